"""Helpers that all formats share: kernels may be stacked, `[*layers, inputs, outputs]`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax


@functools.cache
def over_layers(function: Callable, ndim: int) -> Callable:
    """Return a function of one matrix, jitted, for stacks of them.

    It is cached, so that each function is traced once for each shape.

    Args:
      function: takes and returns matrices, or packed ones.
      ndim: the number of axes of the stack.
    """
    # One vmap for each leading axis: formats are written for one matrix.
    for _ in range(ndim - 2):
        function = jax.vmap(function)
    return jax.jit(function)


def kernel_shape(rows: Any, inputs: int) -> tuple[int, ...]:
    """Return the shape of a kernel, from an array `[*layers, rows, outputs]` that belongs to it.

    Args:
      rows: anything with that array's shape.
      inputs: of the kernel.
    """
    # The rows of a packed array are not inputs: several inputs share one, and the last row may be filled up.
    *layers, _, outputs = rows.shape
    return (*layers, inputs, outputs)


def in_layer(layer: Sequence[int]) -> str:
    """Return the begin of an error: the layer of a stack, nothing for a matrix.

    Args:
      layer: the index into the leading axes.

    >>> in_layer([3]), in_layer([])
    ('layer 3, ', '')
    """
    return f'layer {layer[0] if len(layer) == 1 else layer}, ' if layer else ''
