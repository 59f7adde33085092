"""Helpers for stacked kernels, `[*layers, inputs, outputs]`, which all formats share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax


@functools.cache
def over_layers(function: Callable, ndim: int) -> Callable:
    """Return a jitted version of a function of one matrix that works on stacks.

    The result is cached, so that each function is traced once per shape.

    Args:
      function: takes and returns matrices, or packed ones.
      ndim: the number of axes of the stack.
    """
    # Formats are written for one matrix, so apply one vmap for each leading axis.
    for _ in range(ndim - 2):
        function = jax.vmap(function)
    return jax.jit(function)


def kernel_shape(rows: Any, inputs: int) -> tuple[int, ...]:
    """Return the shape of a kernel, given one of its packed arrays, `[*layers, rows, outputs]`.

    Args:
      rows: an object with that array's shape.
      inputs: number of inputs of the kernel.
    """
    # Several inputs share a row of a packed array, and the last row may be padded. So `inputs` is given.
    *layers, _, outputs = rows.shape
    return (*layers, inputs, outputs)


def in_layer(layer: Sequence[int]) -> str:
    """Return the start of an error message: the layer of a stack, or nothing for a matrix.

    Args:
      layer: the index into the leading axes.

    >>> in_layer([3]), in_layer([])
    ('layer 3, ', '')
    """
    return f'layer {layer[0] if len(layer) == 1 else layer}, ' if layer else ''
