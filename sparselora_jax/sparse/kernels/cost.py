"""What the kernels tell XLA of their cost, which it cannot see."""

from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from sparselora_jax.sparse.packing.packed24 import Packed24


def cost(x: Float[Array, 'rows m'], packed: Packed24) -> pl.CostEstimate:
    """Of a product with packed weights, either way: FLOPs of the dense one, and each array read or written once."""
    (inputs, outputs), rows = packed.shape, x.shape[0]
    return pl.CostEstimate(
        flops=2 * rows * inputs * outputs,
        bytes_accessed=packed.nbytes + rows * (inputs + outputs) * x.dtype.itemsize,
        transcendentals=0,
    )
