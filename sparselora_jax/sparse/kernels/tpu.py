"""x @ W and g @ W.T of a `Packed24`, for TPUs (Pallas, Mosaic). Weights are unpacked in registers by `tpu_unpack.py`.

int4 values are unpacked as 24 + value, and pruned weights as 24. So a product is too large by 24 times the sum of its
inputs. This is corrected in three ways:

- `x @ W`: the sum is computed outside the kernel and subtracted.
- `g @ W.T` with few rows: the kernel also multiplies g by a few extra inputs whose weights are all pruned, and
  subtracts the result. Pruned weights then give exactly zero. This costs the matrix unit as much as 128 inputs.
- `g @ W.T` with more rows: 24 is subtracted from the unpacked weights instead.

Each scale covers 128 inputs of an output, and is applied in fp32. For `x @ W` it multiplies the sums of 128 inputs, for
`g @ W.T` it multiplies g. The product of g and a scale is then split exactly into two bf16 numbers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparselora_jax.sparse.kernels.cost import cost
from sparselora_jax.sparse.kernels.reference import reference
from sparselora_jax.sparse.kernels.tpu_unpack import BIAS, CHUNK, dense, in_order, ordered
from sparselora_jax.sparse.packing.packed24 import SCALED, Packed24

STRIPS = (256, 128)  # outputs unpacked at a time: the width of the matrix unit, or half of it
WORK = 2**21  # target number of weights per grid step, since each step has an overhead of about 200 cycles
WIDEST = 12288  # most outputs that a step of the transposed product sums over
ROWS = 256  # most rows of a tile
FEW = 16  # up to this many rows, the transposed product subtracts the 24 of int4 values from the result
PRUNED = 8  # extra pruned inputs that g is multiplied by for that: the sublanes of a register
LARGEST = 2**22  # most elements of x in a tile


class Tile(NamedTuple):
    """The sizes of what one grid step reads.

    Attributes:
      rows: number of rows of x or g, a multiple of 8.
      inputs: number of inputs of W, a multiple of 256.
      outputs: number of outputs of W, a multiple of 128.
    """

    rows: int
    inputs: int
    outputs: int


def takes(dtype: DTypeLike, packed: Packed24) -> bool:
    """Return whether the kernels support these operands: x in bf16, values in bf16 or int4, in whole registers.

    Args:
      dtype: dtype of x.
      packed: W, or its shapes and dtypes.
    """
    is_bf16 = dtype == jnp.bfloat16 and (packed.scale is not None or packed.values.dtype == jnp.bfloat16)
    return is_bf16 and packed.inputs % CHUNK == 0 and packed.shape[-1] % STRIPS[-1] == 0


# Jitted, so that the body of a kernel is traced once per shape, not once per layer.
@functools.partial(jax.jit, static_argnames='transposed')
def product(x: Float[Array, 'rows m'], packed: Packed24, *, transposed: bool) -> Float[Array, 'rows n']:
    """Return `x @ W` or `x @ W.T`, summed in fp32, in x's dtype.

    Args:
      x: the rows to multiply.
      packed: W, one matrix.
      transposed: multiply with W.T.
    """
    rows = x.shape[0]
    # The kernels unpack all weights again for each 256 rows. With more rows it is faster to unpack them to memory once,
    # and let XLA multiply. (Limits from benchmarks/kernels.py: for v6e, and for int4 on all TPUs.)
    if rows > (2 * ROWS if packed.scale is None else ROWS):
        return reference(x, packed, transposed=transposed)
    multiply = matmul_transposed if transposed else matmul
    return multiply(x, packed, choose_tile(rows, packed, transposed))


def choose_tile(rows: int, packed: Packed24, transposed: bool) -> Tile:
    """Return what a step reads: all inputs of some outputs, or for `g @ W.T` some inputs and a divisor of the outputs.

    Args:
      rows: number of rows of x or g.
      packed: W.
      transposed: the product is `g @ W.T`.
    """
    inputs, outputs = packed.shape
    strip = _strip_width(outputs)
    if transposed:
        # With more inputs in a step, they share the one product with pruned weights.
        shares_pruned = packed.scale is not None and rows <= FEW
        strips = outputs // strip
        counts = range(1, min(strips, WIDEST // strip) + 1)
        outputs = strip * max(count for count in counts if strips % count == 0)
        fits_two_chunks = inputs % (2 * CHUNK) == 0 and (shares_pruned or 2 * CHUNK * outputs <= WORK)
        inputs = 2 * CHUNK if fits_two_chunks else CHUNK
    else:
        outputs = min(outputs, max(WORK // inputs // strip, 1) * strip)
    most_rows = min(ROWS, LARGEST // max(inputs, outputs) // 8 * 8)
    return Tile(min(-(-rows // 8) * 8, most_rows), inputs, outputs)


def _strip_width(outputs: int) -> int:
    return next(strip for strip in STRIPS if outputs % strip == 0)


def _strips(outputs: int) -> list[pl.Slice]:
    """Divide the outputs of a tile into strips, which are unpacked one at a time."""
    width = _strip_width(outputs)
    return [pl.ds(start, width) for start in range(0, outputs, width)]


def _forward_kernel(x_ref, values_ref, positions_ref, *refs):
    """Compute a tile of `x @ W`; for int4, `refs` begins with 24 times the sums of x, and the scales."""
    *int4_refs, out_ref = refs
    width = SCALED if int4_refs else CHUNK  # inputs that are multiplied at once
    for strip in _strips(out_ref.shape[1]):
        total = jnp.zeros((x_ref.shape[0], strip.size), jnp.float32)
        if int4_refs:
            sums_ref, scale_ref = int4_refs
            scale = scale_ref[:, strip].astype(jnp.float32)
            # The total contribution of the 24s is known in advance, so it is subtracted first, in fp32.
            total -= jnp.dot(sums_ref[...], scale, precision='highest', preferred_element_type=jnp.float32)
        for chunk in range(x_ref.shape[1] // CHUNK):
            for block, weights in enumerate(dense(values_ref, positions_ref, chunk, strip), chunk * CHUNK // width):
                x = x_ref[:, pl.ds(block * width, width)]
                part = jnp.dot(x, weights, preferred_element_type=jnp.float32)
                total += part * scale[block : block + 1] if int4_refs else part
        out_ref[:, strip] = total.astype(out_ref.dtype)


def _times_transposed(g: Array, weights: Array) -> Array:
    """Return `g @ weights.T` in fp32."""
    return jax.lax.dot_general(g, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _transposed_kernel(g_ref, values_ref, positions_ref, *refs):
    """Add a step to a tile of `g @ W.T`; `refs`: scales (int4 only), the output, and scratch for the sum."""
    *scale_refs, out_ref, total_ref = refs
    rows, inputs = out_ref.shape
    width = SCALED if scale_refs else CHUNK  # inputs that share a scaled g: scales change every 128 inputs
    blocks = inputs // width
    subtracts_from_result = bool(scale_refs) and rows <= FEW
    totals = [jnp.zeros((rows, width), jnp.float32)] * blocks
    pruned_totals = [jnp.zeros((rows, PRUNED), jnp.float32)] * blocks
    for strip in _strips(g_ref.shape[1]):
        gs = [g_ref[:, strip]] * blocks
        if scale_refs:
            scales = [scale_refs[0][0, block : block + 1, strip].astype(jnp.float32) for block in range(blocks)]
            gs = [_split_in_two(g.astype(jnp.float32) * scale) for g, scale in zip(gs, scales, strict=True)]
        if subtracts_from_result:
            # One product for all blocks, since a separate product would cost as much as 128 inputs each.
            parts = _times_transposed(jnp.concatenate(gs), jnp.full((PRUNED, strip.size), BIAS, gs[0].dtype))
            pruned_totals = [
                total + _add_two(part) for total, part in zip(pruned_totals, jnp.split(parts, blocks), strict=True)
            ]
        for chunk in range(inputs // CHUNK):
            for block, weights in enumerate(dense(values_ref, positions_ref, chunk, strip), chunk * CHUNK // width):
                subtracts_now = scale_refs and not subtracts_from_result
                part = _times_transposed(gs[block], weights - BIAS if subtracts_now else weights)
                totals[block] += _add_two(part) if scale_refs else part
    if subtracts_from_result:
        totals = [total - pruned[:, :1] for total, pruned in zip(totals, pruned_totals, strict=True)]
    total = jnp.concatenate(totals, axis=1)
    step = pl.program_id(2)

    # The last axis of the grid sums over outputs. The scratch keeps the sum between steps, in fp32.
    @pl.when(step == 0)
    def _():
        total_ref[...] = total

    @pl.when(step > 0)
    def _():
        total_ref[...] += total

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def _split_in_two(x: Array) -> Array:
    """Split each product of two bf16 numbers into two bf16 numbers with exactly the same sum.

    Returns:
      `[2 * rows, outputs]`: the upper bits of all rows, then the remaining bits of all rows.
    """
    # A product of two bf16 has 16 significant bits. Dropping the lower half of fp32 leaves 8, and the remainder has 8.
    upper = pltpu.bitcast(pltpu.bitcast(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.concatenate([upper, x - upper]).astype(jnp.bfloat16)


def _add_two(parts: Array) -> Array:
    """Add up the products of the two parts from `_split_in_two`."""
    upper, lower = jnp.split(parts, 2)
    return upper + lower


def matmul(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """Return `x @ W`, summed in fp32, in x's dtype.

    Args:
      x: the rows to multiply.
      packed: W, one matrix.
      tile: what a step reads, which includes all inputs.
      interpret: run the kernel by Pallas' interpreter.
    """
    rows = x.shape[0]
    x = _pad_rows(x, tile.rows)
    arrays = [ordered(x, packed.scale is not None), packed.values, packed.positions]
    if packed.scale is not None:
        sums = BIAS * jnp.sum(x.reshape(x.shape[0], -1, SCALED), axis=2, dtype=jnp.float32)
        arrays += [sums, packed.scale]

    def row_block(array):
        return pl.BlockSpec((tile.rows, array.shape[1]), lambda i, j: (i, 0))

    def output_block(array):
        return pl.BlockSpec((array.shape[0], tile.outputs), lambda i, j: (0, j))

    blocks = row_block, output_block, output_block, row_block, output_block  # the last two for int4 only
    return pl.pallas_call(
        _forward_kernel,
        name='matmul24',
        grid=(x.shape[0] // tile.rows, pl.cdiv(packed.shape[1], tile.outputs)),
        in_specs=[block(array) for block, array in zip(blocks, arrays, strict=False)],
        out_specs=pl.BlockSpec((tile.rows, tile.outputs), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], packed.shape[1]), x.dtype),
        compiler_params=_compiler_params('parallel', 'parallel'),
        interpret=interpret,
        cost_estimate=cost(x, packed),
    )(*arrays)[:rows]


def matmul_transposed(
    g: Float[Array, 'rows outputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows inputs']:
    """Return `g @ W.T`, summed in fp32, in g's dtype.

    Args:
      g: the rows to multiply.
      packed: W, one matrix.
      tile: what a step reads; its inputs and outputs divide those of W.
      interpret: run the kernel by Pallas' interpreter.
    """
    rows = g.shape[0]
    g = _pad_rows(g, tile.rows)
    inputs, outputs = packed.shape
    arrays = [g, packed.values, packed.positions]
    specs = [
        pl.BlockSpec((tile.rows, tile.outputs), lambda i, j, k: (i, k)),
        *(
            # Values and positions have fewer rows than W has inputs, so each block has proportionally fewer rows.
            pl.BlockSpec((array.shape[0] * tile.inputs // inputs, tile.outputs), lambda i, j, k: (j, k))
            for array in arrays[1:]
        ),
    ]
    if packed.scale is not None:
        # A tile may have fewer scales than a block's 8 sublanes, so the tiles get a separate axis.
        arrays.append(packed.scale.reshape(-1, tile.inputs // SCALED, outputs))
        specs.append(pl.BlockSpec((1, tile.inputs // SCALED, tile.outputs), lambda i, j, k: (j, 0, k)))
    out = pl.pallas_call(
        _transposed_kernel,
        name='matmul24_transposed',
        grid=(g.shape[0] // tile.rows, inputs // tile.inputs, outputs // tile.outputs),
        in_specs=specs,
        out_specs=pl.BlockSpec((tile.rows, tile.inputs), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((g.shape[0], inputs), g.dtype),
        scratch_shapes=[pltpu.VMEM((tile.rows, tile.inputs), jnp.float32)],
        compiler_params=_compiler_params('parallel', 'parallel', 'arbitrary'),  # the steps of a sum must run in order
        interpret=interpret,
        cost_estimate=cost(g, packed),
    )(*arrays)[:rows]
    return in_order(out, packed.scale is not None)


def _pad_rows(x: Array, tile_rows: int) -> Array:
    """Pad with rows of zeros to the end of the last tile."""
    return jnp.pad(x, ((0, -x.shape[0] % tile_rows), (0, 0)))


def _compiler_params(*semantics: str) -> pltpu.CompilerParams:
    """Return Mosaic's compiler parameters.

    Args:
      *semantics: semantics of each grid axis; 'parallel' axes may be divided among cores.
    """
    # Two buffers of the largest tile of x take 16 MiB alone, so the compiler is allowed 64 MiB.
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=2**26)
