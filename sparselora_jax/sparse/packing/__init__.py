"""Kernels in fewer bytes: sparse ones without their zeros (docs/formats.md), or dense ones in four bits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse.kernels.dense24 import dense24
from sparselora_jax.sparse.packing.bitmask import (
    Bitmask,
    PackedMask,
    pack_bitmask,
    pack_mask,
    unpack_bitmask,
    unpack_mask,
)
from sparselora_jax.sparse.packing.errors import PackingError
from sparselora_jax.sparse.packing.packed24 import Packed24, mask24, pack24, quantise24
from sparselora_jax.sparse.packing.quantised import FOUR_BITS, dequantise, quantise

FORMATS = {
    'packed24': pack24,
    'packed24_int4': lambda kernel, mask: quantise24(pack24(kernel, mask)),
    'bitmask': pack_bitmask,
}

__all__ = [
    'FORMATS',
    'FOUR_BITS',
    'Bitmask',
    'Packed24',
    'PackedMask',
    'PackingError',
    'dense_kernel',
    'dense_mask',
    'kept',
    'pack',
    'pack24',
    'pack_bitmask',
    'pack_mask',
    'pack_masks',
    'quantise_masked',
    'reduced',
    'stack',
    'unpack',
    'unpack_bitmask',
    'unpack_mask',
]


def pack(params: dict, masks: dict, formats: str | Sequence[tuple[str, str]] = 'packed24') -> dict:
    """Params with every kernel that has a mask packed.

    Args:
      formats: one of `FORMATS`, or ordered rules `(regex, format)`. `packed24` holds two of each four inputs, without
        loss; `packed24_int4` rounds its values to four bits; `bitmask` holds any mask, without loss.

    Raises:
      PackingError: a mask that its format cannot hold (names path, layer and first group), or an unknown format.
      RuleError: rules that do not fit the masks.

    >>> kernel = jnp.array([[1.0], [0.0], [2.0], [0.0]])
    >>> packed = pack({'q': {'kernel': kernel}}, {'q': {'kernel': kernel != 0}})
    >>> packed['q']['kernel'].shape, unpack(packed)['q']['kernel'].tolist() == kernel.tolist()
    ((4, 1), True)
    """
    flat, masks = rules_lib.flatten(params), rules_lib.flatten(masks)
    rules = [('.*', formats)] if isinstance(formats, str) else formats
    for path, name in rules_lib.match(rules, masks).items():
        if name not in FORMATS:
            raise PackingError(f'format {name!r}: expected one of {", ".join(FORMATS)}')
        if getattr(flat.get(path), 'shape', None) != masks[path].shape:
            raise PackingError(f'{path}: has a mask {masks[path].shape}, but no kernel of that shape')
        try:
            flat[path] = FORMATS[name](flat[path], masks[path])
        except PackingError as error:
            raise PackingError(f'{path}: {error}') from None
    return rules_lib.unflatten(flat)


def unpack(params: dict, dtype: Any = None) -> dict:
    """Params with plain kernels in the places of packed and quantised ones.

    Args:
      dtype: of the kernels; what they were packed from by default (of four bits: that of their scales).
    """
    flat = rules_lib.flatten(params)
    plain = {path: dense_kernel(leaf, dtype) for path, leaf in flat.items() if reduced(leaf)}
    return rules_lib.unflatten(flat | plain)


def quantise_masked(params: dict, masks: dict, kind: str) -> dict:
    """Params with every kernel that has a mask in four bits, its zeros in place, for any mask: 4 1/8 bits a weight.

    Unlike packed kernels these do not bring their masks; `pack_masks` makes those small.

    Args:
      kind: `int4` or `nf4`, see `quantised.quantise`.

    Raises:
      PackingError: an unknown kind.
    """
    if kind not in FOUR_BITS:
        raise PackingError(f'kind {kind!r}: expected one of {", ".join(FOUR_BITS)}')
    flat = rules_lib.flatten(params)
    for path, mask in rules_lib.flatten(masks).items():
        flat[path] = quantise(jnp.where(mask, flat[path], jnp.zeros((), flat[path].dtype)), kind)
    return rules_lib.unflatten(flat)


def pack_masks(masks: dict) -> dict:
    """Masks in one bit an element, which `bind` and `merge` take as they take others."""
    return rules_lib.unflatten({path: pack_mask(mask) for path, mask in rules_lib.flatten(masks).items()})


def stack(layers: Sequence[Any]) -> Any:
    """Kernels or masks of single layers, of one kind and shape, as one of a stack; on the host."""
    if isinstance(layers[0], Bitmask):
        longest = max(layer.values.size for layer in layers)
        layers = [
            dataclasses.replace(layer, values=np.pad(layer.values, (0, longest - layer.values.size)))
            for layer in layers
        ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def kept(kernel: Any) -> bool:
    """Whether a kernel is packed: it brings its own mask."""
    return isinstance(kernel, Packed24 | Bitmask)


def reduced(kernel: Any) -> bool:
    """Whether a kernel is packed or quantised: no array that could be used as it is."""
    return kept(kernel) or isinstance(kernel, qwix.QArray)


def dense_kernel(kernel: Any, dtype: Any = None) -> Any:
    """A kernel of any kind as an array."""
    if isinstance(kernel, Packed24):
        return dense24(kernel, dtype)
    if isinstance(kernel, qwix.QArray):
        return dequantise(kernel).astype(dtype or kernel.dtype)
    if isinstance(kernel, Bitmask):
        kernel = unpack_bitmask(kernel)
    return kernel if dtype is None else kernel.astype(dtype)


def dense_mask(mask: Any, kernel: Any) -> Any:
    """A mask as an array of booleans: of any kind, or None, where a packed kernel brings its own."""
    if isinstance(mask, PackedMask):
        return unpack_mask(mask)
    if mask is None and isinstance(kernel, Packed24):
        return mask24(kernel)
    if mask is None and isinstance(kernel, Bitmask):
        return unpack_mask(kernel.mask)
    return mask
