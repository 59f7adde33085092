"""Dense kernels in four bits (qwix's `QArray`), for masks that no packed format saves more with."""

import functools
import math

import jax
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
    if kernel.ndim == 2:
        return _quantise_matrix(kernel, kind)
    # A layer at a time: NF4 compares each weight with 16 levels.
    return jax.lax.map(lambda layer: _quantise_matrix(layer, kind), kernel)


@functools.partial(jax.jit, static_argnames='kind')
def _quantise_matrix(kernel, kind):
    return qwix.quantize(
        kernel.astype(jnp.float32),
        FOUR_BITS[kind],
        channelwise_axes=[1],
        tiled_axes={0: math.gcd(kernel.shape[0], TILE)},
        scale_dtype=jnp.bfloat16,
    )


def dequantise(kernel: qwix.QArray) -> Float[Array, '*layers inputs outputs']:
    """The kernel in float32."""
    return qwix.dequantize(kernel.astype(jnp.float32))
