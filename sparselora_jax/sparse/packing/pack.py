"""Stores the kernels of a tree in fewer bytes: packed without their zeros (docs/formats.md), or in four bits."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jaxtyping import PyTree

from sparselora_jax.runtime.errors import calling
from sparselora_jax.sparse.axes import AxesByPath, unusual_roles
from sparselora_jax.sparse.packing.as_matrix import ReducedMatrix
from sparselora_jax.sparse.packing.bitmask import mask_shapes, pack_mask
from sparselora_jax.sparse.packing.format import FORMATS, PackedFormat, PackingError, find_format, is_packed
from sparselora_jax.sparse.rules import flatten, match, paths_of, unflatten, with_leaves

Formats = str | Sequence[tuple[str, str]]  # the name of one format, or ordered rules (regex, name)


def pack(params: PyTree, masks: dict, formats: Formats = 'packed24', *, axes: AxesByPath | None = None) -> PyTree:
    """Pack every kernel that has a mask; the packed kernels store their masks.

    Args:
      params: the params, any tree of plain arrays.
      masks: the masks tree.
      formats: one of `FORMATS`, or ordered rules `(regex, format)`. `packed24` stores two of each four inputs, without
        loss; `packed24_int4` rounds its values to four bits; `bitmask` stores any mask, without loss. A custom format
        is named as `package.module:Name`.
      axes: the roles of the axes of kernels that are not `[*layers, inputs, outputs]`: what `collect` returned, the
        `axes` of a `PruneResult`, or `{path: KernelAxes}`. Their packed kernels can be unpacked and merged, but neither
        saved nor read by `linear`.

    Raises:
      PackingError: a format cannot store a mask (names path, layer and first group), is unknown, or does not store
        masks in its kernels.
      RuleError: the rules do not fit the masks, or the axes do not fit a kernel.

    >>> from sparselora_jax.sparse.dense import unpack
    >>> kernel = jnp.array([[1.0], [0.0], [2.0], [0.0]])
    >>> packed = pack({'q': {'kernel': kernel}}, {'q': {'kernel': kernel != 0}})
    >>> packed['q']['kernel'].shape, unpack(packed)['q']['kernel'].tolist() == kernel.tolist()
    ((4, 1), True)
    """
    # A kernel without its mask would be used as if all its weights were kept.
    packed, masks_beside = reduce_kernels(params, masks, formats, axes=axes)
    if masks_beside is not None:
        path = next(iter(flatten(masks_beside)))
        raise PackingError(f'{path}: its format does not store the mask; use `reduce_kernels`, which returns masks too')
    return packed


def pack_masks(masks: dict) -> dict:
    """Return masks in one bit per element; `bind` and `merge` accept them like other masks.

    Args:
      masks: the masks tree.
    """
    return unflatten({path: pack_mask(mask) for path, mask in flatten(masks).items()})


def reduce_kernels(
    params: PyTree, masks: dict, formats: Formats, *, axes: AxesByPath | None = None
) -> tuple[PyTree, dict | None]:
    """Store masked kernels in fewer bytes: packed, or in four bits with a separate mask of one bit per weight.

    Args:
      params: the params, any tree of plain arrays.
      masks: the masks tree; its paths select the kernels.
      formats: one of `FORMATS`, or ordered rules `(regex, format)`, see `pack`; also `int4` and `nf4`.
      axes: see `pack`.

    Returns:
      (params, masks). The masks are those of kernels that do not store their own; None: all kernels store theirs.

    Raises:
      PackingError: a format cannot store a mask, or is unknown; names the path.
      RuleError: see `pack`.
    """
    leaves = paths_of(params)
    flat_masks = flatten(masks)
    roles = unusual_roles(leaves, axes)
    reduced = {}
    masks_beside = {}
    for path, form in _formats_by_path(formats, flat_masks).items():
        mask = flat_masks[path]
        if getattr(mask, 'dtype', None) != np.bool_:
            kind = getattr(mask, 'dtype', type(mask).__name__)
            raise PackingError(f'{path}: the mask is {kind}, expected an array of booleans: True where kept')
        kernel = leaves.get(path)
        if getattr(kernel, 'shape', None) != mask.shape:
            raise PackingError(f'{path}: has a mask {mask.shape}, but no kernel of that shape')
        of_kernel = roles.get(path)
        # Formats do not know paths, so the path is added to their errors here.
        try:
            # Ordinary kernels stay what `linear` can read.
            if of_kernel is None:
                reduced[path] = _pack_checked(form, kernel, mask)
            else:
                matrix = _pack_checked(form, of_kernel.to_matrix(kernel), of_kernel.to_matrix(mask))
                reduced[path] = ReducedMatrix(matrix, of_kernel, tuple(kernel.shape))
        except PackingError as error:
            raise PackingError(f'{path}: {error}') from None
        if not form.brings_mask:
            masks_beside[path] = pack_mask(mask)  # one bit per weight instead of one byte
    return with_leaves(params, reduced), unflatten(masks_beside) if masks_beside else None


def _pack_checked(form: PackedFormat, kernel: Any, mask: Any) -> Any:
    """Return the packed kernel; a format of somebody else must give back the kernel and the mask.

    Raises:
      PackingError: the format cannot store the mask, fails, or stores something else.
    """
    name = f'format {type(form).__name__}'
    # One such value would make the scale of its whole block infinite, and with it all of its values NaN.
    if form.levels is not None and not jnp.isfinite(jnp.where(mask, kernel, 0)).all():
        raise PackingError('has infinite values or NaN, which cannot be rounded to a few levels')
    with calling(name, PackingError):
        packed = form.pack(kernel, mask)
    # The formats of the package have tests of their own.
    if any(form is FORMATS.find(own) for own in FORMATS):
        return packed
    if not isinstance(packed, form.kernel_type) or (form.brings_mask and not is_packed(packed)):
        raise PackingError(f'{name} packed a kernel into a {type(packed).__name__}, expected {form.kernel_type}')
    if not form.brings_mask:
        return packed
    with calling(f'{name}: unpacking', PackingError):
        # One layer: a whole stack would need its dense size once more. Scans slice packed stacks in this way too.
        is_stack = len(kernel.shape) == 3
        layer = jax.tree.map(lambda leaf: leaf[0], packed) if is_stack else packed
        weights = np.asarray(layer.unpack(kernel.dtype))
        is_kept = np.asarray(layer.unpack_mask())
    first_mask = np.asarray(mask[0] if is_stack else mask)
    first_kernel = np.asarray(kernel[0] if is_stack else kernel)
    if not np.array_equal(is_kept, first_mask):
        raise PackingError(f'{name} does not give back the mask that it packed')
    if form.levels is None and not np.array_equal(weights, np.where(first_mask, first_kernel, 0)):
        raise PackingError(f'{name} says that it is lossless (levels = None), and does not give back the kernel')
    return packed


def reduce_shapes(params: dict, densities: Mapping[str, float], formats: Formats) -> tuple[dict, dict]:
    """Return the shapes of what `reduce_kernels` returns, to count memory and to compile programs.

    Args:
      params: the shapes of the params tree.
      densities: path -> density, for the kernels that have a mask.
      formats: see `reduce_kernels`.

    Returns:
      The shapes of (params, masks).
    """
    flat = flatten(params)
    masks_beside = {}
    for path, form in _formats_by_path(formats, densities).items():
        kernel = flat[path]
        flat[path] = form.pack_shapes(kernel, densities[path])
        if not form.brings_mask:
            masks_beside[path] = mask_shapes(kernel)
    return unflatten(flat), unflatten(masks_beside)


def _formats_by_path(formats: Formats, paths: Mapping[str, Any]) -> dict[str, PackedFormat]:
    # `match` refuses rules that match no kernel, so a typo leaves no kernel dense.
    rule_list = [('.*', formats)] if isinstance(formats, str) else formats
    return {path: find_format(name) for path, name in match(rule_list, paths).items()}


def stack(layers: Sequence[Any]) -> Any:
    """Stack the kernels or masks of single layers, on the host.

    Args:
      layers: arrays, or packed kernels or masks, of one kind and shape.
    """
    if is_packed(layers[0]):
        return type(layers[0]).stack(layers)  # layers may need padding to the same length
    return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)


def is_reduced(kernel: object) -> bool:
    """Return whether a kernel is packed or four-bit, and so is not a plain array."""
    return is_packed(kernel) or isinstance(kernel, qwix.QArray | ReducedMatrix)
