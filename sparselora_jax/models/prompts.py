"""What a language tower reads: word embeddings, with the soft words of an image in the places of its image tokens."""

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
    """Return a prompt of words alone.

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
    """Return a prompt of words, with an image's soft words in the places of its image tokens.

    Args:
      w: params of a whole model.
      cfg: the family's config.
      batch: `pixel_values`, `input_ids` and `attention_mask`, one image a row; see `models.model`.
      soft_words: computes them from the batch.

    Raises:
      BatchError: not one image a row, or (where values are known: not under jit) see `check_image_tokens`.
    """
    tokens = batch['input_ids']
    mask = batch['attention_mask'].astype(bool)
    images = batch['pixel_values']
    if images.shape[0] != tokens.shape[0]:
        raise BatchError(f'{images.shape[0]} pixel_values for {tokens.shape[0]} input_ids: expected one image a row')
    if not isinstance(tokens, jax.core.Tracer):  # under jit no value is known
        check_image_tokens(cfg, tokens, mask)
    is_image = tokens == cfg.image_token
    # A token that stands for an image may lie outside the vocabulary (PaliGemma's first configs), so it is looked up
    # as word 0 and then replaced.
    words = cfg.language.tower.embed_tokens(w['language'], cfg.language, jnp.where(is_image, 0, tokens))
    # The vision tower computes in the dtype of the language model's weights.
    soft = soft_words({**batch, 'pixel_values': images.astype(words.dtype)})
    return Prompt(layers.scatter_images(words, soft, is_image), mask)


def check_ids(cfg: FamilyConfig, batch: Mapping[str, Array | np.ndarray]) -> None:
    """Check that every token lies in its vocabulary: a lookup would silently return another word's embedding.

    The token that stands for an image is not looked up and may lie outside. Under jit no value is known, and nothing
    is checked.

    Args:
      cfg: the family's config, which says which arrays hold tokens of which vocabulary.
      batch: see `models.model`.

    Raises:
      BatchError: a token outside its vocabulary, with its row.
    """
    image_token = getattr(cfg, 'image_token', None)  # a language model alone has none
    for name, vocab in cfg.family.vocabularies(cfg).items():
        ids = batch.get(name)
        if ids is None or isinstance(ids, jax.core.Tracer):
            continue
        ids = processes.on_host(ids)  # all of them, also of an array that lies on other processes
        is_wrong = (ids < 0) | (ids >= vocab)
        if name == 'input_ids' and image_token is not None:
            is_wrong &= ids != image_token
        if is_wrong.any():
            # One row is enough for the error: a wrong tokenizer makes nearly all of them wrong.
            row, column = np.argwhere(is_wrong)[0]
            raise BatchError(
                f"row {row} of {name} has {ids[row, column]}: expected 0 to {vocab - 1}, the ids of the model's "
                'vocabulary; use its own tokenizer'
            )


def check_image_tokens(
    cfg: ImageConfig, tokens: Int[Array | np.ndarray, 'batch tokens'], mask: Array | np.ndarray
) -> None:
    """Check that every row has one image token for each soft word; rows of nothing but pads need none.

    Args:
      cfg: the family's config.
      tokens: `input_ids`.
      mask: `attention_mask`.

    Raises:
      BatchError: a row with another number of image tokens.
    """
    # A row without any word stands for no example, so it needs no image.
    counts = (processes.on_host(tokens) == cfg.image_token).sum(axis=1)
    wrong = np.flatnonzero((counts != cfg.image_tokens) & processes.on_host(mask).any(axis=1))
    if wrong.size:
        row = wrong[0]
        raise BatchError(
            f'row {row} of input_ids has {counts[row]} image tokens ({cfg.image_token}): '
            f'expected {cfg.image_tokens}, one for each soft word of an image'
        )
