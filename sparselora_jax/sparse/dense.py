"""Kernels and masks of any kind as plain arrays."""

import functools

import numpy as np
import qwix
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Num

from sparselora_jax.sparse.kernels.dense24 import dense24
from sparselora_jax.sparse.packing import Packed24, PackedMask, is_packed, is_reduced, unpack_mask
from sparselora_jax.sparse.packing.quantised import dequantise
from sparselora_jax.sparse.rules import flatten, unflatten


def unpack(params: dict, dtype: DTypeLike | None = None) -> dict:
    """Return params with plain kernels in the places of packed and quantised ones.

    Args:
      params: the params tree.
      dtype: of the kernels; by default that of the kernels they were packed from (of four bits: that of their scales).
    """
    flat = flatten(params)
    plain = {path: dense_kernel(leaf, dtype) for path, leaf in flat.items() if is_reduced(leaf)}
    return unflatten(flat | plain)


@functools.singledispatch
def dense_kernel(kernel: object, dtype: DTypeLike | None = None) -> Num[Array | np.ndarray, '*shape']:
    """Return a kernel of any kind as an array; other arrays are returned as they are.

    A kind of kernel that has a faster way than its own `unpack` registers it: `@dense_kernel.register(Kind)`.

    Args:
      kernel: an array, or a packed or quantised kernel.
      dtype: of the result; the kernel's own by default.
    """
    if is_packed(kernel):
        return kernel.unpack(dtype)
    return kernel if dtype is None else kernel.astype(dtype)


# On GPUs a kernel of its own unpacks, which formats do not know.
@dense_kernel.register(Packed24)
def _dense_packed24(kernel: Packed24, dtype: DTypeLike | None = None) -> Num[Array, '*layers inputs outputs']:
    return dense24(kernel, dtype)


# qwix's class, which cannot have a method of ours.
@dense_kernel.register(qwix.QArray)
def _dense_four_bits(kernel: qwix.QArray, dtype: DTypeLike | None = None) -> Num[Array, '*layers inputs outputs']:
    return dequantise(kernel).astype(dtype or kernel.dtype)


def dense_mask(
    mask: Bool[Array, '*layers inputs outputs'] | PackedMask | None, kernel: object
) -> Bool[Array, '*layers inputs outputs'] | None:
    """Return a mask as an array of booleans; None: the kernel has no mask.

    Args:
      mask: a mask of any kind; None where a packed kernel brings its own.
      kernel: a kernel of any kind.
    """
    if isinstance(mask, PackedMask):
        return unpack_mask(mask)
    # A mask that was given wins: it may be narrower than that of the packed kernel.
    if mask is None and is_packed(kernel):
        return kernel.unpack_mask()
    return mask
