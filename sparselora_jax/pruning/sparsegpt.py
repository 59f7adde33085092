"""SparseGPT (arXiv 2301.00774): prune column by column of the input axis, and let the rest make up for it."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax.pruning import calibrate
from sparselora_jax.sparse.masks import Pattern, PatternError, keep_largest, keep_n_of_m


def inverse_factor(hessian: Float[Array, 'inputs inputs'], damp: float, slab: int = 1) -> Float[Array, 'padded padded']:
    """Lower Cholesky factor of the damped Hessian's inverse; NaN if even so it is not positive definite.

    With H = R R^T and R upper triangular (a Cholesky factor of H, axes reversed), H^-1 = (R^-1)^T R^-1: only a triangle
    is inverted, and no inverse is factored again. An input that is always zero says nothing, and must not make H
    singular.

    Args:
      damp: added to the diagonal, as a share of its mean.
      slab: the factor is filled up to a multiple of it, by inputs that don't exist and touch no other.
    """
    inputs, dtype = hessian.shape[0], hessian.dtype
    hessian = hessian + jnp.diag((jnp.diagonal(hessian) == 0).astype(dtype))
    hessian = hessian + damp * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(inputs, dtype=dtype)
    reversed_factor = jnp.linalg.cholesky(hessian[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(reversed_factor, jnp.eye(inputs, dtype=dtype), lower=True)
    padding = -inputs % slab
    return jnp.pad(inverse[::-1, ::-1].T, (0, padding)) + jnp.diag(
        (jnp.arange(inputs + padding) >= inputs).astype(dtype)
    )


@dataclass(frozen=True)
class SparseGPT:
    """Its statistic is the Hessian `X^T X` over all calibration tokens, `[in, in]`, in fp32.

    Attributes:
      damp: added to the diagonal, as a share of its mean.
      block: inputs whose mask is chosen at once (unstructured) and whose updates are applied lazily. Where it does not
        divide `in`, the last block is smaller.
      group: unstructured only: `'output'` compares a block's inputs within one output; `'block'` the whole
        `[block, out]` slab, as the source does. Slab counts are shares of one total, so the kernel's count is exact.
    """

    damp: float = 0.01
    block: int = 128
    group: str = 'output'
    statistic: ClassVar = staticmethod(calibrate.hessian)

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Float[Array, 'inputs inputs'],
        pattern: Pattern,
        num_zeros: Any = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """The kernel with its zeros and its kept weights updated, and the mask.

        Args:
          num_zeros: instead of the pattern's own, of the whole kernel (group 'block') or of each output.

        Raises:
          PatternError: M divides neither `block` nor the inputs, or an unknown group.
        """
        inputs, outputs = kernel.shape
        size = min(self.block, inputs)
        if pattern.structured and (inputs % pattern.m or size % pattern.m):
            raise PatternError(f'SparseGPT block {size} does not fit {inputs} inputs and pattern {pattern}')
        if self.group not in ('output', 'block'):
            raise PatternError(f"SparseGPT group {self.group!r}: expected 'output' or 'block'")
        dtype = statistic.dtype
        weights = jnp.where((jnp.diagonal(statistic) == 0)[:, None], 0.0, kernel.astype(dtype))  # inputs of zeros
        lower = inverse_factor(statistic, self.damp, size)
        compared = outputs if self.group == 'block' else 1
        ends = np.array([min(end, inputs) for end in range(0, inputs + size, size)], np.int32)
        total = pattern.zeros(inputs * compared) if num_zeros is None else num_zeros
        zeros = _slab_zeros(jnp.asarray(total, jnp.int32), ends)
        # The last slab is filled up with inputs that don't exist: they are pruned first, beside its own zeros.
        padding = -inputs % size
        zeros = zeros.at[-1].add(jnp.asarray(padding * compared, jnp.int32))
        weights = jnp.pad(weights, ((0, padding), (0, 0)))

        def prune_slab(index, state):
            weights, _mask, errors = state
            start = index * size
            # What the inputs before the slab did to it, all at once: the rows of `errors` from here on are still zero.
            rows = jax.lax.dynamic_slice_in_dim(lower, start, size)
            w = jax.lax.dynamic_slice_in_dim(weights, start, size) - jnp.matmul(rows, errors, precision='highest')
            diagonal = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
            real = start + jnp.arange(size) < inputs
            new = _prune_slab(w, diagonal, pattern, self.group, zeros[index], real)
            write = jax.lax.dynamic_update_slice_in_dim
            return tuple(write(all_rows, part, start, 0) for all_rows, part in zip(state, new, strict=True))

        state = (weights, jnp.ones(weights.shape, bool), jnp.zeros_like(weights))
        weights, mask, _ = jax.lax.fori_loop(0, len(ends) - 1, prune_slab, state)
        # Scores without a factor are NaN and all pruned: say so, instead of zeros that look like weights.
        weights = jnp.where(jnp.isfinite(lower).all(), weights, jnp.nan)
        return weights[:inputs].astype(kernel.dtype), mask[:inputs]


def _slab_zeros(total: Int[Array, '*groups'], ends: np.ndarray) -> Int[Array, 'slabs *groups']:
    """Shares of `total` for slabs of inputs that end at `ends`: what all slabs so far have is floor(total * share)."""
    inputs = int(ends[-1])
    ends = jnp.asarray(ends, jnp.int32).reshape(-1, *(1 for _ in total.shape))
    # total * ends would not fit into 32 bits.
    so_far = (total // inputs) * ends + (total % inputs) * ends // inputs
    return so_far[1:] - so_far[:-1]


def _saliency(w: Float[Array, 'rows outputs'], diagonal: Float[Array, ' rows']) -> Float[Array, 'rows outputs']:
    return (w / diagonal[:, None]) ** 2


def _prune_slab(
    w: Array, lower: Array, pattern: Pattern, group: str, zeros: Array, real: Array
) -> tuple[Array, Array, Array]:
    """One slab of inputs: (pruned weights, mask, errors to pass on); `real`: inputs that exist.

    A few inputs at a time, as the kernel goes slab by slab: one after the other touches only those few, and what the
    inputs before them did is one product.
    """
    size, _outputs = w.shape
    diagonal = jnp.diagonal(lower)
    saliency = jnp.where(real[:, None], _saliency(w, diagonal), -1.0)
    if pattern.structured:
        mask = jnp.ones(w.shape, bool)  # chosen M inputs at a time, on the weights as updated so far
    elif group == 'output':
        mask = keep_largest(saliency, zeros, axis=0)
    else:
        mask = keep_largest(saliency.reshape(-1), zeros).reshape(w.shape)
    few = pattern.m if pattern.structured else math.gcd(size, 16)
    read, write = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim

    def prune_few(index, state):
        mask, errors = state
        start = index * few
        rows = read(lower, start, few)
        part = read(w, start, few) - jnp.matmul(rows, errors, precision='highest')
        if pattern.structured:
            kept = keep_n_of_m(_saliency(part, read(diagonal, start, few)), pattern.n, pattern.m)
            mask = write(mask, kept, start, 0)
        kept, triangle = read(mask, start, few), read(rows, start, few, axis=1)

        def prune_input(i, new):
            updated = part[i] - jnp.matmul(triangle[i], new, precision='highest')
            return new.at[i].set(jnp.where(kept[i], 0.0, updated) / triangle[i, i])

        new = jax.lax.fori_loop(0, few, prune_input, jnp.zeros_like(part))
        return mask, write(errors, new, start, 0)

    mask, errors = jax.lax.fori_loop(0, size // few, prune_few, (mask, jnp.zeros_like(w)))
    updated = w - jnp.matmul(jnp.tril(lower, -1), errors, precision='highest')
    return jnp.where(mask, updated, 0.0), mask, errors
