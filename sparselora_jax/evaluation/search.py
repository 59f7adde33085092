"""What greedy and beam search keep of each step, and when they stop: the rules of transformers 5.23's `generate`.

Nothing here knows a model: `start` and `step` see logits only. `ancestry` is what a model's caches are read through:
the tokens of every beam stay where they were written, and a table says which of them belong to whom.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.sparse import sharding

WORST = -1e9  # transformers' score of what must not be chosen


class Rules(NamedTuple):
    """How to search. Arrays, so that one compilation serves all penalties and ways to stop.

    Attributes:
      weight: what the summed log-probabilities of a finished beam are divided by, by its length (from 1).
      hope: what those of a running beam are divided by to tell whether it may still beat a finished one.
      early: stop as soon as there are as many finished beams as running ones.
      min_new: the tokens before that number are no `eos`.
      eos: tokens that finish a sequence.
      pad: what follows them in the output.
    """

    weight: Float[Array | np.ndarray, ' new']
    hope: Float[Array | np.ndarray, ' new']
    early: Bool[Array | np.ndarray, '']
    min_new: Int[Array | np.ndarray, '']
    eos: Int[Array | np.ndarray, ' ends']
    pad: Int[Array | np.ndarray, '']


class Search(NamedTuple):
    """Running beams, best first, and the best finished ones.

    Attributes:
      scores: summed log-probabilities; greedy: 0.
      ancestry: the beam that wrote the n-th token of this one, -1 where none was written yet.
      lengths: of the finished sequences; 0: there is none yet.
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


def rules(
    new: int, *, length_penalty: float, early_stopping: bool | str, min_new: int, eos: tuple[int, ...], pad: int
) -> Rules:
    """Rules for at most `new` tokens, from `generate`'s arguments.

    >>> rules(3, length_penalty=-1.0, early_stopping=False, min_new=0, eos=(2,), pad=1).weight.round(2).tolist()
    [1.0, 0.5, 0.33000001311302185]
    """
    weight = np.asarray(np.arange(1.0, new + 1) ** length_penalty, np.float32)
    hope = np.full_like(weight, weight[-1]) if early_stopping == 'never' and length_penalty > 0 else weight
    numbers = np.int32(min_new), np.asarray(eos, np.int32).reshape(-1), np.int32(pad)
    return Rules(weight, hope, np.bool_(early_stopping is True), *map(np.asarray, numbers))


def start(rules: Rules, batch: int, beams: int) -> Search:
    """Before the first token. All beams are the same prompt, so that only the first may be continued."""
    tokens = jnp.full((batch, beams, rules.weight.shape[0]), rules.pad, jnp.int32)
    worst = jnp.full((batch, beams), WORST, jnp.float32)
    return Search(
        tokens=tokens,
        scores=worst.at[:, 0].set(0.0),
        ancestry=jnp.full_like(tokens, -1),
        finished=tokens,
        finished_scores=worst,
        lengths=jnp.zeros((batch, beams), jnp.int32),
        improvable=jnp.ones((batch, 1), bool),
        unfinished=jnp.ones((), bool),
    )


def step(
    rules: Rules,
    state: Search,
    index: Int[Array, ''],
    logits: Float[Array, 'batch beams vocab'],
    mesh: Mesh | None = None,
) -> Search:
    """Chooses the token number `index` (from 0) of every beam; one beam: greedily. `mesh`: that of `decode`."""
    greedy = logits.shape[1] == 1
    ends = jnp.zeros(logits.shape[-1], bool).at[rules.eos].set(True)
    scores = logits if greedy else jax.nn.log_softmax(logits, axis=-1)  # before any is forbidden, as transformers does
    scores = jnp.where(ends & (index < rules.min_new), -jnp.inf, scores)
    if greedy:
        return _greedy_step(rules, state, index, scores, ends)
    return _beam_step(rules, state, index, scores, ends, functools.partial(sharding.top_k, mesh=mesh))


def _greedy_step(rules: Rules, state: Search, index: Array, scores: Array, ends: Array) -> Search:
    last = index == rules.weight.shape[0] - 1
    done = state.lengths > 0
    token = jnp.where(done, rules.pad, jnp.argmax(scores, axis=-1).astype(jnp.int32))
    tokens = _write(state.tokens, token, index)
    lengths = jnp.where(~done & (ends[token] | last), index + 1, state.lengths)
    return state._replace(
        tokens=tokens,
        ancestry=_write(state.ancestry, jnp.zeros_like(token), index),
        finished=tokens,
        lengths=lengths,
        unfinished=jnp.any(lengths == 0),
    )


def _beam_step(rules: Rules, state: Search, index: Array, scores: Array, ends: Array, top_k: Callable) -> Search:
    batch, beams, vocab = scores.shape
    last = index == rules.weight.shape[0] - 1

    # Enough candidates that `beams` of them go on even if all the others end.
    candidates = max(2, 1 + rules.eos.shape[0]) * beams
    scores, best = top_k((scores + state.scores[..., None]).reshape(batch, -1), candidates)
    tokens, ancestry = _pick((state.tokens, state.ancestry), best // vocab)
    token = (best % vocab).astype(jnp.int32)
    tokens = _write(tokens, token, index)
    ended = ends[token] | last

    running_scores, chosen = top_k(scores + jnp.where(ended, WORST, 0.0), beams)
    running, ancestry = _pick((tokens, ancestry), chosen)
    ancestry = _write(ancestry, jnp.broadcast_to(jnp.arange(beams), (batch, beams)), index)

    # A candidate finishes if it is one of the first `beams`, and if the item is not closed.
    finishes = ended & (jnp.arange(candidates) < beams)
    closed = ~state.improvable | (rules.early & jnp.all(state.lengths > 0, axis=1, keepdims=True))
    scores = scores / rules.weight[index] + jnp.where(closed, WORST, 0.0) + jnp.where(finishes, 0.0, WORST)
    scores, chosen = top_k(jnp.concatenate([state.finished_scores, scores], axis=1), beams)
    finished = jnp.concatenate([state.finished, tokens], axis=1)
    lengths = jnp.concatenate([state.lengths, jnp.where(finishes, index + 1, 0)], axis=1)
    finished, lengths = _pick((finished, lengths), chosen)

    worst = jnp.where(lengths > 0, jnp.min(scores, axis=1, keepdims=True), WORST)
    possible = running_scores[:, :1] / rules.hope[index]
    improvable = state.improvable & jnp.any(possible > worst, axis=1, keepdims=True)
    return Search(
        tokens=running,
        scores=running_scores,
        ancestry=ancestry,
        finished=finished,
        finished_scores=scores,
        lengths=lengths,
        improvable=improvable,
        unfinished=jnp.any(improvable) & ~(rules.early & jnp.all(lengths > 0)) & ~jnp.all(ended),
    )


def _write(tokens: Array, new: Array, index: Array) -> Array:
    """`tokens` with `new` at `index` of the last axis."""
    return jax.lax.dynamic_update_slice_in_dim(tokens, new[..., None].astype(tokens.dtype), index, axis=2)


def _pick(tree: Any, indices: Int[Array, 'batch picked']) -> Any:
    """The beams `indices` of every array of a tree."""

    def pick(leaf):
        return jnp.take_along_axis(leaf, indices.reshape(*indices.shape, *[1] * (leaf.ndim - 2)), axis=1)

    return jax.tree.map(pick, tree)
