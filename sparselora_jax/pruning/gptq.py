"""GPTQ (arXiv 2210.17323) under a mask: round input after input to four bits, and compensate in later inputs."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sparselora_jax.pruning import calibrate
from sparselora_jax.pruning.method import Method, check_statistic
from sparselora_jax.pruning.sparsegpt import inverse_factor
from sparselora_jax.sparse.packing import FORMATS, PackingError, RoundingFormat, find_format, rounding_formats
from sparselora_jax.sparse.packing.four_bits import best_scale, rounded
from sparselora_jax.sparse.patterns import Pattern


@dataclass(frozen=True)
class GPTQ(Method):
    """Round a pruned kernel to four-bit values that preserve its outputs rather than its weights.

    Later inputs compensate the error of a rounded weight, as in SparseGPT for pruned weights (see its section on joint
    quantisation). Pruned weights are rounded to zero, so the mask stays. The scale of a slab of inputs is chosen just
    before the slab is rounded, from its updated weights. The statistic is the Hessian `X^T X` over all calibration
    tokens.

    It rounds a kernel that is pruned already and chooses no mask, so no recipe names it: the job uses it where
    `restore.base` is a format that rounds.

    Attributes:
      damp: value added to the Hessian's diagonal, relative to the diagonal's mean.
      format: the format that stores the values, one of those that round: `packed24_int4`, `int4` or `nf4`, as
        `packing.reduce_kernels` makes them.
    """

    damp: float = 0.01
    format: str = 'packed24_int4'
    group: ClassVar[str] = 'output'
    statistic: ClassVar[calibrate.Statistic] = staticmethod(calibrate.hessian)
    edits_kept_weights: ClassVar[bool] = True
    chooses_mask: ClassVar[bool] = False
    outputs_are_independent: ClassVar[bool] = True
    statistic_copies: ClassVar[int] = 3  # the damped Hessian, its factor, the factor's inverse

    def __call__(
        self,
        kernel: Float[Array, 'inputs outputs'],
        statistic: Float[Array, 'inputs inputs'],
        pattern: Pattern,
        num_zeros: ArrayLike | None = None,
    ) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
        """Return the pruned kernel with rounded values, and its mask: True where the kernel is not zero.

        Args:
          kernel: pruned weights, zeros in place.
          statistic: the Hessian.
          pattern: ignored, since the kernel already has its zeros.
          num_zeros: ignored.

        Raises:
          PackingError: an unknown `format`.
        """
        del pattern, num_zeros
        check_statistic(self, statistic, kernel.shape[0])
        is_known = self.format in FORMATS or ':' in self.format
        form = find_format(self.format) if is_known else None
        if not isinstance(form, RoundingFormat) or form.levels is None:
            raise PackingError(f'GPTQ format {self.format!r}: expected one of {", ".join(rounding_formats())}')
        inputs = kernel.shape[0]
        dtype = statistic.dtype
        kind = form.levels
        size = form.inputs_per_scale(inputs)
        lower = inverse_factor(statistic, self.damp, size)
        weights = jnp.pad(kernel.astype(dtype), ((0, -inputs % size), (0, 0)))  # zeros are rounded without error
        read = jax.lax.dynamic_slice_in_dim
        write = jax.lax.dynamic_update_slice_in_dim

        def round_slab(index, state):
            start = index * size
            # Apply the errors of all earlier inputs at once: the rows of `errors` from here on are still zero.
            rows = read(lower, start, size)
            is_kept = read(weights, start, size) != 0
            part = read(weights, start, size) - jnp.matmul(rows, state[1], precision='highest')
            new = _round_slab(part, is_kept, read(rows, start, size, axis=1), kind)
            return tuple(write(old, of_slab, start, 0) for old, of_slab in zip(state, new, strict=True))

        state = (jnp.zeros_like(weights), jnp.zeros_like(weights))
        values, _ = jax.lax.fori_loop(0, len(weights) // size, round_slab, state)
        # As in SparseGPT: if the factorisation failed, return NaN, since zeros would look like valid weights.
        values = jnp.where(jnp.isfinite(lower).all(), values, jnp.nan)
        return values[:inputs].astype(kernel.dtype), kernel != 0


def _round_slab(
    part: Float[Array, 'size outputs'],
    is_kept: Bool[Array, 'size outputs'],
    lower: Float[Array, 'size size'],
    kind: str,
) -> tuple[Float[Array, 'size outputs'], Float[Array, 'size outputs']]:
    """Round inputs that share scales, and return (rounded weights, errors to pass on).

    Args:
      part: weights of the slab, updated by the slabs before it.
      is_kept: False where the kernel was pruned.
      lower: the factor's rows and columns of the slab.
      kind: `int4` or `nf4`.
    """
    scale = best_scale(jnp.where(is_kept, part, 0.0), kind)

    def round_input(i, state):
        values, errors = state
        # The rows of `errors` from i on are still zero: only inputs before i count.
        updated = part[i] - jnp.matmul(lower[i], errors, precision='highest')
        value = jnp.where(is_kept[i], rounded(updated[None], scale, kind)[0], 0.0)
        return values.at[i].set(value), errors.at[i].set((updated - value) / lower[i, i])

    return jax.lax.fori_loop(0, len(part), round_input, (jnp.zeros_like(part), jnp.zeros_like(part)))
