"""What the estimates of benchmarks/kernels.py share: a product, a chip, and the three terms of its time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparselora_jax.planning.tracing import nbytes
from sparselora_jax.sparse.packing.packed24 import Packed24, shapes24


class Chip(NamedTuple):
    """Rates of the vendors' data sheets, dense bf16."""

    name: str
    bytes_s: float
    flops_s: float
    cores: int  # multiprocessors; of a TPU 1
    hertz: float
    target: int | str  # compute capability, or the topology's name


def times(chip: Chip, moved: float, flops: float, vector_s: float) -> dict[str, float]:
    """Seconds of the three terms."""
    return {'bytes': moved / chip.bytes_s, 'matmul': flops / chip.flops_s, 'vector': vector_s}


class Problem(NamedTuple):
    """One product: `x @ W`, or `g @ W.T` (transposed), W being `[inputs, outputs]`."""

    rows: int
    inputs: int
    outputs: int
    four_bits: bool
    transposed: bool

    @property
    def packed(self) -> Packed24:
        """Shapes of its weights."""
        return shapes24(jax.ShapeDtypeStruct((self.inputs, self.outputs), jnp.bfloat16), four_bits=self.four_bits)

    def moved(self, weights: float) -> float:
        """Bytes, where the weights are so many."""
        return weights + 2 * self.rows * (self.inputs + self.outputs)

    def of_tile(self, weights: float, rows: int, wide: int) -> float:
        """Bytes read and written for a tile of the product, `rows` x `wide`: the weights' share, its rows, itself."""
        deep, across = (self.outputs, self.inputs) if self.transposed else (self.inputs, self.outputs)
        return weights * wide / across + 2 * rows * (deep + wide)

    def a_tile(self, rows: int, wide: int, shared: int = 1) -> str:
        """The same as a column: KB, and their ratio to a tile of dense bf16 weights.

        Args:
          shared: programs that share a sum, and write their parts in fp32, which are read to be added up.
        """
        moved = self.of_tile(nbytes(self.packed), rows, wide) + (8 * shared * rows * wide if shared > 1 else 0)
        return f'{moved / 1e3:.0f} ({moved / self.of_tile(2 * self.inputs * self.outputs, rows, wide):.2f})'

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs
