"""Packed weights as dense ones in the registers of a GPU: what gpu_kernels.py multiplies with.

Values come in words of 32 bits: of two-byte numbers two neighbouring outputs (lanes) lie in one, and masks place both
together, in a third of the instructions that comparing and selecting takes.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, UInt32

from sparselora_jax.packing.packed24 import BYTE


def unpacked(values: Sequence[Array], positions: Array, dtype, *, four_bits: bool, interpret: bool) -> Array:
    """The dense form of a tile, `[8 * octets, outputs]`; int4 values as numbers, not scaled.

    Args:
      values: words `[octets, words]`: of each octet's four values in turn, or bytes of two int4 ones.
      positions: a byte for each lane of a word, side by side.
    """
    return _matrix(placed(values, positions, dtype, four_bits=four_bits, interpret=interpret), dtype)


def placed(values: Sequence[Array], positions: Array, dtype, *, four_bits: bool, interpret: bool) -> list[Array]:
    """Of each octet input 0, input 1, ... and input 7: one matrix of words each."""
    values = _from_int4(values, dtype, interpret) if four_bits else values
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


def _ones_where(positions: UInt32[Array, 'octets words'], bit: int, dtype, interpret) -> UInt32[Array, 'octets words']:
    """All bits of a lane where this bit of its byte of positions is set; a word holds one byte a lane, side by side."""
    if dtype.itemsize == 4:
        return ((positions >> bit) & 1) * jnp.uint32(0xFFFFFFFF)
    return _ptx('prmt.b32 $0, $1, 0, 0x9988;', _signs, positions << (7 - bit), interpret)


def _signs(word: UInt32[Array, '*of']) -> UInt32[Array, '*of']:
    """What the instruction of `_ones_where` does: the sign of byte 0 in bytes 0 and 1, that of byte 1 in 2 and 3."""
    return ((word >> 7) & 1) * jnp.uint32(0xFFFF) | ((word >> 15) & 1) * jnp.uint32(0xFFFF0000)


def _from_int4(values: Sequence[Array], dtype, interpret) -> list[Array]:
    """Four bits of each byte as a float: the first and the second value of a group from one word.

    Without a conversion, which runs at a quarter of the rate: the bits, offset by 8, end a fraction.
    """
    words, found = [word.astype(jnp.uint32) for word in values], []
    for word in words:
        for high in (0, 4):
            if dtype.itemsize == 4:
                bits = (word >> high) & 15 ^ 0x4B000008  # 2**23 + 8
                value = jax.lax.bitcast_convert_type(bits, jnp.float32) - 8388616.0
                found.append(jax.lax.bitcast_convert_type(value, jnp.uint32))
            else:
                bits = ((word | word << 8) >> high) & 0x000F000F ^ 0x43084308  # 2**7 + 8
                found.append(_ptx(_MINUS_136, _minus_136, bits, interpret))
    return found


_MINUS_136 = (
    '{.reg .b32 one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; fma.rn.bf16x2 $0, $1, one, less;}'
)


def _minus_136(word: UInt32[Array, '*of']) -> UInt32[Array, '*of']:
    """What `_MINUS_136` does: both bf16 of a word, less 136."""
    low, high = (jax.lax.bitcast_convert_type(number - 136, jnp.uint32) for number in numbers(word, jnp.bfloat16.dtype))
    return low >> 16 | high & jnp.uint32(0xFFFF0000)


def _ptx(code: str, meaning: Callable[[Array], Array], word: Array, interpret: bool) -> UInt32[Array, '*of']:
    """One instruction where Triton finds several; an interpreter computes what it means."""
    if interpret:
        return meaning(word)
    shape = jax.ShapeDtypeStruct(word.shape, jnp.int32)  # Triton's integers have no sign
    (found,) = plgpu.elementwise_inline_asm(code, args=[word], constraints='=r,r', pack=1, result_shape_dtypes=[shape])
    return found.astype(jnp.uint32)


def _matrix(phases: Sequence[Array], dtype) -> Array:
    """`[8 * octets, outputs]` of the words of the eight inputs of each octet."""
    octets, words = phases[0].shape
    word = joined(phases).transpose(0, 2, 1).reshape(BYTE * octets, words)
    if dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(word, dtype)
    lanes = [jax.lax.bitcast_convert_type(half.astype(jnp.uint16), dtype) for half in (word, word >> 16)]
    return joined(lanes).reshape(BYTE * octets, 2 * words)


def numbers(word: UInt32[Array, '*of'], dtype) -> list[Array]:
    """The numbers of a word's lanes, in fp32."""
    if dtype.itemsize == 4:
        return [jax.lax.bitcast_convert_type(word, jnp.float32)]
    halves = word << 16, word & jnp.uint32(0xFFFF0000)
    return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]


def joined(arrays: Sequence[Array]) -> Array:
    """Stacked along a new last axis, by two at a time, as Triton can."""
    shape = *arrays[0].shape, len(arrays)
    while len(arrays) > 1:
        half = len(arrays) // 2
        arrays = [jnp.stack(pair, axis=-1) for pair in zip(arrays[:half], arrays[half:], strict=True)]
    return arrays[0].reshape(shape)
