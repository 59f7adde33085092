"""x @ W and g @ W.T of a `Packed24`, for TPUs (Pallas, Mosaic).

Two rows of bf16 lie in one word of 32 bits, so the two values of a group arrive as a word, and the word of its first
two inputs, like that of its last two, is that word, shifted by half or not, with halves cut off. A word is two rows
again to the matrix unit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sparselora_jax.packing.packed24 import BYTE, Packed24


class Tile(NamedTuple):
    """What one step of the grid reads: `inputs` a multiple of 256, `outputs` of 128."""

    rows: int
    outputs: int
    inputs: int


def takes(x: Array, packed: Packed24) -> bool:
    """Whether the kernel here reads these: bf16, 256 divides the inputs and 128 the outputs."""
    bf16 = packed.scale is None and packed.values.dtype == x.dtype == jnp.bfloat16
    return bf16 and packed.inputs % 256 == 0 and packed.shape[-1] % 128 == 0


def _codes(positions_ref):
    """Half a byte a group, one row a group."""
    byte = positions_ref[...].astype(jnp.int32)
    return pltpu.bitcast(byte & 15 | byte >> 4 << 16, jnp.int16).astype(jnp.int32)


def _halves(word, code):
    """The words of the first and of the last two inputs of each group."""
    first, second = code & 3, code & 12
    low, zero = word & 0xFFFF, jnp.zeros_like(word)
    begins = jnp.where(first == 0, jnp.where(second == 4, word, low), zero)
    ends = jnp.where(second == 12, jnp.where(first == 2, word, word - low), zero)
    return jnp.where(first == 1, word << 16, begins), jnp.where(second == 8, word >> 16, ends)


def _forward_kernel(x_ref, values_ref, positions_ref, out_ref, total_ref):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    words = _halves(pltpu.bitcast(values_ref[...], jnp.uint32), _codes(positions_ref))
    for half, word in enumerate(words):
        weights = pltpu.bitcast(word, x_ref.dtype)
        total_ref[...] += jnp.dot(x_ref[half], weights, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def halves(x: Float[Array, 'rows inputs']) -> Float[Array, '2 rows half']:
    """The inputs that each of a tile's two products reads: the first, or the last, two of each four."""
    rows, inputs = x.shape
    return x.reshape(rows, inputs // 4, 2, 2).transpose(2, 0, 1, 3).reshape(2, rows, inputs // 2)


def matmul(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """`x @ W`, summed in fp32, in x's dtype."""
    (rows, inputs), outputs = x.shape, packed.shape[1]
    return pl.pallas_call(
        _forward_kernel,
        name='matmul24',
        grid=(pl.cdiv(rows, tile.rows), outputs // tile.outputs, inputs // tile.inputs),
        in_specs=[
            pl.BlockSpec((2, tile.rows, tile.inputs // 2), lambda i, j, k: (0, i, k)),
            pl.BlockSpec((tile.inputs // 2, tile.outputs), lambda i, j, k: (k, j)),
            pl.BlockSpec((tile.inputs // BYTE, tile.outputs), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((tile.rows, tile.outputs), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, outputs), x.dtype),
        scratch_shapes=[pltpu.VMEM((tile.rows, tile.outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * outputs,
            bytes_accessed=x.nbytes + packed.nbytes + rows * outputs * x.dtype.itemsize,
            transcendentals=0,
        ),
    )(halves(x), packed.values, packed.positions)
