"""Single NVIDIA GPU (PTX) instructions where Triton would emit several, each beside its equivalent in jax.numpy.

Each function is elementwise. A word of 32 bits holds two 16-bit numbers from neighbouring outputs (lanes). Triton
keeps two elements of a 16-bit array in one register, so one instruction may serve both (`pack=2`).

Instructions: `prmt` selects four bytes from two registers by four hexadecimal digits, lowest byte first. The digit
d + 8 selects the sign of byte d, copied into all bits. `lop3` computes any bitwise function of three registers, given
by its truth table. `fma.rn.bf16x2` does two bf16 multiply-adds at once, each rounded once. (PTX ISA manual, sections
"prmt", "lop3", "fma".)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, BFloat16, Num, UInt16, UInt32


def numbers(word: UInt32[Array, '*of'], dtype) -> list[Array]:
    """Return the numbers in a word's lanes, in fp32.

    Args:
      word: one fp32 number, or two bf16 numbers, the first in the low half.
      dtype: fp32 or bf16, the dtype of the numbers.
    """
    if dtype.itemsize == 4:
        return [jax.lax.bitcast_convert_type(word, jnp.float32)]
    # bf16 is the upper half of fp32.
    halves = word << 16, word & jnp.uint32(0xFFFF0000)
    return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]


def ones_where(positions: UInt16[Array, '*of'], bit: int, *, interpret: bool) -> UInt32[Array, '*of']:
    """Return words in which a lane has all bits set if one bit of the lane's byte is set.

    Args:
      positions: a byte for each of two lanes.
      bit: index of the bit in the byte.
      interpret: compute by jax.numpy.
    """

    def meaning(positions):
        word = positions.astype(jnp.uint32) >> bit
        return (word & 1) * jnp.uint32(0xFFFF) | ((word >> 8) & 1) * jnp.uint32(0xFFFF0000)

    # The shift moves the bit to the sign position of its byte. `prmt` copies that sign into both bytes of a lane:
    # byte 0 (digit 8) and byte 1 (digit 9) for the first element, bytes 2 and 3 for the second.
    code = f'{{.reg .b32 sign; shl.b32 sign, $2, {7 - bit}; {_two_words("sign, 0", 0x9988, 0xBBAA)}}}'
    return _ptx(code, meaning, positions, pack=2, interpret=interpret)


def side_by_side(even: UInt16[Array, '*of'], odd: UInt16[Array, '*of'], *, interpret: bool) -> UInt32[Array, '*of']:
    """Return words with a byte of `even` and a byte of `odd` in each lane, the even one in the low half.

    Args:
      even: a byte for each of two lanes.
      odd: the same.
      interpret: compute by jax.numpy.
    """

    def meaning(*halves):
        even, odd = (word.astype(jnp.uint32) for word in halves)
        even, odd = (word & 0xFF | (word & 0xFF00) << 8 for word in (even, odd))
        return even | odd << 8

    # Bytes 0 to 3 are those of `even`, 4 to 7 those of `odd`.
    return _ptx(_two_words('$2, $3', 0x5140, 0x7362), meaning, even, odd, pack=2, interpret=interpret)


def int4_as_bf16(word: UInt32[Array, '*of'], *, interpret: bool) -> UInt32[Array, '*of']:
    """Return the lowest four bits of each lane, a signed number, as bf16.

    A conversion instruction runs at a quarter of the rate. Instead, the number plus 8 is put into the lowest fraction
    bits of 128 in bf16, where one step is 1. This gives 128 + 8 + number, from which 136 is subtracted.

    Args:
      word: other bits are ignored.
      interpret: compute by jax.numpy.
    """

    def meaning(word):
        # 0x4300 is 128 in bf16. Flipping bit 3 (0x0008) adds 8 to a signed four-bit number.
        bits = word & 0x000F000F ^ 0x43084308
        low, high = (jax.lax.bitcast_convert_type(lane - 136, jnp.uint32) for lane in numbers(bits, jnp.bfloat16.dtype))
        return low >> 16 | high

    # 0x6A is the truth table of (a & b) ^ c; 0x3F80 is 1 and 0xC308 is -136 in bf16.
    code = (
        '{.reg .b32 bits, one, less; lop3.b32 bits, $1, 0x000F000F, 0x43084308, 0x6A; '
        'mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; fma.rn.bf16x2 $0, bits, one, less;}'
    )
    return _ptx(code, meaning, word, interpret=interpret)


def product_in_two(
    x: BFloat16[Array, '*of'], y: BFloat16[Array, '*of'], *, interpret: bool
) -> tuple[BFloat16[Array, '*of'], BFloat16[Array, '*of']]:
    """Return two numbers whose sum is the exact product: the product rounded to bf16, and the remainder.

    Args:
      x: one factor.
      y: the other.
      interpret: compute by jax.numpy.
    """

    def nearest(x, y):
        return (x.astype(jnp.float32) * y.astype(jnp.float32)).astype(x.dtype)

    def rest(x, y, upper):
        return (x.astype(jnp.float32) * y.astype(jnp.float32) - upper.astype(jnp.float32)).astype(x.dtype)

    # sm_80 has no plain bf16 multiplication, so -0 (0x8000) is added, which changes nothing.
    code = '{.reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, $2, none;}'
    upper = _ptx(code, nearest, x, y, pack=2, interpret=interpret)
    # `xor` flips the signs. The fused multiply-add rounds once, after the subtraction.
    code = '{.reg .b32 less; xor.b32 less, $3, 0x80008000; fma.rn.bf16x2 $0, $1, $2, less;}'
    return upper, _ptx(code, rest, x, y, upper, pack=2, interpret=interpret)


def _two_words(operands: str, low: int, high: int) -> str:
    """Return PTX that builds one word for each of two elements that share a register."""
    return f'prmt.b32 $0, {operands}, {low:#x}; prmt.b32 $1, {operands}, {high:#x};'


def _ptx(code: str, meaning: Callable[..., Array], *args: Array, interpret: bool, pack: int = 1) -> Num[Array, '*of']:
    """Run the PTX code, or `meaning` in an interpreter.

    Args:
      code: PTX; `$0`, `$1`, ... are first the results, then the arguments.
      meaning: the same operation in jax.numpy.
      *args: arrays of one shape.
      interpret: compute `meaning`.
      pack: number of elements of an argument that share a register.
    """
    if interpret:
        return meaning(*args)
    out = jax.eval_shape(meaning, *args)
    registers = pack * out.dtype.itemsize // 4  # for `pack` elements of the result
    (result,) = plgpu.elementwise_inline_asm(
        code,
        args=[_signed(arg) for arg in args],
        constraints=','.join(['=r'] * registers + ['r'] * len(args)),
        pack=pack,
        result_shape_dtypes=[jax.eval_shape(_signed, out)],
    )
    return result.astype(out.dtype)


def _signed(array):
    """Convert unsigned integers to signed ones with the same bits, since Triton has no unsigned integers."""
    if not jnp.issubdtype(array.dtype, jnp.unsignedinteger):
        return array
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f'int{8 * array.dtype.itemsize}'))
