"""Call pruning methods, which may be anybody's code, and check what they return.

The check is one boolean, computed by the program that prunes, since a method that is right needs no more. Only if it is
False does `explain` look at the arrays again, to find what is wrong and in which layer.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from sparselora_jax.pruning.calibrate import CalibrationError
from sparselora_jax.pruning.method import Method, MethodError
from sparselora_jax.runtime import processes
from sparselora_jax.runtime.errors import SparseloraError, calling
from sparselora_jax.sparse.masks import zeros_of_groups
from sparselora_jax.sparse.patterns import Pattern


def call_method(
    method: Method, kernel: Float[Array, 'inputs outputs'], statistic: PyTree, pattern: Pattern, zeros: ArrayLike | None
) -> tuple[Float[Array, 'inputs outputs'], Bool[Array, 'inputs outputs']]:
    """Return what a method returns for one kernel, and check its form; it runs while a program is traced.

    Args:
      method: the method.
      kernel: see `Method`.
      statistic: see `Method`.
      pattern: see `Method`.
      zeros: see `Method`.

    Raises:
      MethodError: the method fails, or does not return a kernel and a boolean mask of the kernel's shape.
    """
    name = f'pruning method {type(method).__name__}'
    with calling(name, MethodError):
        result = method(kernel, statistic, pattern, zeros)
    expected = f'expected (kernel, mask): {kernel.dtype} and bool, both of shape {list(kernel.shape)}'
    if not isinstance(result, tuple | list) or len(result) != 2:
        count = f' of {len(result)}' if isinstance(result, tuple | list) else ''
        raise MethodError(f'{name} returned a {type(result).__name__}{count}: {expected}')
    given = [(getattr(part, 'dtype', type(part).__name__), list(np.shape(part))) for part in result]
    if given != [(kernel.dtype, list(kernel.shape)), (np.dtype(bool), list(kernel.shape))]:
        parts = ' and '.join(f'{dtype} {shape}' for dtype, shape in given)
        raise MethodError(f'{name} returned {parts}: {expected}')
    pruned, mask = result
    return jnp.asarray(pruned), jnp.asarray(mask)


def is_right(
    method: Method,
    pattern: Pattern,
    kernel: Float[Array, '*layers inputs outputs'],
    pruned: Float[Array, '*layers inputs outputs'],
    mask: Bool[Array, '*layers inputs outputs'],
    zeros: ArrayLike | None,
) -> Bool[Array, '']:
    """Return whether a method did what it promises; `explain` says what is wrong.

    Args:
      method: the method.
      pattern: the pattern that it was given.
      kernel: dense weights.
      pruned: weights that it returned.
      mask: mask that it returned.
      zeros: number of zeros of each comparison group; None: the pattern is N:M.
    """
    is_finite = jnp.isfinite(kernel) & jnp.isfinite(pruned)
    # One reduction for all checks of weights, so that arrays are read once.
    is_fine = jnp.all(is_finite & ~_is_outside(pruned, mask) & ~_is_edited(method, kernel, pruned, mask))
    return is_fine & ~jnp.any(_has_wrong_zeros(method, pattern, mask, zeros))


def _is_outside(pruned: Array, mask: Array) -> Array:
    """Return where a weight is not zero although its mask is False."""
    return ~mask & (pruned != 0)


def _is_edited(method: Method, kernel: Array, pruned: Array, mask: Array) -> Array:
    """Return where a kept weight differs from the dense one, unless the method may do that."""
    if method.edits_kept_weights:
        return jnp.zeros(kernel.shape, bool)
    return mask & (pruned != kernel)


def _has_wrong_zeros(method: Method, pattern: Pattern, mask: Array, zeros: ArrayLike | None) -> Array:
    """Return which comparison groups have another number of zeros than promised."""
    if not method.chooses_mask and not pattern.structured:
        # An allocation may have moved zeros between the layers that it gets.
        return jnp.zeros(mask.shape[:-2], bool)
    promised = jnp.asarray(pattern.zeros(pattern.m) if pattern.structured else zeros, jnp.int32)
    counts = zeros_of_groups(mask, pattern, 'output' if method.group == 'output' else 'matrix')
    # A kernel that was pruned before may have further weights that are zero by themselves.
    return counts != promised if method.chooses_mask else counts < promised


def explain(
    path: str,
    method: Method,
    pattern: Pattern,
    kernel: Float[Array, '*layers inputs outputs'],
    statistic: PyTree,
    pruned: Float[Array, '*layers inputs outputs'],
    mask: Bool[Array, '*layers inputs outputs'],
    zeros: ArrayLike | None,
) -> SparseloraError | None:
    """Return the error that says what is wrong with a kernel that was pruned, or None.

    Args:
      path: path of the kernel.
      method: see `is_right`.
      pattern: see `is_right`.
      kernel: see `is_right`.
      statistic: statistic that the method was given.
      pruned: see `is_right`.
      mask: see `is_right`.
      zeros: see `is_right`.
    """
    name = type(method).__name__
    layers = kernel.ndim - 2

    def problems() -> Iterator[tuple[type[SparseloraError], Array, str]]:
        """Yield (error, where it applies, message); `{count}` of the message counts such places of the layer."""
        yield CalibrationError, ~jnp.isfinite(kernel), 'NaN or infinite weight before pruning; load sound weights'
        for leaf in jax.tree.leaves(statistic):
            text = 'NaN or infinite statistic; calibrate again on finite activations'
            yield CalibrationError, ~jnp.isfinite(leaf), text
        text = f'pruned weights are not finite ({name}); a singular Hessian needs more damping or more samples'
        yield CalibrationError, ~jnp.isfinite(pruned), text
        promise = f'pattern {pattern} has' if pattern.structured else 'num_zeros says'
        compared = 'another number of' if method.chooses_mask else 'fewer'
        text = f'{name} returned a mask with {{count}} groups that have {compared} zeros than {promise}'
        yield MethodError, _has_wrong_zeros(method, pattern, mask, zeros), text
        text = f'{name} returned {{count}} weights that are not zero where its mask is False'
        yield MethodError, _is_outside(pruned, mask), text
        text = (
            f'{name} changed weights that its mask keeps, but says edits_kept_weights = False; set it to True, so that '
            'the changes are stored'
        )
        yield MethodError, _is_edited(method, kernel, pruned, mask), text

    for error, places, message in problems():
        counts = np.atleast_1d(processes.on_host(jnp.sum(places, axis=tuple(range(layers, places.ndim)))))
        if counts.any():
            layer = int(np.flatnonzero(counts)[0])
            where = f'{path}, layer {layer}' if layers else path
            return error(f'{where}: {message.format(count=counts[layer])}')
    return None
