"""Bodies of the kernels in gpu.py: each program reads tiles of packed weights and computes with them.

Outputs are read in words of 32 bits: one fp32 number, or two neighbouring 16-bit outputs (see gpu_unpack.py). Several
programs may share a sum (`Tile.splits`). Each then stores its part.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Int, PyTree

from sparselora_jax.sparse.kernels.gpu_ptx import numbers, product_in_two
from sparselora_jax.sparse.kernels.gpu_unpack import joined, placed, unpacked
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED

SPLITS_AXIS = 2  # axis of the grid along which programs share a sum


class Tile(NamedTuple):
    """The sizes of what one program computes at a time: powers of two, at least 16 outputs and 2 octets.

    Attributes:
      rows: number of rows of x or g; unused by `few` and `unpack`.
      outputs: number of outputs of W.
      octets: number of octets: runs of eight inputs that share a byte of positions.
      warps: number of warps (32 threads) of a program.
      stages: loads in flight (Triton's software pipelining).
      splits: number of programs that share a sum. With few rows, one program per sum would not keep memory busy.
    """

    rows: int
    outputs: int
    octets: int
    warps: int = 4
    stages: int = 3
    splits: int = 1


class Sizes(NamedTuple):
    """Sizes of the whole arrays."""

    rows: int
    inputs: int
    outputs: int
    octets: int


class _Span(NamedTuple):
    """A range along one axis of an array.

    Attributes:
      slice: the range.
      fits: False beyond the end of the axis; None: the whole range is inside, so no mask is needed.
    """

    slice: pl.Slice
    fits: Bool[Array, ' size'] | None


def _span(index: Int[Array, ''], size: int, end: int, runs: int | None = None) -> _Span:
    """Return one of several equal ranges that cover an axis.

    Args:
      index: index of the range, traced.
      size: length of a range.
      end: length of the axis.
      runs: number of ranges; None: as many as reach the end.
    """
    all_fit = end == size * (pl.cdiv(end, size) if runs is None else runs)
    fits = None if all_fit else index * size + jnp.arange(size, dtype=jnp.int32) < end
    return _Span(pl.ds(index * size, size), fits)


class _Steps(NamedTuple):
    """A program's share of a sum.

    Attributes:
      count: number of steps of this program.
      runs: number of steps of all programs that share the sum.
      first: index of this program's first step among them.
    """

    count: int
    runs: int
    first: Int[Array, '']


def _steps(end: int, size: int, splits: int) -> _Steps:
    """Divide the ranges of the summed axis among the programs that share the sum."""
    count = pl.cdiv(pl.cdiv(end, size), splits)
    return _Steps(count, count * splits, pl.program_id(SPLITS_AXIS) * count)


def _mask(first: _Span, second: _Span, shape: tuple[int, int]) -> Bool[Array, '...'] | None:
    """Return a mask that is True where a tile is inside its array; None: it is inside everywhere."""
    masks = [
        None if span.fits is None else jnp.expand_dims(span.fits, axis) for span, axis in ((first, 1), (second, 0))
    ]
    needed = [jnp.broadcast_to(mask, shape) for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, needed) if needed else None


def _load(ref, mask):
    """Load with zeros where the mask is False, since zeros add nothing to a sum."""
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _lanes(dtype) -> int:
    """Return the number of values in a word."""
    return 4 // dtype.itemsize


def _read_words(packed_refs, octets: _Span, words: _Span, dtype, tile: Tile) -> tuple[list[Array], Array]:
    """Load the words of a tile's values and its positions, `[octets, words]` each.

    The list has one array for each row of values in an octet: four, or two for int4.
    """
    values_ref, positions_ref, *_ = packed_refs
    mask = _mask(octets, words, (tile.octets, tile.outputs // _lanes(dtype)))
    positions = _load(positions_ref.at[octets.slice, words.slice], mask)
    rows = range(values_ref.shape[1])
    return [_load(values_ref.at[octets.slice, jnp.int32(row), words.slice], mask) for row in rows], positions


def _read_tile(packed_refs, octets: _Span, words: _Span, dtype, tile: Tile, interpret) -> Callable[[], Array]:
    """Load a tile, and return a function that unpacks it to `[8 * octets, outputs]`.

    int4 values become integers that are not scaled yet.
    """
    values, positions = _read_words(packed_refs, octets, words, dtype, tile)
    four_bits = _are_four_bits(packed_refs)
    return functools.partial(unpacked, values, positions, dtype, four_bits=four_bits, interpret=interpret)


def _are_four_bits(packed_refs) -> bool:
    return len(packed_refs) == 3  # values, positions and, for int4 only, scales


def _in_branch(make: Callable[[], PyTree], step: Int[Array, '']) -> PyTree:
    """Return `make()`, computed in a branch that is always taken (no step is negative).

    Without the branch, Triton does two things that cost time:

    - After a join it feeds half-width operands to the tensor core, and shuffles registers, one move for each word of an
      operand.
    - It computes elementwise operations in the tensor core's operand layout, repeated in each warp.

    Inside a branch it does neither. But Triton does not prefetch loads in a branch. So `make` must only compute, and
    its inputs are loaded before.
    """
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(make))
    return jax.lax.cond(step >= 0, make, lambda: zeros)


def _scales(packed_refs, octet, columns: _Span) -> Array:
    """Load the scales of the 128 inputs that an octet belongs to."""
    # A step may be beyond the last inputs, where all values are masked. Any scale will do, so the last one is read.
    index = jnp.minimum(octet // (SCALED // BYTE), packed_refs[2].shape[0] - 1)
    return _load(packed_refs[2].at[index, columns.slice], columns.fits)


def _store(out_ref, total, first: _Span, second: _Span) -> None:
    """Store this program's part of a sum."""
    target = out_ref.at[pl.program_id(SPLITS_AXIS), first.slice, second.slice]
    plgpu.store(target, total.astype(out_ref.dtype), mask=_mask(first, second, total.shape))


def forward(x_ref, *refs, tile: Tile, sizes: Sizes, interpret: bool) -> None:
    """Compute `x @ W` with the tensor core.

    Args:
      x_ref: x.
      *refs: packed arrays (values, positions, and scales for int4), then the output `[splits, rows, outputs]`.
      tile: what a program computes at a time.
      sizes: sizes of the arrays. Grid: rows, outputs, splits.
      interpret: replace PTX by jax.numpy.
    """
    *packed_refs, out_ref = refs
    dtype = x_ref.dtype
    lanes = _lanes(x_ref.dtype)
    rows = _span(pl.program_id(0), tile.rows, sizes.rows)
    words = _span(pl.program_id(1), tile.outputs // lanes, sizes.outputs // lanes)
    outputs = _span(pl.program_id(1), tile.outputs, sizes.outputs)
    steps = _steps(sizes.octets, tile.octets, tile.splits)

    def add_step(step, total):
        step = steps.first + step
        octets = _span(step, tile.octets, sizes.octets, steps.runs)
        inputs = _span(step, BYTE * tile.octets, sizes.inputs, steps.runs)
        x = _load(x_ref.at[rows.slice, inputs.slice], _mask(rows, inputs, (tile.rows, BYTE * tile.octets)))
        unpack_tile = _read_tile(packed_refs, octets, words, dtype, tile, interpret)
        part = plgpu.dot(x, _in_branch(unpack_tile, step))
        if not _are_four_bits(packed_refs):
            return total + part
        # A tile of int4 has at most 16 octets and never spans two scales. So one scale per output serves the step.
        return total + part * _scales(packed_refs, step * tile.octets, outputs).astype(jnp.float32)[None]

    zeros = jnp.zeros((tile.rows, tile.outputs), jnp.float32)
    _store(out_ref, jax.lax.fori_loop(0, steps.count, add_step, zeros), rows, outputs)


def transposed(g_ref, *refs, tile: Tile, sizes: Sizes, interpret: bool) -> None:
    """Compute `g @ W.T` with the tensor core.

    Args:
      g_ref: g.
      *refs: packed arrays (values, positions, and scales for int4), then the output `[splits, rows, inputs]`.
      tile: what a program computes at a time.
      sizes: sizes of the arrays. Grid: rows, inputs, splits.
      interpret: replace PTX by jax.numpy.
    """
    *packed_refs, out_ref = refs
    dtype = g_ref.dtype
    lanes = _lanes(g_ref.dtype)
    rows = _span(pl.program_id(0), tile.rows, sizes.rows)
    block = pl.program_id(1)
    octets = _span(block, tile.octets, sizes.octets)
    inputs = _span(block, BYTE * tile.octets, sizes.inputs)
    steps = _steps(sizes.outputs, tile.outputs, tile.splits)

    def add_step(step, total):
        step = steps.first + step
        words = _span(step, tile.outputs // lanes, sizes.outputs // lanes, steps.runs)
        outputs = _span(step, tile.outputs, sizes.outputs, steps.runs)
        g = _load(g_ref.at[rows.slice, outputs.slice], _mask(rows, outputs, (tile.rows, tile.outputs)))
        unpack_tile = _read_tile(packed_refs, octets, words, dtype, tile, interpret)
        weights = _in_branch(unpack_tile, step)
        parts = [g]
        if _are_four_bits(packed_refs):
            # The sum runs over outputs, and each output has its own scale. So scales are applied to g, not to the sum.
            # In bf16 the product would be rounded, so it is split into two numbers.
            scale = jnp.broadcast_to(_scales(packed_refs, block * tile.octets, outputs).astype(dtype)[None], g.shape)
            scale_in_two = functools.partial(product_in_two, g, scale, interpret=interpret)
            parts = _in_branch(scale_in_two, step) if dtype == jnp.bfloat16 else [g * scale]
        for part in parts:
            total += plgpu.dot(part, weights, trans_b=True)
        return total

    zeros = jnp.zeros((tile.rows, BYTE * tile.octets), jnp.float32)
    _store(out_ref, jax.lax.fori_loop(0, steps.count, add_step, zeros), rows, inputs)


def few(x_ref, *refs, tile: Tile, sizes: Sizes, interpret: bool) -> None:
    """Compute `x @ W` for few rows, in fp32 by plain multiply-adds.

    Each thread sums the products of its own weights, so the dense weights never leave its registers.

    Args:
      x_ref: x.
      *refs: packed arrays (values, positions, and scales for int4 as words), then the output `[splits, rows, outputs]`.
      tile: what a program computes at a time, for all rows.
      sizes: sizes of the arrays. Grid: 1, outputs, splits.
      interpret: replace PTX by jax.numpy.
    """
    *packed_refs, out_ref = refs
    dtype = x_ref.dtype
    lanes = _lanes(x_ref.dtype)
    words = _span(pl.program_id(1), tile.outputs // lanes, sizes.outputs // lanes)
    outputs = _span(pl.program_id(1), tile.outputs, sizes.outputs)
    steps = _steps(sizes.octets, tile.octets, tile.splits)
    four_bits = _are_four_bits(packed_refs)

    def load_row(row: int, inputs: Array) -> list[Array]:
        """Load inputs 0 to 7 of each octet from one row of x, as arrays `[octets, 1]`."""
        # Octets beyond the last are masked, and so are the missing inputs of the last octet.
        all_fit = sizes.inputs == steps.runs * tile.octets * BYTE
        places = []
        for place in range(BYTE):
            mask = None if all_fit else inputs + place < sizes.inputs
            places.append(_load(x_ref.at[jnp.int32(row), inputs + place], mask).astype(jnp.float32)[:, None])
        return places

    def add_step(step, totals):
        step = steps.first + step
        octets = _span(step, tile.octets, sizes.octets, steps.runs)
        values, positions = _read_words(packed_refs, octets, words, dtype, tile)
        places = placed(values, positions, dtype, four_bits=four_bits, interpret=interpret)
        weights = [numbers(place, dtype) for place in places]  # weights[input of the octet][lane]
        inputs = (step * tile.octets + jnp.arange(tile.octets, dtype=jnp.int32)) * BYTE
        scales = numbers(_scales(packed_refs, step * tile.octets, words), dtype) if four_bits else None
        new_totals = []
        for row, totals_of_lanes in enumerate(totals):
            xs = load_row(row, inputs)
            sums = [sum(weight[lane] * x for weight, x in zip(weights, xs, strict=True)) for lane in range(lanes)]
            if scales is not None:
                sums = [part * scale[None] for part, scale in zip(sums, scales, strict=True)]
            new_totals.append([total + part for total, part in zip(totals_of_lanes, sums, strict=True)])
        return new_totals

    # One total for each row of x, each lane and each octet of the tile. Octets are summed only once, at the end.
    zeros = jnp.zeros((tile.octets, tile.outputs // lanes), jnp.float32)
    totals = jax.lax.fori_loop(0, steps.count, add_step, [[zeros] * lanes] * sizes.rows)
    for row, totals_of_lanes in enumerate(totals):
        sums = joined([jnp.sum(total, axis=0) for total in totals_of_lanes]).reshape(tile.outputs)
        target = out_ref.at[pl.program_id(SPLITS_AXIS), jnp.int32(row), outputs.slice]
        plgpu.store(target, sums.astype(out_ref.dtype), mask=outputs.fits)


def unpack(*refs, tile: Tile, sizes: Sizes, interpret: bool) -> None:
    """Write W with its zeros.

    Args:
      *refs: packed arrays (values, positions, and scales for int4), then the output `[inputs, outputs]`.
      tile: what a program unpacks.
      sizes: sizes of the arrays. Grid: inputs, outputs.
      interpret: replace PTX by jax.numpy.
    """
    *packed_refs, out_ref = refs
    dtype = out_ref.dtype
    lanes = _lanes(out_ref.dtype)
    block = pl.program_id(0)
    column = pl.program_id(1)
    octets = _span(block, tile.octets, sizes.octets)
    inputs = _span(block, BYTE * tile.octets, sizes.inputs)
    words = _span(column, tile.outputs // lanes, sizes.outputs // lanes)
    outputs = _span(column, tile.outputs, sizes.outputs)
    # No branch is needed here, since this tile does not go to the tensor core.
    weights = _read_tile(packed_refs, octets, words, dtype, tile, interpret)()
    if _are_four_bits(packed_refs):
        scale = _scales(packed_refs, block * tile.octets, outputs).astype(jnp.float32)
        weights = (weights.astype(jnp.float32) * scale[None]).astype(dtype)
    plgpu.store(out_ref.at[inputs.slice, outputs.slice], weights, mask=_mask(inputs, outputs, weights.shape))
