"""The product on any platform, by unpacking the weights where they are used."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.sparse.packing.packed24 import Packed24, unpack24


def reference(x: Float[Array, 'rows m'], kernel: Packed24, *, transposed: bool) -> Float[Array, 'rows n']:
    """Return `x @ W` or `x @ W.T`, summed in fp32, in x's dtype.

    Args:
      x: the rows to multiply.
      kernel: W, one matrix.
      transposed: multiply with W.T.
    """
    return dense_product(x, unpack24(kernel, x.dtype), transposed=transposed)


def dense_product(
    x: Float[Array, 'rows m'], weights: Float[Array, 'inputs outputs'], *, transposed: bool
) -> Float[Array, 'rows n']:
    """Return the same as `reference`, for weights that are already unpacked.

    Args:
      x: the rows to multiply.
      weights: W.
      transposed: multiply with W.T.
    """
    product = jnp.matmul(x, weights.T if transposed else weights, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
