"""Dense kernels in four bits (qwix's `QArray`), for masks that no packed format saves more with."""

import functools
import math

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float

from sparselora_jax.sparse.packing.four_bits import best_scale, nearest

FOUR_BITS = {'int4': jnp.int4, 'nf4': 'nf4'}


def tile(inputs: int) -> int:
    """Inputs that share a scale: 128, or the largest power of two below it that divides the inputs."""
    return math.gcd(inputs, 128)


def quantise(kernel: Float[Array, '*layers inputs outputs'], kind: str) -> qwix.QArray:
    """A kernel in four bits, with a bf16 scale for 128 inputs of each output.

    Of the scales that are tried the one with the least squared error is taken. Values that lie on a grid already, as
    `sl.GPTQ` leaves them, are held as they are.

    Args:
      kind: `int4`: evenly spaced levels; `nf4`: levels at quantiles of the normal distribution (QLoRA, section 3 of
        arXiv 2305.14314).

    >>> quantise(jnp.array([[7.0], [-3.2]]), 'int4').qvalue.tolist()
    [[7], [-3]]
    """
    if kernel.ndim == 2:
        return _quantise_matrix(kernel, kind)
    # A layer at a time: NF4 compares each weight with 16 levels.
    return jax.lax.map(lambda layer: _quantise_matrix(layer, kind), kernel)


@functools.partial(jax.jit, static_argnames='kind')
def _quantise_matrix(kernel, kind):
    blocks = kernel.astype(jnp.float32).reshape(-1, tile(kernel.shape[0]), kernel.shape[1])
    scale = best_scale(blocks, kind)
    codes = nearest(blocks, scale, kind).reshape(kernel.shape)
    codes = (codes - 8).astype(jnp.int4) if kind == 'int4' else codes.astype(jnp.uint4)  # as qwix stores them
    return qwix.QArray(codes, scale, None, FOUR_BITS[kind])


def dequantise(kernel: qwix.QArray) -> Float[Array, '*layers inputs outputs']:
    """The kernel in float32."""
    return qwix.dequantize(kernel.astype(jnp.float32))
