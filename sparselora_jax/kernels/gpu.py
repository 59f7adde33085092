"""x @ W and g @ W.T of a `Packed24`, for NVIDIA GPUs from Ampere on (Pallas, Triton).

A tile of packed weights is read once, its dense form is made in registers and multiplied at once: it is never in
memory. What is saved is bytes (0.5625x of bf16), not FLOPs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from sparselora_jax.kernels.cost import cost
from sparselora_jax.kernels.gpu_tiles import TILES
from sparselora_jax.kernels.gpu_unpack import joined, unpacked
from sparselora_jax.packing.packed24 import BYTE, SCALED, Packed24


class Tile(NamedTuple):
    """What one program reads and computes at a time: powers of two, rows and outputs at least 16, octets at least 2."""

    rows: int  # of x, or of g
    outputs: int
    octets: int  # eight inputs each, which share a byte of positions
    warps: int = 4
    stages: int = 3


def _tiles(packed: Packed24, transposed: bool) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """By most rows; they were chosen for bf16."""
    return TILES['transposed' if transposed else 'forward', 'values' if packed.scale is None else 'int4']


def takes(x: Array, packed: Packed24) -> bool:
    """Whether the kernels here read these: bf16 or fp32, x and values alike (int4 values fit both), even outputs."""
    same = packed.scale is not None or packed.values.dtype == x.dtype
    return same and x.dtype in (jnp.bfloat16, jnp.float32) and packed.shape[-1] % 2 == 0


def pays(rows: int, packed: Packed24, transposed: bool) -> bool:
    """Whether that is faster than to unpack all weights once, write them, and leave the product to XLA.

    With many rows FLOPs bind and not bytes; the table ends where, by benchmarks/tune.py.
    """
    return rows <= _tiles(packed, transposed)[-1][0]


def tile(rows: int, packed: Packed24, transposed: bool) -> Tile:
    """What to read at a time; of more rows than the kernels take, what the most of them read."""
    tiles = _tiles(packed, transposed)
    return Tile(*next((found for most, found in tiles if rows <= most), tiles[-1][1]))


class _Along(NamedTuple):
    """A run of an axis: where it lies, and which of it are not behind the axis' end; None: none can be."""

    at: Any
    fits: Array | None

    @classmethod
    def of(cls, index, size, end):
        fits = None if end % size == 0 else index * size + jnp.arange(size, dtype=jnp.int32) < end
        return cls(pl.ds(index * size, size), fits)


def _both(first: _Along, second: _Along, shape: tuple[int, int]) -> Array | None:
    masks = [
        None if along.fits is None else jnp.expand_dims(along.fits, axis) for along, axis in ((first, 1), (second, 0))
    ]
    known = [jnp.broadcast_to(mask, shape) for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, known) if known else None


def _load(ref, mask):
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _dense(packed_refs, step, octets: _Along, words: _Along, dtype, tile, interpret) -> Array:
    """The dense form of a tile, `[8 * octets, outputs]`; int4 values as numbers, not scaled.

    Args:
      step: of the loop that this stands in.
      words: outputs, in words of 32 bits (see `gpu_unpack`).
    """
    values_ref, positions_ref, *scale_ref = packed_refs
    fits = _both(octets, words, (tile.octets, tile.outputs // (4 // dtype.itemsize)))
    positions = _load(positions_ref.at[octets.at, words.at], fits).astype(jnp.uint32)
    planes = range(values_ref.shape[1])
    values = [_load(values_ref.at[octets.at, jnp.int32(plane), words.at], fits) for plane in planes]

    def make():
        return unpacked(values, positions, dtype, four_bits=bool(scale_ref), interpret=interpret)

    return _made(make, step, (BYTE * tile.octets, tile.outputs), dtype)


def _made(make: Callable[[], Array], step, shape, dtype) -> Array:
    """`make()`, in a branch that is always taken.

    Behind a join Triton halves the width in which it gives operands to the tensor core, and then sorts registers by
    moves, one for each of an operand's words. It does not see joins in a branch.
    """
    return jax.lax.cond(step >= 0, make, lambda: jnp.zeros(shape, dtype))


def _scales(packed_refs, octet, outputs: _Along) -> Float[Array, 'outputs']:
    """Of the 128 inputs that an octet is among."""
    return _load(packed_refs[2].at[octet // (SCALED // BYTE), outputs.at], outputs.fits)


class _Sizes(NamedTuple):
    rows: int
    inputs: int
    outputs: int
    octets: int


def _forward_kernel(x_ref, *refs, tile, sizes, interpret):
    *packed_refs, out_ref = refs
    lanes = 4 // x_ref.dtype.itemsize
    rows = _Along.of(pl.program_id(0), tile.rows, sizes.rows)
    words = _Along.of(pl.program_id(1), tile.outputs // lanes, sizes.outputs // lanes)
    outputs = _Along.of(pl.program_id(1), tile.outputs, sizes.outputs)

    def body(step, total):
        octets = _Along.of(step, tile.octets, sizes.octets)
        inputs = _Along.of(step, BYTE * tile.octets, sizes.inputs)
        x = _load(x_ref.at[rows.at, inputs.at], _both(rows, inputs, (tile.rows, BYTE * tile.octets)))
        part = plgpu.dot(x, _dense(packed_refs, step, octets, words, x_ref.dtype, tile, interpret))
        if len(packed_refs) == 2:
            return total + part
        return total + part * _scales(packed_refs, step * tile.octets, outputs).astype(jnp.float32)[None]

    first = jnp.zeros((tile.rows, tile.outputs), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(sizes.octets, tile.octets), body, first)
    fits = _both(rows, outputs, (tile.rows, tile.outputs))
    plgpu.store(out_ref.at[rows.at, outputs.at], total.astype(out_ref.dtype), mask=fits)


def _halves(product: Float[Array, 'rows outputs']) -> Float[Array, 'twice outputs']:
    """A product of two bf16 as the sum of two, which is exact: two rows for one."""
    high = product.astype(jnp.bfloat16)
    rest = (product - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return joined([high, rest]).transpose(0, 2, 1).reshape(-1, product.shape[1])


def _transposed_kernel(g_ref, *refs, tile, sizes, interpret):
    *packed_refs, out_ref = refs
    dtype, lanes = g_ref.dtype, 4 // g_ref.dtype.itemsize
    halves = lanes if len(packed_refs) == 3 else 1
    rows = _Along.of(pl.program_id(0), tile.rows, sizes.rows)
    block = pl.program_id(1)
    octets = _Along.of(block, tile.octets, sizes.octets)
    inputs = _Along.of(block, BYTE * tile.octets, sizes.inputs)

    def body(step, total):
        words = _Along.of(step, tile.outputs // lanes, sizes.outputs // lanes)
        outputs = _Along.of(step, tile.outputs, sizes.outputs)
        g = _load(g_ref.at[rows.at, outputs.at], _both(rows, outputs, (tile.rows, tile.outputs)))
        weights = _dense(packed_refs, step, octets, words, dtype, tile, interpret)
        if len(packed_refs) == 3:
            # Scales differ from output to output, along which is summed, so they go to g.
            scaled = (
                g.astype(jnp.float32) * _scales(packed_refs, block * tile.octets, outputs).astype(jnp.float32)[None]
            )
            in_two = functools.partial(_halves, scaled)
            g = _made(in_two, step, (2 * tile.rows, tile.outputs), dtype) if halves == 2 else scaled
        return total + plgpu.dot(g, weights, trans_b=True)

    first = jnp.zeros((halves * tile.rows, BYTE * tile.octets), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(sizes.outputs, tile.outputs), body, first)
    if halves == 2:
        total = jnp.sum(total.reshape(tile.rows, 2, BYTE * tile.octets), axis=1)
    fits = _both(rows, inputs, (tile.rows, BYTE * tile.octets))
    plgpu.store(out_ref.at[rows.at, inputs.at], total.astype(dtype), mask=fits)


def _as_words(array: Array, lanes: int, word: Any) -> Array:
    """Neighbouring outputs as one number."""
    array = array.reshape(*array.shape[:-1], -1, lanes) if lanes > 1 else array
    return jax.lax.bitcast_convert_type(array, word)


def _call(body, name, x, packed: Packed24, tile: Tile, grid, out_width: int, interpret) -> Array:
    if packed.scale is not None and tile.octets > SCALED // BYTE:
        raise ValueError(f'{tile}: int4 values have a scale for {SCALED // BYTE} octets')
    octets, outputs = packed.positions.shape
    lanes = 4 // x.dtype.itemsize
    bits = {1: jnp.uint8, 2: jnp.uint16}[lanes]
    values = _as_words(packed.values, lanes, jnp.uint32 if packed.scale is None else bits)
    arrays = [values.reshape(octets, -1, outputs // lanes), _as_words(packed.positions, lanes, bits)]
    if packed.scale is not None:
        arrays.append(packed.scale)
    out = jax.ShapeDtypeStruct((x.shape[0], out_width), x.dtype)
    sizes = _Sizes(x.shape[0], packed.inputs, outputs, octets)
    return pl.pallas_call(
        functools.partial(body, tile=tile, sizes=sizes, interpret=interpret),
        name=name,
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(arrays)),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=out,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=cost(x, packed),
    )(x, *arrays)


def matmul(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """`x @ W`, summed in fp32, in x's dtype."""
    outputs = packed.shape[-1]
    grid = pl.cdiv(x.shape[0], tile.rows), pl.cdiv(outputs, tile.outputs)
    return _call(_forward_kernel, 'matmul24', x, packed, tile, grid, outputs, interpret)


def matmul_transposed(
    g: Float[Array, 'rows outputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows inputs']:
    """`g @ W.T`, summed in fp32, in g's dtype."""
    grid = pl.cdiv(g.shape[0], tile.rows), pl.cdiv(packed.positions.shape[0], tile.octets)
    return _call(_transposed_kernel, 'matmul24_transposed', g, packed, tile, grid, packed.inputs, interpret)
