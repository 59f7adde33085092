"""A `Packed24` as an array, lowered for the platform that a program is compiled for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparselora_jax.kernels import gpu
from sparselora_jax.packing.packed24 import Packed24, unpack24


def dense24(packed: Packed24, dtype: Any = None) -> Float[Array, '*layers inputs outputs']:
    """`unpack24`; where all there is is one GPU, a matrix is unpacked by a kernel, which reads every byte once.

    (On several XLA divides what it unpacks itself; a kernel it would run whole on each.)
    """
    made = jnp.dtype('float32') if packed.scale is not None else packed.values.dtype  # as `unpack24`, before it casts
    if packed.ndim != 2 or jax.device_count() > 1 or not gpu.takes(made, packed):
        return unpack24(packed, dtype)
    cuda = functools.partial(gpu.unpacked, dtype=made)
    matrix = jax.lax.platform_dependent(packed, default=functools.partial(unpack24, dtype=made), cuda=cuda)
    return matrix.astype(dtype or packed.dtype)
