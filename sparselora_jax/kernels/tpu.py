"""x @ W and g @ W.T of a `Packed24`, for TPUs (Pallas, Mosaic).

The two values of a group lie in one word (bf16) or one byte (int4), and are unpacked there. Of each four inputs, 0 and
3 are one half, 1 and 2 the other. In the first half the first value, which is never at 3, and the second, never at 0,
have a side each: what stands there is a mask of the word. In the other half both can be on both sides: what is on its
own side, or that of the other, with the sides swapped. The result is dense, so the matrix unit does no more than for
dense weights. Inputs are put into this order, and back, outside the kernel.

int4 values go to the matrix unit as 24 + value, in which bf16 holds the four bits as they are; what the 24 add up to is
subtracted from the sum (transposed: from the weights, so that pruned ones give zero). Scales, one for 128 inputs of an
output, are applied in fp32: to sums of 128 inputs, or to g, which then is two numbers of bf16, nothing rounded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sparselora_jax.packing.packed24 import BYTE, SCALED, Packed24

STRIPS = (256, 128)  # outputs that are unpacked at a time: the matrix unit's width, or half of it
CHUNK = 2 * SCALED  # inputs whose positions fill a register
BIAS = 24  # of int4 values
WORK = 2**21  # weights of a step, about: each costs some 200 cycles of its own
WIDEST = 12288  # outputs that a step of the transposed product sums over
ROWS = 256
LARGEST = 2**22  # numbers of x in a tile

Halves = tuple[list[Array], list[Array]]  # of inputs: 0 and 3 of each four, and 1 and 2


class Tile(NamedTuple):
    """What one step of the grid reads: `rows` a multiple of 8, `inputs` of 256, `outputs` of 128."""

    rows: int
    inputs: int
    outputs: int


def takes(x: Array, packed: Packed24) -> bool:
    """Whether the kernels here read these: few rows of bf16, values of bf16 or int4, and whole registers of them."""
    bf16 = x.dtype == jnp.bfloat16 and (packed.scale is not None or packed.values.dtype == jnp.bfloat16)
    # All weights are unpacked again for each 256 rows. With more rows than these it takes less to unpack them once and
    # write them (by benchmarks/kernels.py: on v6e, and int4 on all).
    few = x.shape[0] <= (2 * ROWS if packed.scale is None else ROWS)
    return few and bf16 and packed.inputs % CHUNK == 0 and packed.shape[-1] % STRIPS[-1] == 0


def tile(rows: int, packed: Packed24, transposed: bool = False) -> Tile:
    """What to read at a time: all inputs of some outputs; transposed, a divisor of the outputs."""
    inputs, outputs = packed.shape
    strip = _strip(outputs)
    if transposed:
        strips = outputs // strip
        outputs = strip * max(count for count in range(1, min(strips, WIDEST // strip) + 1) if strips % count == 0)
        inputs = 2 * CHUNK if inputs % (2 * CHUNK) == 0 and 2 * CHUNK * outputs <= WORK else CHUNK
    else:
        outputs = min(outputs, max(WORK // inputs // strip, 1) * strip)
    most = min(ROWS, LARGEST // max(inputs, outputs) // 8 * 8)
    return Tile(min(-(-rows // 8) * 8, most), inputs, outputs)


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


def _dense(values_ref, positions_ref, chunk: int, strip) -> list[Array]:
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


def _strip(outputs: int) -> int:
    return next(strip for strip in STRIPS if outputs % strip == 0)


def _strips(outputs: int) -> list[Any]:
    strip = _strip(outputs)
    return [pl.ds(start, strip) for start in range(0, outputs, strip)]


def _forward_kernel(x_ref, values_ref, positions_ref, *refs):
    *scaled_refs, out_ref = refs
    width = SCALED if scaled_refs else CHUNK
    for strip in _strips(out_ref.shape[1]):
        total = jnp.zeros((x_ref.shape[0], strip.size), jnp.float32)
        if scaled_refs:
            sums_ref, scale_ref = scaled_refs
            scale = scale_ref[:, strip].astype(jnp.float32)
            total -= jnp.dot(sums_ref[...], scale, precision='highest', preferred_element_type=jnp.float32)
        for chunk in range(x_ref.shape[1] // CHUNK):
            for at, weights in enumerate(_dense(values_ref, positions_ref, chunk, strip), chunk * CHUNK // width):
                x = x_ref[:, pl.ds(at * width, width)]
                part = jnp.dot(x, weights, preferred_element_type=jnp.float32)
                total += part * scale[at : at + 1] if scaled_refs else part
        out_ref[:, strip] = total.astype(out_ref.dtype)


def _times_transposed(g: Array, weights: Array) -> Array:
    return jax.lax.dot_general(g, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _transposed_kernel(g_ref, values_ref, positions_ref, *refs):
    *scale_refs, out_ref, total_ref = refs
    rows, inputs = out_ref.shape
    width = SCALED if scale_refs else CHUNK
    totals = [jnp.zeros((rows, width), jnp.float32)] * (inputs // width)
    for strip in _strips(g_ref.shape[1]):
        g = g_ref[:, strip]
        for chunk in range(inputs // CHUNK):
            for at, weights in enumerate(_dense(values_ref, positions_ref, chunk, strip), chunk * CHUNK // width):
                if scale_refs:
                    scaled = g.astype(jnp.float32) * scale_refs[0][0, at : at + 1, strip].astype(jnp.float32)
                    both = _times_transposed(_in_two(scaled), weights - BIAS)
                    totals[at] += both[:rows] + both[rows:]
                else:
                    totals[at] += _times_transposed(g, weights)
    total = jnp.concatenate(totals, axis=1)
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total_ref[...] = total

    @pl.when(step > 0)
    def _():
        total_ref[...] += total

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _in_two(x: Array) -> Array:
    """Products of two bf16 as bf16, nothing rounded: the upper bits of all rows, then the lower ones."""
    upper = pltpu.bitcast(pltpu.bitcast(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.concatenate([upper, x - upper]).astype(jnp.bfloat16)


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


def matmul(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """`x @ W`, summed in fp32, in x's dtype."""
    x, rows = _filled(x, tile.rows), x.shape[0]
    arrays = [ordered(x, packed.scale is not None), packed.values, packed.positions]
    if packed.scale is not None:
        arrays += [BIAS * jnp.sum(x.reshape(x.shape[0], -1, SCALED), axis=2, dtype=jnp.float32), packed.scale]

    def of_rows(array):
        return pl.BlockSpec((tile.rows, array.shape[1]), lambda i, j: (i, 0))

    def of_outputs(array):
        return pl.BlockSpec((array.shape[0], tile.outputs), lambda i, j: (0, j))

    specs = of_rows, of_outputs, of_outputs, of_rows, of_outputs
    return pl.pallas_call(
        _forward_kernel,
        name='matmul24',
        grid=(x.shape[0] // tile.rows, pl.cdiv(packed.shape[1], tile.outputs)),
        in_specs=[spec(array) for spec, array in zip(specs, arrays, strict=False)],
        out_specs=pl.BlockSpec((tile.rows, tile.outputs), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], packed.shape[1]), x.dtype),
        compiler_params=_compiler_params('parallel', 'parallel'),
        interpret=interpret,
        cost_estimate=_cost(x, packed),
    )(*arrays)[:rows]


def matmul_transposed(
    g: Float[Array, 'rows outputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows inputs']:
    """`g @ W.T`, summed in fp32, in g's dtype."""
    g, rows = _filled(g, tile.rows), g.shape[0]
    inputs, outputs = packed.shape
    arrays = [g, packed.values, packed.positions]
    specs = [
        pl.BlockSpec((tile.rows, tile.outputs), lambda i, j, k: (i, k)),
        *(
            pl.BlockSpec((array.shape[0] * tile.inputs // inputs, tile.outputs), lambda i, j, k: (j, k))
            for array in arrays[1:]
        ),
    ]
    if packed.scale is not None:
        arrays.append(packed.scale.reshape(-1, tile.inputs // SCALED, outputs))
        specs.append(pl.BlockSpec((1, tile.inputs // SCALED, tile.outputs), lambda i, j, k: (j, 0, k)))
    found = pl.pallas_call(
        _transposed_kernel,
        name='matmul24_transposed',
        grid=(g.shape[0] // tile.rows, inputs // tile.inputs, outputs // tile.outputs),
        in_specs=specs,
        out_specs=pl.BlockSpec((tile.rows, tile.inputs), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((g.shape[0], inputs), g.dtype),
        scratch_shapes=[pltpu.VMEM((tile.rows, tile.inputs), jnp.float32)],
        compiler_params=_compiler_params('parallel', 'parallel', 'arbitrary'),
        interpret=interpret,
        cost_estimate=_cost(g, packed),
    )(*arrays)[:rows]
    return in_order(found, packed.scale is not None)


def _filled(x: Array, rows: int) -> Array:
    """With rows of zeros up to a tile's end."""
    return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))


def _compiler_params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=2**26)


def _cost(x: Array, packed: Packed24) -> pl.CostEstimate:
    (inputs, outputs), rows = packed.shape, x.shape[0]
    return pl.CostEstimate(
        flops=2 * rows * inputs * outputs,
        bytes_accessed=packed.nbytes + rows * (inputs + outputs) * x.dtype.itemsize,
        transcendentals=0,
    )
