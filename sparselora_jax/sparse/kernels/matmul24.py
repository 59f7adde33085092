"""x @ W for a `Packed24`: one function that dispatches to the platform that a program is lowered for."""

import functools
import logging

import jax
from jaxtyping import Array, Float

from sparselora_jax.sparse.kernels.platforms import PLATFORMS
from sparselora_jax.sparse.kernels.reference import reference
from sparselora_jax.sparse.packing.packed24 import Packed24


def matmul24(x: Float[Array, '*batch inputs'], kernel: Packed24) -> Float[Array, '*batch outputs']:
    """Return `x @ W` in x's dtype, summed in fp32.

    It is differentiable in x. The backward saves the packed kernel, never the dense one.

    A platform in `PLATFORMS` uses its own kernels, if they support these shapes and dtypes. Otherwise the kernel is
    unpacked where it is used.

    Args:
      x: the rows to multiply.
      kernel: W, one matrix.

    >>> from sparselora_jax.sparse.packing.packed24 import pack24
    >>> matmul24(jnp.ones((1, 4)), pack24(jnp.array([[1.0], [0.0], [2.0], [0.0]]))).tolist()
    [[3.0]]
    """
    return _matmul24(x, kernel)


@jax.custom_vjp
def _matmul24(x, kernel):
    return _dispatch(False, x, kernel)


def _forward(x, kernel):
    return _dispatch(False, x, kernel), kernel


def _backward(kernel, g):
    return _dispatch(True, g, kernel), None  # no gradient for the base


_matmul24.defvjp(_forward, _backward)


def _dispatch(transposed: bool, x: Array, kernel: Packed24) -> Array:
    """Return `x @ W` or `x @ W.T`, by the function of the platform that the program is lowered for."""
    matrix = x.reshape(-1, x.shape[-1])
    products = {'default': reference}
    for name in PLATFORMS:
        platform = PLATFORMS.find(name)
        if platform.takes(matrix.dtype, kernel):
            products[name] = platform.product
    # A program may be lowered for another platform, which is only known at lowering. So all platforms stay branches.
    this_platform = _platform()
    if this_platform not in products:
        _warn_unpacked(this_platform, matrix, kernel)
    branches = {name: functools.partial(product, transposed=transposed) for name, product in products.items()}
    out = jax.lax.platform_dependent(matrix, kernel, **branches)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _platform() -> str:
    """Return the platform of this process, by its name in lowering.

    `jax.default_backend()` calls NVIDIA and AMD GPUs `gpu`. Lowering calls them `cuda` and `rocm`.
    """
    backend = jax.default_backend()
    if backend == 'gpu':
        return 'rocm' if 'rocm' in jax.devices()[0].client.platform_version.lower() else 'cuda'
    return backend


def _warn_unpacked(platform: str, x: Array, kernel: Packed24) -> None:
    """Warn once that no kernel supports these operands."""
    values = 'int4' if kernel.scale is not None else kernel.values.dtype
    operands = f'x {x.dtype} and values {values} {list(kernel.shape)}'
    _warn(f'matmul24: no kernel on {platform} for {operands}: weights are unpacked where they are used')


@functools.cache  # once per message, since every layer is traced
def _warn(line: str) -> None:
    logging.getLogger(__name__).warning(line)
