"""What the formats share: kernels may be stacked, `[*layers, inputs, outputs]`."""

import functools
from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array


@functools.cache
def over_layers(function: Callable, ndim: int) -> Callable:
    """A function of one matrix, jitted, for stacks of them with `ndim` axes."""
    for _ in range(ndim - 2):
        function = jax.vmap(function)
    return jax.jit(function)


def kernel_shape(rows: Array, inputs: int) -> tuple[int, ...]:
    """The shape of a kernel, from an array `[*layers, rows, outputs]` that belongs to it."""
    *layers, _, outputs = rows.shape
    return (*layers, inputs, outputs)


def of_layer(layer: Sequence[int]) -> str:
    """How an error begins: the layer of a stack, nothing for a matrix.

    >>> of_layer([3]), of_layer([])
    ('layer 3, ', '')
    """
    return f'layer {layer[0] if len(layer) == 1 else layer}, ' if layer else ''
