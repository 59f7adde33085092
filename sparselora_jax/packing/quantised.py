"""Dense kernels in four bits (qwix's `QArray`), for masks that no packed format saves more with."""

import math

import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float

TILE = 128  # inputs that share a scale, or the largest power of two below it that divides the inputs
FOUR_BITS = {'int4': jnp.int4, 'nf4': 'nf4'}


def quantise(kernel: Float[Array, '*layers inputs outputs'], kind: str) -> qwix.QArray:
    """A kernel in four bits, with a bf16 scale for 128 inputs of each output.

    Args:
      kind: `int4`: evenly spaced levels; `nf4`: levels at quantiles of the normal distribution (QLoRA, section 3 of
        arXiv 2305.14314).

    >>> quantise(jnp.array([[7.5], [-3.2]]), 'int4').qvalue.tolist()
    [[7], [-3]]
    """
    inputs = kernel.ndim - 2
    return qwix.quantize(
        kernel.astype(jnp.float32),
        FOUR_BITS[kind],
        channelwise_axes=[axis for axis in range(kernel.ndim) if axis != inputs],
        tiled_axes={inputs: math.gcd(kernel.shape[inputs], TILE)},
        scale_dtype=jnp.bfloat16,
    )


def dequantise(kernel: qwix.QArray) -> Float[Array, '*layers inputs outputs']:
    """The kernel in float32."""
    return qwix.dequantize(kernel.astype(jnp.float32))
