"""The cost of a Pallas kernel, which XLA needs for scheduling but cannot see by itself."""

from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from sparselora_jax.sparse.packing.packed24 import Packed24


def cost(x: Float[Array, 'rows m'], packed: Packed24) -> pl.CostEstimate:
    """Estimate the cost of a product with packed weights, transposed or not.

    Args:
      x: the rows to multiply.
      packed: W, one matrix.

    Returns:
      The FLOPs of the dense product, since the kernels skip no zeros, and the bytes of reading or writing each array
      once.
    """
    inputs, outputs = packed.shape
    rows = x.shape[0]
    return pl.CostEstimate(
        flops=2 * rows * inputs * outputs,
        bytes_accessed=packed.nbytes + rows * (inputs + outputs) * x.dtype.itemsize,
        transcendentals=0,
    )
