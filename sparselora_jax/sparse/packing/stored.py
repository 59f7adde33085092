"""Converts packed kernels and masks to the named arrays of a file, and back (docs/formats.md)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from sparselora_jax.sparse.packing.bitmask import PackedMask
from sparselora_jax.sparse.packing.format import FORMATS, PackingError, Stored


def stored_types() -> dict[str, type]:
    """Return the classes of leaves that files store as several arrays, by their name in a header."""
    # Looked up at each call, since a format may be registered at any time. Formats whose kernels do not store masks
    # (qwix's class) are never written to our files.
    kernel_types = [FORMATS.find(name).kernel_type for name in FORMATS if FORMATS.find(name).brings_mask]
    return {kind.stored_as: kind for kind in (*kernel_types, PackedMask)}


def array_names() -> set[str]:
    """Return all names that the arrays of such leaves may have."""
    types = stored_types().values()
    return {name for kind in types for name in (*kind.required_arrays, *kind.optional_arrays)}


def header_of(leaf: Stored) -> dict[str, str | int]:
    """Return the header entry of a leaf, which a file stores beside its arrays.

    Args:
      leaf: a packed kernel or mask.
    """
    return {'format': leaf.stored_as, 'inputs': leaf.inputs}


def from_file(path: str, header: Any, arrays: Mapping[str, Array]) -> Stored:
    """Build the leaf that a header describes, and check it.

    Args:
      path: path of the leaf, for error messages.
      header: its entry in the header, see `header_of`; it comes from a file, so it may be anything.
      arrays: its arrays by name.

    Raises:
      PackingError: the format is unknown, arrays are missing, or they contradict the format; names the path.
    """
    # A file may be damaged or foreign, so any of these may be missing or of another type.
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
