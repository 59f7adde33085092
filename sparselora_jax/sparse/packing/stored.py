"""Packed kernels and masks as named arrays, and back: the content of a file of them (docs/formats.md)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from sparselora_jax.sparse.packing.bitmask import PackedMask
from sparselora_jax.sparse.packing.format import FORMATS, PackingError, Stored


def stored_types() -> dict[str, type]:
    """Return the classes of leaves that files hold as several arrays, by the name that a header gives to them."""
    # Looked up at each call: a format may be registered at any time. Kernels of formats without masks (qwix's class)
    # are stored in no file of ours.
    kernel_types = [FORMATS.find(name).kernel_type for name in FORMATS if FORMATS.find(name).brings_mask]
    return {kind.stored_as: kind for kind in (*kernel_types, PackedMask)}


def array_names() -> set[str]:
    """Return the names that the arrays of any such leaf may have."""
    types = stored_types().values()
    return {name for kind in types for name in (*kind.required_arrays, *kind.optional_arrays)}


def header_of(leaf: Stored) -> dict[str, str | int]:
    """Return what a header says about a leaf beside its arrays.

    Args:
      leaf: a packed kernel or mask.
    """
    return {'format': leaf.stored_as, 'inputs': leaf.inputs}


def from_file(path: str, header: Any, arrays: Mapping[str, Array]) -> Stored:
    """Return the leaf that a header describes, checked.

    Args:
      path: of the leaf, for errors.
      header: what the file says about it, see `header_of`; from a file, so it may be anything.
      arrays: its arrays by name.

    Raises:
      PackingError: an unknown format, arrays that are missing, or what contradicts the format; names the path.
    """
    # A file may be damaged or somebody else's: any of these may be missing or of another type.
    try:
        kind = stored_types()[header['format']]
        inputs = int(header['inputs'])
    except (KeyError, TypeError, ValueError):
        raise PackingError(f'{path}: {header!r} is not the format of a packed array') from None
    if missing := [name for name in kind.required_arrays if name not in arrays]:
        raise PackingError(f'{path}: {", ".join(missing)} of its {kind.stored_as} is missing')
    try:
        return kind.from_arrays(arrays, inputs)
    except PackingError as error:
        raise PackingError(f'{path}: {error}') from None
