"""Packed weights as dense ones in the registers of a GPU: what gpu_kernels.py multiplies with.

Values come in words of 32 bits: of two-byte numbers two neighbouring outputs (lanes) lie in one, and masks place both
together, in a third of the instructions that comparing and selecting takes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt, UInt32

from sparselora_jax.sparse.kernels import gpu_ptx
from sparselora_jax.sparse.packing.packed24 import BYTE


def unpacked(values: Sequence[Array], positions: Array, dtype, *, four_bits: bool, interpret: bool) -> Array:
    """The dense form of a tile, `[8 * octets, outputs]`; int4 values as numbers, not scaled.

    Args:
      values: words `[octets, words]`: of each octet's four values in turn, or of each group's two int4 ones, a byte a
        lane.
      positions: a byte for each lane of a word, side by side.
    """
    return _matrix(placed(values, positions, dtype, four_bits=four_bits, interpret=interpret), dtype)


def placed(values: Sequence[Array], positions: Array, dtype, *, four_bits: bool, interpret: bool) -> list[Array]:
    """Of each octet input 0, input 1, ... and input 7: one matrix of words each."""
    values = _from_int4(*values, dtype, interpret) if four_bits else values
    found = []
    for group in (0, 1):
        first, second = values[2 * group], values[2 * group + 1]
        first0, first1, second0, second1 = (
            _ones_where(positions, 4 * group + index, dtype, interpret) for index in range(4)
        )
        # The first value stands before the second: it is never at 3, the second never at 0.
        found.append(first & ~(first0 | first1))
        found.append(first & first0 | second & ~second1)
        found.append(first & first1 | second & ~second0)
        found.append(second & (second0 & second1))
    return found


def _ones_where(positions: UInt[Array, 'octets words'], bit: int, dtype, interpret) -> UInt32[Array, 'octets words']:
    """All bits of a lane where this bit of its byte of positions is set."""
    if dtype.itemsize == 4:
        return ((positions.astype(jnp.uint32) >> bit) & 1) * jnp.uint32(0xFFFFFFFF)
    return gpu_ptx.ones_where(positions, bit, interpret=interpret)


def _from_int4(even: Array, odd: Array, dtype, interpret) -> list[Array]:
    """The four values of an octet as floats, from the bytes of its two groups."""
    if dtype.itemsize == 4:  # as `gpu_ptx.int4_as_bf16`, behind 2**23
        words = [word.astype(jnp.uint32) >> high for word in (even, odd) for high in (0, 4)]
        numbers = [jax.lax.bitcast_convert_type(word & 15 ^ 0x4B000008, jnp.float32) for word in words]
        return [jax.lax.bitcast_convert_type(number - (2**23 + 8), jnp.uint32) for number in numbers]
    octets = gpu_ptx.side_by_side(even, odd, interpret=interpret)
    return [gpu_ptx.int4_as_bf16(octets >> at, interpret=interpret) for at in range(0, 16, 4)]


def _matrix(phases: Sequence[Array], dtype) -> Array:
    """`[8 * octets, outputs]` of the words of the eight inputs of each octet."""
    octets, words = phases[0].shape
    word = joined(phases).transpose(0, 2, 1).reshape(BYTE * octets, words)
    if dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(word, dtype)
    lanes = [jax.lax.bitcast_convert_type(half.astype(jnp.uint16), dtype) for half in (word, word >> 16)]
    return joined(lanes).reshape(BYTE * octets, 2 * words)


def joined(arrays: Sequence[Array]) -> Array:
    """Stacked along a new last axis, by two at a time, as Triton can."""
    shape = *arrays[0].shape, len(arrays)
    while len(arrays) > 1:
        half = len(arrays) // 2
        arrays = [jnp.stack(pair, axis=-1) for pair in zip(arrays[:half], arrays[half:], strict=True)]
    return arrays[0].reshape(shape)
