"""Builds the input of a language tower: word embeddings, in which soft words replace the image tokens."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.models import layers
from sparselora_jax.models.config import FamilyConfig, ImageConfig
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import BatchError


class Prompt(NamedTuple):
    """A language tower's input.

    Attributes:
      x: word embeddings and soft words.
      valid: False marks a pad.
      prefix: tokens that attend to each other in both directions (PaliGemma's prompt); None: attention is causal.
    """

    x: Float[Array, 'batch tokens dim']
    valid: Bool[Array, 'batch tokens']
    prefix: Bool[Array, 'batch tokens'] | None = None


def embed_words(w: dict, cfg: FamilyConfig, batch: Mapping[str, Array]) -> Prompt:
    """Return a prompt without an image.

    Args:
      w: params of a whole model.
      cfg: the family's config.
      batch: `input_ids` and `attention_mask`, see `models.model`.
    """
    words = cfg.language.tower.embed_tokens(w['language'], cfg.language, batch['input_ids'])
    return Prompt(words, batch['attention_mask'].astype(bool))


def embed_words_and_image(
    w: dict,
    cfg: ImageConfig,
    batch: Mapping[str, Array],
    soft_words: Callable[[dict], Float[Array, 'batch soft dim']],
) -> Prompt:
    """Return a prompt in which an image's soft words replace its image tokens.

    Args:
      w: params of a whole model.
      cfg: the family's config.
      batch: `pixel_values`, `input_ids` and `attention_mask`, with one image per row; see `models.model`.
      soft_words: computes the soft words from the batch.

    Raises:
      BatchError: there is not one image per row; outside jit, where values are known, see also `check_image_tokens`.
    """
    tokens = batch['input_ids']
    mask = batch['attention_mask'].astype(bool)
    images = batch['pixel_values']
    if images.shape[0] != tokens.shape[0]:
        raise BatchError(f'{images.shape[0]} pixel_values for {tokens.shape[0]} input_ids: expected one image per row')
    if not isinstance(tokens, jax.core.Tracer):  # values are unknown under jit
        check_image_tokens(cfg, tokens, mask)
    is_image = tokens == cfg.image_token
    # The image token may be outside the vocabulary (PaliGemma's first configs). So it is looked up as token 0, and then
    # replaced.
    words = cfg.language.tower.embed_tokens(w['language'], cfg.language, jnp.where(is_image, 0, tokens))
    # The vision tower computes in the dtype of the language model's weights.
    soft = soft_words({**batch, 'pixel_values': images.astype(words.dtype)})
    return Prompt(layers.scatter_images(words, soft, is_image), mask)


def check_ids(cfg: FamilyConfig, batch: Mapping[str, Array | np.ndarray]) -> None:
    """Check that every token is in its vocabulary, since a lookup would silently return another token's embedding.

    The image token is not looked up, so it may be outside. Under jit values are unknown, and nothing is checked.

    Args:
      cfg: the family's config, which gives the arrays of tokens and their vocabularies.
      batch: see `models.model`.

    Raises:
      BatchError: a token is outside its vocabulary; names the row.
    """
    image_token = getattr(cfg, 'image_token', None)  # a family without images has none
    for name, vocab in cfg.family.vocabularies(cfg).items():
        ids = batch.get(name)
        if ids is None or isinstance(ids, jax.core.Tracer):
            continue
        ids = processes.on_host(ids)  # the whole array, even if other processes hold parts of it
        is_wrong = (ids < 0) | (ids >= vocab)
        if name == 'input_ids' and image_token is not None:
            is_wrong &= ids != image_token
        if is_wrong.any():
            # One row is enough for the error, since a wrong tokenizer makes nearly all rows wrong.
            row, column = np.argwhere(is_wrong)[0]
            raise BatchError(
                f"row {row} of {name} has {ids[row, column]}: expected 0 to {vocab - 1}, the ids of the model's "
                'vocabulary; use its own tokenizer'
            )


def check_image_tokens(
    cfg: ImageConfig, tokens: Int[Array | np.ndarray, 'batch tokens'], mask: Array | np.ndarray
) -> None:
    """Check that every row has one image token for each soft word, except rows of only pads.

    Args:
      cfg: the family's config.
      tokens: `input_ids`.
      mask: `attention_mask`.

    Raises:
      BatchError: a row has another number of image tokens.
    """
    # A row of only pads is not an example, so it needs no image.
    counts = (processes.on_host(tokens) == cfg.image_token).sum(axis=1)
    wrong = np.flatnonzero((counts != cfg.image_tokens) & processes.on_host(mask).any(axis=1))
    if wrong.size:
        row = wrong[0]
        raise BatchError(
            f'row {row} of input_ids has {counts[row]} image tokens ({cfg.image_token}): '
            f'expected {cfg.image_tokens}, one for each soft word of an image'
        )
