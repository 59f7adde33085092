"""The fields that configs have in common: those of transformers, of towers and of families.

Each tower and each family has a frozen dataclass of its own with more fields. The protocols here name what others read.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # both build on these protocols
    from sparselora_jax.models.family import Family
    from sparselora_jax.models.towers import LanguageTower, VisionTower


@runtime_checkable
class HfConfig(Protocol):
    """A config of transformers, whose fields are read by name.

    This stands for `transformers.PretrainedConfig`, so that importing the package does not import transformers.
    """

    model_type: str


@runtime_checkable
class LanguageConfig(Protocol):
    """The fields that every language tower's config has; towers add their own."""

    @property
    def vocab(self) -> int:
        """Return the number of words."""

    @property
    def width(self) -> int:
        """Return the size of a hidden state."""

    @property
    def tied(self) -> bool:
        """Return whether the head is the word embedding."""

    @property
    def longest(self) -> int | None:
        """Return how many tokens a text may have, pads included; None: any number."""

    @property
    def tower(self) -> 'LanguageTower':
        """Return the module that runs this config."""


@runtime_checkable
class VisionConfig(Protocol):
    """The fields that every vision tower's config has; towers add their own."""

    @property
    def image_size(self) -> int:
        """Return the pixels a side of the images it reads."""

    @property
    def width(self) -> int:
        """Return the size of a hidden state."""

    @property
    def output_tokens(self) -> int:
        """Return how many hidden states it hands on for each image."""

    @property
    def tower(self) -> 'VisionTower':
        """Return the module that runs this config."""


# A family's config holds its towers' configs as fields, under the names of the towers in params.
@runtime_checkable
class FamilyConfig(Protocol):
    """The fields that every family's config has; families add their own."""

    @property
    def language(self) -> LanguageConfig:
        """Return the language tower's config."""

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
        """Return how many soft words an image has."""
