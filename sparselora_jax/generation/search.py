"""What greedy and beam search keep of each step, and when they stop: the rules of transformers 5.23's `generate`.

Nothing here knows a model: `start` and `step` see logits only. `ancestry` is what a model's caches are read through:
the tokens of every beam stay where they were written, and a table says which of them belong to whom.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

WORST = -1e9  # transformers' score of what must not be chosen; sums with it are rounded there as here


class Settings(NamedTuple):
    """How to search; hashable, so that a jitted function may take it as a static argument.

    Attributes:
      beams: 1 is greedy search.
      new: the most tokens to generate; `min_new`: those before it are no `eos`.
      length_penalty: a finished beam scores its summed log-probabilities / length ** length_penalty.
      early_stopping: True: stop at `beams` finished ones; False or 'never': when no running one can do better, by the
        score it would have now, or at its best length.
      eos: tokens that finish a sequence.
      pad: what follows it in the output.
    """

    beams: int
    new: int
    min_new: int
    length_penalty: float
    early_stopping: bool | str
    eos: tuple[int, ...]
    pad: int


class Search(NamedTuple):
    """Running beams, best first, and the best finished ones.

    Attributes:
      scores: summed log-probabilities; greedy: 0.
      ancestry: the beam that wrote the n-th token of this one, -1 where none was written yet.
      lengths: of the finished sequences; 0: there is none yet. Greedy finishes in place.
      improvable: whether a running beam may still replace a finished one.
      unfinished: whether to go on.
    """

    tokens: Int[Array, 'batch beams new']
    scores: Float[Array, 'batch beams']
    ancestry: Int[Array, 'batch beams new']
    finished: Int[Array, 'batch beams new']
    finished_scores: Float[Array, 'batch beams']
    lengths: Int[Array, 'batch beams']
    improvable: Bool[Array, 'batch 1']
    unfinished: Bool[Array, '']


def start(settings: Settings, batch: int) -> Search:
    """Before the first token. All beams are the same prompt, so that only the first may be continued."""
    shape = (batch, settings.beams)
    tokens = jnp.full((*shape, settings.new), settings.pad, jnp.int32)
    return Search(
        tokens=tokens,
        scores=jnp.full(shape, WORST, jnp.float32).at[:, 0].set(0.0),
        ancestry=jnp.full_like(tokens, -1),
        finished=tokens,
        finished_scores=jnp.full(shape, WORST, jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        improvable=jnp.ones((batch, 1), bool),
        unfinished=jnp.ones((), bool),
    )


def step(settings: Settings, state: Search, index: Int[Array, ''], logits: Float[Array, 'batch beams vocab']) -> Search:
    """Chooses the token number `index` (from 0) of every beam."""
    ends = jnp.zeros(logits.shape[-1], bool).at[np.array(settings.eos, np.int32)].set(True)
    # Processors see log-probabilities in a beam search and logits in a greedy one.
    scores = logits if settings.beams == 1 else jax.nn.log_softmax(logits, axis=-1)
    scores = jnp.where(ends & (index < settings.min_new), -jnp.inf, scores)
    last = index == settings.new - 1
    rule = _greedy_step if settings.beams == 1 else _beam_step
    return rule(settings, state, index, scores, ends, last)


def _write(tokens: Array, new: Array, index: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(tokens, new[..., None].astype(tokens.dtype), index, axis=2)


def _greedy_step(settings, state, index, scores, ends, last) -> Search:
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    done = state.lengths > 0
    token = jnp.where(done, settings.pad, token)
    done_now = ~done & (ends[token] | last)
    return state._replace(
        tokens=(tokens := _write(state.tokens, token, index)),
        ancestry=_write(state.ancestry, jnp.zeros_like(token), index),
        finished=tokens,
        lengths=(lengths := jnp.where(done_now, index + 1, state.lengths)),
        unfinished=jnp.any(lengths == 0),
    )


def _pick(tree, indices: Int[Array, 'batch picked']):
    """The beams `indices` of every array of a tree."""

    def pick(leaf):
        return jnp.take_along_axis(leaf, indices.reshape(*indices.shape, *[1] * (leaf.ndim - 2)), axis=1)

    return jax.tree.map(pick, tree)


def _beam_step(settings, state, index, scores, ends, last) -> Search:
    batch, beams, vocab = scores.shape
    weight = jnp.asarray(np.arange(1.0, settings.new + 1) ** settings.length_penalty, jnp.float32)
    early = settings.early_stopping is True

    # Enough candidates that `beams` of them go on even if all the others end.
    candidates = max(2, 1 + len(settings.eos)) * beams
    scores, best = jax.lax.top_k((scores + state.scores[..., None]).reshape(batch, -1), candidates)
    parents, token = best // vocab, (best % vocab).astype(jnp.int32)
    tokens, ancestry = _pick((state.tokens, state.ancestry), parents)
    tokens = _write(tokens, token, index)
    ended = ends[token] | last

    running_scores, chosen = jax.lax.top_k(scores + jnp.where(ended, WORST, 0.0), beams)
    running, ancestry = _pick((tokens, ancestry), chosen)
    ancestry = _write(ancestry, jnp.broadcast_to(jnp.arange(beams), (batch, beams)), index)

    # Only one of the first `beams` candidates may finish, and only where another finished sequence still counts.
    finishes = ended & (jnp.arange(candidates) < beams)
    closed = ~state.improvable | (early & jnp.all(state.lengths > 0, axis=1, keepdims=True))
    scores = scores / weight[index] + jnp.where(closed, WORST, 0.0) + jnp.where(finishes, 0.0, WORST)
    merged = (
        jnp.concatenate([state.finished, tokens], axis=1),
        jnp.concatenate([state.lengths, jnp.where(finishes, index + 1, 0)], axis=1),
    )
    scores, chosen = jax.lax.top_k(jnp.concatenate([state.finished_scores, scores], axis=1), beams)
    finished, lengths = _pick(merged, chosen)

    # `weight` ends at the longest sequence.
    hope = weight[-1] if settings.early_stopping == 'never' and settings.length_penalty > 0 else weight[index]
    worst = jnp.where(lengths > 0, jnp.min(scores, axis=1, keepdims=True), WORST)
    improvable = state.improvable & jnp.any(running_scores[:, :1] / hope > worst, axis=1, keepdims=True)
    return Search(
        tokens=running,
        scores=running_scores,
        ancestry=ancestry,
        finished=finished,
        finished_scores=scores,
        lengths=lengths,
        improvable=improvable,
        unfinished=jnp.any(improvable) & ~(early & jnp.all(lengths > 0)) & ~jnp.all(ended),
    )
