"""Packed weights as dense ones in the registers of a TPU, 256 inputs at a time: what tpu.py multiplies with.

The two values of a group lie in one word (bf16) or one byte (int4), and are unpacked there. Of each four inputs, 0 and
3 are one half, 1 and 2 the other. In the first half the first value, which is never at 3, and the second, never at 0,
have a side each: what stands there is a mask of the word. In the other half both can be on both sides: what is on its
own side, or that of the other, with the sides swapped. The result is dense, so the matrix unit does no more than for
dense weights. Inputs are put into this order, and back, outside the kernel.

int4 values become 24 + value, in which bf16 holds the four bits as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED

CHUNK = 2 * SCALED  # inputs whose positions fill a register
BIAS = 24  # of int4 values

Halves = tuple[list[Array], list[Array]]  # of inputs: 0 and 3 of each four, and 1 and 2


def _sublane(shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcasted_iota(jnp.uint32, shape, 0)


def _pick(rows: Array, index: Any) -> Array:
    return jnp.take_along_axis(rows, index.astype(jnp.int32), axis=0, mode='promise_in_bounds')


def _halves_of_bf16(values: Array, codes: Array) -> Halves:
    """The words of 128 inputs by half, `[8, outputs]` each.

    Args:
      values: a group's in a word, `[32, outputs]`.
      codes: eight groups' in a word, `[4, outputs]` twice.
    """
    at = _sublane(codes.shape)
    codes = codes >> (at >> 2) * 16  # the groups 0 to 3 of each eight, and below, the groups 4 to 7
    codes = codes & 0x3333 | (codes & 0xCCCC) << 14  # of the first value, and 16 bits on, of the second
    halves: Halves = ([], [])
    for row in range(4):
        word = values[8 * row : 8 * row + 8]
        both = _pick(codes, (at & 4) + row) >> (at & 3) * 4
        at1, at2 = both & 0x00010001, both & 0x00020002
        first, second = word & ((at1 << 16) - at1), word & ((at2 << 15) - (at2 >> 1))
        halves[0].append(word ^ first ^ second)
        halves[1].append(first | second << 16 | second >> 16)
    return halves


def _halves_of_int4(word: Array, codes: Array) -> Halves:
    """The same; four groups in a word, codes of four in the low half of a word, both `[8, outputs]`."""
    codes = (codes | codes << 8) & 0x00FF00FF
    codes = (codes | codes << 4) & 0x0F0F0F0F
    codes = codes | codes << 2  # of the first value, and 4 bits on, of the second
    at1, at2 = codes & 0x11111111, codes & 0x22222222
    first, second = word & ((at1 << 4) - at1), word & ((at2 << 3) - (at2 >> 1))
    halves = word ^ first ^ second, first | (second & 0x0F0F0F0F) << 4 | second >> 4 & 0x0F0F0F0F
    first, second = ([_biased(half, bits) for bits in range(0, 16, 4)] for half in halves)
    return first, second


def _biased(word: Array, at: int) -> Array:
    """Of each half of a word, the four bits from there, as bf16: of 16 to 31, bits 3 to 6 count ones."""
    bits = word << 3 if at == 0 else word >> at - 3
    return bits & 0x00780078 ^ 0x41C041C0  # 16, and the sign's bit the other way round: 24


def dense(values_ref, positions_ref, chunk: int, strip) -> list[Array]:
    """256 inputs of a strip as bf16, `[256, outputs]`; of int4, those of each scale, `[128, outputs]`."""
    rows = CHUNK // BYTE
    positions = pltpu.bitcast(positions_ref[pl.ds(rows * chunk, rows), strip], jnp.uint32)
    codes = positions ^ jnp.uint32(0xCCCCCCCC)  # 3 - place of the second value: both are at home where 0 is
    at = _sublane(codes.shape)
    rows = values_ref.shape[0] // positions_ref.shape[0] * rows
    values = jnp.split(pltpu.bitcast(values_ref[pl.ds(rows * chunk, rows), strip], jnp.uint32), 2)
    if values_ref.dtype == jnp.uint8:
        of_words = [_pick(codes, (at >> 1) + 4 * block) >> (at & 1) * 16 & 0xFFFF for block in (0, 1)]
        halves = [_halves_of_int4(words, code) for words, code in zip(values, of_words, strict=True)]
        return [pltpu.bitcast(jnp.concatenate([*first, *second]), jnp.bfloat16) for first, second in halves]
    halves = [_halves_of_bf16(words, _pick(codes, (at & 3) + 4 * block)) for block, words in enumerate(values)]
    return [pltpu.bitcast(jnp.concatenate([word for both in halves for half in both for word in half]), jnp.bfloat16)]


def ordered(x: Float[Array, 'rows inputs'], four_bits: bool) -> Float[Array, 'rows inputs']:
    """Inputs in the order of the unpacked weights' rows, 128 by 128."""
    rows = x.shape[0]
    groups = x.reshape(rows, -1, 4)
    halves = jnp.stack([groups[..., place] for place in (0, 3, 1, 2)], axis=-1)
    if four_bits:
        return halves.reshape(rows, -1, 8, 2, 2, 2, 2).transpose(0, 1, 5, 4, 6, 2, 3).reshape(x.shape)
    return halves.reshape(rows, -1, 32, 2, 2).transpose(0, 1, 3, 2, 4).reshape(x.shape)


def in_order(x: Float[Array, 'rows inputs'], four_bits: bool) -> Float[Array, 'rows inputs']:
    """The inverse of `ordered`."""
    rows = x.shape[0]
    if four_bits:
        halves = x.reshape(rows, -1, 2, 2, 2, 8, 2).transpose(0, 1, 5, 6, 3, 2, 4)
    else:
        halves = x.reshape(rows, -1, 2, 32, 2).transpose(0, 1, 3, 2, 4)
    groups = halves.reshape(rows, -1, 4)
    return jnp.stack([groups[..., at] for at in (0, 2, 3, 1)], axis=-1).reshape(x.shape)
