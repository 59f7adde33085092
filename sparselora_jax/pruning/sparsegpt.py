"""SparseGPT (arXiv 2301.00774): prune column by column of the input axis, and let the rest make up for it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparselora_jax import calibrate
from sparselora_jax.sparsity import Pattern, PatternError, keep_largest, keep_n_of_m


def inverse_factor(hessian: Float[Array, 'inputs inputs'], damp: float) -> Float[Array, 'inputs inputs']:
    """Upper Cholesky factor of the damped Hessian's inverse; `damp` is a share of the mean diagonal."""
    n = hessian.shape[0]
    hessian = hessian + damp * jnp.mean(jnp.diagonal(hessian)) * jnp.eye(n, dtype=hessian.dtype)
    lower = jnp.linalg.cholesky(hessian)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(n, dtype=hessian.dtype))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


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
        # An input that is always zero says nothing: its weights are set to zero and it must not make H singular.
        dead = jnp.diagonal(statistic) == 0
        weights = jnp.where(dead[:, None], 0.0, kernel.astype(dtype))
        factor = inverse_factor(statistic + jnp.diag(dead.astype(dtype)), self.damp)
        compared = outputs if self.group == 'block' else 1
        ends = np.array([min(end, inputs) for end in range(0, inputs + size, size)], np.int32)
        total = pattern.zeros(inputs * compared) if num_zeros is None else num_zeros
        zeros = _slab_zeros(jnp.asarray(total, jnp.int32), ends)
        # The last slab is filled up with inputs that don't exist: they are pruned first, beside its own zeros.
        padding = -inputs % size
        zeros = zeros.at[-1].add(jnp.asarray(padding * compared, jnp.int32))
        weights = jnp.pad(weights, ((0, padding), (0, 0)))
        factor = jnp.pad(factor, (0, padding)) + jnp.diag((jnp.arange(inputs + padding) >= inputs).astype(dtype))

        def prune_block(index, state):
            weights, mask = state
            start = index * size
            w = jax.lax.dynamic_slice_in_dim(weights, start, size)
            u = jax.lax.dynamic_slice(factor, (start, start), (size, size))
            real = start + jnp.arange(size) < inputs
            pruned, kept, errors = _prune_slab(w, u, pattern, self.group, zeros[index], real)
            # Inputs after the block: rows of the factor are zero before the diagonal, so earlier ones are untouched.
            rows = jax.lax.dynamic_slice_in_dim(factor, start, size)
            later = (jnp.arange(inputs + padding) >= start + size)[None]
            weights = weights - jnp.matmul(jnp.where(later, rows, 0.0).T, errors, precision='highest')
            write = jax.lax.dynamic_update_slice_in_dim
            return write(weights, pruned, start, 0), write(mask, kept, start, 0)

        state = (weights, jnp.ones(weights.shape, bool))
        weights, mask = jax.lax.fori_loop(0, len(ends) - 1, prune_block, state)
        return weights[:inputs].astype(kernel.dtype), mask[:inputs]


def _slab_zeros(total: Int[Array, '*groups'], ends: np.ndarray) -> Int[Array, 'slabs *groups']:
    """Shares of `total` for slabs of inputs that end at `ends`: what all slabs so far have is floor(total * share)."""
    inputs = int(ends[-1])
    ends = jnp.asarray(ends, jnp.int32).reshape(-1, *(1 for _ in total.shape))
    # total * ends would not fit into 32 bits.
    so_far = (total // inputs) * ends + (total % inputs) * ends // inputs
    return so_far[1:] - so_far[:-1]


def _saliency(w: Array, u: Array) -> Array:
    return (w / jnp.diagonal(u)[:, None]) ** 2


def _prune_slab(
    w: Array, u: Array, pattern: Pattern, group: str, zeros: Array, real: Array
) -> tuple[Array, Array, Array]:
    """One slab of inputs, top to bottom: (pruned weights, mask, errors to pass on); `real`: inputs that exist."""
    size, outputs = w.shape
    saliency = jnp.where(real[:, None], _saliency(w, u), -1.0)
    if pattern.structured:
        mask = jnp.ones(w.shape, bool)  # chosen M inputs at a time, on the weights as updated so far
    elif group == 'output':
        mask = keep_largest(saliency, zeros, axis=0)
    else:
        mask = keep_largest(saliency.reshape(-1), zeros).reshape(w.shape)
    rows = jnp.arange(size)

    def prune_input(i, state):
        w, mask, errors = state
        if pattern.structured:
            m = pattern.m

            def choose(mask):
                scores = jax.lax.dynamic_slice_in_dim(_saliency(w, u), i, m)
                return jax.lax.dynamic_update_slice_in_dim(mask, keep_n_of_m(scores, pattern.n, m), i, 0)

            mask = jax.lax.cond(i % m == 0, choose, lambda mask: mask, mask)
        quantised = jnp.where(mask[i], w[i], 0.0)
        error = (w[i] - quantised) / u[i, i]
        w = w - jnp.where(rows > i, u[i], 0.0)[:, None] * error[None]
        return w.at[i].set(quantised), mask, errors.at[i].set(error)

    return jax.lax.fori_loop(0, size, prune_input, (w, mask, jnp.zeros_like(w)))
