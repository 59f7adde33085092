"""x @ W, g @ W.T and W itself of a `Packed24`, for NVIDIA GPUs from Ampere on (Pallas, Triton).

A tile of packed weights is read once. Its dense form is built in registers, multiplied there, and never written to
memory. This saves bytes (0.5625 times those of bf16), not FLOPs. With many rows, FLOPs are the limit. Then W is
unpacked to memory once, and XLA multiplies.

`gpu_kernels.py` contains the kernel bodies, `gpu_tiles.py` the fastest measured tiles.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sparselora_jax.sparse.kernels import gpu_kernels
from sparselora_jax.sparse.kernels.cost import cost
from sparselora_jax.sparse.kernels.gpu_kernels import Sizes, Tile
from sparselora_jax.sparse.kernels.gpu_tiles import TILES
from sparselora_jax.sparse.kernels.reference import dense_product
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED, Packed24

LANES = 2  # bf16 outputs in a 32-bit word


def takes(dtype: DTypeLike, packed: Packed24) -> bool:
    """Return whether the kernels support these operands.

    They support bf16 or fp32, the same for x and the values (int4 values fit both), and an even number of outputs.

    Args:
      dtype: dtype of x, or of the unpacked weights.
      packed: W, or its shapes and dtypes.
    """
    same_dtype = packed.scale is not None or packed.values.dtype == dtype
    return same_dtype and dtype in (jnp.bfloat16, jnp.float32) and packed.shape[-1] % LANES == 0


def choose_tile(kind: str, rows: int, packed: Packed24) -> Tile | None:
    """Return the fastest tile of a kernel, or None if another kernel is faster for this number of rows.

    Args:
      kind: `few`, `forward`, `transposed` or `unpack`.
      rows: number of rows of x or g; 0 for `unpack`.
      packed: W.
    """
    tiles = TILES[kind, 'values' if packed.scale is None else 'int4']
    return next((Tile(*sizes) for max_rows, sizes in tiles if rows <= max_rows), None)


def choose_kernel(rows: int, packed: Packed24, transposed: bool) -> tuple[str, Tile | None]:
    """Return the fastest kernel for a product and its tile.

    Args:
      rows: number of rows of x or g.
      packed: W.
      transposed: the product is `g @ W.T`.

    Returns:
      The kernel's kind and its tile. If the tile is None, unpacking and a dense product are faster.
    """
    kinds = ['transposed'] if transposed else ['few', 'forward']
    choices = [(kind, choose_tile(kind, rows, packed)) for kind in kinds]
    return next(((kind, tile) for kind, tile in choices if tile is not None), choices[-1])


# Jitted, so that the body of a kernel is traced once per shape, not once per layer.
@functools.partial(jax.jit, static_argnames=('transposed', 'interpret'))
def product(
    x: Float[Array, 'rows m'], packed: Packed24, *, transposed: bool, interpret: bool = False
) -> Float[Array, 'rows n']:
    """Return `x @ W` or `x @ W.T`, summed in fp32, in x's dtype, by the fastest kernel for this number of rows.

    Args:
      x: the rows to multiply.
      packed: W, one matrix.
      transposed: multiply with W.T.
      interpret: run the kernel by Pallas' interpreter, on any machine.
    """
    kind, tile = choose_kernel(x.shape[0], packed, transposed)
    if tile is None:
        return dense_product(x, unpacked(packed, x.dtype, interpret=interpret), transposed=transposed)
    return MULTIPLY[kind](x, packed, tile, interpret=interpret)


def matmul(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """Return `x @ W`, summed in fp32, in x's dtype.

    fp32 numbers are multiplied at JAX's default precision.

    Args:
      x: the rows to multiply.
      packed: W, one matrix.
      tile: what one program computes at a time.
      interpret: run the kernel by Pallas' interpreter.
    """
    outputs = packed.shape[-1]
    grid = (pl.cdiv(x.shape[0], tile.rows), pl.cdiv(outputs, tile.outputs), tile.splits)
    return _product(gpu_kernels.forward, 'matmul24', x, packed, tile, grid, outputs, interpret)


def matmul_transposed(
    g: Float[Array, 'rows outputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows inputs']:
    """Return `g @ W.T`, summed in fp32, in g's dtype; fp32 as in `matmul`.

    Args:
      g: the rows to multiply.
      packed: W, one matrix.
      tile: what one program computes at a time.
      interpret: run the kernel by Pallas' interpreter.
    """
    grid = (pl.cdiv(g.shape[0], tile.rows), pl.cdiv(packed.positions.shape[0], tile.octets), tile.splits)
    return _product(gpu_kernels.transposed, 'matmul24_transposed', g, packed, tile, grid, packed.inputs, interpret)


def matmul_few(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """Return `x @ W`, multiplied and summed in fp32 without the tensor core, in x's dtype.

    Args:
      x: few rows, since each row needs its own registers.
      packed: W, one matrix.
      tile: what one program computes at a time; its rows are not used.
      interpret: run the kernel by Pallas' interpreter.
    """
    outputs = packed.shape[-1]
    grid = (1, pl.cdiv(outputs, tile.outputs), tile.splits)
    return _product(gpu_kernels.few, 'matmul24_few', x, packed, tile, grid, outputs, interpret)


MULTIPLY = {'few': matmul_few, 'forward': matmul, 'transposed': matmul_transposed}


@functools.partial(jax.jit, static_argnames=('dtype', 'interpret'))
def unpacked(packed: Packed24, dtype: DTypeLike, *, interpret: bool = False) -> Float[Array, 'inputs outputs']:
    """Return W with its zeros, unpacked with the fastest tile.

    Args:
      packed: W, one matrix.
      dtype: bf16 or fp32, as `takes` allows.
      interpret: run the kernel by Pallas' interpreter.
    """
    return unpack(packed, dtype, choose_tile('unpack', 0, packed), interpret=interpret)


def unpack(
    packed: Packed24, dtype: DTypeLike, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'inputs outputs']:
    """Return W with its zeros, unpacked with this tile.

    Args:
      packed: W, one matrix.
      dtype: bf16 or fp32, as `takes` allows.
      tile: what one program unpacks; its rows and splits are not used.
      interpret: run the kernel by Pallas' interpreter.
    """
    grid = (pl.cdiv(packed.positions.shape[0], tile.octets), pl.cdiv(packed.shape[-1], tile.outputs))
    out = jax.ShapeDtypeStruct(packed.shape, dtype)
    return _call(gpu_kernels.unpack, 'unpack24', (), packed, tile, grid, out, interpret)


def _product(
    body: Callable,
    name: str,
    x: Array,
    packed: Packed24,
    tile: Tile,
    grid: tuple[int, ...],
    out_width: int,
    interpret: bool,
) -> Array:
    """Return a product, and add up its parts if several programs share a sum."""
    is_whole = tile.splits == 1
    # Parts stay in fp32 until they are added. The kernel itself casts the result only if it is the whole sum.
    out = jax.ShapeDtypeStruct((tile.splits, x.shape[0], out_width), x.dtype if is_whole else jnp.float32)
    parts = _call(body, name, (x,), packed, tile, grid, out, interpret)
    return parts[0] if is_whole else jnp.sum(parts, axis=0).astype(x.dtype)


def _call(
    body: Callable,
    name: str,
    xs: tuple[Array, ...],
    packed: Packed24,
    tile: Tile,
    grid: tuple[int, ...],
    out: jax.ShapeDtypeStruct,
    interpret: bool,
) -> Array:
    """Call a kernel with the packed arrays viewed as words of 32 bits.

    Args:
      body: a kernel body from `gpu_kernels`.
      name: name of the kernel in profiles.
      xs: x or g; empty to unpack.
      packed: W.
      tile: what one program computes at a time.
      grid: number of programs along each axis.
      out: shape and dtype of the result.
      interpret: run by Pallas' interpreter.
    """
    if packed.scale is not None and tile.octets > SCALED // BYTE:
        raise ValueError(f'{tile}: int4 values have one scale for {SCALED // BYTE} octets; use a tile of fewer octets')
    octets, outputs = packed.positions.shape
    dtype = xs[0].dtype if xs else out.dtype
    # Number of neighbouring outputs (lanes) whose dense numbers fill a word: two for bf16, one for fp32. Their packed
    # values are read as one integer of matching width; positions and int4 have one byte per lane.
    lanes = 4 // dtype.itemsize
    byte_per_lane = {1: jnp.uint8, 2: jnp.uint16}[lanes]
    values = _as_words(packed.values, lanes, jnp.uint32 if packed.scale is None else byte_per_lane)
    # A new axis for the value rows of one octet (4, or 2 for int4), so that a body reads them by a fixed index.
    arrays = [values.reshape(octets, -1, outputs // lanes), _as_words(packed.positions, lanes, byte_per_lane)]
    if packed.scale is not None:
        # `few` works on lanes, so it reads scales in the same words. The other bodies scale whole outputs.
        reads_words = body is gpu_kernels.few
        arrays.append(_as_words(packed.scale.astype(dtype), lanes, jnp.uint32) if reads_words else packed.scale)
    # Whole arrays are passed. The bodies load their tiles themselves, and mask them beyond the end of an array.
    in_specs = [pl.BlockSpec(memory_space=pl.ANY)] * (len(xs) + len(arrays))
    sizes = Sizes(rows=xs[0].shape[0] if xs else 0, inputs=packed.inputs, outputs=outputs, octets=octets)
    return pl.pallas_call(
        functools.partial(body, tile=tile, sizes=sizes, interpret=interpret),
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=out,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=cost(xs[0], packed) if xs else None,
    )(*xs, *arrays)


def _as_words(array: Array, lanes: int, word: DTypeLike) -> Array:
    """Combine each `lanes` neighbouring outputs to one number of type `word`."""
    # A bitcast to a wider type combines the numbers along the last axis.
    array = array.reshape(*array.shape[:-1], -1, lanes) if lanes > 1 else array
    return jax.lax.bitcast_convert_type(array, word)
