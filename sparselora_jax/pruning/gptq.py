"""GPTQ (arXiv 2210.17323) under a mask: four-bit values, rounded input by input, and the rest makes up for it."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparselora_jax import calibrate
from sparselora_jax.packing.packed24 import SCALED, int4_codes, int4_scale
from sparselora_jax.pruning.sparsegpt import inverse_factor
from sparselora_jax.sparsity import Pattern


@dataclass(frozen=True)
class GPTQ:
    """The values that `quantise24` would store, chosen for what a pruned kernel computes, not for its weights.

    A rounded weight's error is passed on to the inputs behind it, as SparseGPT does with what it prunes (its section on
    joint quantisation): pruned weights are rounded to zero, so the mask stays. Scales are chosen for what 128 inputs
    have become when their turn comes. Its statistic is the Hessian `X^T X` over all calibration tokens.

    Attributes:
      damp: added to the Hessian's diagonal, as a share of its mean.
    """

    damp: float = 0.01
    group: ClassVar[str] = 'output'
    statistic: ClassVar = staticmethod(calibrate.hessian)

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Float[Array, 'inputs inputs'],
        pattern: Pattern,
        num_zeros: None = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """The pruned kernel with its values rounded, and the mask that it came with: where it is not zero."""
        del pattern, num_zeros
        inputs, dtype = kernel.shape[0], statistic.dtype
        dead = jnp.diagonal(statistic) == 0  # says nothing, and must not make H singular
        factor = inverse_factor(statistic + jnp.diag(dead.astype(dtype)), self.damp)
        padding = -inputs % SCALED  # inputs that don't exist: zeros, whose error is none
        lower = (jnp.pad(factor, (0, padding)) + jnp.diag((jnp.arange(inputs + padding) >= inputs).astype(dtype))).T
        weights = jnp.pad(kernel.astype(dtype), ((0, padding), (0, 0)))
        read, write = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim

        def round_slab(index, state):
            start = index * SCALED
            # What the inputs before the slab did to it, all at once: the rows of `errors` from here on are still zero.
            rows, kept = read(lower, start, SCALED), read(weights, start, SCALED) != 0
            part = read(weights, start, SCALED) - jnp.matmul(rows, state[1], precision='highest')
            new = _round_slab(part, kept, read(rows, start, SCALED, axis=1))
            return tuple(write(old, of_slab, start, 0) for old, of_slab in zip(state, new, strict=True))

        state = jnp.zeros_like(weights), jnp.zeros_like(weights)
        rounded, _ = jax.lax.fori_loop(0, (inputs + padding) // SCALED, round_slab, state)
        # As in SparseGPT: without a factor zeros would look like weights.
        rounded = jnp.where(jnp.isfinite(factor).all(), rounded, jnp.nan)
        return rounded[:inputs].astype(kernel.dtype), kernel != 0


def _round_slab(part: Array, kept: Array, lower: Array) -> tuple[Array, Array]:
    """128 inputs that share scales: (rounded weights, errors to pass on)."""
    scale = int4_scale(jnp.where(kept, part, 0.0))

    def round_input(i, state):
        rounded, errors = state
        updated = part[i] - jnp.matmul(lower[i], errors, precision='highest')
        nearest = int4_codes(updated[None], scale)[0] * scale.astype(part.dtype)
        value = jnp.where(kept[i], nearest, 0.0)
        return rounded.at[i].set(value), errors.at[i].set((updated - value) / lower[i, i])

    return jax.lax.fori_loop(0, SCALED, round_input, (jnp.zeros_like(part), jnp.zeros_like(part)))
