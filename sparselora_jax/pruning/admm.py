"""ADMM (arXiv 2401.02938): fit the kept weights to the dense outputs, while the mask grows to its full number of zeros.

With H = X^T X over the calibration tokens, D the diagonal of input norms (`D_ii^2 = H_ii`) and K the dense kernel, the
method works on normalised inputs and weights: `G = D^-1 H D^-1 + ridge I` and `W_0 = D K`. Without the ridge, G has 1
on its diagonal. It looks for

    min over W of trace((W - W_0)^T G (W - W_0)), where W is zero outside the mask,

by the alternating direction method of multipliers with penalty rho, from U = 0 and W = W_0:

    Z <- (W + U) under the mask
    U <- U + W - Z
    W <- (G + rho I)^-1 (G W_0 + rho (Z - U))

The result is `D^-1 Z` of one more step for Z. Of G + rho I one factorisation is needed, and of each iteration one
product. In iteration t of the first `growth` ones, the mask is chosen anew: of each comparison group the
`z (1 - (1 - t / growth)^3)` smallest `|W + U|` are pruned, where z is the group's final number of zeros. At first W + U
is W_0, so the first scores are Wanda's. For N:M, only the M - N smallest of each group can be pruned, the smallest of
an output first.

Differences from the public code (fmfi-compbio/admm-pruning):
- Unstructured, it compares the weights of the whole matrix, and prunes all of them in the first iteration. Here groups
  are those of `group`, and the number of zeros grows as the paper says.
- With N:M, zeros are counted over the whole matrix while they grow; here over each output, so outputs are independent.
- It adds 1e-8 to the norms. Here weights of inputs that are always zero become zero, as in SparseGPT.
- W is computed as `W_0 + rho (G + rho I)^-1 (Z - U - W_0)`, which is equal and needs no product G W_0.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.method import Method, check_statistic
from sparselora_jax.pruning.sparsegpt import inverse_factor
from sparselora_jax.sparse.masks import keep_largest, keep_n_of_m
from sparselora_jax.sparse.patterns import Pattern, PatternError


class _Problem(NamedTuple):
    """The problem with normalised inputs: `W_0`, `rho (G + rho I)^-1`, and the norms of the inputs."""

    dense: Float[Array, 'inputs outputs']
    inverse: Float[Array, 'inputs inputs']
    norms: Float[Array, ' inputs']


@dataclass(frozen=True)
class ADMM(Method):
    """Choose a mask step by step and fit the kept weights to the dense outputs in between (see the module).

    The statistic is the Hessian `X^T X` over all calibration tokens, `[inputs, inputs]`, in fp32.

    Attributes:
      ridge: value added to the normalised Hessian's diagonal, which is 1; it keeps weights near the dense ones. It is
        no `damp`, since the recipe's `prune.damp` has SparseGPT's default: on text unlike that of the calibration,
        0.01 gives a larger error than 0.1.
      rho: penalty on the distance of W and Z, in the same unit; smaller values move weights further in each iteration.
      iterations: number of updates of the weights.
      growth: number of iterations in which the mask grows; the other iterations keep the final mask. With 1 the mask is
        Wanda's.
      group: comparison group of unstructured patterns: `'output'` or `'matrix'`.
    """

    ridge: float = 0.1
    rho: float = 1.0
    iterations: int = 20
    growth: int = 15
    group: str = 'output'
    statistic: ClassVar[calibrate.Statistic] = staticmethod(calibrate.hessian)
    edits_kept_weights: ClassVar[bool] = True
    outputs_are_independent: ClassVar[bool] = True
    kernel_copies: ClassVar[int] = 6  # also the normalised weights, W + U and the product
    statistic_copies: ClassVar[int] = 4  # the normalised Hessian, its factor, the factor's inverse, the inverse

    def check(self, pattern: Pattern, inputs: int) -> None:
        """Check the options, and that M divides the inputs.

        Args:
          pattern: unstructured or N:M.
          inputs: length of the kernel's input axis.

        Raises:
          PatternError: an option is out of its range, or M does not divide the inputs.
        """
        if not 0 <= self.ridge < math.inf:
            raise PatternError(f'ADMM ridge {self.ridge!r}: expected a finite number, 0 or more')
        if not 0 < self.rho < math.inf:
            raise PatternError(f'ADMM rho {self.rho!r}: expected a finite number above 0')
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise PatternError(f'ADMM iterations {self.iterations!r}: expected a whole number, 1 or more')
        if not isinstance(self.growth, int) or not 1 <= self.growth <= self.iterations:
            raise PatternError(
                f'ADMM growth {self.growth!r}: expected a whole number from 1 to iterations, {self.iterations}'
            )
        if self.group not in ('output', 'matrix'):
            raise PatternError(f"ADMM group {self.group!r}: expected 'output' or 'matrix'")
        pattern.zeros(inputs)  # raises where M does not divide the inputs

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Float[Array, 'inputs inputs'],
        pattern: Pattern,
        num_zeros: ArrayLike | None = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """Return the kernel with its zeros and its kept weights updated, and the mask.

        Args:
          kernel: dense weights.
          statistic: the Hessian.
          pattern: see `Method`.
          num_zeros: number of zeros of the whole kernel (group `'matrix'`) or of each output; None: from the pattern.

        Raises:
          PatternError: see `check`.
        """
        inputs, outputs = kernel.shape
        self.check(pattern, inputs)
        problem = self._normalise(kernel, statistic)
        compared = outputs if self.group == 'matrix' and not pattern.structured else 1
        total = jnp.asarray(pattern.zeros(inputs * compared) if num_zeros is None else num_zeros, jnp.int32)
        # The part of the zeros that is missing after each iteration; after the last one, none.
        missing = np.array([((self.growth - step) / self.growth) ** 3 for step in range(1, self.growth + 1)])
        missing = jnp.asarray(missing, problem.dense.dtype)

        def grow(index, state):
            sums, _mask = state
            zeros = total - jnp.floor(total.astype(missing.dtype) * missing[index]).astype(jnp.int32)
            mask = _choose(jnp.abs(sums), pattern, self.group, zeros)
            return _update(problem, sums, mask), mask

        state = (problem.dense, jnp.ones(kernel.shape, bool))
        sums, mask = jax.lax.fori_loop(0, self.growth, grow, state)
        return self._finish(kernel, problem, sums, mask, self.iterations - self.growth), mask

    def refit(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Float[Array, 'inputs inputs'],
        mask: Bool[Array, 'inputs outputs'],
    ) -> Float[Array, 'inputs outputs']:
        """Return the kernel under a given mask, with its kept weights updated; `growth` and `group` do not matter.

        Args:
          kernel: dense weights.
          statistic: the Hessian.
          mask: True = kept.
        """
        problem = self._normalise(kernel, statistic)
        return self._finish(kernel, problem, problem.dense, mask, self.iterations)

    def _normalise(self, kernel: Float[Array, 'inputs outputs'], hessian: Float[Array, 'inputs inputs']) -> _Problem:
        """Return the normalised problem; its inverse is NaN if the factorisation fails."""
        check_statistic(self, hessian, kernel.shape[0])
        norms = jnp.sqrt(jnp.diagonal(hessian))
        is_dead = norms == 0
        norms = jnp.where(is_dead, 1.0, norms)
        # Weights of inputs that are always zero have no effect. Set to zero, they are pruned first.
        dense = jnp.where(is_dead[:, None], 0.0, kernel.astype(hessian.dtype) * norms[:, None])
        # The diagonal is 1 except for dead inputs, which get 1: what is relative to its mean is absolute.
        factor = inverse_factor(hessian / norms[:, None] / norms, self.ridge + self.rho)
        return _Problem(dense, self.rho * jnp.matmul(factor, factor.T, precision='highest'), norms)

    def _finish(
        self,
        kernel: Float[Array, 'inputs outputs'],
        problem: _Problem,
        sums: Float[Array, 'inputs outputs'],
        mask: Bool[Array, 'inputs outputs'],
        iterations: int,
    ) -> Float[Array, 'inputs outputs']:
        """Return the pruned kernel after some more iterations under a mask that stays."""
        sums = jax.lax.fori_loop(0, iterations, lambda _index, sums: _update(problem, sums, mask), sums)
        pruned = jnp.where(mask, sums, 0.0) / problem.norms[:, None]
        # As in SparseGPT: if the factorisation failed, return NaN, since zeros would look like valid weights.
        return jnp.where(jnp.isfinite(problem.inverse).all(), pruned, jnp.nan).astype(kernel.dtype)


def _update(
    problem: _Problem, sums: Float[Array, 'inputs outputs'], mask: Bool[Array, 'inputs outputs']
) -> Float[Array, 'inputs outputs']:
    """Run one iteration and return the new W + U.

    Under the mask the new Z is W + U and the new U is 0; elsewhere Z is 0 and U is W + U. So Z - U is W + U with its
    sign changed outside the mask, and W + U is all that an iteration hands to the next.

    Args:
      problem: see `_Problem`.
      sums: W + U.
      mask: True = kept.
    """
    move = jnp.where(mask, sums, -sums) - problem.dense
    weights = problem.dense + jnp.matmul(problem.inverse, move, precision='highest')
    return weights + jnp.where(mask, 0.0, sums)


def _choose(
    scores: Float[Array, 'inputs outputs'], pattern: Pattern, group: str, zeros: Int[Array, '*groups']
) -> Bool[Array, 'inputs outputs']:
    """Return the mask of one iteration: the smallest scores of each comparison group are pruned, ties by position.

    Args:
      scores: importance of each weight.
      pattern: with N:M, the N largest scores of each M are kept whatever `zeros` is.
      group: see `ADMM`.
      zeros: number of zeros so far of each comparison group; with N:M, of each output.
    """
    if pattern.structured:
        scores = jnp.where(keep_n_of_m(scores, pattern.n, pattern.m), jnp.inf, scores)
    elif group == 'matrix':
        return keep_largest(scores.reshape(-1), zeros).reshape(scores.shape)
    return keep_largest(scores, zeros, axis=0)
