"""Packed and quantised kernels by their shapes, nothing packed: to count memory and to compile programs with."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse.packing.bitmask import Bitmask, PackedMask
from sparselora_jax.sparse.packing.packed24 import BYTE, SCALED, Packed24
from sparselora_jax.sparse.packing.quantised import FOUR_BITS, quantise


def packed24_like(kernel: Any, *, four_bits: bool = False) -> Packed24:
    """A `Packed24` of shapes.

    Args:
      kernel: anything with the kernel's shape and dtype.

    >>> packed = packed24_like(jax.ShapeDtypeStruct((2, 16, 3), jnp.bfloat16))
    >>> packed.values.shape, packed.positions.shape
    ((2, 8, 3), (2, 2, 3))
    """
    *layers, inputs, outputs = kernel.shape
    rows, shape = -(-inputs // BYTE), jax.ShapeDtypeStruct
    positions = shape((*layers, rows, outputs), jnp.uint8)
    if not four_bits:
        return Packed24(shape((*layers, 4 * rows, outputs), kernel.dtype), positions, None, inputs)
    scale = shape((*layers, -(-inputs // SCALED), outputs), jnp.bfloat16)
    return Packed24(shape((*layers, 2 * rows, outputs), jnp.uint8), positions, scale, inputs)


def mask_like(kernel: Any) -> PackedMask:
    """A `PackedMask` of shapes."""
    *layers, inputs, outputs = kernel.shape
    return PackedMask(jax.ShapeDtypeStruct((*layers, -(-inputs // 8), outputs), jnp.uint8), inputs)


def bitmask_like(kernel: Any, density: float) -> Bitmask:
    """A `Bitmask` of shapes, with this share of the weights kept in every layer."""
    *layers, inputs, outputs = kernel.shape
    kept = math.ceil(density * inputs * outputs)
    return Bitmask(jax.ShapeDtypeStruct((*layers, kept), kernel.dtype), mask_like(kernel))


def base_like(params: dict, densities: dict[str, float], base: str | Sequence[tuple[str, str]]) -> tuple[dict, dict]:
    """What `restore.reduce_base` would make of params and masks.

    Args:
      params: by shapes.
      densities: of the kernels that have a mask, by path.
      base: see `restore.reduce_base`.

    Returns:
      (params, masks), by shapes.
    """
    flat, kernels = rules_lib.flatten(params), {path: rules_lib.flatten(params)[path] for path in densities}
    if isinstance(base, str) and base in FOUR_BITS:
        in_four_bits = functools.partial(quantise, kind=base)
        reduced = {path: jax.eval_shape(in_four_bits, kernel) for path, kernel in kernels.items()}
        masks = {path: mask_like(kernel) for path, kernel in kernels.items()}
        return rules_lib.unflatten(flat | reduced), rules_lib.unflatten(masks)
    like = {
        'packed24': lambda path: packed24_like(kernels[path]),
        'packed24_int4': lambda path: packed24_like(kernels[path], four_bits=True),
        'bitmask': lambda path: bitmask_like(kernels[path], densities[path]),
    }
    rules = [('.*', base)] if isinstance(base, str) else base
    reduced = {path: like[name](path) for path, name in rules_lib.match(rules, densities).items()}
    return rules_lib.unflatten(flat | reduced), {}
