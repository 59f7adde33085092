"""Measure the perplexity of a language tower on a text, to see how pruning and restoring affect plain language."""

import functools
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames='cfg')
def _losses(w: dict, cfg: Any, tokens: Int[Array, 'windows tokens']) -> Float[Array, 'windows predicted']:
    """Return the cross-entropy, in nats, of each token of a window except the first."""
    language = cfg.tower
    # Windows have no pads: every token is valid.
    hidden = language.forward(w, cfg, language.embed_tokens(w, cfg, tokens), jnp.ones(tokens.shape, bool))
    logits = language.head(w, cfg, hidden)
    # The logits at one token predict the next one.
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])


def window_losses(w: dict, cfg: Any, tokens: Int[np.ndarray, ' tokens'], *, window: int = 128) -> list[float]:
    """Return the mean loss per predicted token, in nats, of each window of the text.

    Args:
      w: weights of a decoder-only language tower, with any kind of kernel.
      cfg: the tower's config.
      tokens: the text.
      window: number of tokens that are read together; windows do not overlap. A last, shorter window is left out.

    Raises:
      ValueError: the text is shorter than a window.
    """
    count = len(tokens) // window
    if not count:
        raise ValueError(f'the text has {len(tokens)} tokens, fewer than one window of {window}')
    windows = jnp.asarray(tokens[: count * window], jnp.int32).reshape(count, window)
    return jnp.mean(_losses(w, cfg, windows), axis=1).tolist()


def perplexity(w: dict, cfg: Any, tokens: Int[np.ndarray, ' tokens'], *, window: int = 128) -> float:
    """Return exp(mean loss per predicted token) over windows of the text.

    Args:
      w: see `window_losses`.
      cfg: see `window_losses`.
      tokens: see `window_losses`.
      window: see `window_losses`.

    Raises:
      ValueError: see `window_losses`.
    """
    # Windows have equal lengths, so the mean of their means is the mean over all tokens.
    return float(np.exp(np.mean(window_losses(w, cfg, tokens, window=window))))


def held_out_text() -> str:
    """Return the plain text on which jobs measure perplexity.

    It is the opening of Lewis Carroll's *Alice's Adventures in Wonderland* (1865), in the public domain. It is not used
    for calibration or restoration. Language models were very likely trained on it. So its perplexity can compare
    models, but means nothing in absolute terms.

    >>> held_out_text().startswith('Alice was beginning to get very tired')
    True
    """
    return (resources.files(__package__) / 'heldout.txt').read_text()
