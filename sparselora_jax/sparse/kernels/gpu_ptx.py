"""Instructions of NVIDIA GPUs where Triton would find several, beside what they mean in jax.numpy.

Each function is elementwise. Two numbers of 16 bits, neighbouring outputs (lanes), lie in a word of 32; of arrays of 16
bits two elements lie in a register, and one instruction may serve both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Num, UInt16, UInt32


def numbers(word: UInt32[Array, '*of'], dtype) -> list[Array]:
    """The numbers of a word's lanes, in fp32."""
    if dtype.itemsize == 4:
        return [jax.lax.bitcast_convert_type(word, jnp.float32)]
    halves = word << 16, word & jnp.uint32(0xFFFF0000)
    return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]


def ones_where(positions: UInt16[Array, '*of'], bit: int, *, interpret: bool) -> UInt32[Array, '*of']:
    """All bits of a lane of a word where this bit of a byte is set."""

    def meaning(positions):
        word = positions.astype(jnp.uint32) >> bit
        return (word & 1) * jnp.uint32(0xFFFF) | ((word >> 8) & 1) * jnp.uint32(0xFFFF0000)

    # The bit becomes the sign of its byte, which `prmt` copies into both bytes of a lane.
    code = f'{{.reg .b32 sign; shl.b32 sign, $2, {7 - bit}; {_two_words("sign, 0", 0x9988, 0xBBAA)}}}'
    return _ptx(code, meaning, positions, pack=2, interpret=interpret)


def side_by_side(even: UInt16[Array, '*of'], odd: UInt16[Array, '*of'], *, interpret: bool) -> UInt32[Array, '*of']:
    """A byte of `even` and one of `odd` in each lane of a word."""

    def meaning(*halves):
        even, odd = (word.astype(jnp.uint32) for word in halves)
        even, odd = (word & 0xFF | (word & 0xFF00) << 8 for word in (even, odd))
        return even | odd << 8

    return _ptx(_two_words('$2, $3', 0x5140, 0x7362), meaning, even, odd, pack=2, interpret=interpret)


def int4_as_bf16(word: UInt32[Array, '*of'], *, interpret: bool) -> UInt32[Array, '*of']:
    """The lowest four bits of each lane, which are a signed number, as bf16.

    Without a conversion, which runs at a quarter of the rate: offset by 8 they end the fraction of 2**7.
    """

    def meaning(word):
        bits = word & 0x000F000F ^ 0x43084308
        low, high = (jax.lax.bitcast_convert_type(lane - 136, jnp.uint32) for lane in numbers(bits, jnp.bfloat16.dtype))
        return low >> 16 | high

    code = (
        '{.reg .b32 bits, one, less; lop3.b32 bits, $1, 0x000F000F, 0x43084308, 0x6A; '
        'mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; fma.rn.bf16x2 $0, bits, one, less;}'
    )
    return _ptx(code, meaning, word, interpret=interpret)


def product_in_two(
    x: BFloat16[Array, '*of'], y: BFloat16[Array, '*of'], *, interpret: bool
) -> tuple[BFloat16[Array, '*of'], BFloat16[Array, '*of']]:
    """Two numbers whose sum is the product, nothing rounded: the product in bf16, and what that leaves."""

    def nearest(x, y):
        return (x.astype(jnp.float32) * y.astype(jnp.float32)).astype(x.dtype)

    def rest(x, y, upper):
        return (x.astype(jnp.float32) * y.astype(jnp.float32) - upper.astype(jnp.float32)).astype(x.dtype)

    code = '{.reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, $2, none;}'  # sm_80 has no product alone
    upper = _ptx(code, nearest, x, y, pack=2, interpret=interpret)
    code = '{.reg .b32 less; xor.b32 less, $3, 0x80008000; fma.rn.bf16x2 $0, $1, $2, less;}'
    return upper, _ptx(code, rest, x, y, upper, pack=2, interpret=interpret)


def _two_words(operands: str, low: int, high: int) -> str:
    """A word for each of two elements that share a register."""
    return f'prmt.b32 $0, {operands}, {low:#x}; prmt.b32 $1, {operands}, {high:#x};'


def _ptx(code: str, meaning: Callable[..., Array], *args: Array, interpret: bool, pack: int = 1) -> Num[Array, '*of']:
    """What the code computes, or an interpreter, by what it means.

    Args:
      pack: elements of an argument that share a register.
    """
    if interpret:
        return meaning(*args)
    out = jax.eval_shape(meaning, *args)
    registers = pack * out.dtype.itemsize // 4
    (found,) = plgpu.elementwise_inline_asm(
        code,
        args=[_signed(arg) for arg in args],
        constraints=','.join(['=r'] * registers + ['r'] * len(args)),
        pack=pack,
        result_shape_dtypes=[jax.eval_shape(_signed, out)],
    )
    return found.astype(out.dtype)


def _signed(array: Array) -> Any:
    """As Triton has integers."""
    if not jnp.issubdtype(array.dtype, jnp.unsignedinteger):
        return array
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f'int{8 * array.dtype.itemsize}'))
