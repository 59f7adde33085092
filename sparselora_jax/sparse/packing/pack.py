"""Packs the kernels of a tree: sparse ones without their zeros (docs/formats.md), or dense ones in four bits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from sparselora_jax.sparse import rules as rules_lib
from sparselora_jax.sparse.packing.bitmask import Bitmask, pack_bitmask, pack_mask
from sparselora_jax.sparse.packing.errors import PackingError
from sparselora_jax.sparse.packing.packed24 import Packed24, pack24, quantise24
from sparselora_jax.sparse.packing.quantised import FOUR_BITS, quantise

FORMATS = {
    'packed24': pack24,
    'packed24_int4': lambda kernel, mask: quantise24(pack24(kernel, mask)),
    'bitmask': pack_bitmask,
}


def pack(params: dict, masks: dict, formats: str | Sequence[tuple[str, str]] = 'packed24') -> dict:
    """Params with every kernel that has a mask packed.

    Args:
      formats: one of `FORMATS`, or ordered rules `(regex, format)`. `packed24` holds two of each four inputs, without
        loss; `packed24_int4` rounds its values to four bits; `bitmask` holds any mask, without loss.

    Raises:
      PackingError: a mask that its format cannot hold (names path, layer and first group), or an unknown format.
      RuleError: rules that do not fit the masks.

    >>> from sparselora_jax.sparse.dense import unpack
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


def reduce_kernels(params: dict, masks: dict, base: str | Sequence[tuple[str, str]]) -> tuple[dict, dict | None]:
    """Store the kernels that have a mask in fewer bytes: packed, or in four bits beside a mask of one bit a weight.

    Args:
      params: plain arrays.
      masks: of the kernels to store in fewer bytes.
      base: `int4` or `nf4` (see `quantise_masked`), or formats of `pack`.

    Returns:
      (params, masks); masks None: packed kernels bring their own.

    Raises:
      PackingError: see `pack`.
    """
    if isinstance(base, str) and base in FOUR_BITS:
        return quantise_masked(params, masks, base), pack_masks(masks)
    return pack(params, masks, base), None


def stack(layers: Sequence[Any]) -> Any:
    """Kernels or masks of single layers, of one kind and shape, as one of a stack; on the host."""
    if isinstance(layers[0], Bitmask):
        longest = max(layer.values.size for layer in layers)
        layers = [
            dataclasses.replace(layer, values=np.pad(layer.values, (0, longest - layer.values.size)))
            for layer in layers
        ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


def is_packed(kernel: Any) -> bool:
    """Whether a kernel is packed: it brings its own mask."""
    return isinstance(kernel, Packed24 | Bitmask)


def is_reduced(kernel: Any) -> bool:
    """Whether a kernel is packed or quantised: no array that could be used as it is."""
    return is_packed(kernel) or isinstance(kernel, qwix.QArray)
