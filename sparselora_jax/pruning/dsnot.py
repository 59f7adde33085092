"""DSnoT (arXiv 2310.08915): swap weights of a finished mask so that what an output is expected to miss shrinks.

Of output o, `error_o = sum of W_io E[x_i] over the pruned i` is the expected difference between dense and pruned (its
reconstruction error). A cycle regrows the pruned weight whose share of the error has the error's sign and is largest
against its input's variance, `argmax |W_io E[x_i]| / Var[x_i]^power`, and prunes, of the kept weights whose share has
the other sign (N:M: of the same group), the one with the smallest Wanda score `|W_io| ||x_i||`. No weight is regrown or
pruned twice.

What the public code (zyxxmu/DSnoT) does, and this does not:
- It makes 50 swaps whether or not they help, as long as the error is above the threshold (N:M: until its sign changes).
  Here an output is done when its next swap would not bring its error nearer to zero: the error never rises.
- When it has run out of candidates it goes on with weights that are already kept, and loses count of the zeros. Here an
  output is then done.
- With N:M it prunes the weight of the group with the smallest score of the *initial* method, whatever its sign. Here
  signs and scores are as for unstructured patterns, and a group that has no such weight is passed over.
- Its variance is the mean of the samples' own; here it is that of all tokens.
- It leaves LLaMA's MLPs as the initial method pruned them, unless told otherwise; rules of methods do that here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.wanda import Wanda
from sparselora_jax.sparse.masks import Pattern


class Moments(NamedTuple):
    """Means over all calibration tokens: of each input, of its square, and of the initial method's statistic."""

    first: Float[Array, '*layers inputs']
    second: Float[Array, '*layers inputs']
    initial: Any


@dataclass(frozen=True)
class SumsOfMoments:
    """The statistic whose means are `Moments`; `initial` is that of the initial method, or None."""

    initial: Callable | None

    def __call__(self, x: Float[Array, 'tokens inputs']) -> Moments:
        first = jnp.sum(x.astype(jnp.float32), axis=0)
        return Moments(first, calibrate.squares(x), self.initial and self.initial(x))


@dataclass(frozen=True)
class DSnoT:
    """Its statistic is `Moments`. Kept weights are as they came, whatever the initial method makes of them.

    With `SparseGPT` only the mask is taken over, as in the public code; that mask is SparseGPT's own, chosen while kept
    weights are updated, where the public code scores all weights at once. `Random` sees kernels that share an input as
    one, so its mask is another than without DSnoT.

    Attributes:
      initial: the method whose mask is changed. Zeros per output, or per N:M group, stay as it set them.
      cycles: the most swaps of an output (N:M: and groups passed over).
      threshold: an output whose |error| is at most this is done, in units of the output per token. The public code's
        0.1 is per sample of 2048 tokens.
      power: of the variance; 0 regrows by expected share alone.
    """

    initial: Any = Wanda()
    cycles: int = 50
    threshold: float = 0.1 / 2048
    power: float = 1.0

    @property
    def group(self) -> str:
        """The comparison group of the initial mask."""
        return self.initial.group

    @property
    def statistic(self) -> calibrate.Mean:
        """Equal for equal initial methods."""
        return calibrate.Mean(SumsOfMoments(self.initial.statistic))

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Moments,
        pattern: Pattern,
        num_zeros: Any = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """The kernel with its zeros, and the mask; `num_zeros`: of the initial method.

        Raises:
          PatternError: see the initial method.
        """
        pruned, mask = self.initial(kernel, statistic.initial, pattern, num_zeros)
        mask = _swap(kernel.T, mask.T, statistic, pattern, self).T
        # Where the initial method failed (a singular Hessian), its mask means nothing: the weights must say so.
        sparse = jnp.where(mask, kernel, jnp.zeros((), kernel.dtype))
        return jnp.where(jnp.isfinite(pruned).all(), sparse, jnp.full((), jnp.nan, kernel.dtype)), mask


def _swap(weights: Array, initial: Array, moments: Moments, pattern: Pattern, knobs: DSnoT) -> Array:
    """The mask after at most `cycles` swaps of each output, all outputs at once; matrices are `[outputs, inputs]`."""
    mean, second = moments.first, moments.second
    # What is left of the variance of an input that is all but constant is rounding: there it counts as that small.
    variance = jnp.maximum(second - mean**2, jnp.finfo(second.dtype).eps * second)
    variance = jnp.where(variance > 0, variance, 1.0)  # dead inputs; their share is zero, so they are never regrown
    weights = weights.astype(mean.dtype)
    share, score = weights * mean, jnp.abs(weights) * jnp.sqrt(second)
    outputs, inputs = weights.shape
    row = jnp.arange(outputs)

    def best(allowed, priority):
        """Inputs in the order in which they are taken, equal ones by position, and how many may be."""
        _, order = jax.lax.top_k(jnp.where(allowed, priority, -jnp.inf), min(knobs.cycles, inputs))
        return order, jnp.sum(allowed, axis=1, dtype=jnp.int32)

    # For errors above zero, and below; one after the other, for memory's sake.
    signs = jnp.array([1, -1], mean.dtype)
    to_grow = jax.lax.map(lambda sign: best(~initial & (sign * share > 0), sign * share / variance**knobs.power), signs)
    if not pattern.structured:
        to_prune = jax.lax.map(lambda sign: best(initial & (sign * share < 0), -score), signs)

    def candidate(listed, side, taken):
        order, count = listed
        return order[side, row, taken[side, row]], taken[side, row] < count[side, row]

    def in_group(error, mask, grown):
        """What to prune of the grown weight's N:M group, and whether there is any."""
        group = (grown // pattern.m * pattern.m)[:, None] + jnp.arange(pattern.m, dtype=grown.dtype)
        other_sign = jnp.sign(error)[:, None] * jnp.take_along_axis(share, group, axis=1) < 0
        allowed = jnp.take_along_axis(initial & mask, group, axis=1) & other_sign
        scores = jnp.where(allowed, jnp.take_along_axis(score, group, axis=1), jnp.inf)
        return group[row, jnp.argmin(scores, axis=1)], allowed.any(axis=1)

    def cycle(state):
        cycles, active, error, taken, mask = state
        side = (error < 0).astype(jnp.int32)
        grown, growable = candidate(to_grow, side, taken)
        pruned, prunable = in_group(error, mask, grown) if pattern.structured else candidate(to_prune, side, taken)
        after = error - share[row, grown] + share[row, pruned]
        swap = active & growable & prunable & (jnp.abs(after) < jnp.abs(error))
        mask = mask.at[row, grown].set(mask[row, grown] | swap)
        mask = mask.at[row, pruned].set(mask[row, pruned] & ~swap)
        taken = taken.at[side, row].add(1)
        active = (swap & (jnp.abs(after) > knobs.threshold)) | (active & growable & ~prunable)
        return cycles + 1, active, jnp.where(swap, after, error), taken, mask

    error = jnp.sum(jnp.where(initial, 0.0, share), axis=1)
    state = (jnp.int32(0), jnp.abs(error) > knobs.threshold, error, jnp.zeros((2, outputs), jnp.int32), initial)
    return jax.lax.while_loop(lambda state: (state[0] < knobs.cycles) & state[1].any(), cycle, state)[-1]
