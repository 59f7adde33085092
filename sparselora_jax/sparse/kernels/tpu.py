"""x @ W and g @ W.T of a `Packed24`, for TPUs (Pallas, Mosaic); weights are unpacked in registers (`tpu_unpack.py`).

int4 values arrive as 24 + value: what the 24 add up to is subtracted from the sum. Transposed, that is the sum of an
input all of whose weights are pruned, multiplied and added up as the others', so that pruned ones give zero. It takes
the matrix unit as long as 128 inputs do: of more than a few rows the 24 are subtracted from the weights. Scales, one
for 128 inputs of an output, are applied in fp32: to sums of 128 inputs, or to g, which then is two numbers of bf16,
nothing rounded.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sparselora_jax.sparse.kernels.cost import cost
from sparselora_jax.sparse.kernels.reference import reference
from sparselora_jax.sparse.kernels.tpu_unpack import BIAS, CHUNK, dense, in_order, ordered
from sparselora_jax.sparse.packing.packed24 import SCALED, Packed24

STRIPS = (256, 128)  # outputs that are unpacked at a time: the matrix unit's width, or half of it
WORK = 2**21  # weights of a step, about: each costs some 200 cycles of its own
WIDEST = 12288  # outputs that a step of the transposed product sums over
ROWS = 256
FEW = 16  # rows up to which the transposed product is of int4 values with the 24
PRUNED = 8  # inputs of pruned weights alone that these are multiplied with: a register's
LARGEST = 2**22  # numbers of x in a tile


class Tile(NamedTuple):
    """What one step of the grid reads: `rows` a multiple of 8, `inputs` of 256, `outputs` of 128."""

    rows: int
    inputs: int
    outputs: int


def takes(dtype: Any, packed: Packed24) -> bool:
    """Whether the kernels here read these: x of bf16, values of bf16 or int4, and whole registers of them."""
    bf16 = dtype == jnp.bfloat16 and (packed.scale is not None or packed.values.dtype == jnp.bfloat16)
    return bf16 and packed.inputs % CHUNK == 0 and packed.shape[-1] % STRIPS[-1] == 0


@functools.partial(jax.jit, static_argnames='transposed')  # a kernel's body is traced once for a shape
def product(x: Float[Array, 'rows m'], packed: Packed24, *, transposed: bool) -> Float[Array, 'rows n']:
    """`x @ W` or `x @ W.T`, summed in fp32, in x's dtype.

    The kernels unpack all weights again for each 256 rows. Of more rows than here it is faster to unpack them once,
    write them, and leave the product to XLA (limits by benchmarks/kernels.py: of v6e, and int4's of all).
    """
    rows = x.shape[0]
    if rows > (2 * ROWS if packed.scale is None else ROWS):
        return reference(x, packed, transposed=transposed)
    return (matmul_transposed if transposed else matmul)(x, packed, tile(rows, packed, transposed))


def tile(rows: int, packed: Packed24, transposed: bool) -> Tile:
    """What to read at a time: all inputs of some outputs; transposed, a divisor of the outputs."""
    inputs, outputs = packed.shape
    strip = _strip(outputs)
    if transposed:
        few = packed.scale is not None and rows <= FEW  # more inputs then share the product with pruned weights
        strips = outputs // strip
        outputs = strip * max(count for count in range(1, min(strips, WIDEST // strip) + 1) if strips % count == 0)
        inputs = 2 * CHUNK if inputs % (2 * CHUNK) == 0 and (few or 2 * CHUNK * outputs <= WORK) else CHUNK
    else:
        outputs = min(outputs, max(WORK // inputs // strip, 1) * strip)
    most = min(ROWS, LARGEST // max(inputs, outputs) // 8 * 8)
    return Tile(min(-(-rows // 8) * 8, most), inputs, outputs)


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
            for at, weights in enumerate(dense(values_ref, positions_ref, chunk, strip), chunk * CHUNK // width):
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
    blocks = inputs // width
    biased = bool(scale_refs) and rows <= FEW
    totals = [jnp.zeros((rows, width), jnp.float32)] * blocks
    pruned = [jnp.zeros((rows, PRUNED), jnp.float32)] * blocks
    for strip in _strips(g_ref.shape[1]):
        gs = [g_ref[:, strip]] * blocks
        if scale_refs:
            scales = [scale_refs[0][0, at : at + 1, strip].astype(jnp.float32) for at in range(blocks)]
            gs = [_in_two(g.astype(jnp.float32) * scale) for g, scale in zip(gs, scales, strict=True)]
        if biased:
            found = _times_transposed(jnp.concatenate(gs), jnp.full((PRUNED, strip.size), BIAS, gs[0].dtype))
            pruned = [total + _of_two(two) for total, two in zip(pruned, jnp.split(found, blocks), strict=True)]
        for chunk in range(inputs // CHUNK):
            for at, weights in enumerate(dense(values_ref, positions_ref, chunk, strip), chunk * CHUNK // width):
                found = _times_transposed(gs[at], weights - BIAS if scale_refs and not biased else weights)
                totals[at] += _of_two(found) if scale_refs else found
    if biased:
        totals = [total - none[:, :1] for total, none in zip(totals, pruned, strict=True)]
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


def _of_two(found: Array) -> Array:
    """What was multiplied in two, added up."""
    upper, lower = jnp.split(found, 2)
    return upper + lower


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
        cost_estimate=cost(x, packed),
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
        cost_estimate=cost(g, packed),
    )(*arrays)[:rows]
    return in_order(found, packed.scale is not None)


def _filled(x: Array, rows: int) -> Array:
    """With rows of zeros up to a tile's end."""
    return jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))


def _compiler_params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=2**26)
