"""Packed kernels and masks as named arrays, and back: what a file of them holds (docs/formats.md)."""

from typing import Any

from sparselora_jax.sparse.packing.bitmask import Bitmask, PackedMask, check_bitmask
from sparselora_jax.sparse.packing.errors import PackingError
from sparselora_jax.sparse.packing.packed24 import Packed24, check_packed24

# What a header calls each kind, and its arrays.
NAMES = ('values', 'positions', 'scale', 'bits')
ARRAYS = {'packed24': ('values', 'positions'), 'bitmask': ('values', 'bits'), 'packed_mask': ('bits',)}


def take_apart(leaf: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, what a header says beside them) of a packed leaf."""
    if isinstance(leaf, Packed24):
        arrays = {'values': leaf.values, 'positions': leaf.positions}
        arrays |= {} if leaf.scale is None else {'scale': leaf.scale}
        return arrays, {'format': 'packed24', 'inputs': leaf.inputs}
    if isinstance(leaf, Bitmask):
        return {'values': leaf.values, 'bits': leaf.mask.bits}, {'format': 'bitmask', 'inputs': leaf.mask.inputs}
    return {'bits': leaf.bits}, {'format': 'packed_mask', 'inputs': leaf.inputs}


def put_together(path: str, said: Any, arrays: dict[str, Any]) -> Packed24 | Bitmask | PackedMask:
    """The leaf of which a header says this; checked.

    Raises:
      PackingError: an unknown format, arrays that are missing, or what contradicts the format; names the path.
    """
    try:
        kind, inputs = said['format'], int(said['inputs'])
        required = ARRAYS[kind]
    except (KeyError, TypeError, ValueError):
        raise PackingError(f'{path}: {said!r} is not the format of a packed array') from None
    if missing := [name for name in required if name not in arrays]:
        raise PackingError(f'{path}: {", ".join(missing)} of its {kind} is missing')
    try:
        if kind == 'packed24':
            leaf = Packed24(arrays['values'], arrays['positions'], arrays.get('scale'), inputs)
            check_packed24(leaf)
            return leaf
        mask = PackedMask(arrays['bits'], inputs)
        leaf = mask if kind == 'packed_mask' else Bitmask(arrays['values'], mask)
        check_bitmask(leaf)
        return leaf
    except PackingError as error:
        raise PackingError(f'{path}: {error}') from None
