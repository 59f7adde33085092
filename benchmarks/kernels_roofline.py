"""What the estimates of benchmarks/kernels.py share: a product, a chip, and the three terms of its time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparselora_jax.packing.like import packed24_like
from sparselora_jax.packing.packed24 import Packed24


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
        return packed24_like(jax.ShapeDtypeStruct((self.inputs, self.outputs), jnp.bfloat16), four_bits=self.four_bits)

    def moved(self, weights: float) -> float:
        """Bytes, where the weights are so many."""
        return weights + 2 * self.rows * (self.inputs + self.outputs)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs
