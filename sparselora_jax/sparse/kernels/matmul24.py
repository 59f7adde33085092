"""x @ W of a `Packed24`: one function, lowered for the platform that a program is compiled for."""

import functools
import logging

import jax
from jaxtyping import Array, Float

from sparselora_jax.sparse.kernels import cpu, gpu, tpu
from sparselora_jax.sparse.kernels.reference import reference
from sparselora_jax.sparse.packing.packed24 import Packed24


def matmul24(x: Float[Array, '*batch inputs'], kernel: Packed24) -> Float[Array, '*batch outputs']:
    """`x @ W` in x's dtype, summed in fp32; differentiable in x, and what is kept for that is packed.

    On a GPU or a TPU by a Pallas kernel, where shapes and dtypes are those that it takes; on a CPU, where x has few
    rows, as it is packed; else the kernel is unpacked where it is used.

    >>> from sparselora_jax.packing.packed24 import pack24
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
    return _dispatch(True, g, kernel), None


_matmul24.defvjp(_forward, _backward)


def _dispatch(transposed: bool, x: Array, kernel: Packed24) -> Array:
    matrix = x.reshape(-1, x.shape[-1])
    products = {'default': reference, 'cpu': cpu.product}
    for platform, chip in (('cuda', gpu), ('tpu', tpu)):
        if chip.takes(matrix.dtype, kernel):
            products[platform] = chip.product
    if (here := _platform()) not in products:
        _say_unpacked(here, matrix, kernel)
    branches = {name: functools.partial(product, transposed=transposed) for name, product in products.items()}
    found = jax.lax.platform_dependent(matrix, kernel, **branches)
    return found.reshape(*x.shape[:-1], found.shape[-1])


def _platform() -> str:
    """What this process computes on, by the names that lowering has: JAX calls both makes of GPU `gpu`."""
    backend = jax.default_backend()
    if backend == 'gpu':
        return 'rocm' if 'rocm' in jax.devices()[0].client.platform_version.lower() else 'cuda'
    return backend


def _say_unpacked(platform: str, x: Array, kernel: Packed24) -> None:
    """A line, once."""
    values = 'int4' if kernel.scale is not None else kernel.values.dtype
    what = f'x {x.dtype} and values {values} {list(kernel.shape)}'
    _warn(f'matmul24: no kernel on {platform} for {what}: weights are unpacked where they are used')


@functools.cache
def _warn(line: str) -> None:
    logging.getLogger(__name__).warning(line)
