"""Platforms that have functions of their own for a `Packed24`. To add one, write its file and register it here."""

from collections.abc import Callable
from dataclasses import dataclass

from jax.typing import DTypeLike
from jaxtyping import Array

from sparselora_jax.runtime.registry import Registry
from sparselora_jax.sparse.kernels import cpu, gpu, tpu
from sparselora_jax.sparse.packing.packed24 import Packed24


@dataclass(frozen=True)
class Platform:
    """Multiplies with a `Packed24` on one platform, and may unpack it.

    Attributes:
      takes: `takes(dtype, packed)` is whether the other functions read these: the dtype of x (or of the unpacked
        weights), and a packed kernel, of which only shapes and dtypes are looked at.
      product: `product(x, packed, transposed=...)` is `x @ W` or `x @ W.T` for a matrix x, summed in fp32, in x's
        dtype.
      unpack: `unpack(packed, dtype, interpret=...)` is W with its zeros, one matrix, values (or fp32 for int4) not
        cast. `interpret` runs a Pallas kernel on any machine. None: `unpack24` as XLA compiles it is fast enough.
      unpack_outputs: number of neighbouring outputs that `unpack` reads together. A mesh must not divide them.
    """

    takes: Callable[[DTypeLike, Packed24], bool]
    product: Callable[..., Array]
    unpack: Callable[..., Array] | None = None
    unpack_outputs: int = 1


# By the names that `jax.lax.platform_dependent` gives to platforms.
PLATFORMS: Registry[Platform] = Registry('platform')
PLATFORMS.register('cpu', Platform(cpu.takes, cpu.product))
PLATFORMS.register('cuda', Platform(gpu.takes, gpu.product, gpu.unpacked, gpu.LANES))
PLATFORMS.register('tpu', Platform(tpu.takes, tpu.product))
