"""x @ W and g @ W.T of a `Packed24`, for NVIDIA GPUs from Ampere on (Pallas, Triton).

A tile of packed weights is read once. Eight inputs share a byte of positions, an octet; the eight phases of a tile
(input 0 of every octet, input 1, ...) are made in registers, each for a product of its own with the same inputs of x.
The dense tile is never in memory: what is saved is bytes (0.5625x of bf16), not FLOPs.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from sparselora_jax.packing.packed24 import BYTE, SCALED, Packed24


class Tile(NamedTuple):
    """What one program reads and computes at a time: powers of two, at least 16 each."""

    rows: int  # of x, or of g
    outputs: int
    octets: int  # of inputs
    warps: int = 4
    stages: int = 3


def takes(x: Array, packed: Packed24) -> bool:
    """Whether the kernels here read these: bf16 or fp32, x and values alike (int4 values fit both), even outputs."""
    same = packed.scale is not None or packed.values.dtype == x.dtype
    return same and x.dtype in (jnp.bfloat16, jnp.float32) and packed.shape[-1] % 2 == 0


def tile(rows: int) -> Tile:
    """What to read at a time."""
    return Tile(rows=16 if rows <= 16 else 64, outputs=64, octets=16)


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


def _phases(packed_refs, octets: _Along, outputs: _Along, dtype, tile) -> Iterator[tuple[Array, ...]]:
    """The eight phases of a tile, each as one matrix `[octets, outputs]` a lane; int4 values as numbers, not scaled.

    Values are words of 32 bits: of two-byte numbers two neighbouring outputs (lanes) lie in one, and are placed
    together by masks, in a third of the instructions that comparing and selecting takes.
    """
    values_ref, positions_ref, *scale_ref = packed_refs
    lanes = 4 // dtype.itemsize
    fits = _both(octets, outputs, (tile.octets, tile.outputs // lanes))
    positions = _load(positions_ref.at[octets.at, outputs.at], fits).astype(jnp.uint32)
    words = [
        _load(values_ref.at[octets.at, jnp.int32(plane), outputs.at], fits) for plane in range(values_ref.shape[1])
    ]
    if scale_ref:
        words = [_from_int4(word.astype(jnp.uint32), high, lanes) for word in words for high in (0, 4)]
    if lanes == 2:
        positions = positions & 0xFF | (positions & 0xFF00) << 8

    def bit(index):
        """All bits of a lane where this bit of its positions is set."""
        ones = (positions >> index) & (0x00010001 if lanes == 2 else 1)
        return ones * jnp.uint32(0xFFFF if lanes == 2 else 0xFFFFFFFF)

    for group in (0, 1):
        first, second = words[2 * group], words[2 * group + 1]
        first0, first1, second0, second1 = (bit(4 * group + index) for index in range(4))
        # The first value stands before the second: it is never at 3, the second never at 0.
        yield _lanes(first & ~(first0 | first1), dtype)
        yield _lanes(first & first0 | second & ~second1, dtype)
        yield _lanes(first & first1 | second & ~second0, dtype)
        yield _lanes(second & (second0 & second1), dtype)


def _lanes(word: Array, dtype) -> tuple[Array, ...]:
    """The numbers of a word, one matrix a lane."""
    if dtype.itemsize == 4:
        return (jax.lax.bitcast_convert_type(word, dtype),)
    halves = word.astype(jnp.uint16), (word >> 16).astype(jnp.uint16)
    return tuple(jax.lax.bitcast_convert_type(half, dtype) for half in halves)


def _from_int4(word: Array, high: int, lanes: int) -> Array:
    """Four bits of each byte as a float, in words of `lanes` floats.

    Without a conversion, which runs at a quarter of the rate: the bits, offset by 8, end the fraction of 2**23.
    """
    floats = []
    for lane in range(lanes):
        bits = (word >> (8 * lane + high)) & 15 ^ 8 | 0x4B000000
        floats.append(jax.lax.bitcast_convert_type(bits, jnp.float32) - 8388616.0)
    bits = [jax.lax.bitcast_convert_type(value, jnp.uint32) for value in floats]
    return (
        bits[0] if lanes == 1 else bits[0] >> 16 | bits[1] & jnp.uint32(0xFFFF0000)
    )  # of small integers bf16 cuts zeros


def _scales(packed_refs, octet, outputs: _Along) -> list[Array]:
    """Of the 128 inputs that an octet is among: one array `[outputs]` a lane."""
    ref, row = packed_refs[2], octet // (SCALED // BYTE)
    lanes = range(ref.shape[2])
    return [_load(ref.at[row, outputs.at, jnp.int32(lane)], outputs.fits).astype(jnp.float32) for lane in lanes]


def _forward_kernel(x_ref, *refs, tile, sizes):
    *packed_refs, out_ref = refs
    dtype, lanes = x_ref.dtype, 4 // x_ref.dtype.itemsize
    wide = tile.outputs // lanes
    rows = _Along.of(pl.program_id(0), tile.rows, sizes[0])
    outputs = _Along.of(pl.program_id(1), wide, sizes[2])

    def body(step, totals):
        octets = _Along.of(step, tile.octets, sizes[1])
        scaled = len(packed_refs) == 3
        parts, fits = [jnp.zeros_like(total) if scaled else total for total in totals], None
        fits = _both(rows, octets, (tile.rows, tile.octets))
        for phase, weights in enumerate(_phases(packed_refs, octets, outputs, dtype, tile)):
            x = _load(x_ref.at[jnp.int32(phase), rows.at, octets.at], fits)
            parts = [part + plgpu.dot(x, of_lane) for part, of_lane in zip(parts, weights, strict=True)]
        if not scaled:
            return tuple(parts)
        scales = _scales(packed_refs, step * tile.octets, outputs)
        return tuple(total + part * scale[None] for total, part, scale in zip(totals, parts, scales, strict=True))

    first = (jnp.zeros((tile.rows, wide), jnp.float32),) * lanes
    totals = jax.lax.fori_loop(0, pl.cdiv(sizes[1], tile.octets), body, first)
    plgpu.store(out_ref.at[rows.at, outputs.at], _word(totals, dtype), mask=_both(rows, outputs, (tile.rows, wide)))


def _word(lanes: tuple[Array, ...], dtype) -> Array:
    """The inverse of `_lanes`, of sums in fp32."""
    if len(lanes) == 1:
        return jax.lax.bitcast_convert_type(lanes[0], jnp.uint32)
    low, high = (jax.lax.bitcast_convert_type(lane.astype(dtype), jnp.uint16).astype(jnp.uint32) for lane in lanes)
    return low | high << 16


def _transposed_kernel(g_ref, *refs, tile, sizes):
    *packed_refs, out_ref = refs
    dtype, lanes = out_ref.dtype, 4 // out_ref.dtype.itemsize
    wide = tile.outputs // lanes
    rows = _Along.of(pl.program_id(0), tile.rows, sizes[0])
    block = pl.program_id(1)
    octets = _Along.of(block, tile.octets, sizes[1])

    def body(step, totals):
        outputs = _Along.of(step, wide, sizes[2])
        g = _lanes(_load(g_ref.at[rows.at, outputs.at], _both(rows, outputs, (tile.rows, wide))), dtype)
        if len(packed_refs) == 3:
            scales = _scales(packed_refs, block * tile.octets, outputs)
            # Scales differ from output to output, so they go to g; in bf16 that would round it once more.
            g = tuple(of_lane.astype(jnp.float32) * scale[None] for of_lane, scale in zip(g, scales, strict=True))
        phases = _phases(packed_refs, octets, outputs, dtype, tile)
        return tuple(_add_products(total, g, weights) for total, weights in zip(totals, phases, strict=True))

    first = (jnp.zeros((tile.rows, tile.octets), jnp.float32),) * BYTE
    totals = jax.lax.fori_loop(0, pl.cdiv(sizes[2], wide), body, first)
    fits = _both(rows, octets, (tile.rows, tile.octets))
    for phase, total in enumerate(totals):
        plgpu.store(out_ref.at[jnp.int32(phase), rows.at, octets.at], total.astype(dtype), mask=fits)


def _add_products(total, g, weights):
    for of_lane, matrix in zip(g, weights, strict=True):
        total += plgpu.dot(of_lane, matrix.astype(of_lane.dtype), trans_b=True)
    return total


def _as_words(array: Array, lanes: int, word: Any) -> Array:
    """Neighbouring outputs as one number."""
    array = array.reshape(*array.shape[:-1], -1, lanes) if lanes > 1 else array
    return jax.lax.bitcast_convert_type(array, word)


def _call(body, name, first, packed: Packed24, tile: Tile, sizes, grid, out_shape, interpret) -> Array:
    if packed.scale is not None and tile.octets > SCALED // BYTE:
        raise ValueError(f'{tile}: int4 values have a scale for {SCALED // BYTE} octets')
    octets, outputs = packed.positions.shape
    lanes = outputs // sizes[2]
    bits = {1: jnp.uint8, 2: jnp.uint16}[lanes]
    values = _as_words(packed.values, lanes, jnp.uint32 if packed.scale is None else bits)
    arrays = [values.reshape(octets, -1, outputs // lanes), _as_words(packed.positions, lanes, bits)]
    if packed.scale is not None:
        arrays.append(packed.scale.reshape(-1, outputs // lanes, lanes))
    return pl.pallas_call(
        functools.partial(body, tile=tile, sizes=sizes),
        name=name,
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(arrays)),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=out_shape,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * sizes[0] * BYTE * sizes[1] * outputs,
            bytes_accessed=first.nbytes + packed.nbytes + out_shape.size * out_shape.dtype.itemsize,
            transcendentals=0,
        ),
    )(first, *arrays)


def matmul(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """`x @ W`, summed in fp32, in x's dtype."""
    (octets, outputs), rows, lanes = packed.positions.shape, x.shape[0], 4 // x.dtype.itemsize
    phases = jnp.pad(x, ((0, 0), (0, octets * BYTE - packed.inputs))).reshape(rows, octets, BYTE).transpose(2, 0, 1)
    grid = pl.cdiv(rows, tile.rows), pl.cdiv(outputs, tile.outputs)
    out = jax.ShapeDtypeStruct((rows, outputs // lanes), jnp.uint32)
    sizes = rows, octets, outputs // lanes
    words = _call(_forward_kernel, 'matmul24', phases, packed, tile, sizes, grid, out, interpret)
    return jax.lax.bitcast_convert_type(words, x.dtype).reshape(rows, outputs)


def matmul_transposed(
    g: Float[Array, 'rows outputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows inputs']:
    """`g @ W.T`, summed in fp32, in g's dtype."""
    (octets, outputs), rows, lanes = packed.positions.shape, g.shape[0], 4 // g.dtype.itemsize
    words = _as_words(g, lanes, jnp.uint32)
    grid = pl.cdiv(rows, tile.rows), pl.cdiv(octets, tile.octets)
    out = jax.ShapeDtypeStruct((BYTE, rows, octets), g.dtype)
    sizes = rows, octets, outputs // lanes
    phases = _call(_transposed_kernel, 'matmul24_transposed', words, packed, tile, sizes, grid, out, interpret)
    return phases.transpose(1, 2, 0).reshape(rows, octets * BYTE)[:, : packed.inputs]
