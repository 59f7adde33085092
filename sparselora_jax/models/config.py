"""The common fields of configs: of transformers, of towers and of families.

Each tower and each family has its own frozen dataclass with more fields. The protocols here list the fields that other
modules read.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # both modules import these protocols
    from sparselora_jax.models.family import Family
    from sparselora_jax.models.towers import LanguageTower, VisionTower


@runtime_checkable
class HfConfig(Protocol):
    """A transformers config, whose fields are read by name.

    It replaces the type `transformers.PretrainedConfig`, so that importing the package does not import transformers.
    """

    model_type: str


@runtime_checkable
class LanguageConfig(Protocol):
    """The fields of every language tower's config; towers add their own."""

    @property
    def vocab(self) -> int:
        """Return the vocabulary size."""

    @property
    def width(self) -> int:
        """Return the size of a hidden state."""

    @property
    def tied(self) -> bool:
        """Return whether the head is the word embedding."""

    @property
    def longest(self) -> int | None:
        """Return the maximum number of tokens in a text, including pads; None: no maximum."""

    @property
    def tower(self) -> 'LanguageTower':
        """Return the module that implements the tower."""


@runtime_checkable
class VisionConfig(Protocol):
    """The fields of every vision tower's config; towers add their own."""

    @property
    def image_size(self) -> int:
        """Return the side of the square input images, in pixels."""

    @property
    def width(self) -> int:
        """Return the size of a hidden state."""

    @property
    def output_tokens(self) -> int:
        """Return the number of hidden states that it outputs for each image."""

    @property
    def tower(self) -> 'VisionTower':
        """Return the module that implements the tower."""


# The fields of a family's config are its towers' configs, under the towers' names in params.
@runtime_checkable
class FamilyConfig(Protocol):
    """The fields of every family's config; families add their own."""

    @property
    def language(self) -> LanguageConfig | None:
        """Return the language tower's config; None: the models compare images with texts, and generate no text."""

    @property
    def family(self) -> 'Family':
        """Return the family of this config."""


@runtime_checkable
class ImageConfig(FamilyConfig, Protocol):
    """The fields of a family that reads images."""

    @property
    def vision(self) -> VisionConfig:
        """Return the vision tower's config."""

    @property
    def image_token(self) -> int:
        """Return the token that stands for one soft word of an image."""

    @property
    def image_tokens(self) -> int:
        """Return the number of soft words of an image."""
