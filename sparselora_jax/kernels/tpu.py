"""x @ W of a `Packed24`, for TPUs (Pallas, Mosaic).

Two rows of bf16 lie in one word of 32 bits, so the two values of a group arrive as a word, and a word is two rows again
to the matrix unit. Where the values of a group stand is a question of which inputs they meet: the first value input 0,
1 or 2 of the four, the second 3, 2 or 1. So there are three products, each with those halves of the words that its
inputs belong to. The matrix unit does half as much again, for which it has time where bytes bind; the vector unit only
masks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sparselora_jax.packing.packed24 import BYTE, Packed24

STRIP = 128  # outputs
WIDEST = 4096  # outputs of a tile


class Tile(NamedTuple):
    """What one step of the grid reads: `inputs` a multiple of 256, `outputs` of 128."""

    rows: int
    outputs: int
    inputs: int


def takes(x: Array, packed: Packed24) -> bool:
    """Whether the kernel here reads these: bf16, 256 divides the inputs and 128 the outputs."""
    bf16 = packed.scale is None and packed.values.dtype == x.dtype == jnp.bfloat16
    return bf16 and packed.inputs % 256 == 0 and packed.shape[-1] % 128 == 0


def tile(rows: int, packed: Packed24) -> Tile:
    """What to read at a time: every step costs some 200 cycles of its own, so many outputs.

    More inputs are no gain: what is unpacked of them then leaves the registers.
    """
    strips = -(-packed.shape[-1] // STRIP)
    blocks = -(-strips // (WIDEST // STRIP))
    return Tile(min(-(-rows // 16) * 16, 256), -(-strips // blocks) * STRIP, min(512, packed.inputs))


def _thirds(word: Array, positions: Array) -> tuple[Array, Array, Array]:
    """A group's word in three: its first value at input d and its second at input 3 - d, for d = 0, 1, 2.

    Args:
      word: both values of each group, `[groups, outputs]` in 32 bits.
      positions: half a byte a group, eight of them in 32 bits, `[groups / 8, outputs]`.
    """
    rows, outputs = positions.shape
    # 3 - place of the second value, so that both halves of a mask are made alike.
    spread = jnp.broadcast_to((positions ^ jnp.uint32(0xCCCCCCCC))[:, None], (rows, 8, outputs))
    own = jax.lax.broadcasted_iota(jnp.uint32, spread.shape, 1) * 4
    code = (spread >> own).reshape(8 * rows, outputs) & 15
    both = code | code << 14  # bits 0-1: of the first value; 16-17: of the second
    at1, at2 = both & 0x00010001, both & 0x00020002
    first, second = word & ((at1 << 16) - at1), word & ((at2 << 15) - (at2 >> 1))
    return word ^ first ^ second, first, second


def _forward_kernel(x_ref, values_ref, positions_ref, out_ref, total_ref, *, groups):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    # A strip at a time, or what is unpacked does not stay in registers.
    for start in range(0, total_ref.shape[1], STRIP):
        strip = pl.ds(start, STRIP)
        word = pltpu.bitcast(values_ref[:, strip], jnp.uint32)
        if groups % word.shape[0]:
            row = step * word.shape[0] + jax.lax.broadcasted_iota(jnp.int32, word.shape, 0)
            word = jnp.where(row < groups, word, jnp.zeros_like(word))
        for third, half in enumerate(_thirds(word, pltpu.bitcast(positions_ref[:, strip], jnp.uint32))):
            weights = pltpu.bitcast(half, x_ref.dtype)
            total_ref[:, strip] += jnp.dot(x_ref[third], weights, preferred_element_type=jnp.float32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = total_ref[...].astype(out_ref.dtype)


def thirds(x: Float[Array, 'rows inputs']) -> Float[Array, '3 rows half']:
    """The inputs that each of a tile's three products reads: of each four, d and 3 - d."""
    groups = x.reshape(x.shape[0], -1, 4)
    return jnp.stack([jnp.stack([groups[..., d], groups[..., 3 - d]], axis=-1) for d in range(3)]).reshape(
        3, x.shape[0], -1
    )


def _filled(x: Array, size: int) -> Array:
    """With zeros behind the end: what weights hold there is masked, and x is small."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size)))


def matmul(
    x: Float[Array, 'rows inputs'], packed: Packed24, tile: Tile, *, interpret: bool = False
) -> Float[Array, 'rows outputs']:
    """`x @ W`, summed in fp32, in x's dtype."""
    (rows, inputs), outputs = x.shape, packed.shape[1]
    x = jnp.pad(x, ((0, -rows % tile.rows), (0, 0)))  # a single row is laid out badly
    return pl.pallas_call(
        functools.partial(_forward_kernel, groups=inputs // 4),
        name='matmul24',
        # Blocks may reach behind the ends: of outputs, what is read there ends in none; of inputs, it is masked.
        grid=(x.shape[0] // tile.rows, pl.cdiv(outputs, tile.outputs), pl.cdiv(inputs, tile.inputs)),
        in_specs=[
            pl.BlockSpec((3, tile.rows, tile.inputs // 2), lambda i, j, k: (0, i, k)),
            pl.BlockSpec((tile.inputs // 2, tile.outputs), lambda i, j, k: (k, j)),
            pl.BlockSpec((tile.inputs // BYTE, tile.outputs), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((tile.rows, tile.outputs), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], outputs), x.dtype),
        scratch_shapes=[pltpu.VMEM((tile.rows, tile.outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=2**26
        ),
        interpret=interpret,
        cost_estimate=pl.CostEstimate(
            flops=3 * rows * inputs * outputs,
            bytes_accessed=x.nbytes + packed.nbytes + rows * outputs * x.dtype.itemsize,
            transcendentals=0,
        ),
    )(_filled(thirds(x), tile.inputs // 2), packed.values, packed.positions)[:rows]
