"""Converts kernels and masks of any kind to plain arrays."""

import functools

import jax.numpy as jnp
import numpy as np
import qwix
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Num, PyTree

from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.sparse.kernels.dense24 import dense24
from sparselora_jax.sparse.packing import Packed24, PackedMask, ReducedMatrix, is_packed, is_reduced, unpack_mask
from sparselora_jax.sparse.packing.quantised import dequantise
from sparselora_jax.sparse.rules import RuleError, paths_of, with_leaves


def unpack(params: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """Return params in which packed and quantised kernels are plain arrays.

    Args:
      params: the params, any tree.
      dtype: dtype of the plain kernels; default: the dtype before packing (for four bits, the dtype of the scales).

    Raises:
      RuleError: `dtype` holds no fractions.
    """
    check_floating(dtype, RuleError)
    plain = {path: dense_kernel(leaf, dtype) for path, leaf in paths_of(params).items() if is_reduced(leaf)}
    return with_leaves(params, plain)


def check_floating(dtype: DTypeLike | None, error_type: type[SparseloraError]) -> None:
    """Check that a dtype can hold weights.

    Args:
      dtype: the dtype of weights; None: that which they have.
      error_type: type of the error to raise.

    Raises:
      SparseloraError: of that type: it holds no fractions, so that most weights would become 0.
    """
    if dtype is None:
        return
    try:
        is_floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # not a dtype at all
        is_floating = False
    if not is_floating:
        raise error_type(f'dtype {dtype!r}: expected a floating-point dtype such as float32 or bfloat16')


@functools.singledispatch
def dense_kernel(kernel: object, dtype: DTypeLike | None = None) -> Num[Array | np.ndarray, '*shape']:
    """Return a kernel of any kind as an array; a plain array is returned unchanged.

    A kind of kernel can register a function that is faster than its `unpack`: `@dense_kernel.register(Kind)`.

    Args:
      kernel: an array, or a packed or quantised kernel.
      dtype: dtype of the result; default: the kernel's dtype.
    """
    if is_packed(kernel):
        return kernel.unpack(dtype)
    return kernel if dtype is None else kernel.astype(dtype)


# On GPUs a Pallas kernel unpacks. The format itself does not depend on it.
@dense_kernel.register(Packed24)
def _dense_packed24(kernel: Packed24, dtype: DTypeLike | None = None) -> Num[Array, '*layers inputs outputs']:
    return dense24(kernel, dtype)


# `QArray` is qwix's class, so it cannot have our `unpack` method.
@dense_kernel.register(qwix.QArray)
def _dense_four_bits(kernel: qwix.QArray, dtype: DTypeLike | None = None) -> Num[Array, '*layers inputs outputs']:
    return dequantise(kernel).astype(dtype or kernel.dtype)


@dense_kernel.register(ReducedMatrix)
def _dense_reduced_matrix(kernel: ReducedMatrix, dtype: DTypeLike | None = None) -> Num[Array, '...']:
    return kernel.axes.from_matrix(dense_kernel(kernel.matrix, dtype), kernel.shape)


def dense_mask(
    mask: Bool[Array, '*layers inputs outputs'] | PackedMask | None, kernel: object
) -> Bool[Array, '*layers inputs outputs'] | None:
    """Return a mask as an array of booleans; None: the kernel has no mask.

    Args:
      mask: a mask of any kind; None: use the mask that a packed kernel stores.
      kernel: a kernel of any kind.
    """
    if isinstance(mask, PackedMask):
        return unpack_mask(mask)
    # A given mask takes precedence: it may keep fewer weights than the packed kernel's mask.
    if mask is None and (is_packed(kernel) or isinstance(kernel, ReducedMatrix)):
        return kernel.unpack_mask()
    return mask
