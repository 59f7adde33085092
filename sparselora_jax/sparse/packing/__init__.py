"""Compact kernel formats: sparse kernels without their zeros (docs/formats.md), or dense kernels in four bits."""

from sparselora_jax.sparse.packing.as_matrix import ReducedMatrix
from sparselora_jax.sparse.packing.bitmask import (
    Bitmask,
    BitmaskFormat,
    PackedMask,
    pack_bitmask,
    pack_mask,
    unpack_bitmask,
    unpack_mask,
)
from sparselora_jax.sparse.packing.format import (
    FORMATS,
    PackedFormat,
    PackedKernel,
    PackingError,
    RoundingFormat,
    Stored,
    find_format,
    format_for,
    is_packed,
    rounding_formats,
)
from sparselora_jax.sparse.packing.pack import (
    is_reduced,
    pack,
    pack_masks,
    reduce_kernels,
    reduce_shapes,
    stack,
)
from sparselora_jax.sparse.packing.packed24 import Packed24, Packed24Format, pack24
from sparselora_jax.sparse.packing.quantised import FOUR_BITS, FourBitFormat

# All formats, the most specific first: `format_for` returns the first one that accepts a pattern.
FORMATS.register('packed24', Packed24Format())
FORMATS.register('packed24_int4', Packed24Format(four_bits=True))
FORMATS.register('bitmask', BitmaskFormat())
FORMATS.register('int4', FourBitFormat('int4'))
FORMATS.register('nf4', FourBitFormat('nf4'))

__all__ = [
    'FORMATS',
    'FOUR_BITS',
    'Bitmask',
    'Packed24',
    'PackedFormat',
    'PackedKernel',
    'PackedMask',
    'PackingError',
    'ReducedMatrix',
    'RoundingFormat',
    'Stored',
    'find_format',
    'format_for',
    'is_packed',
    'is_reduced',
    'pack',
    'pack24',
    'pack_bitmask',
    'pack_mask',
    'pack_masks',
    'reduce_kernels',
    'reduce_shapes',
    'rounding_formats',
    'stack',
    'unpack_bitmask',
    'unpack_mask',
]
