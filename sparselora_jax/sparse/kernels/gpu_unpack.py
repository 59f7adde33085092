"""Unpacks weights in the registers of a GPU, for the bodies in gpu_kernels.py.

Values come in words of 32 bits. Of 16-bit numbers two neighbouring outputs (lanes) lie in one word. Bit masks put both
lanes into place together, in a third of the instructions that comparing and selecting takes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt, UInt32

from sparselora_jax.sparse.kernels import gpu_ptx
from sparselora_jax.sparse.packing.packed24 import BYTE


def unpacked(values: Sequence[Array], positions: Array, dtype, *, four_bits: bool, interpret: bool) -> Array:
    """Return the dense form of a tile, `[8 * octets, outputs]`; int4 values as whole numbers without their scale.

    Args:
      values: words `[octets, words]`. Four arrays: the first and the second value of both groups of each octet. For
        int4 two arrays: the byte with both values of each group, one byte per lane.
      positions: words `[octets, words]` with a byte per lane.
      dtype: of the result, bf16 or fp32.
      four_bits: values are int4.
      interpret: replace PTX by jax.numpy.
    """
    return _matrix(placed(values, positions, dtype, four_bits=four_bits, interpret=interpret), dtype)


def placed(values: Sequence[Array], positions: Array, dtype, *, four_bits: bool, interpret: bool) -> list[Array]:
    """Return the words of input 0, input 1, ... and input 7 of each octet, `[octets, words]` each.

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
        # Masks by the bits of both positions: bit 0 and bit 1 of the first value's, then of the second value's.
        first0, first1, second0, second1 = (
            _ones_where(positions, 4 * group + bit, dtype, interpret) for bit in range(4)
        )
        # The first value stands before the second, so it is never at place 3, nor the second at place 0. One bit is
        # then enough to tell the places that are left: the first is at 1 where its bit 0 is set, at 2 where its bit 1
        # is, the second at 1 where its bit 1 is clear, at 2 where its bit 0 is clear.
        inputs.append(first & ~(first0 | first1))
        inputs.append(first & first0 | second & ~second1)
        inputs.append(first & first1 | second & ~second0)
        inputs.append(second & (second0 & second1))
    return inputs


def _ones_where(positions: UInt[Array, 'octets words'], bit: int, dtype, interpret) -> UInt32[Array, 'octets words']:
    """Return words with all bits of a lane set where this bit of the lane's byte of positions is set."""
    if dtype.itemsize == 4:
        return ((positions.astype(jnp.uint32) >> bit) & 1) * jnp.uint32(0xFFFFFFFF)
    return gpu_ptx.ones_where(positions, bit, interpret=interpret)


def _from_int4(even: Array, odd: Array, dtype, interpret) -> list[Array]:
    """Return the bits of the four values of an octet as floats, from the bytes of its even and its odd group."""
    if dtype.itemsize == 4:
        # As in `gpu_ptx.int4_as_bf16`, but in the fraction of 2**23 (0x4B000000), where a step of fp32 is 1.
        words = [word.astype(jnp.uint32) >> shift for word in (even, odd) for shift in (0, 4)]
        numbers = [jax.lax.bitcast_convert_type(word & 15 ^ 0x4B000008, jnp.float32) for word in words]
        return [jax.lax.bitcast_convert_type(number - (2**23 + 8), jnp.uint32) for number in numbers]
    # A lane then holds the four values of its octet, four bits each, and every shift brings one to the lowest bits.
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

    Triton joins two arrays at a time. So halves are paired until one array is left, whose trailing axes of 2 are then
    counted as one.

    Args:
      arrays: a power of two of them, of one shape.
    """
    shape = *arrays[0].shape, len(arrays)
    while len(arrays) > 1:
        # Pairs are half the list apart, so the first pairing makes the slowest axis, and the order is kept.
        half = len(arrays) // 2
        arrays = [jnp.stack(pair, axis=-1) for pair in zip(arrays[:half], arrays[half:], strict=True)]
    return arrays[0].reshape(shape)
