"""x @ W, g @ W.T and W itself of a `Packed24`, for NVIDIA GPUs from Ampere on (Pallas, Triton).

A tile of packed weights is read once, its dense form is made in registers and multiplied at once: it is never in
memory. What is saved is bytes (0.5625x of bf16), not FLOPs. With many rows FLOPs bind: W is then unpacked to memory,
once, and XLA's own product follows. (`gpu_kernels.py` has the bodies, `gpu_tiles.py` what was found to be fastest.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from sparselora_jax.sparse.kernels import gpu_kernels
from sparselora_jax.sparse.kernels.cost import cost
from sparselora_jax.sparse.kernels.gpu_kernels import Sizes, Tile
from sparselora_jax.sparse.kernels.gpu_tiles import TILES
from sparselora_jax.sparse.kernels.reference import dense_product
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED, Packed24

LANES = 2  # bf16 outputs that share a word of 32 bits


def takes(dtype: Any, packed: Packed24) -> bool:
    """Whether the kernels here read these: bf16 or fp32, x and values alike (int4 values fit both), even outputs."""
    same = packed.scale is not None or packed.values.dtype == dtype
    return same and dtype in (jnp.bfloat16, jnp.float32) and packed.shape[-1] % LANES == 0


def tile(kind: str, rows: int, packed: Packed24) -> Tile | None:
    """What to read at a time; None: of so many rows the kernel of this kind is not the fastest.

    Args:
      kind: `few`, `forward`, `transposed` or `unpack` (of no rows).
    """
    tiles = TILES[kind, 'values' if packed.scale is None else 'int4']
    return next((Tile(*found) for most, found in tiles if rows <= most), None)


def fastest(rows: int, packed: Packed24, transposed: bool) -> tuple[str, Tile | None]:
    """The kernel for a product with so many rows, and its tile; None: unpacking and a dense product are faster."""
    kinds = ['transposed'] if transposed else ['few', 'forward']
    found = [(kind, tile(kind, rows, packed)) for kind in kinds]
    return next((one for one in found if one[1] is not None), found[-1])


@functools.partial(jax.jit, static_argnames=('transposed', 'interpret'))  # a kernel's body is traced once for a shape
def product(
    x: Float[Array, 'rows m'], packed: Packed24, *, transposed: bool, interpret: bool = False
) -> Float[Array, 'rows n']:
    """`x @ W` or `x @ W.T`, summed in fp32, in x's dtype, by what is fastest for so many rows."""
    kind, found = fastest(x.shape[0], packed, transposed)
    if found is None:
        return dense_product(x, unpacked(packed, x.dtype, interpret=interpret), transposed=transposed)
    return MULTIPLY[kind](x, packed, found, interpret=interpret)


def matmul(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """`x @ W`, summed in fp32, in x's dtype; fp32 ones are multiplied at JAX's default precision."""
    outputs = packed.shape[-1]
    grid = pl.cdiv(x.shape[0], tile.rows), pl.cdiv(outputs, tile.outputs), tile.splits
    return _summed(gpu_kernels.forward, 'matmul24', x, packed, tile, grid, outputs, interpret)


def matmul_transposed(
    g: Float[Array, 'rows outputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows inputs']:
    """`g @ W.T`, summed in fp32, in g's dtype; fp32 ones are multiplied at JAX's default precision."""
    grid = pl.cdiv(g.shape[0], tile.rows), pl.cdiv(packed.positions.shape[0], tile.octets), tile.splits
    return _summed(gpu_kernels.transposed, 'matmul24_transposed', g, packed, tile, grid, packed.inputs, interpret)


def matmul_few(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """`x @ W` in fp32, in x's dtype; registers grow with the rows."""
    outputs = packed.shape[-1]
    grid = 1, pl.cdiv(outputs, tile.outputs), tile.splits
    return _summed(gpu_kernels.few, 'matmul24_few', x, packed, tile, grid, outputs, interpret)


MULTIPLY = {'few': matmul_few, 'forward': matmul, 'transposed': matmul_transposed}


@functools.partial(jax.jit, static_argnames=('dtype', 'interpret'))
def unpacked(packed: Packed24, dtype: Any, *, interpret: bool = False) -> Float[Array, 'inputs outputs']:
    """W with its zeros; `dtype` as `takes` has it."""
    return unpack(packed, dtype, tile('unpack', 0, packed), interpret=interpret)


def unpack(packed: Packed24, dtype: Any, tile: Tile, *, interpret: bool = False) -> Float[Array, 'inputs outputs']:
    """`unpacked` by this tile."""
    grid = pl.cdiv(packed.positions.shape[0], tile.octets), pl.cdiv(packed.shape[-1], tile.outputs)
    out = jax.ShapeDtypeStruct(packed.shape, dtype)
    return _call(gpu_kernels.unpack, 'unpack24', (), packed, tile, grid, out, interpret)


def _summed(body, name, x, packed: Packed24, tile: Tile, grid, out_width: int, interpret) -> Array:
    """A product, whose parts are added where programs share a sum."""
    alone = tile.splits == 1
    out = jax.ShapeDtypeStruct((tile.splits, x.shape[0], out_width), x.dtype if alone else jnp.float32)
    parts = _call(body, name, (x,), packed, tile, grid, out, interpret)
    return parts[0] if alone else jnp.sum(parts, axis=0).astype(x.dtype)


def _call(
    body: Callable, name: str, xs: tuple[Array, ...], packed: Packed24, tile: Tile, grid, out, interpret: bool
) -> Array:
    if packed.scale is not None and tile.octets > SCALED // BYTE:
        raise ValueError(f'{tile}: int4 values have a scale for {SCALED // BYTE} octets')
    octets, outputs = packed.positions.shape
    dtype = xs[0].dtype if xs else out.dtype
    lanes = 4 // dtype.itemsize
    bits = {1: jnp.uint8, 2: jnp.uint16}[lanes]
    values = _as_words(packed.values, lanes, jnp.uint32 if packed.scale is None else bits)
    arrays = [values.reshape(octets, -1, outputs // lanes), _as_words(packed.positions, lanes, bits)]
    if packed.scale is not None:
        few = body is gpu_kernels.few
        arrays.append(_as_words(packed.scale.astype(dtype), lanes, jnp.uint32) if few else packed.scale)
    return pl.pallas_call(
        functools.partial(
            body,
            tile=tile,
            sizes=Sizes(xs[0].shape[0] if xs else 0, packed.inputs, outputs, octets),
            interpret=interpret,
        ),
        name=name,
        grid=grid,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (len(xs) + len(arrays)),
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=out,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=cost(xs[0], packed) if xs else None,
    )(*xs, *arrays)


def _as_words(array: Array, lanes: int, word: Any) -> Array:
    """Neighbouring outputs as one number."""
    array = array.reshape(*array.shape[:-1], -1, lanes) if lanes > 1 else array
    return jax.lax.bitcast_convert_type(array, word)
