"""Kernels in fewer bytes: sparse ones without their zeros (docs/formats.md), or dense ones in four bits."""

from sparselora_jax.sparse.packing.bitmask import (
    Bitmask,
    PackedMask,
    pack_bitmask,
    pack_mask,
    unpack_bitmask,
    unpack_mask,
)
from sparselora_jax.sparse.packing.errors import PackingError
from sparselora_jax.sparse.packing.pack import (
    FORMATS,
    is_packed,
    is_reduced,
    pack,
    pack_masks,
    quantise_masked,
    reduce_kernels,
    stack,
)
from sparselora_jax.sparse.packing.packed24 import Packed24, pack24
from sparselora_jax.sparse.packing.quantised import FOUR_BITS

__all__ = [
    'FORMATS',
    'FOUR_BITS',
    'Bitmask',
    'Packed24',
    'PackedMask',
    'PackingError',
    'is_packed',
    'is_reduced',
    'pack',
    'pack24',
    'pack_bitmask',
    'pack_mask',
    'pack_masks',
    'quantise_masked',
    'reduce_kernels',
    'stack',
    'unpack_bitmask',
    'unpack_mask',
]
