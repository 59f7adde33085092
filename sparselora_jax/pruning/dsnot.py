"""DSnoT (arXiv 2310.08915): swap weights of a finished mask to reduce the expected error of each output.

The reconstruction error of output o, `error_o = sum of W_io E[x_i] over the pruned i`, is the expected difference
between its dense and its pruned value. Each cycle makes one swap. It regrows a pruned weight: among those whose share
`W_io E[x_i]` has the sign of the error, the one with the largest `|W_io E[x_i]| / Var[x_i]^power`. It prunes a kept
weight: among those whose share has the other sign (N:M: in the same group), the one with the smallest Wanda score
`|W_io| ||x_i||`. No weight is regrown or pruned twice.

Differences from the public code (zyxxmu/DSnoT):
- It makes 50 swaps whether or not they help, as long as the error is above the threshold (N:M: until its sign changes).
  Here an output is done when its next swap would not bring its error nearer to zero, so the error never rises.
- When it runs out of candidates it continues with weights that are already kept, so the number of zeros changes. Here
  the output is then done.
- With N:M it prunes the weight of the group with the smallest score of the *initial* method, whatever its sign. Here
  the same signs and scores apply as for unstructured patterns, and a group without such a weight is skipped.
- Its variance is the mean of each sample's variance; here it is the variance over all tokens.
- By default it leaves LLaMA's MLPs as the initial method pruned them; here rules of methods can do that.
"""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.method import Method, check_method, check_statistic
from sparselora_jax.pruning.wanda import Wanda
from sparselora_jax.sparse.patterns import Pattern


class Moments(NamedTuple):
    """Means over all calibration tokens: of each input, of its square, and of the initial method's statistic."""

    first: Float[Array, '*layers inputs']
    second: Float[Array, '*layers inputs']
    initial: PyTree


@dataclass(frozen=True)
class SumsOfMoments:
    """The statistic whose means are `Moments`; `initial` is the statistic of the initial method, or None."""

    initial: calibrate.Statistic | None

    @property
    def only_ratios_matter(self) -> bool:
        """Return whether the statistic may be of scaled activations; without, all squares of tiny ones would be 0."""
        return calibrate.can_be_scaled(self.initial)

    def __call__(self, x: Float[Array, 'tokens inputs']) -> Moments:
        """Return the sums over the tokens of one call."""
        first = jnp.sum(x.astype(jnp.float32), axis=0)
        return Moments(first, calibrate.squares(x), self.initial and self.initial(x))

    def weighted(self, x: Float[Array, 'tokens inputs'], weights: Float[Array, ' tokens']) -> Moments:
        """Return the sums over the tokens of one call, each of which counts as often as its weight says.

        Args:
          x: the tokens.
          weights: their weights.
        """
        first = jnp.sum(x.astype(jnp.float32) * weights[:, None], axis=0)
        second = calibrate.statistic_of(calibrate.squares, x, weights)
        return Moments(first, second, self.initial and calibrate.statistic_of(self.initial, x, weights))


@dataclass(frozen=True)
class DSnoT(Method):
    """Swap weights of another method's mask; kept weights keep their dense values, even if that method edits them.

    The statistic is `Moments`. With `SparseGPT` only the mask is used, as in the public code. SparseGPT chooses that
    mask while it updates kept weights; the public code scores all weights at once.

    Attributes:
      initial: the method whose mask is changed. Zeros per output, or per N:M group, stay as it set them.
      cycles: maximum number of swaps of an output (for N:M, skipped groups count too).
      threshold: an output whose absolute error is at most this is done, in units of the output per token. The public
        code's 0.1 is per sample of 2048 tokens.
      power: exponent of the variance; 0 regrows by the expected share alone.
    """

    initial: Method = field(default_factory=Wanda)
    cycles: int = 50
    threshold: float = 0.1 / 2048
    power: float = 1.0
    edits_kept_weights: ClassVar[bool] = False
    kernel_copies: ClassVar[int] = 6  # also the shares of the error and the order of candidates

    def __post_init__(self):
        # Its members are read by the properties below.
        check_method(self.initial)

    @property
    def group(self) -> str:
        """Return the comparison group of the initial mask."""
        return self.initial.group

    @property
    def statistic(self) -> calibrate.Mean:
        """Return the statistic; equal for equal initial methods."""
        return calibrate.Mean(SumsOfMoments(self.initial.statistic))

    @property
    def outputs_are_independent(self) -> bool:
        """Return the initial method's value; swaps themselves look at one output at a time."""
        return self.initial.outputs_are_independent

    @property
    def statistic_copies(self) -> int:
        """Return the initial method's value."""
        return self.initial.statistic_copies

    def check(self, pattern: Pattern, inputs: int) -> None:
        """Check that the initial method can make the pattern.

        Args:
          pattern: unstructured or N:M.
          inputs: length of the kernel's input axis.

        Raises:
          PatternError: it cannot.
        """
        self.initial.check(pattern, inputs)

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Moments,
        pattern: Pattern,
        num_zeros: ArrayLike | None = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """Return the kernel with its zeros, and the mask.

        Args:
          kernel: dense weights.
          statistic: means over all calibration tokens.
          pattern: see `Method`.
          num_zeros: see `Method`; passed to the initial method.

        Raises:
          PatternError: see the initial method.
        """
        check_statistic(self, statistic, kernel.shape[0])
        pruned, mask = self.initial(kernel, statistic.initial, pattern, num_zeros)
        mask = _swap(kernel.T, mask.T, statistic, pattern, self).T
        # If the initial method failed (a singular Hessian), its mask is meaningless. NaN weights report that.
        sparse = jnp.where(mask, kernel, jnp.zeros((), kernel.dtype))
        return jnp.where(jnp.isfinite(pruned).all(), sparse, jnp.full((), jnp.nan, kernel.dtype)), mask


def _swap(
    weights: Float[Array, 'outputs inputs'],
    initial: Bool[Array, 'outputs inputs'],
    moments: Moments,
    pattern: Pattern,
    options: DSnoT,
) -> Bool[Array, 'outputs inputs']:
    """Return the mask after at most `cycles` swaps of each output, all outputs at once.

    Args:
      weights: dense weights.
      initial: the initial method's mask.
      moments: see `Moments`.
      pattern: pattern of the initial mask; with N:M, swaps stay within a group.
      options: the method's own options.
    """
    mean = moments.first
    second = moments.second
    # The computed variance of a nearly constant input is only rounding error, so it is raised to at least that size.
    variance = jnp.maximum(second - mean**2, jnp.finfo(second.dtype).eps * second)
    variance = jnp.where(variance > 0, variance, 1.0)  # dead inputs; their share is zero, so they are never regrown
    # Shares and scores are compared in the statistic's dtype, float32.
    weights = weights.astype(mean.dtype)
    share = weights * mean
    score = jnp.abs(weights) * jnp.sqrt(second)
    outputs, inputs = weights.shape
    row = jnp.arange(outputs)

    def best(allowed, priority):
        """Return candidate inputs, the best first and ties by position, and how many of them are allowed."""
        # At most `cycles` candidates are ever taken, so no full sort is needed; top_k breaks ties by position.
        _, order = jax.lax.top_k(jnp.where(allowed, priority, -jnp.inf), min(options.cycles, inputs))
        return order, jnp.sum(allowed, axis=1, dtype=jnp.int32)

    # Candidates for positive errors, then for negative ones: one after the other, since each sort needs memory.
    signs = jnp.array([1, -1], mean.dtype)
    to_grow = jax.lax.map(
        lambda sign: best(~initial & (sign * share > 0), sign * share / variance**options.power), signs
    )
    if not pattern.structured:
        to_prune = jax.lax.map(lambda sign: best(initial & (sign * share < 0), -score), signs)

    def candidate(listed, side, taken):
        """Return each output's next candidate, and whether there is one."""
        order, count = listed
        return order[side, row, taken[side, row]], taken[side, row] < count[side, row]

    def in_group(error, mask, grown):
        """Return the weight to prune in the N:M group of the grown weight, and whether there is one."""
        group = (grown // pattern.m * pattern.m)[:, None] + jnp.arange(pattern.m, dtype=grown.dtype)
        has_other_sign = jnp.sign(error)[:, None] * jnp.take_along_axis(share, group, axis=1) < 0
        # `initial & mask`: a weight that was regrown is not pruned again.
        allowed = jnp.take_along_axis(initial & mask, group, axis=1) & has_other_sign
        scores = jnp.where(allowed, jnp.take_along_axis(score, group, axis=1), jnp.inf)
        return group[row, jnp.argmin(scores, axis=1)], allowed.any(axis=1)

    def cycle(state):
        """Swap two weights of every output that is not done."""
        cycles, active, error, taken, mask = state
        # Which of the two lists of candidates: 0 for errors above zero, 1 for errors below.
        side = (error < 0).astype(jnp.int32)
        grown, can_grow = candidate(to_grow, side, taken)
        pruned, can_prune = in_group(error, mask, grown) if pattern.structured else candidate(to_prune, side, taken)
        after = error - share[row, grown] + share[row, pruned]
        swaps = active & can_grow & can_prune & (jnp.abs(after) < jnp.abs(error))
        # Outputs that do not swap write back their old values.
        mask = mask.at[row, grown].set(mask[row, grown] | swaps)
        mask = mask.at[row, pruned].set(mask[row, pruned] & ~swaps)
        taken = taken.at[side, row].add(1)
        # An output continues after a swap while its error is large, and after an N:M group with nothing to prune.
        active = (swaps & (jnp.abs(after) > options.threshold)) | (active & can_grow & ~can_prune)
        return cycles + 1, active, jnp.where(swaps, after, error), taken, mask

    # The expected error of each output under the initial mask.
    error = jnp.sum(jnp.where(initial, 0.0, share), axis=1)
    state = (jnp.int32(0), jnp.abs(error) > options.threshold, error, jnp.zeros((2, outputs), jnp.int32), initial)
    return jax.lax.while_loop(lambda state: (state[0] < options.cycles) & state[1].any(), cycle, state)[-1]
