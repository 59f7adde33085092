"""Unpacks weights in the registers of a GPU, for the bodies in gpu_kernels.py.

Values are read in words of 32 bits. A word holds two neighbouring outputs (lanes) of 16-bit numbers. Bit masks place
both lanes together, with a third of the instructions of compare and select.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt, UInt32

from sparselora_jax.sparse.kernels import gpu_ptx
from sparselora_jax.sparse.packing.packed24 import BYTE


def unpacked(values: Sequence[Array], positions: Array, dtype, *, four_bits: bool, interpret: bool) -> Array:
    """Return the dense form of a tile, `[8 * octets, outputs]`; int4 values become unscaled integers.

    Args:
      values: words `[octets, words]`. Four arrays: the first and the second value of both groups of each octet. For
        int4 two arrays: the byte with both values of each group, one byte per lane.
      positions: words `[octets, words]` with a byte per lane.
      dtype: dtype of the result, bf16 or fp32.
      four_bits: values are int4.
      interpret: replace PTX by jax.numpy.
    """
    return _matrix(placed(values, positions, dtype, four_bits=four_bits, interpret=interpret), dtype)


def placed(values: Sequence[Array], positions: Array, dtype, *, four_bits: bool, interpret: bool) -> list[Array]:
    """Return the words of inputs 0 to 7 of each octet, as eight arrays `[octets, words]`.

    Args:
      values: see `unpacked`.
      positions: see `unpacked`.
      dtype: see `unpacked`.
      four_bits: see `unpacked`.
      interpret: see `unpacked`.
    """
    values = _from_int4(*values, dtype, interpret) if four_bits else values
    inputs = []
    for group in (0, 1):
        first = values[2 * group]
        second = values[2 * group + 1]
        # Masks from the bits of both positions: bits 0 and 1 of the first value's place, then of the second's.
        first0, first1, second0, second1 = (
            _ones_where(positions, 4 * group + bit, dtype, interpret) for bit in range(4)
        )
        # The first value is before the second, so it is never at place 3, and the second never at place 0. So one bit
        # is enough to identify places 1 and 2. The first value is at 1 if its bit 0 is set, at 2 if its bit 1 is
        # set. The second is at 1 if its bit 1 is clear, at 2 if its bit 0 is clear.
        inputs.append(first & ~(first0 | first1))
        inputs.append(first & first0 | second & ~second1)
        inputs.append(first & first1 | second & ~second0)
        inputs.append(second & (second0 & second1))
    return inputs


def _ones_where(positions: UInt[Array, 'octets words'], bit: int, dtype, interpret) -> UInt32[Array, 'octets words']:
    """Return words in which a lane has all bits set if this bit of its byte of positions is set."""
    if dtype.itemsize == 4:
        return ((positions.astype(jnp.uint32) >> bit) & 1) * jnp.uint32(0xFFFFFFFF)
    return gpu_ptx.ones_where(positions, bit, interpret=interpret)


def _from_int4(even: Array, odd: Array, dtype, interpret) -> list[Array]:
    """Convert the four int4 values of an octet to the bits of floats, from the bytes of its even and odd group."""
    if dtype.itemsize == 4:
        # As in `gpu_ptx.int4_as_bf16`, but in the fraction bits of 2**23 (0x4B000000), where one step of fp32 is 1.
        words = [word.astype(jnp.uint32) >> shift for word in (even, odd) for shift in (0, 4)]
        numbers = [jax.lax.bitcast_convert_type(word & 15 ^ 0x4B000008, jnp.float32) for word in words]
        return [jax.lax.bitcast_convert_type(number - (2**23 + 8), jnp.uint32) for number in numbers]
    # A lane now holds the four values of its octet, four bits each. Each shift moves one to the lowest bits.
    octets = gpu_ptx.side_by_side(even, odd, interpret=interpret)
    return [gpu_ptx.int4_as_bf16(octets >> shift, interpret=interpret) for shift in range(0, 16, 4)]


def _matrix(inputs: Sequence[Array], dtype) -> Array:
    """Return `[8 * octets, outputs]` from the words of the eight inputs of each octet."""
    octets, words = inputs[0].shape
    word = joined(inputs).transpose(0, 2, 1).reshape(BYTE * octets, words)  # [octets, words, 8] -> [inputs, words]
    if dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(word, dtype)
    lanes = [jax.lax.bitcast_convert_type(half.astype(jnp.uint16), dtype) for half in (word, word >> 16)]
    return joined(lanes).reshape(BYTE * octets, 2 * words)


def joined(arrays: Sequence[Array]) -> Array:
    """Stack arrays along a new last axis.

    Triton joins two arrays at a time. So halves are joined pairwise until one array is left, and its trailing axes of
    size 2 are merged into one.

    Args:
      arrays: arrays of one shape; their number is a power of two.
    """
    shape = *arrays[0].shape, len(arrays)
    while len(arrays) > 1:
        # Pairs are half the list apart. So the first join creates the slowest axis, which keeps the order.
        half = len(arrays) // 2
        arrays = [jnp.stack(pair, axis=-1) for pair in zip(arrays[:half], arrays[half:], strict=True)]
    return arrays[0].reshape(shape)
