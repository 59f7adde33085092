"""Kernels and masks of any kind as plain arrays."""

from typing import Any

import qwix

from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse.kernels.dense24 import dense24
from sparselora_jax.sparse.packing import Bitmask, Packed24, PackedMask, is_reduced, unpack_bitmask, unpack_mask
from sparselora_jax.sparse.packing.packed24 import mask24
from sparselora_jax.sparse.packing.quantised import dequantise


def unpack(params: dict, dtype: Any = None) -> dict:
    """Params with plain kernels in the places of packed and quantised ones.

    Args:
      dtype: of the kernels; what they were packed from by default (of four bits: that of their scales).
    """
    flat = rules_lib.flatten(params)
    plain = {path: dense_kernel(leaf, dtype) for path, leaf in flat.items() if is_reduced(leaf)}
    return rules_lib.unflatten(flat | plain)


def dense_kernel(kernel: Any, dtype: Any = None) -> Any:
    """A kernel of any kind as an array."""
    if isinstance(kernel, Packed24):
        return dense24(kernel, dtype)
    if isinstance(kernel, qwix.QArray):
        return dequantise(kernel).astype(dtype or kernel.dtype)
    if isinstance(kernel, Bitmask):
        kernel = unpack_bitmask(kernel)
    return kernel if dtype is None else kernel.astype(dtype)


def dense_mask(mask: Any, kernel: Any) -> Any:
    """A mask as an array of booleans: of any kind, or None, where a packed kernel brings its own."""
    if isinstance(mask, PackedMask):
        return unpack_mask(mask)
    if mask is None and isinstance(kernel, Packed24):
        return mask24(kernel)
    if mask is None and isinstance(kernel, Bitmask):
        return unpack_mask(kernel.mask)
    return mask
