"""Perplexity of a language tower on a text: what pruning and restoring do to plain language."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int


@functools.partial(jax.jit, static_argnames='cfg')
def _losses(w, cfg, tokens):
    language = cfg.tower
    hidden = language.forward(w, cfg, language.embed_tokens(w, cfg, tokens), jnp.ones(tokens.shape, bool))
    logits = language.head(w, cfg, hidden)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


def perplexity(w: dict, cfg: Any, tokens: Int[np.ndarray, ' tokens'], *, window: int = 128) -> float:
    """exp(mean loss per predicted token) over windows of `window` tokens; a last, shorter window is left out.

    Args:
      w: weights of a decoder-only language tower (any kind of kernel).

    Raises:
      ValueError: fewer tokens than a window.
    """
    count = len(tokens) // window
    if not count:
        raise ValueError(f'the text has {len(tokens)} tokens, fewer than one window of {window}')
    windows = jnp.asarray(tokens[: count * window], jnp.int32).reshape(count, window)
    return float(jnp.exp(jnp.mean(_losses(w, cfg, windows))))
