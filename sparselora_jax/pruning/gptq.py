"""GPTQ (arXiv 2210.17323) under a mask: four-bit values, rounded input by input, and the rest makes up for it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.sparsegpt import inverse_factor
from sparselora_jax.sparse.masks import Pattern
from sparselora_jax.sparse.packing import PackingError, find_format, rounding_formats
from sparselora_jax.sparse.packing.four_bits import best_scale, rounded


@dataclass(frozen=True)
class GPTQ:
    """Values that four bits hold, chosen for what a pruned kernel computes, not for its weights.

    A rounded weight's error is passed on to the inputs behind it, as SparseGPT does with what it prunes (its section on
    joint quantisation): pruned weights are rounded to zero, so the mask stays. Scales are chosen for what their inputs
    have become when their turn comes. Its statistic is the Hessian `X^T X` over all calibration tokens.

    Attributes:
      damp: added to the Hessian's diagonal, as a share of its mean.
      held: the format that is to hold the values, one of those that round: `packed24_int4`, `int4` or `nf4`, as
        `packing.reduce_kernels` makes them.
    """

    damp: float = 0.01
    held: str = 'packed24_int4'
    group: ClassVar[str] = 'output'
    statistic: ClassVar = staticmethod(calibrate.hessian)

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Float[Array, 'inputs inputs'],
        pattern: Pattern,
        num_zeros: Any = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """The pruned kernel with its values rounded, and the mask that it came with: where it is not zero.

        Raises:
          PackingError: an unknown `held`.
        """
        del pattern, num_zeros
        if self.held not in rounding_formats():
            raise PackingError(f'GPTQ held {self.held!r}: expected one of {", ".join(rounding_formats())}')
        inputs, dtype = kernel.shape[0], statistic.dtype
        form = find_format(self.held)
        kind = form.levels
        size = form.inputs_per_scale(inputs)
        lower = inverse_factor(statistic, self.damp, size)
        weights = jnp.pad(kernel.astype(dtype), ((0, -inputs % size), (0, 0)))  # zeros, whose error is none
        read, write = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim

        def round_slab(index, state):
            start = index * size
            # What the inputs before the slab did to it, all at once: the rows of `errors` from here on are still zero.
            rows, kept = read(lower, start, size), read(weights, start, size) != 0
            part = read(weights, start, size) - jnp.matmul(rows, state[1], precision='highest')
            new = _round_slab(part, kept, read(rows, start, size, axis=1), kind)
            return tuple(write(old, of_slab, start, 0) for old, of_slab in zip(state, new, strict=True))

        state = jnp.zeros_like(weights), jnp.zeros_like(weights)
        chosen, _ = jax.lax.fori_loop(0, len(weights) // size, round_slab, state)
        # As in SparseGPT: without a factor zeros would look like weights.
        chosen = jnp.where(jnp.isfinite(lower).all(), chosen, jnp.nan)
        return chosen[:inputs].astype(kernel.dtype), kernel != 0


def _round_slab(part: Array, kept: Array, lower: Array, kind: str) -> tuple[Array, Array]:
    """Inputs that share scales: (rounded weights, errors to pass on)."""
    scale = best_scale(jnp.where(kept, part, 0.0), kind)

    def round_input(i, state):
        values, errors = state
        updated = part[i] - jnp.matmul(lower[i], errors, precision='highest')
        value = jnp.where(kept[i], rounded(updated[None], scale, kind)[0], 0.0)
        return values.at[i].set(value), errors.at[i].set((updated - value) / lower[i, i])

    return jax.lax.fori_loop(0, len(part), round_input, (jnp.zeros_like(part), jnp.zeros_like(part)))
