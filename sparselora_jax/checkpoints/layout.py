"""List where each piece of a checkpoint belongs in our arrays. Loading, exporting and checking walk the same list.

Our path alone determines how a tensor is laid out. A `kernel` is transposed; a convolution [D, C, p, p] first becomes
[p * p * C, D]. Every other tensor keeps its order. Axes of size 1 may be added or removed.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sparselora_jax.checkpoints import safetensors_format
from sparselora_jax.checkpoints.checkpoint_files import Checkpoint
from sparselora_jax.checkpoints.safetensors_format import Entry
from sparselora_jax.models.family import Family
from sparselora_jax.models.key_table import Part
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse import rules

PIECE = 32 * 2**20  # bytes; larger tensors are read and written in runs of rows
HEAD = 'language/head/kernel'
EMBED = 'language/embed'

# The same code converts NumPy arrays on the host and JAX arrays, also under jit.
AnyArray = TypeVar('AnyArray', np.ndarray, jax.Array)


class Place(NamedTuple):
    """Where a tensor of a checkpoint belongs: one of our arrays, or one layer of a stack.

    Attributes:
      path: the path of our array.
      shape: the shape of the whole array.
      layer: the layer of a stack; None: the array is not stacked.
      index: index of the slice of a fused tensor, along its first axis.
      of: number of slices; 1: the tensor is not fused.
    """

    path: str
    shape: tuple[int, ...]
    layer: int | None
    index: int
    of: int

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Return the shape without the layers axis."""
        return self.shape if self.layer is None else self.shape[1:]


class Piece(NamedTuple):
    """Some rows of a checkpoint's tensor, and the block of our array that holds them.

    Attributes:
      path: the path of our array.
      entry: the tensor.
      rows: first row, and the row after the last.
      starts: start of the block in our array, one index per axis.
      sizes: size of the block along each axis.
    """

    path: str
    entry: Entry
    rows: tuple[int, int]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Return the shape of the piece in the checkpoint's layout."""
        return (self.rows[1] - self.rows[0], *self.entry.shape[1:])

    @property
    def block(self) -> tuple[slice, ...]:
        """Return the index of the block in our array."""
        return tuple(slice(start, start + size) for start, size in zip(self.starts, self.sizes, strict=True))


def is_patches(path: str) -> bool:
    """Return whether checkpoints store this kernel as a convolution over patches."""
    return path.endswith('patch/kernel')


def to_params(array: AnyArray, shape: tuple[int, ...], *, kernel: bool) -> AnyArray:
    """Convert a tensor from a checkpoint's layout to ours.

    Args:
      array: [out, in], or the kernel of a convolution [out, channels, height, width], or an array that is not a kernel.
      shape: shape in our layout; axes of size 1 may differ.
      kernel: whether the array is a kernel.

    >>> to_params(np.array([[1, 2, 3], [4, 5, 6]]), (1, 3, 2), kernel=True).tolist()
    [[[1, 4], [2, 5], [3, 6]]]
    """
    if kernel:
        # [out, channels, height, width] -> [height, width, channels, out]: pixels of a patch in the order of an image.
        array = array.transpose(*range(2, array.ndim), 1, 0)
    return array.reshape(shape)


def to_checkpoint(array: AnyArray, shape: tuple[int, ...], *, kernel: bool) -> AnyArray:
    """Convert an array from our layout to a checkpoint's: the inverse of `to_params`.

    Args:
      array: array in our layout.
      shape: shape in the checkpoint.
      kernel: whether the array is a kernel.
    """
    if kernel:
        # shape is [out, in, ...], so this is [..., in, out]; then out and in go to the front.
        array = array.reshape(*shape[2:], *shape[1::-1])
        array = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    return array.reshape(shape)


def places(family: Family, cfg: Any) -> dict[str, list[Place]]:
    """Return the arrays of ours that each tensor of a checkpoint fills, by the tensor's name.

    Args:
      family: the family of the model.
      cfg: the family's config.

    Returns:
      {name: places}, several places for a fused tensor.
    """
    shapes = rules.flatten(family.shapes(cfg))
    places_of: dict[str, list[Place]] = {}
    for path, key in family.keys(cfg).items():
        # A tensor that is not fused counts as one slice of itself.
        part = key if isinstance(key, Part) else Part(key, 0, 1)
        if '{' not in part.name:
            place = Place(path, shapes[path], None, part.index, part.of)
            places_of.setdefault(part.name, []).append(place)
            continue
        for layer in range(shapes[path][0]):
            # A stack may be every second layer of torch's; see models/key_table.py.
            name = part.name.format(i=layer, even=2 * layer, odd=2 * layer + 1)
            place = Place(path, shapes[path], layer, part.index, part.of)
            places_of.setdefault(name, []).append(place)
    return places_of


def modules(family: Family, checkpoint: Checkpoint) -> dict[str, Entry]:
    """Return a checkpoint's tensors under the module names of current transformers.

    Args:
      family: family whose `renames` map older names to current ones.
      checkpoint: the tensors.

    Raises:
      StorageError: two tensors mean the same parameter.
    """
    entries: dict[str, Entry] = {}
    for entry in checkpoint.entries.values():
        name = entry.name
        # In order: a later pattern applies to the result of the earlier ones.
        for pattern, replacement in family.renames:
            name = re.sub(pattern, replacement, name)
        if name in entries:
            raise StorageError(f'{entry.file}: {entry.name} and {entries[name].name} both mean {name}; expected one')
        entries[name] = entry
    return entries


def embed_names(family: Family, cfg: Any) -> list[str]:
    """List the names under which a file may hold the word embeddings: their own, then those of copies.

    Args:
      family: the family of the model.
      cfg: the family's config.

    Returns:
      Names in the order in which torch looks for them.
    """
    if not family.has_language:
        return []
    table = family.keys(untied(cfg))
    own = table[EMBED]
    copies = cfg.language.tower.embed_copies(own)
    return [own, *copies, table[HEAD]] if cfg.language.tied else [own, *copies]


def follow_head(family: Family, cfg: Any, checkpoint: Checkpoint) -> Any:
    """Return the config with an untied head if the head in the file differs from the word embeddings.

    T5 1.1 needs this: its config ties the head, but its files hold a different one.

    Args:
      family: the family of the model.
      cfg: the family's config, as config.json says.
      checkpoint: the tensors; heads and embeddings are read and compared.

    Raises:
      StorageError: another copy of the word embeddings differs from them.
    """
    if not family.has_language:
        return cfg
    entries = modules(family, checkpoint)
    untied_cfg = untied(cfg)
    head_name = family.keys(untied_cfg)[HEAD]
    present = [name for name in embed_names(family, cfg) if name in entries]
    for name in present[1:]:
        if _is_equal(entries[present[0]], entries[name]):
            continue
        # Only a head may differ, and is then untied. Our model has no place for a T5 stack with its own embeddings.
        if name != head_name:
            where = f'{entries[name].file}: {name} is not equal to {present[0]}'
            raise StorageError(f'{where}; stacks with word embeddings of their own are not known')
        cfg = untied_cfg
    return cfg


def untied(cfg: Any) -> Any:
    """Return the config with an untied head.

    Args:
      cfg: a family's config.
    """
    return dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, tied=False))


def _is_equal(first: Entry, second: Entry) -> bool:
    """Return whether two tensors hold the same numbers; both are read in runs of rows."""
    if first.shape != second.shape:
        return False
    runs = _split_rows(first.shape[0], first.row_size)
    return all(
        np.array_equal(safetensors_format.read(first, run), safetensors_format.read(second, run)) for run in runs
    )


def _split_rows(rows: int, row_size: int) -> Iterator[tuple[int, int]]:
    """Split rows into runs of at most `PIECE` bytes.

    All runs but the last have the same size, since every new size needs a compilation. Rows are divided evenly, so the
    last run is not much smaller.
    """
    largest = max(1, PIECE // max(row_size, 1))  # rows; a row larger than a piece is read alone
    runs = math.ceil(rows / largest)
    step = math.ceil(rows / runs) if rows else 1
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def pieces(family: Family, cfg: Any, checkpoint: Checkpoint) -> list[Piece]:
    """List every piece of a checkpoint that a model reads, in the order of the files' bytes.

    Args:
      family: the family of the model.
      cfg: the family's config.
      checkpoint: the tensors.

    Raises:
      StorageError: a tensor is missing, unknown to the model, or not of the shape that the config asks for.
    """
    wanted = places(family, cfg)
    entries = modules(family, checkpoint)
    embeddings = embed_names(family, cfg)
    present = [name for name in embeddings if name in entries]
    if present:
        # Every copy is a piece of the same array, so that an export changes all copies.
        places_of_embedding = wanted.pop(embeddings[0])
        wanted |= dict.fromkeys(present, places_of_embedding)
    entries = {
        name: entry
        for name, entry in entries.items()
        # Not read: buffers that older versions saved, such as position ids, and layers that no output needs.
        if name in wanted or not any(re.fullmatch(pattern, name) for pattern in family.ignored)
    }
    _check_entries(checkpoint, wanted, entries)
    unsorted = [piece for name, entry in entries.items() for place in wanted[name] for piece in _split(entry, place)]
    # An export copies the bytes between pieces, and reading files from start to end is fastest.
    order = {file: index for index, file in enumerate(checkpoint.files)}
    return sorted(unsorted, key=lambda piece: (order[piece.entry.file], piece.entry.start, piece.rows))


def _check_entries(checkpoint: Checkpoint, wanted: dict[str, list[Place]], entries: dict[str, Entry]) -> None:
    """Raise `StorageError` unless the tensors are those that the model needs, with the right shapes."""
    # The error names a single file; with shards, a missing tensor could belong to any of them.
    where = checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.folder
    missing = [f'{name} {_describe(wanted[name])}' for name in wanted.keys() - entries.keys()]
    _refuse(where, 'are missing', missing)
    extra = [f'{entries[name].name} {entries[name].shape}' for name in entries.keys() - wanted.keys()]
    _refuse(where, 'belong to no parameter that its config asks for', extra)
    misshapen = [
        f'{entry.file.name}: {entry.name} has {entry.shape}, expected {_describe(wanted[name])}'
        for name, entry in entries.items()
        if not all(_fits(entry, place) for place in wanted[name])
    ]
    _refuse(where, 'have the wrong shape', misshapen)
    # Only a quantiser writes integers, and nothing in the file says what they stand for.
    integers = [
        f'{entry.file.name}: {entry.name} is {entry.dtype}'
        for entry in entries.values()
        if not jnp.issubdtype(entry.dtype, jnp.floating)
    ]
    _refuse(where, 'hold no floating-point numbers', integers)


def _describe(places_of_tensor: list[Place]) -> str:
    """Describe the tensor that a config asks for: its shape in the checkpoint, and our path."""
    first = places_of_tensor[0]
    shape = first.layer_shape[::-1] if rules.named_kernel(first.path) else first.layer_shape
    fused = ', fused' if first.of > 1 else ''
    return f'{(first.of * shape[0], *shape[1:])} for {first.path}{fused}'


def _refuse(where: Path, what: str, problems: list[str]) -> None:
    """Raise `StorageError` if there are problems; the error lists five of them."""
    if problems:
        more = f'; and {len(problems) - 5} more' if len(problems) > 5 else ''
        raise StorageError(f'{where}: {len(problems)} tensors {what}: {"; ".join(sorted(problems)[:5])}{more}')


def _squeeze(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _fits(entry: Entry, place: Place) -> bool:
    """Return whether a tensor has the shape of its place."""
    # A scalar has no rows to split, and a fused tensor has as many rows for each slice.
    if not entry.shape or entry.shape[0] % place.of:
        return False
    rows, *rest = entry.shape
    shape = [rows // place.of, *rest]
    if rules.named_kernel(place.path):
        if len(shape) < 2:
            return False
        # [out, channels, height, width] has as many elements as our [height * width * channels, out].
        shape = [math.prod(shape[1:]), shape[0]]
    return _squeeze(shape) == _squeeze(place.layer_shape)


def _split(entry: Entry, place: Place) -> Iterator[Piece]:
    """Yield the pieces of a tensor, or of a slice of a fused one: one piece if it is small, otherwise runs of rows."""
    rows = entry.shape[0] // place.of
    shape = place.layer_shape
    row_axis = len(shape) - 1 if rules.named_kernel(place.path) else 0  # the axis of ours that holds the tensor's rows
    # Either shape may have an extra first axis of size 1, as a class token [1, 1, D] has. Such a tensor is not split.
    is_whole = shape[row_axis] != rows
    layer_start = () if place.layer is None else (place.layer,)
    layer_size = () if place.layer is None else (1,)
    first = place.index * rows
    for start, stop in [(0, rows)] if is_whole else _split_rows(rows, entry.row_size):
        starts = [0] * len(shape)
        sizes = list(shape)
        if not is_whole:
            starts[row_axis] = start
            sizes[row_axis] = stop - start
        yield Piece(
            path=place.path,
            entry=entry,
            rows=(first + start, first + stop),
            starts=(*layer_start, *starts),
            sizes=(*layer_size, *sizes),
        )
