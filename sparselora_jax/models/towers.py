"""Which module runs a language tower, by the class of its config; and what a tower is given to read."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparselora_jax.models import keys as names
from sparselora_jax.models import layers, llama, opt, t5
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import BatchError, UnsupportedModelError


class Prompt(NamedTuple):
    """A language tower's input.

    `prefix`: tokens that read each other both ways (PaliGemma's prompt); None: attention is causal.
    """

    x: Float[Array, 'batch tokens dim']
    valid: Bool[Array, 'batch tokens']
    prefix: Bool[Array, 'batch tokens'] | None = None


LANGUAGE: dict[type, ModuleType] = {llama.LlamaConfig: llama, opt.OptConfig: opt, t5.T5Config: t5}
MODEL_TYPES: dict[str, ModuleType] = {  # by transformers' model_type
    'llama': llama,
    'mistral': llama,
    'gemma': llama,
    'opt': opt,
    't5': t5,
}


def language(cfg: Any) -> ModuleType:
    """The module of a language tower's config."""
    return LANGUAGE[type(cfg)]


def embed_tokens(w: dict, cfg: Any, tokens: Any) -> Float[Array, 'batch tokens dim']:
    """Word embeddings of whatever language tower it is."""
    return language(cfg).embed_tokens(w, cfg, tokens)


def shapes(cfg: Any) -> dict:
    """The shape of every parameter of a language tower."""
    return language(cfg).shapes(cfg)


def keys(cfg: Any, model: str, head: str) -> names.Keys:
    """The key table of a language tower, its paths under `language/`.

    Args:
      model: the prefix of transformers' model without its head, e.g. 'model.'.
      head: the prefix of the head's name, and of T5's embedding and stacks.
    """
    module = language(cfg)
    prefix = {opt: f'{model}decoder.', t5: head}.get(module, model)
    table = names.nested(module.keys(cfg), 'language/', prefix)
    untied = 'head' in shapes(cfg)
    return table | ({'language/head/kernel': f'{head}lm_head.weight'} if untied else {})


def from_hf(hf: Any) -> Any:
    """The config of a language tower from transformers' config of it.

    Raises:
      UnsupportedModelError: no module here runs that kind, or a field's value is not supported.
    """
    if hf.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(f'language model {hf.model_type!r}: expected one of {", ".join(MODEL_TYPES)}')
    return MODEL_TYPES[hf.model_type].from_hf(hf)


def check_dtypes(dtypes: dict[str, Any]) -> None:
    """Raises `UnsupportedModelError` if a T5's weights, by path, are to be float16: its hidden states outgrow that."""
    half = [path for path, dtype in dtypes.items() if dtype == jnp.float16]
    if t5s := [path for path in half if path.startswith(('language/encoder/', 'language/decoder/'))]:
        raise UnsupportedModelError(
            f'{t5s[0]} in float16, in which a T5 overflows (torch keeps parts of it in float32): '
            'load as float32 or bfloat16'
        )


def check_ids(cfg: Any, batch: dict) -> None:
    """Raises `BatchError` if a token is none of its vocabulary: a lookup would give it another one's embedding.

    The token that stands for an image is not looked up and may lie outside. Under jit nothing is known, nor checked.
    """
    words, image = cfg.language.vocab, getattr(cfg, 'image_token', None)
    tables = {'input_ids': words, 'decoder_input_ids': words}
    tables['qformer_input_ids'] = getattr(getattr(cfg, 'qformer', None), 'vocab', 0)  # 0: they are not read
    for name, vocab in tables.items():
        ids = batch.get(name)
        if ids is None or not vocab or isinstance(ids, jax.core.Tracer):
            continue
        ids = processes.on_host(ids)
        wrong = (ids < 0) | (ids >= vocab)
        if name == 'input_ids' and image is not None:
            wrong &= ids != image
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise BatchError(
                f"row {row} of {name} has {ids[row, column]}: expected 0 to {vocab - 1}, the ids of the model's "
                'vocabulary; use its own tokenizer'
            )


def check_image_tokens(cfg: Any, tokens: Any, mask: Any) -> None:
    """Raises `BatchError` unless every row, but those of nothing but pads, has one image token a soft word."""
    counts = (processes.on_host(tokens) == cfg.image_token).sum(axis=1)
    wrong = np.flatnonzero((counts != cfg.image_tokens) & processes.on_host(mask).any(axis=1))
    if wrong.size:
        found = f'row {wrong[0]} of input_ids has {counts[wrong[0]]} image tokens ({cfg.image_token})'
        raise BatchError(f'{found}: expected {cfg.image_tokens}, one for each soft word of an image')


def prompt(w: dict, cfg: Any, batch: dict, soft_words: Callable[[dict], Array]) -> Prompt:
    """Word embeddings, with an image's soft words in the places of its image tokens.

    Args:
      w: params of a whole model.
      cfg: its config: `language` and `image_token` are read.
      batch: see `models.model`; one image a row.
      soft_words: what makes them of such a batch.

    Raises:
      BatchError: not one image a row, or (where values are known: not under jit) see `check_image_tokens`.
    """
    tokens, mask = batch['input_ids'], batch['attention_mask'].astype(bool)
    if (images := batch['pixel_values']).shape[0] != tokens.shape[0]:
        raise BatchError(f'{images.shape[0]} pixel_values for {tokens.shape[0]} input_ids: expected one image a row')
    if not isinstance(tokens, jax.core.Tracer):
        check_image_tokens(cfg, tokens, mask)
    here = tokens == cfg.image_token
    # A token that stands for an image may lie outside the vocabulary (PaliGemma's first configs).
    words = embed_tokens(w['language'], cfg.language, jnp.where(here, 0, tokens))
    soft = soft_words(batch | {'pixel_values': images.astype(words.dtype)})
    return Prompt(layers.scatter_images(words, soft, here), mask)
