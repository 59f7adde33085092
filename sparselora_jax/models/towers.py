"""Towers: the protocols of vision encoders and language models, and the registries of their modules.

A tower is a module of pure functions with a frozen config: `embed`, `block`, `finish`, and a `forward` that passes the
stacked blocks to a runner (`models.runners`). Each module registers itself here under transformers' `model_type`, and
each config returns its module as `cfg.tower`. So only a tower's own file checks which kind of tower it is.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from sparselora_jax.models import key_table, layers
from sparselora_jax.models.config import HfConfig, LanguageConfig, VisionConfig
from sparselora_jax.models.key_table import Keys
from sparselora_jax.models.runners import Runner
from sparselora_jax.runtime.errors import UnsupportedModelError
from sparselora_jax.runtime.registry import Registry


@runtime_checkable
class LanguageTower(Protocol):
    """A language model, such as LLaMA, OPT or T5. A module with functions of these names satisfies the protocol.

    Weights `w` are params of the tower, or its weights from `bind`. A decoder-only tower also has `forward`
    (`DecoderTower`), an encoder-decoder has `encode` and `decode` (`EncoderDecoderTower`).

    Attributes:
      is_encoder_decoder: whether an encoder reads the prompt, and a decoder writes the answer.
      overflows_in_float16: path prefixes of stacks whose hidden states exceed float16's range.
    """

    is_encoder_decoder: bool
    overflows_in_float16: Sequence[str]

    def from_hf(self, hf: HfConfig) -> LanguageConfig:
        """Convert a transformers config; raise an error if a field's value is not supported."""

    def shapes(self, cfg: LanguageConfig) -> dict:
        """Return the shape of every parameter, as a params tree of tuples."""

    def keys(self, cfg: LanguageConfig) -> Keys:
        """Return the key table: our paths -> transformers' names within this kind of model."""

    def key_prefix(self, model: str, head: str) -> str:
        """Return the prefix of the names from `keys` in a whole model; for `model` and `head` see `language_keys`."""

    def embed_copies(self, own: str) -> list[str]:
        """Return the names of copies of the word embedding `own` that a file may contain."""

    def likely_tied(self, cfg: LanguageConfig) -> bool:
        """Return whether the head of published files is probably the word embedding, judging by their config."""

    def embed_tokens(self, w: dict, cfg: LanguageConfig, tokens: Int[Array, '...']) -> Float[Array, '... dim']:
        """Return word embeddings."""

    def embed(self, w: dict, cfg: LanguageConfig, x: Float[Array, '...'], view: layers.View) -> tuple[Array, dict]:
        """Return the input of the blocks and their `ctx`, from word embeddings."""

    def block(
        self, w: dict, cfg: LanguageConfig, x: Float[Array, '...'], ctx: dict, cache: PyTree
    ) -> tuple[Array, PyTree]:
        """Run one block (of the decoder), see `runners.Block`."""

    def finish(self, w: dict, cfg: LanguageConfig, x: Float[Array, '...']) -> Float[Array, '...']:
        """Return the input of the head, from the output of the last block."""

    def head(self, w: dict, cfg: LanguageConfig, hidden: Float[Array, '...']) -> Float[Array, '... vocab']:
        """Return logits in fp32."""


@runtime_checkable
class DecoderTower(LanguageTower, Protocol):
    """A decoder-only language model."""

    def forward(
        self,
        w: dict,
        cfg: LanguageConfig,
        x: Float[Array, 'batch tokens words'],
        valid: Bool[Array, 'batch tokens'],
        run: Runner,
        *,
        prefix: Bool[Array, 'batch tokens'] | None,
    ) -> Float[Array, 'batch tokens dim']:
        """Run the whole tower over word embeddings; tokens of `prefix` attend to each other in both directions."""

    def caches(self, cfg: LanguageConfig, batch: int, slots: int, dtype: DTypeLike) -> tuple:
        """Return empty key/value caches of every layer."""


@runtime_checkable
class EncoderDecoderTower(LanguageTower, Protocol):
    """A language model with an encoder and a decoder; `embed`, `block` and `finish` belong to the decoder."""

    def encode(
        self, w: dict, cfg: LanguageConfig, x: Float[Array, '...'], valid: Bool[Array, '...'], run: Runner
    ) -> Float[Array, '...']:
        """Run the encoder over word embeddings."""

    def decode(
        self,
        w: dict,
        cfg: LanguageConfig,
        tokens: Int[Array, 'batch tokens'],
        valid: Bool[Array, 'batch tokens'],
        encoded: Float[Array, 'batch encoded dim'],
        encoded_valid: Bool[Array, 'batch encoded'],
        run: Runner,
    ) -> Float[Array, 'batch tokens dim']:
        """Run the decoder over tokens."""

    def reading(self, encoded_valid: Bool[Array, '...'], encoded: Float[Array, '...'] | None = None) -> dict:
        """Return the encoder's part of the `ctx` of the decoder's blocks."""

    def caches(self, w: dict, cfg: LanguageConfig, encoded: Float[Array, '...'], slots: int, dtype: DTypeLike) -> tuple:
        """Return the cache of every decoder layer, with the keys and values of the encoder's output."""


@runtime_checkable
class VisionTower(Protocol):
    """A vision encoder. A module with functions of these names satisfies the protocol."""

    def from_hf(self, hf: HfConfig, *, layer: int | None = None, drop_first: bool = False) -> VisionConfig:
        """Convert a transformers config; raise an error if a field's value is not supported.

        `layer` selects one of torch's `hidden_states` as output (None: the tower's own output), and `drop_first` drops
        its first token.
        """

    def shapes(self, cfg: VisionConfig) -> dict:
        """Return the shape of every parameter, as a params tree of tuples."""

    def keys(self, cfg: VisionConfig) -> Keys:
        """Return the key table: our paths -> transformers' names within this kind of model."""

    def forward(
        self, w: dict, cfg: VisionConfig, images: Float[Array, 'batch 3 height width'], run: Runner
    ) -> Float[Array, 'batch tokens dim']:
        """Run the tower over normalised images."""

    def unread(self, hf: HfConfig, cfg: VisionConfig) -> dict[str, int]:
        """Return the numbers of parameters in published files that this config does not use, by description."""


# Keys are the `model_type` of transformers' text config and vision config.
LANGUAGE_TOWERS: Registry[LanguageTower] = Registry('language model')
VISION_TOWERS: Registry[VisionTower] = Registry('vision model')


def language_from_hf(hf: HfConfig) -> LanguageConfig:
    """Convert the config of a language model.

    Args:
      hf: the transformers config of it.

    Returns:
      The config of its tower.

    Raises:
      UnsupportedModelError: no tower is registered for its `model_type`, or a field's value is not supported.
    """
    if hf.model_type not in LANGUAGE_TOWERS:
        known = ', '.join(LANGUAGE_TOWERS)
        raise UnsupportedModelError(f'language model {hf.model_type!r}: expected one of {known}')
    return LANGUAGE_TOWERS.find(hf.model_type).from_hf(hf)


def vision_from_hf(hf: HfConfig, *, layer: int | None = None, drop_first: bool = False) -> VisionConfig:
    """Convert the config of a vision model.

    Args:
      hf: the transformers config of it.
      layer: index of torch's `hidden_states` to output; None: the tower's own output.
      drop_first: whether to drop the first token of the output.

    Returns:
      The config of its tower.

    Raises:
      UnsupportedModelError: no tower is registered for its `model_type`, or a field's value is not supported.
    """
    if hf.model_type not in VISION_TOWERS:
        known = ', '.join(VISION_TOWERS)
        raise UnsupportedModelError(f'vision model {hf.model_type!r}: expected one of {known}')
    return VISION_TOWERS.find(hf.model_type).from_hf(hf, layer=layer, drop_first=drop_first)


def language_keys(cfg: LanguageConfig, model: str, head: str) -> Keys:
    """Return the key table of a language tower, with its paths under `language/`.

    Args:
      cfg: the tower's config.
      model: the prefix of transformers' model without its head, e.g. 'model.'.
      head: the prefix of the head's name, and of T5's embedding and stacks.
    """
    tower = cfg.tower
    # transformers nests towers differently: LLaMA is the model, OPT is the model's decoder, T5 has no such module.
    table = key_table.nested(tower.keys(cfg), 'language/', tower.key_prefix(model, head))
    # A tied head is not a separate parameter. `checkpoints.layout` handles files that contain one anyway.
    if 'head' in tower.shapes(cfg):
        table['language/head/kernel'] = f'{head}lm_head.weight'
    return table


def check_dtypes(dtypes: Mapping[str, np.dtype]) -> None:
    """Check that no weight will be loaded in a dtype in which its tower overflows.

    Args:
      dtypes: path in the whole model -> dtype of the weight.

    Raises:
      UnsupportedModelError: a stack would be loaded in float16, but its hidden states exceed float16's range.
    """
    # These stacks are recognised by path alone, since code that reads single layers from disk has no config.
    overflowing = tuple(
        {prefix for name in LANGUAGE_TOWERS for prefix in LANGUAGE_TOWERS.find(name).overflows_in_float16}
    )
    for path, dtype in dtypes.items():
        if dtype == jnp.float16 and path.startswith(overflowing):
            raise UnsupportedModelError(
                f'{path} in float16, in which its hidden states overflow (torch keeps parts of it in float32): '
                'load as float32 or bfloat16'
            )
