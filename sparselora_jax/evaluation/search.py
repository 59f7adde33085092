"""Greedy and beam search as transformers 5.23's `generate` does them: which beams to keep, and when to stop.

Nothing here knows a model: `start` and `step` see logits only. The tokens of every beam stay in the cache slots where
they were written. The table `ancestry` says which slots belong to which beam, and a model's caches are read through it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PyTree

from sparselora_jax.sparse import sharding

WORST = -1e9  # the score that transformers gives to a beam that must not be chosen


class Settings(NamedTuple):
    """Settings of the search; all fields are arrays, so one compilation serves all penalties and ways to stop.

    Attributes:
      finished_divisors: divisor of a finished beam's summed log-probabilities, by its length (the first is for length
        1).
      running_divisors: divisor of a running beam's summed log-probabilities, by its length, when testing whether it can
        still beat a finished beam.
      stops_early: stop as soon as there are as many finished beams as running ones.
      min_new: minimum number of new tokens before a sequence may end.
      eos: tokens that finish a sequence.
      pad: token that fills the output after the end of a sequence.
      repetition_penalty: makes the tokens that a beam has read or written less likely; None: it does not.
    """

    finished_divisors: Float[Array | np.ndarray, ' new']
    running_divisors: Float[Array | np.ndarray, ' new']
    stops_early: Bool[Array | np.ndarray, '']
    min_new: Int[Array | np.ndarray, '']
    eos: Int[Array | np.ndarray, ' ends']
    pad: Int[Array | np.ndarray, '']
    # None is no array, so a search without a penalty is another program, which does not look for repeated tokens.
    repetition_penalty: Float[Array | np.ndarray, ''] | None = None


class Search(NamedTuple):
    """Running beams, best first, and the best finished beams.

    Attributes:
      tokens: new tokens of the running beams.
      scores: summed log-probabilities of the running beams; 0 in greedy search.
      ancestry: which beam wrote the n-th token of a running beam; -1 where none is written yet.
      finished: new tokens of the finished beams, best first.
      finished_scores: their scores, with the length penalty.
      lengths: their lengths in new tokens; 0 where there is no finished beam yet.
      can_improve: whether a running beam may still replace a finished one.
      is_unfinished: whether to generate another token.
    """

    tokens: Int[Array, 'batch beams new']
    scores: Float[Array, 'batch beams']
    ancestry: Int[Array, 'batch beams new']
    finished: Int[Array, 'batch beams new']
    finished_scores: Float[Array, 'batch beams']
    lengths: Int[Array, 'batch beams']
    can_improve: Bool[Array, 'batch 1']
    is_unfinished: Bool[Array, '']


def make_settings(
    new: int,
    *,
    length_penalty: float,
    early_stopping: bool | str,
    min_new: int,
    eos: tuple[int, ...],
    pad: int,
    repetition_penalty: float = 1.0,
) -> Settings:
    """Build the settings for at most `new` tokens from `generate`'s arguments.

    Args:
      new: maximum number of tokens to generate.
      length_penalty: exponent of the length that a beam's score is divided by.
      early_stopping: True, False or 'never', as in `generate`.
      min_new: minimum number of tokens to generate.
      eos: tokens that finish a sequence.
      pad: token after the end.
      repetition_penalty: see `generate`.

    >>> settings = make_settings(3, length_penalty=-1.0, early_stopping=False, min_new=0, eos=(2,), pad=1)
    >>> settings.finished_divisors.round(2).tolist()
    [1.0, 0.5, 0.33000001311302185]
    """
    finished_divisors = np.asarray(np.arange(1.0, new + 1) ** length_penalty, np.float32)
    running_divisors = finished_divisors
    if early_stopping == 'never' and length_penalty > 0:
        # A positive penalty favours length, so a running beam's best score is the one at its greatest length.
        running_divisors = np.full_like(finished_divisors, finished_divisors[-1])
    return Settings(
        finished_divisors=finished_divisors,
        running_divisors=running_divisors,
        stops_early=np.asarray(np.bool_(early_stopping is True)),
        min_new=np.asarray(np.int32(min_new)),
        eos=np.asarray(eos, np.int32).reshape(-1),  # without end tokens, an empty vector
        pad=np.asarray(np.int32(pad)),
        repetition_penalty=None if repetition_penalty == 1 else np.asarray(np.float32(repetition_penalty)),
    )


def start(settings: Settings, batch: int, beams: int) -> Search:
    """Return the state before the first token.

    All beams are the same prompt, so only the first may be continued: the others start with the worst score.

    Args:
      settings: settings of the search.
      batch: number of prompts.
      beams: number of beams.
    """
    tokens = jnp.full((batch, beams, settings.finished_divisors.shape[0]), settings.pad, jnp.int32)
    worst = jnp.full((batch, beams), WORST, jnp.float32)
    return Search(
        tokens=tokens,
        scores=worst.at[:, 0].set(0.0),
        ancestry=jnp.full_like(tokens, -1),
        finished=tokens,
        finished_scores=worst,
        lengths=jnp.zeros((batch, beams), jnp.int32),
        can_improve=jnp.ones((batch, 1), bool),
        is_unfinished=jnp.ones((), bool),
    )


def step(
    settings: Settings,
    state: Search,
    index: Int[Array, ''],
    logits: Float[Array, 'batch beams vocab'],
    *,
    read: Bool[Array, 'batch vocab'] | None = None,
    mesh: Mesh | None = None,
) -> Search:
    """Choose the next token of every beam; with one beam, greedily.

    Args:
      settings: settings of the search.
      state: the state before this token.
      index: number of the token, from 0.
      logits: logits of the token, in fp32.
      read: which tokens the prompt has; only a repetition penalty needs it.
      mesh: the mesh of `decode`.
    """
    is_greedy = logits.shape[1] == 1
    is_end = jnp.zeros(logits.shape[-1], bool).at[settings.eos].set(True)
    # As in transformers, probabilities are normalised before any token is forbidden.
    scores = logits if is_greedy else jax.nn.log_softmax(logits, axis=-1)
    if settings.repetition_penalty is not None:
        scores = _penalise_repetition(settings.repetition_penalty, state, index, scores, read)
    scores = jnp.where(is_end & (index < settings.min_new), -jnp.inf, scores)
    if is_greedy:
        return _greedy_step(settings, state, index, scores, is_end)
    return _beam_step(settings, state, index, scores, is_end, functools.partial(sharding.top_k, mesh=mesh))


def _penalise_repetition(
    penalty: Float[Array, ''],
    state: Search,
    index: Int[Array, ''],
    scores: Float[Array, 'batch beams vocab'],
    read: Bool[Array, 'batch vocab'],
) -> Float[Array, 'batch beams vocab']:
    """Return scores in which those of tokens that a beam has read or written are worse (CTRL, arXiv 1909.05858).

    Args:
      penalty: what a score is divided by; a score below 0 is multiplied, since division would make it better.
      state: the state before this token.
      index: number of the token, from 0.
      scores: logits in greedy search, log-probabilities otherwise, as in transformers.
      read: which tokens the prompt has.
    """
    batch, beams, vocab = scores.shape
    is_written = jnp.arange(state.tokens.shape[-1]) < index
    # Places that hold no token yet get a number outside the vocabulary, which is dropped.
    tokens = jnp.where(is_written, state.tokens, vocab)
    rows = jnp.arange(batch)[:, None, None]
    columns = jnp.arange(beams)[:, None]
    repeats = jnp.zeros(scores.shape, bool).at[rows, columns, tokens].set(True, mode='drop') | read[:, None]
    worse = jnp.where(scores < 0, scores * penalty, scores / penalty)
    return jnp.where(repeats, worse, scores)


def _greedy_step(
    settings: Settings,
    state: Search,
    index: Int[Array, ''],
    scores: Float[Array, 'batch 1 vocab'],
    is_end: Bool[Array, ' vocab'],
) -> Search:
    """Take the most likely token of each row; rows that have ended get pads."""
    is_last = index == settings.finished_divisors.shape[0] - 1
    has_ended = state.lengths > 0
    # No log-probabilities are needed: the largest logit also has the largest log-probability.
    token = jnp.where(has_ended, settings.pad, jnp.argmax(scores, axis=-1).astype(jnp.int32))
    tokens = _write(state.tokens, token, index)
    lengths = jnp.where(~has_ended & (is_end[token] | is_last), index + 1, state.lengths)
    return state._replace(
        tokens=tokens,
        ancestry=_write(state.ancestry, jnp.zeros_like(token), index),
        finished=tokens,
        lengths=lengths,
        is_unfinished=jnp.any(lengths == 0),
    )


def _beam_step(
    settings: Settings,
    state: Search,
    index: Int[Array, ''],
    scores: Float[Array, 'batch beams vocab'],
    is_end: Bool[Array, ' vocab'],
    top_k: Callable,
) -> Search:
    """Extend the beams by the best candidates that do not end, and merge those that end into the finished beams."""
    batch, beams, vocab = scores.shape
    is_last = index == settings.finished_divisors.shape[0] - 1

    # A beam has as many ending candidates as there are end tokens. Even if all of them are among the best, `beams`
    # candidates that continue remain.
    candidates = max(2, 1 + settings.eos.shape[0]) * beams
    # All beams of a batch item compete: [batch, beams, vocab] -> [batch, beams * vocab].
    scores, best = top_k((scores + state.scores[..., None]).reshape(batch, -1), candidates)
    tokens, ancestry = _pick((state.tokens, state.ancestry), best // vocab)
    token = (best % vocab).astype(jnp.int32)
    tokens = _write(tokens, token, index)
    ends = is_end[token] | is_last

    # The running beams: the best candidates that do not end.
    running_scores, chosen = top_k(scores + jnp.where(ends, WORST, 0.0), beams)
    running, ancestry = _pick((tokens, ancestry), chosen)
    ancestry = _write(ancestry, jnp.broadcast_to(jnp.arange(beams), (batch, beams)), index)

    # The finished beams: an ending candidate joins them if it is among the first `beams` and its batch item is still
    # open. All others get the worst score.
    finishes = ends & (jnp.arange(candidates) < beams)
    is_closed = ~state.can_improve | (settings.stops_early & jnp.all(state.lengths > 0, axis=1, keepdims=True))
    scores = scores / settings.finished_divisors[index] + jnp.where(is_closed, WORST, 0.0)
    scores = scores + jnp.where(finishes, 0.0, WORST)
    scores, chosen = top_k(jnp.concatenate([state.finished_scores, scores], axis=1), beams)
    finished = jnp.concatenate([state.finished, tokens], axis=1)
    lengths = jnp.concatenate([state.lengths, jnp.where(finishes, index + 1, 0)], axis=1)
    finished, lengths = _pick((finished, lengths), chosen)

    # Continue while the best running beam may still beat the worst finished one.
    worst_finished = jnp.where(lengths > 0, jnp.min(scores, axis=1, keepdims=True), WORST)
    best_possible = running_scores[:, :1] / settings.running_divisors[index]
    can_improve = state.can_improve & jnp.any(best_possible > worst_finished, axis=1, keepdims=True)
    return Search(
        tokens=running,
        scores=running_scores,
        ancestry=ancestry,
        finished=finished,
        finished_scores=scores,
        lengths=lengths,
        can_improve=can_improve,
        is_unfinished=jnp.any(can_improve) & ~(settings.stops_early & jnp.all(lengths > 0)) & ~jnp.all(ends),
    )


def _write(
    tokens: Int[Array, 'batch beams new'], token: Int[Array, 'batch beams'], index: Int[Array, '']
) -> Int[Array, 'batch beams new']:
    """Return `tokens` with `token` at place `index` of every beam."""
    return jax.lax.dynamic_update_slice_in_dim(tokens, token[..., None].astype(tokens.dtype), index, axis=2)


def _pick(tree: PyTree, indices: Int[Array, 'batch picked']) -> PyTree:
    """Pick beams (axis 1) from every array of a tree."""

    def pick(leaf):
        # Indices have two axes. `take_along_axis` needs as many as the array has.
        return jnp.take_along_axis(leaf, indices.reshape(*indices.shape, *[1] * (leaf.ndim - 2)), axis=1)

    return jax.tree.map(pick, tree)
