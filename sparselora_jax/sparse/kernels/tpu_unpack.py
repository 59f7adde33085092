"""Unpacks weights in the registers of a TPU, 256 inputs at a time, for the kernels in tpu.py.

The two values of a group of four inputs share one word (bf16) or one byte (int4): the first in the low half, the second
in the high half. Unpacking writes inputs 0 and 3 of the group to one word or byte, and inputs 1 and 2 to another:

- The first value is never at 3, and the second never at 0. So in the word for 0 and 3 each value has its own half: this
  word is the packed word, masked.
- In the word for 1 and 2, each value may be in either half. Home is place 0 for the first value and 3 for the second. A
  value one place from home keeps its half. A value two places from home moves to the other half.

The result is dense, so the matrix unit does the same work as for dense weights. The rows of the result are not in input
order. `ordered` puts the inputs of x into the same order, outside the kernel, and `in_order` restores it in results.

int4 values become 24 + value, because in bf16 numbers from 16 to 31 four fraction bits count ones, so the value's four
bits can be copied.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED

CHUNK = 2 * SCALED  # inputs whose positions fill a register: 32 bytes, which are 8 sublanes of words
BIAS = 24  # added to int4 values

Halves = tuple[list[Array], list[Array]]  # words with inputs 0 and 3 of each four, and words with inputs 1 and 2


def _sublane(shape: tuple[int, ...]) -> UInt32[Array, 'sublanes outputs']:
    """Return the sublane index (row of a register) of each element."""
    return jax.lax.broadcasted_iota(jnp.uint32, shape, 0)


def _pick(rows: Array, index: UInt32[Array, 'sublanes outputs']) -> Array:
    """Gather rows within registers."""
    return jnp.take_along_axis(rows, index.astype(jnp.int32), axis=0, mode='promise_in_bounds')


def _halves_of_bf16(values: UInt32[Array, '32 outputs'], codes: UInt32[Array, '8 outputs']) -> Halves:
    """Unpack 128 inputs to words, in arrays of `[8, outputs]`.

    Args:
      values: words with the two values of a group.
      codes: words with the codes of eight groups (see `dense`). The four rows appear twice.
    """
    sublane = _sublane(codes.shape)
    # Of each eight groups, sublanes 0 to 3 use the codes of groups 0 to 3, sublanes 4 to 7 those of groups 4 to 7.
    codes = codes >> (sublane >> 2) * 16
    # The codes of first values stay in the low half of the word, those of second values move to the high half. So each
    # code is in the half of its value.
    codes = codes & 0x3333 | (codes & 0xCCCC) << 14
    halves: Halves = ([], [])
    for row in range(4):
        word = values[8 * row : 8 * row + 8]
        code = _pick(codes, (sublane & 4) + row) >> (sublane & 3) * 4
        bit0 = code & 0x00010001
        bit1 = code & 0x00020002
        # The differences are masks: all bits of a half are set if its code has the bit.
        one_from_home = word & ((bit0 << 16) - bit0)
        two_from_home = word & ((bit1 << 15) - (bit1 >> 1))
        halves[0].append(word ^ one_from_home ^ two_from_home)
        halves[1].append(one_from_home | two_from_home << 16 | two_from_home >> 16)
    return halves


def _halves_of_int4(word: UInt32[Array, '8 outputs'], codes: UInt32[Array, '8 outputs']) -> Halves:
    """Unpack 128 inputs to words of 24 + value in bf16, in arrays of `[8, outputs]`.

    Args:
      word: the values of four groups, one byte each.
      codes: the codes of the same four groups in the low half of a word (see `dense`).
    """
    # Spread the four codes of 4 bits over four bytes.
    codes = (codes | codes << 8) & 0x00FF00FF
    codes = (codes | codes << 4) & 0x0F0F0F0F
    # The codes of first values stay in the low half of a byte, those of second values move to the high half.
    codes = codes | codes << 2
    bit0 = codes & 0x11111111
    bit1 = codes & 0x22222222
    # As in `_halves_of_bf16`, with halves of four bits.
    one_from_home = word & ((bit0 << 4) - bit0)
    two_from_home = word & ((bit1 << 3) - (bit1 >> 1))
    inputs_0_3 = word ^ one_from_home ^ two_from_home
    inputs_1_2 = one_from_home | (two_from_home & 0x0F0F0F0F) << 4 | two_from_home >> 4 & 0x0F0F0F0F
    first, second = ([_biased(half, low_bit) for low_bit in range(0, 16, 4)] for half in (inputs_0_3, inputs_1_2))
    return first, second


def _biased(word: UInt32[Array, '8 outputs'], low_bit: int) -> UInt32[Array, '8 outputs']:
    """Convert a signed four-bit number in each half of a word to 24 + number in bf16.

    In bf16 numbers from 16 to 31, bits 3 to 6 count ones.
    """
    bits = word << 3 if low_bit == 0 else word >> low_bit - 3
    # 0x4180 is 16. Flipping the sign bit (0x0040) adds 8 to a signed four-bit number.
    return bits & 0x00780078 ^ 0x41C041C0


def dense(values_ref, positions_ref, chunk: int, strip: pl.Slice) -> list[Array]:
    """Unpack 256 inputs of some outputs to bf16.

    Args:
      values_ref: values in VMEM.
      positions_ref: positions in VMEM.
      chunk: index of the 256 inputs.
      strip: the outputs to unpack.

    Returns:
      One array `[256, outputs]`; for int4, two arrays `[128, outputs]`, one for each scale, whose weights are 24 too
      large.
    """
    octets = CHUNK // BYTE
    positions = pltpu.bitcast(positions_ref[pl.ds(octets * chunk, octets), strip], jnp.uint32)
    # A group's code has two bits with the place of the first value, and two with 3 - place of the second. Each is the
    # distance from home: 0, 1 or 2.
    codes = positions ^ jnp.uint32(0xCCCCCCCC)
    sublane = _sublane(codes.shape)
    rows = values_ref.shape[0] // positions_ref.shape[0] * octets
    values = jnp.split(pltpu.bitcast(values_ref[pl.ds(rows * chunk, rows), strip], jnp.uint32), 2)
    if values_ref.dtype == jnp.uint8:
        # A word of values has four groups, a word of codes has eight, so two sublanes share a word of codes.
        codes_of_blocks = [_pick(codes, (sublane >> 1) + 4 * block) >> (sublane & 1) * 16 & 0xFFFF for block in (0, 1)]
        halves = [_halves_of_int4(words, code) for words, code in zip(values, codes_of_blocks, strict=True)]
        return [pltpu.bitcast(jnp.concatenate([*first, *second]), jnp.bfloat16) for first, second in halves]
    halves = [_halves_of_bf16(words, _pick(codes, (sublane & 3) + 4 * block)) for block, words in enumerate(values)]
    return [pltpu.bitcast(jnp.concatenate([word for both in halves for half in both for word in half]), jnp.bfloat16)]


def ordered(x: Float[Array, 'rows inputs'], four_bits: bool) -> Float[Array, 'rows inputs']:
    """Put inputs into the order of the rows from `dense`, which differs within each 128 inputs.

    Args:
      x: inputs in their original order.
      four_bits: the order of int4 weights.
    """
    rows = x.shape[0]
    groups = x.reshape(rows, -1, 4)
    halves = jnp.stack([groups[..., place] for place in (0, 3, 1, 2)], axis=-1)
    if four_bits:
        # [rows, 128s, 8 words, 2 halves of a word, 2 groups, 2 halves, 2 places]
        # -> [rows, 128s, 2 halves, 2 groups, 2 places, 8 words, 2 halves of a word]
        return halves.reshape(rows, -1, 8, 2, 2, 2, 2).transpose(0, 1, 5, 4, 6, 2, 3).reshape(x.shape)
    # [rows, 128s, 32 groups, 2 halves, 2 places] -> [rows, 128s, 2 halves, 32 groups, 2 places]
    return halves.reshape(rows, -1, 32, 2, 2).transpose(0, 1, 3, 2, 4).reshape(x.shape)


def in_order(x: Float[Array, 'rows inputs'], four_bits: bool) -> Float[Array, 'rows inputs']:
    """Put inputs back into their original order: the inverse of `ordered`.

    Args:
      x: inputs in the order of `dense`.
      four_bits: the order of int4 weights.
    """
    rows = x.shape[0]
    if four_bits:
        halves = x.reshape(rows, -1, 2, 2, 2, 8, 2).transpose(0, 1, 5, 6, 3, 2, 4)
    else:
        halves = x.reshape(rows, -1, 2, 32, 2).transpose(0, 1, 3, 2, 4)
    groups = halves.reshape(rows, -1, 4)
    # Places 0, 3, 1, 2 become 0, 1, 2, 3.
    return jnp.stack([groups[..., index] for index in (0, 2, 3, 1)], axis=-1).reshape(x.shape)
