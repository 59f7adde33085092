"""Bodies of the kernels in gpu.py, and how they read packed weights.

Outputs are read in words of 32 bits (see gpu_unpack.py). Programs may share a sum (`Tile.splits`): each stores its
part.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from sparselora_jax.sparse.kernels.gpu_ptx import numbers, product_in_two
from sparselora_jax.sparse.kernels.gpu_unpack import joined, placed, unpacked
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED

LAST = 2  # axis of the grid along which programs share a sum


class Tile(NamedTuple):
    """What one program reads and computes at a time: powers of two, outputs at least 16, octets at least 2."""

    rows: int  # of x, or of g; of the kernel for few rows and of unpacking without meaning
    outputs: int
    octets: int  # eight inputs each, which share a byte of positions
    warps: int = 4
    stages: int = 3
    splits: int = 1  # programs that share a sum: with few rows there are else too few to keep memory busy


class Sizes(NamedTuple):
    """Of the arrays."""

    rows: int
    inputs: int
    outputs: int
    octets: int


class _Along(NamedTuple):
    """A run of an axis: where it lies, and which of it are not behind the axis' end; None: none can be."""

    at: Any
    fits: Array | None

    @classmethod
    def of(cls, index, size, end, runs=None):
        """Run `index` of `runs`; by default of as many as reach the end."""
        whole = end == size * (pl.cdiv(end, size) if runs is None else runs)
        fits = None if whole else index * size + jnp.arange(size, dtype=jnp.int32) < end
        return cls(pl.ds(index * size, size), fits)


class _Sum(NamedTuple):
    """The steps of a program along what is summed, of all those that share the sum."""

    steps: int
    runs: int  # of all programs
    first: Any

    @classmethod
    def of(cls, end: int, size: int, splits: int):
        steps = pl.cdiv(pl.cdiv(end, size), splits)
        return cls(steps, steps * splits, pl.program_id(LAST) * steps)


def _both(first: _Along, second: _Along, shape: tuple[int, int]) -> Array | None:
    masks = [
        None if along.fits is None else jnp.expand_dims(along.fits, axis) for along, axis in ((first, 1), (second, 0))
    ]
    known = [jnp.broadcast_to(mask, shape) for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, known) if known else None


def _load(ref, mask):
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _lanes(dtype) -> int:
    """Numbers in a word."""
    return 4 // dtype.itemsize


def _words(packed_refs, octets: _Along, words: _Along, dtype, tile: Tile) -> tuple[list[Array], Array]:
    """Words of a tile's values, and its positions: `[octets, words]` each."""
    values_ref, positions_ref, *_ = packed_refs
    fits = _both(octets, words, (tile.octets, tile.outputs // _lanes(dtype)))
    positions = _load(positions_ref.at[octets.at, words.at], fits)
    planes = range(values_ref.shape[1])
    return [_load(values_ref.at[octets.at, jnp.int32(plane), words.at], fits) for plane in planes], positions


def _dense(packed_refs, octets: _Along, words: _Along, dtype, tile: Tile, interpret) -> Callable[[], Array]:
    """Reads a tile; the call makes its dense form, `[8 * octets, outputs]`; int4 values as numbers, not scaled."""
    values, positions = _words(packed_refs, octets, words, dtype, tile)
    four_bits = _four_bits(packed_refs)
    return functools.partial(unpacked, values, positions, dtype, four_bits=four_bits, interpret=interpret)


def _four_bits(packed_refs) -> bool:
    return len(packed_refs) == 3


def _made(make: Callable[[], Any], step: Array) -> Any:
    """`make()`, in a branch that is always taken.

    Behind a join Triton halves the width in which it gives operands to the tensor core, and then sorts registers by
    moves, one for each of an operand's words; what is elementwise it computes in the order in which the tensor core
    reads, once in each warp. It does not see either in a branch; nor does it fetch ahead what a branch reads, so that
    is read before.
    """
    nothing = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(make))
    return jax.lax.cond(step >= 0, make, lambda: nothing)


def _scales(packed_refs, octet, along: _Along) -> Array:
    """Of the 128 inputs that an octet is among; behind the last of them the last."""
    index = jnp.minimum(octet // (SCALED // BYTE), packed_refs[2].shape[0] - 1)
    return _load(packed_refs[2].at[index, along.at], along.fits)


def _store(out_ref, total, first: _Along, second: _Along) -> None:
    at = out_ref.at[pl.program_id(LAST), first.at, second.at]
    plgpu.store(at, total.astype(out_ref.dtype), mask=_both(first, second, total.shape))


def forward(x_ref, *refs, tile: Tile, sizes: Sizes, interpret: bool) -> None:
    """`x @ W` by the tensor core; grid: rows, outputs, shares of the sum."""
    *packed_refs, out_ref = refs
    dtype, lanes = x_ref.dtype, _lanes(x_ref.dtype)
    rows = _Along.of(pl.program_id(0), tile.rows, sizes.rows)
    words = _Along.of(pl.program_id(1), tile.outputs // lanes, sizes.outputs // lanes)
    outputs = _Along.of(pl.program_id(1), tile.outputs, sizes.outputs)
    along = _Sum.of(sizes.octets, tile.octets, tile.splits)

    def body(step, total):
        step = along.first + step
        octets = _Along.of(step, tile.octets, sizes.octets, along.runs)
        inputs = _Along.of(step, BYTE * tile.octets, sizes.inputs, along.runs)
        x = _load(x_ref.at[rows.at, inputs.at], _both(rows, inputs, (tile.rows, BYTE * tile.octets)))
        dense = _dense(packed_refs, octets, words, dtype, tile, interpret)
        part = plgpu.dot(x, _made(dense, step))
        if not _four_bits(packed_refs):
            return total + part
        return total + part * _scales(packed_refs, step * tile.octets, outputs).astype(jnp.float32)[None]

    first = jnp.zeros((tile.rows, tile.outputs), jnp.float32)
    _store(out_ref, jax.lax.fori_loop(0, along.steps, body, first), rows, outputs)


def transposed(g_ref, *refs, tile: Tile, sizes: Sizes, interpret: bool) -> None:
    """`g @ W.T` by the tensor core; grid: rows, inputs, shares of the sum."""
    *packed_refs, out_ref = refs
    dtype, lanes = g_ref.dtype, _lanes(g_ref.dtype)
    rows = _Along.of(pl.program_id(0), tile.rows, sizes.rows)
    block = pl.program_id(1)
    octets = _Along.of(block, tile.octets, sizes.octets)
    inputs = _Along.of(block, BYTE * tile.octets, sizes.inputs)
    along = _Sum.of(sizes.outputs, tile.outputs, tile.splits)

    def body(step, total):
        step = along.first + step
        words = _Along.of(step, tile.outputs // lanes, sizes.outputs // lanes, along.runs)
        outputs = _Along.of(step, tile.outputs, sizes.outputs, along.runs)
        g = _load(g_ref.at[rows.at, outputs.at], _both(rows, outputs, (tile.rows, tile.outputs)))
        dense = _dense(packed_refs, octets, words, dtype, tile, interpret)
        weights = _made(dense, step)
        parts = [g]
        if _four_bits(packed_refs):
            # Scales differ from output to output, along which is summed, so they go to g.
            scale = jnp.broadcast_to(_scales(packed_refs, block * tile.octets, outputs).astype(dtype)[None], g.shape)
            split = functools.partial(product_in_two, g, scale, interpret=interpret)
            parts = _made(split, step) if dtype == jnp.bfloat16 else [g * scale]
        for part in parts:
            total += plgpu.dot(part, weights, trans_b=True)
        return total

    first = jnp.zeros((tile.rows, BYTE * tile.octets), jnp.float32)
    _store(out_ref, jax.lax.fori_loop(0, along.steps, body, first), rows, inputs)


def few(x_ref, *refs, tile: Tile, sizes: Sizes, interpret: bool) -> None:
    """`x @ W` of few rows, in fp32 by plain multiply-adds; grid: 1, outputs, shares of the sum.

    Each thread adds up products of its own weights: nothing of the dense form leaves its registers.
    """
    *packed_refs, out_ref = refs
    dtype, lanes = x_ref.dtype, _lanes(x_ref.dtype)
    words = _Along.of(pl.program_id(1), tile.outputs // lanes, sizes.outputs // lanes)
    outputs = _Along.of(pl.program_id(1), tile.outputs, sizes.outputs)
    along = _Sum.of(sizes.octets, tile.octets, tile.splits)
    four_bits = _four_bits(packed_refs)

    def of_row(row: int, inputs: Array) -> list[Array]:
        """Inputs 0, 1, ... and 7 of each octet."""
        fits = None if sizes.inputs == along.runs * tile.octets * BYTE else inputs
        found = []
        for place in range(BYTE):
            mask = None if fits is None else inputs + place < sizes.inputs
            found.append(_load(x_ref.at[jnp.int32(row), inputs + place], mask).astype(jnp.float32)[:, None])
        return found

    def body(step, totals):
        step = along.first + step
        octets = _Along.of(step, tile.octets, sizes.octets, along.runs)
        values, positions = _words(packed_refs, octets, words, dtype, tile)
        phases = placed(values, positions, dtype, four_bits=four_bits, interpret=interpret)
        weights = [numbers(phase, dtype) for phase in phases]  # of each input of an octet, and lane
        inputs = (step * tile.octets + jnp.arange(tile.octets, dtype=jnp.int32)) * BYTE
        scales = numbers(_scales(packed_refs, step * tile.octets, words), dtype) if four_bits else None
        found = []
        for row, of_lanes in enumerate(totals):
            xs = of_row(row, inputs)
            sums = [sum(weight[lane] * x for weight, x in zip(weights, xs, strict=True)) for lane in range(lanes)]
            if scales is not None:
                sums = [part * scale[None] for part, scale in zip(sums, scales, strict=True)]
            found.append([total + part for total, part in zip(of_lanes, sums, strict=True)])
        return found

    zero = jnp.zeros((tile.octets, tile.outputs // lanes), jnp.float32)
    totals = jax.lax.fori_loop(0, along.steps, body, [[zero] * lanes] * sizes.rows)
    for row, of_lanes in enumerate(totals):
        sums = joined([jnp.sum(total, axis=0) for total in of_lanes]).reshape(tile.outputs)
        at = out_ref.at[pl.program_id(LAST), jnp.int32(row), outputs.at]
        plgpu.store(at, sums.astype(out_ref.dtype), mask=outputs.fits)


def unpack(*refs, tile: Tile, sizes: Sizes, interpret: bool) -> None:
    """W with its zeros; grid: inputs, outputs."""
    *packed_refs, out_ref = refs
    dtype, lanes = out_ref.dtype, _lanes(out_ref.dtype)
    block, column = pl.program_id(0), pl.program_id(1)
    octets = _Along.of(block, tile.octets, sizes.octets)
    inputs = _Along.of(block, BYTE * tile.octets, sizes.inputs)
    words = _Along.of(column, tile.outputs // lanes, sizes.outputs // lanes)
    outputs = _Along.of(column, tile.outputs, sizes.outputs)
    weights = _dense(packed_refs, octets, words, dtype, tile, interpret)()
    if _four_bits(packed_refs):
        scale = _scales(packed_refs, block * tile.octets, outputs).astype(jnp.float32)
        weights = (weights.astype(jnp.float32) * scale[None]).astype(dtype)
    plgpu.store(out_ref.at[inputs.at, outputs.at], weights, mask=_both(inputs, outputs, weights.shape))
