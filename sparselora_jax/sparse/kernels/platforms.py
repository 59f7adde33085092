"""Platforms with their own functions for a `Packed24`. To add one, write its file and register it here."""

from collections.abc import Callable
from dataclasses import dataclass

from jax.typing import DTypeLike
from jaxtyping import Array

from sparselora_jax.runtime.registry import Registry
from sparselora_jax.sparse.kernels import cpu, gpu, tpu
from sparselora_jax.sparse.packing.packed24 import Packed24


@dataclass(frozen=True)
class Platform:
    """The functions that multiply with a `Packed24` on one platform, and may unpack it.

    Attributes:
      takes: `takes(dtype, packed)` returns whether the other functions support these operands: the dtype of x (or of
        the unpacked weights), and a packed kernel, of which only shapes and dtypes are used.
      product: `product(x, packed, transposed=...)` returns `x @ W` or `x @ W.T` for a matrix x, summed in fp32, in
        x's dtype.
      unpack: `unpack(packed, dtype, interpret=...)` returns W, one matrix, with its zeros, in the dtype of its values
        (fp32 for int4). `interpret` runs a Pallas kernel on any machine. None: XLA's `unpack24` is fast enough.
      unpack_outputs: number of neighbouring outputs that `unpack` reads together. A mesh must not divide them.
    """

    takes: Callable[[DTypeLike, Packed24], bool]
    product: Callable[..., Array]
    unpack: Callable[..., Array] | None = None
    unpack_outputs: int = 1


# Keys are the platform names of `jax.lax.platform_dependent`.
PLATFORMS: Registry[Platform] = Registry('platform')
PLATFORMS.register('cpu', Platform(cpu.takes, cpu.product))
PLATFORMS.register('cuda', Platform(gpu.takes, gpu.product, gpu.unpacked, gpu.LANES))
PLATFORMS.register('tpu', Platform(tpu.takes, tpu.product))
