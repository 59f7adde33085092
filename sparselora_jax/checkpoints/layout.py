"""Where each piece of a checkpoint belongs in our arrays: loading, exporting and checking walk the same list.

How a tensor is laid out follows from our path alone. A `kernel` is transposed (a convolution [D, C, p, p] becomes
[p * p * C, D] first); everything else keeps its order; axes of size 1 may come and go.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sparselora_jax.checkpoints import checkpoint_files
from sparselora_jax.checkpoints.checkpoint_files import Checkpoint, Entry
from sparselora_jax.models.family import Family
from sparselora_jax.models.key_table import Part
from sparselora_jax.runtime.files import StorageError
from sparselora_jax.sparse import rules

PIECE = 32 * 2**20  # bytes; larger tensors are read and written in runs of rows
HEAD, EMBED = 'language/head/kernel', 'language/embed'


class Place(NamedTuple):
    """One of our arrays, or one layer of a stacked one; of a fused tensor, slice `index` of `of`."""

    path: str
    shape: tuple[int, ...]  # of the whole array
    layer: int | None
    index: int
    of: int

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Without the axis of layers."""
        return self.shape if self.layer is None else self.shape[1:]


class Piece(NamedTuple):
    """Rows `rows[0]` to `rows[1]` of a tensor, and the block of our array that holds them."""

    path: str
    entry: Entry
    rows: tuple[int, int]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def file_shape(self) -> tuple[int, ...]:
        """In the checkpoint's layout."""
        return (self.rows[1] - self.rows[0], *self.entry.shape[1:])


def is_patches(path: str) -> bool:
    """Whether a kernel is a convolution over patches in checkpoints."""
    return path.endswith('patch/kernel')


def to_params(array: Any, shape: tuple[int, ...], *, kernel: bool) -> Any:
    """A tensor in a checkpoint's layout (NumPy or JAX) -> in ours, of `shape`.

    >>> to_params(np.array([[1, 2, 3], [4, 5, 6]]), (1, 3, 2), kernel=True).tolist()
    [[[1, 4], [2, 5], [3, 6]]]
    """
    if kernel:
        array = array.transpose(*range(2, array.ndim), 1, 0)
    return array.reshape(shape)


def to_checkpoint(array: Any, shape: tuple[int, ...], *, kernel: bool) -> Any:
    """The inverse of `to_params`; `shape` is the checkpoint's."""
    if kernel:
        array = array.reshape(*shape[2:], *shape[1::-1])
        array = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    return array.reshape(shape)


def places(family: Family, cfg: Any) -> dict[str, list[Place]]:
    """Checkpoint name -> our arrays that it fills: several for a fused tensor."""
    shapes, found = rules.flatten(family.shapes(cfg)), {}
    for path, key in family.keys(cfg).items():
        part = key if isinstance(key, Part) else Part(key, 0, 1)
        for layer in range(shapes[path][0]) if '{' in part.name else (None,):
            numbers = {} if layer is None else {'i': layer, 'even': 2 * layer, 'odd': 2 * layer + 1}
            place = Place(path, shapes[path], layer, part.index, part.of)
            found.setdefault(part.name.format(**numbers), []).append(place)
    return found


def modules(family: Family, checkpoint: Checkpoint) -> dict[str, Entry]:
    """A checkpoint's tensors under today's module names.

    Raises:
      StorageError: two of its names mean the same parameter.
    """
    found: dict[str, Entry] = {}
    for entry in checkpoint.entries.values():
        name = entry.name
        for pattern, replacement in family.renames:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise StorageError(f'{entry.file}: {entry.name} and {found[name].name} both mean {name}; expected one')
        found[name] = entry
    return found


def embed_names(family: Family, cfg: Any) -> list[str]:
    """By which names a file may hold the word embeddings: their own, then those of copies, in torch's order."""
    table = family.keys(untied(cfg))
    own = table[EMBED]
    copies = cfg.language.tower.embed_copies(own)
    return [own, *copies, table[HEAD]] if cfg.language.tied else [own, *copies]


def follow_head(family: Family, cfg: Any, checkpoint: Checkpoint) -> Any:
    """The config, its head untied where the file's own head differs from the word embeddings (T5 1.1 is saved so).

    Raises:
      StorageError: another copy of the word embeddings differs from them.
    """
    entries, other = modules(family, checkpoint), untied(cfg)
    present = [name for name in embed_names(family, cfg) if name in entries]
    for name in present[1:]:
        if not _equal(entries[present[0]], entries[name]):
            if name != family.keys(other)[HEAD]:
                where = f'{entries[name].file}: {name} is not equal to {present[0]}'
                raise StorageError(f'{where}; stacks with word embeddings of their own are not known')
            cfg = other
    return cfg


def untied(cfg: Any) -> Any:
    """The config with a head of its own."""
    return dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, tied=False))


def _equal(a: Entry, b: Entry) -> bool:
    if a.shape != b.shape:
        return False
    runs = _runs(a.shape[0], a.row_size)
    return all(np.array_equal(checkpoint_files.read(a, run), checkpoint_files.read(b, run)) for run in runs)


def _runs(rows: int, row_size: int) -> Iterator[tuple[int, int]]:
    """Splits rows into runs of at most `PIECE` bytes, all but the last of one size."""
    step = max(1, PIECE // max(row_size, 1))
    step = math.ceil(rows / math.ceil(rows / step)) if rows else 1
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def pieces(family: Family, cfg: Any, checkpoint: Checkpoint) -> list[Piece]:
    """Every piece of a checkpoint that a model is made of, in the order of the files' bytes.

    Raises:
      StorageError: tensors that are missing, that the model lacks, or whose shape is not what its config asks for.
    """
    wanted, entries = places(family, cfg), modules(family, checkpoint)
    names = embed_names(family, cfg)
    if present := [name for name in names if name in entries]:
        wanted |= dict.fromkeys(present, wanted.pop(names[0]))  # every copy, so that an export changes them all
    entries = {
        name: entry
        for name, entry in entries.items()
        if name in wanted or not any(re.fullmatch(pattern, name) for pattern in family.ignored)
    }
    where = checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.folder
    _raise_if(where, 'are missing', [f'{name} {_asked(wanted[name])}' for name in wanted.keys() - entries.keys()])
    extra = [f'{entries[name].name} {entries[name].shape}' for name in entries.keys() - wanted.keys()]
    _raise_if(where, 'belong to no parameter that its config asks for', extra)
    _raise_if(
        where,
        'have the wrong shape',
        [
            f'{entry.file.name}: {entry.name} has {entry.shape}, expected {_asked(wanted[name])}'
            for name, entry in entries.items()
            if not all(_fits(entry, place) for place in wanted[name])
        ],
    )
    found = [piece for name, entry in entries.items() for place in wanted[name] for piece in _split(entry, place)]
    order = {file: index for index, file in enumerate(checkpoint.files)}
    return sorted(found, key=lambda piece: (order[piece.entry.file], piece.entry.start, piece.rows))


def _asked(places: Iterable[Place]) -> str:
    """What a config asks of a tensor."""
    first, *_ = places
    shape = first.layer_shape[::-1] if rules.named_kernel(first.path) else first.layer_shape
    return f'{(first.of * shape[0], *shape[1:])} for {first.path}' + (', fused' if first.of > 1 else '')


def _raise_if(where: Any, what: str, problems: list[str]) -> None:
    if problems:
        more = f'; and {len(problems) - 5} more' if len(problems) > 5 else ''
        raise StorageError(f'{where}: {len(problems)} tensors {what}: {"; ".join(sorted(problems)[:5])}{more}')


def _squeezed(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _fits(entry: Entry, place: Place) -> bool:
    if not entry.shape or entry.shape[0] % place.of:
        return False
    rows, *rest = entry.shape
    shape = [rows // place.of, *rest]
    if rules.named_kernel(place.path):
        if len(shape) < 2:
            return False
        shape = [math.prod(shape[1:]), shape[0]]
    return _squeezed(shape) == _squeezed(place.layer_shape)


def _split(entry: Entry, place: Place) -> Iterator[Piece]:
    """The pieces of a tensor (or of a slice of a fused one): whole if it is small, else runs of rows."""
    rows = entry.shape[0] // place.of
    shape = place.layer_shape
    axis = len(shape) - 1 if rules.named_kernel(place.path) else 0  # of ours that the checkpoint's rows lie along
    whole = shape[axis] != rows  # the first axis is one of size 1
    lead = () if place.layer is None else (place.layer,)
    for start, stop in [(0, rows)] if whole else _runs(rows, entry.row_size):
        starts, sizes = [0] * len(shape), list(shape)
        if not whole:
            starts[axis], sizes[axis] = start, stop - start
        first = place.index * rows
        sizes = (*(1 for _ in lead), *sizes)
        yield Piece(place.path, entry, (first + start, first + stop), (*lead, *starts), sizes)
