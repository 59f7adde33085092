"""What any platform computes: the weights are unpacked where they are used."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.sparse.packing.packed24 import Packed24, unpack24


def reference(x: Float[Array, 'rows m'], kernel: Packed24, *, transposed: bool) -> Float[Array, 'rows n']:
    """`x @ W` or `x @ W.T`, summed in fp32, in x's dtype."""
    return dense_product(x, unpack24(kernel, x.dtype), transposed=transposed)


def dense_product(
    x: Float[Array, 'rows m'], weights: Float[Array, 'inputs outputs'], *, transposed: bool
) -> Float[Array, 'rows n']:
    """`reference` of weights that are unpacked."""
    product = jnp.matmul(x, weights.T if transposed else weights, preferred_element_type=jnp.float32)
    return product.astype(x.dtype)
