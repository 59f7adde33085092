"""SparseGPT (arXiv 2301.00774): prune input after input, and compensate the error in later inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.method import Method, check_statistic
from sparselora_jax.sparse.masks import keep_largest, keep_n_of_m
from sparselora_jax.sparse.patterns import Pattern, PatternError

UNROLLED = 16  # inputs that unstructured pruning handles one by one before it applies their errors together


def inverse_factor(hessian: Float[Array, 'inputs inputs'], damp: float, slab: int = 1) -> Float[Array, 'padded padded']:
    """Return the lower Cholesky factor of the damped Hessian's inverse; NaN if that is not positive definite.

    With H = R R^T and R upper triangular (the Cholesky factor of H with both axes reversed), H^-1 = (R^-1)^T R^-1. So
    only a triangular matrix is inverted, and no inverse has to be factored.

    Args:
      hessian: `x^T x` over all calibration tokens.
      damp: value added to the diagonal, relative to the diagonal's mean.
      slab: the factor is padded to a multiple of this size, with extra inputs that affect no other input.
    """
    inputs = hessian.shape[0]
    dtype = hessian.dtype
    # An input that is always zero has a row of zeros, which must not make H singular.
    hessian = hessian + jnp.diag((jnp.diagonal(hessian) == 0).astype(dtype))
    hessian = hessian + damp * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(inputs, dtype=dtype)
    reversed_factor = jnp.linalg.cholesky(hessian[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(reversed_factor, jnp.eye(inputs, dtype=dtype), lower=True)
    padding = -inputs % slab
    # Padded inputs have 1 on the diagonal, which their weights are divided by.
    return jnp.pad(inverse[::-1, ::-1].T, (0, padding)) + jnp.diag(
        (jnp.arange(inputs + padding) >= inputs).astype(dtype)
    )


@dataclass(frozen=True)
class SparseGPT(Method):
    """Prune input after input; the weights of later inputs compensate the error of each pruned weight.

    Algorithm 1 of the paper. The statistic is the Hessian `X^T X` over all calibration tokens, `[inputs, inputs]`, in
    fp32.

    Attributes:
      damp: value added to the Hessian's diagonal, relative to the diagonal's mean.
      block: number of inputs whose mask is chosen at once (unstructured) and whose updates are applied lazily. If it
        does not divide `inputs`, the last block is smaller.
      group: unstructured only. `'output'` compares a block's inputs within one output; `'block'` compares the whole
        `[block, outputs]` slab, as the source does. The zeros of a slab are its share of one total, so the kernel's
        count is exact.
    """

    damp: float = 0.01
    block: int = 128
    group: str = 'output'
    statistic: ClassVar[calibrate.Statistic] = staticmethod(calibrate.hessian)
    edits_kept_weights: ClassVar[bool] = True
    outputs_are_independent: ClassVar[bool] = True
    # Pruning goes slab by slab, so a whole slab is the nearest it has to a whole matrix.
    groups: ClassVar[Mapping[str, str]] = MappingProxyType({'output': 'output', 'matrix': 'block'})
    statistic_copies: ClassVar[int] = 3  # the damped Hessian, its factor, the factor's inverse

    def check(self, pattern: Pattern, inputs: int) -> None:
        """Check that N:M groups do not cross slabs.

        Args:
          pattern: unstructured or N:M.
          inputs: length of the kernel's input axis.

        Raises:
          PatternError: M does not divide both `block` and the inputs, `block` is below one, or the group is unknown.
        """
        if not isinstance(self.block, int) or self.block < 1:
            raise PatternError(f'SparseGPT block {self.block!r}: expected a number of inputs, 1 or more')
        size = min(self.block, inputs)
        if pattern.structured and (inputs % pattern.m or size % pattern.m):
            raise PatternError(f'SparseGPT block {size} does not fit {inputs} inputs and pattern {pattern}')
        if self.group not in ('output', 'block'):
            raise PatternError(f"SparseGPT group {self.group!r}: expected 'output' or 'block'")

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
          num_zeros: number of zeros of the whole kernel (group `'block'`) or of each output; None: from the pattern.

        Raises:
          PatternError: see `check`.
        """
        self.check(pattern, kernel.shape[0])
        check_statistic(self, statistic, kernel.shape[0])
        inputs, outputs = kernel.shape
        size = min(self.block, inputs)
        dtype = statistic.dtype
        # Weights of inputs that are always zero have no effect. Set to zero, they are pruned first.
        weights = jnp.where((jnp.diagonal(statistic) == 0)[:, None], 0.0, kernel.astype(dtype))
        lower = inverse_factor(statistic, self.damp, size)
        compared = outputs if self.group == 'block' else 1
        ends = np.array([min(end, inputs) for end in range(0, inputs + size, size)], np.int32)
        total = pattern.zeros(inputs * compared) if num_zeros is None else num_zeros
        zeros = _slab_zeros(jnp.asarray(total, jnp.int32), ends)
        # The last slab is padded. The padding is pruned first, in addition to the slab's own zeros.
        padding = -inputs % size
        zeros = zeros.at[-1].add(jnp.asarray(padding * compared, jnp.int32))
        weights = jnp.pad(weights, ((0, padding), (0, 0)))

        def prune_slab(index, state):
            weights, _mask, errors = state
            start = index * size
            # Apply the errors of all earlier inputs at once: the rows of `errors` from here on are still zero.
            rows = jax.lax.dynamic_slice_in_dim(lower, start, size)
            w = jax.lax.dynamic_slice_in_dim(weights, start, size) - jnp.matmul(rows, errors, precision='highest')
            diagonal = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
            is_real = start + jnp.arange(size) < inputs
            new = _prune_slab(w, diagonal, pattern, self.group, zeros[index], is_real)
            write = jax.lax.dynamic_update_slice_in_dim
            return tuple(write(all_rows, part, start, 0) for all_rows, part in zip(state, new, strict=True))

        state = (weights, jnp.ones(weights.shape, bool), jnp.zeros_like(weights))
        weights, mask, _ = jax.lax.fori_loop(0, len(ends) - 1, prune_slab, state)
        # If the factorisation failed, all scores are NaN and all weights pruned. NaN reports that; zeros would look
        # valid.
        weights = jnp.where(jnp.isfinite(lower).all(), weights, jnp.nan)
        return weights[:inputs].astype(kernel.dtype), mask[:inputs]


def _slab_zeros(total: Int[Array, '*groups'], ends: np.ndarray) -> Int[Array, ' slabs *groups']:
    """Split `total` into the zeros of each slab of inputs, where slabs end at `ends`.

    The first n slabs together have floor(total * their share of the inputs) zeros, so nothing is lost to rounding.
    """
    inputs = int(ends[-1])
    ends = jnp.asarray(ends, jnp.int32).reshape(-1, *(1 for _ in total.shape))
    # total * ends // inputs in two parts: total * ends would not fit into 32 bits.
    so_far = (total // inputs) * ends + (total % inputs) * ends // inputs
    return so_far[1:] - so_far[:-1]


def _saliency(w: Float[Array, 'rows outputs'], diagonal: Float[Array, ' rows']) -> Float[Array, 'rows outputs']:
    """Return the error that pruning each weight would cause, once the other weights compensate for it (equation 3)."""
    return (w / diagonal[:, None]) ** 2


def _prune_slab(
    w: Float[Array, 'size outputs'],
    lower: Float[Array, 'size size'],
    pattern: Pattern,
    group: str,
    zeros: Int[Array, '*groups'],
    is_real: Bool[Array, ' size'],
) -> tuple[Float[Array, 'size outputs'], Bool[Array, 'size outputs'], Float[Array, 'size outputs']]:
    """Prune one slab of inputs, and return (pruned weights, mask, errors to pass on).

    A slab is processed a few inputs at a time, as the kernel is processed slab by slab. Pruning one input updates only
    those few. One matrix product applies the errors of all inputs before them.

    Args:
      w: weights of the slab, updated by the slabs before it.
      lower: the factor's rows and columns of the slab.
      pattern: see `Method`.
      group: see `SparseGPT`.
      zeros: number of zeros of the slab in each comparison group.
      is_real: False for padded inputs.
    """
    size = w.shape[0]
    diagonal = jnp.diagonal(lower)
    saliency = jnp.where(is_real[:, None], _saliency(w, diagonal), -1.0)
    if pattern.structured:
        # Filled in below, M inputs at a time, from the weights as updated so far.
        mask = jnp.ones(w.shape, bool)
    elif group == 'output':
        mask = keep_largest(saliency, zeros, axis=0)
    else:
        mask = keep_largest(saliency.reshape(-1), zeros).reshape(w.shape)
    few = pattern.m if pattern.structured else math.gcd(size, UNROLLED)
    read = jax.lax.dynamic_slice_in_dim
    write = jax.lax.dynamic_update_slice_in_dim

    def prune_few(index, state):
        mask, errors = state
        start = index * few
        rows = read(lower, start, few)
        part = read(w, start, few) - jnp.matmul(rows, errors, precision='highest')
        if pattern.structured:
            chosen = keep_n_of_m(_saliency(part, read(diagonal, start, few)), pattern.n, pattern.m)
            mask = write(mask, chosen, start, 0)
        few_mask = read(mask, start, few)
        triangle = read(rows, start, few, axis=1)

        def prune_input(i, new):
            updated = part[i] - jnp.matmul(triangle[i], new, precision='highest')
            return new.at[i].set(jnp.where(few_mask[i], 0.0, updated) / triangle[i, i])

        new = jax.lax.fori_loop(0, few, prune_input, jnp.zeros_like(part))
        return mask, write(errors, new, start, 0)

    mask, errors = jax.lax.fori_loop(0, size // few, prune_few, (mask, jnp.zeros_like(w)))
    updated = w - jnp.matmul(jnp.tril(lower, -1), errors, precision='highest')
    return jnp.where(mask, updated, 0.0), mask, errors
