"""Write a model to a Hugging Face directory that follows the one it was read from.

`export_model` writes the source directory once more, with our numbers in the places of its own: same files, keys,
dtypes and shards, because nothing but the bytes of tensors is replaced. A model that was read from no directory is
written by `write_new`. Weights stream, a piece at a time, and a file appears whole or not at all.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from sparselora_jax.checkpoints import checkpoint_files, layout, safetensors_format, streaming
from sparselora_jax.checkpoints.checkpoint_files import CONFIG, Checkpoint
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.checkpoints.on_disk import Stack
from sparselora_jax.checkpoints.trees import check_shapes
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.files import PARTIAL, StorageError, whole
from sparselora_jax.sparse import rules

# Files that hold weights: those that we write, and others, which would hold the model as it was before.
WEIGHTS = ('.safetensors', *checkpoint_files.PICKLES, '.h5', '.msgpack', '.onnx', '.gguf', '.ot')

# What the leaves of params may be where they are written.
Leaf = jax.Array | np.ndarray | Stack


def export_model(
    folder: str | Path,
    model: Model,
    params: dict,
    *,
    changed: Iterable[str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a directory that differs from the model's own in the values of changed weights alone.

    Every tensor of an unchanged array is copied byte for byte, whatever the dtype of `params`, and so are tensors that
    the model does not read. An interrupted export can be repeated into the same folder; until it has ended, the folder
    has no config.json.

    Args:
      folder: the directory to write.
      model: read from a directory, `model.source`.
      params: plain arrays, merged, or stacks that are read a layer at a time (`on_disk`); cast to the dtype that each
        tensor has in its file.
      changed: the paths of the arrays that differ from the source's. None: find out. An array is unchanged then if it
        equals the source's, cast to the array's dtype; this reads the source once more where that dtype is narrower.
      texts: more files to write, by name.

    Raises:
      StorageError: the model has no source, or it no longer fits the model; the folder is the source, or holds other
        files; a changed path that the model lacks; a number is too large for its file's dtype.
    """
    if model.source is None:
        raise StorageError('the model was read from no Hugging Face directory: use write_new, or load it from one')
    folder = Path(folder)
    source = checkpoint_files.open_checkpoint(model.source)
    # The source is opened anew: its files may have changed since the model was read, and must still fit it.
    pieces = layout.pieces(model.family, model.cfg, source)
    check_shapes(folder, params, model.shapes())
    flat = rules.flatten(params)
    changed = _find_changed(flat, pieces) if changed is None else _check_paths(changed, flat)
    texts_by_path = {Path(name): text for name, text in (texts or {}).items()}
    others = [name for name in files_beside(source.folder) if name not in texts_by_path]
    # The index of shards that are not read would lie in the export without its shards.
    others = [name for name in others if str(name) not in source.ignored]
    _claim(folder, source, {*others, *texts_by_path})
    for file in source.files:
        # Headers, unread tensors and unchanged ones come from the old file, between the pieces that are written.
        to_write = [piece for piece in pieces if piece.entry.file == file and piece.path in changed]
        with placed(folder / file.relative_to(source.folder)) as new, file.open('rb') as old:
            write_pieces(new, to_write, params, old)
            _copy(old, new, file.stat().st_size - new.tell())
    write_texts(folder, texts_by_path)
    copy_beside(folder, source.folder, others)


def check_export(folder: str | Path, model: Model, params: dict, *, changed: Iterable[str] | None = None) -> None:
    """Read a written directory back, and compare it to what was to be written.

    Args:
      folder: of `export_model` or `write_new`.
      model: the model that was written.
      params: those that were written.
      changed: as for `export_model`.

    Raises:
      StorageError: the directory is not whole; or a changed number is not that of `params`, cast to the file's dtype;
        or an unchanged one is not the source's.
    """
    flat = rules.flatten(params)
    pieces = layout.pieces(model.family, model.cfg, checkpoint_files.open_checkpoint(folder))
    originals = {}
    if model.source is None:  # of `write_new`: every array was written
        changed = flat.keys()
    else:
        source = checkpoint_files.open_checkpoint(model.source)
        originals = source.entries
        source_pieces = layout.pieces(model.family, model.cfg, source)
        changed = _find_changed(flat, source_pieces) if changed is None else _check_paths(changed, flat)
    blocks = _Blocks(flat)
    for piece in pieces:
        written = safetensors_format.read(piece.entry, piece.rows)
        if piece.path in changed:
            expected = blocks.read(piece)
        else:
            expected = safetensors_format.read(originals[piece.entry.name], piece.rows)
        if not np.array_equal(_bytes(written), _bytes(expected)):
            name = f'{piece.entry.name} ({piece.path})'
            raise StorageError(f'{piece.entry.file}: {name}, read back, is not what was written; export it again')


def copy_beside(folder: Path, source: Path, names: Iterable[Path]) -> None:
    """Copy files that lie beside weights, the config last: with it the directory counts as whole.

    Args:
      folder: the directory to copy to.
      source: the directory to copy from.
      names: of the files, relative to `source`.
    """
    for name in sorted(names, key=lambda name: name == Path(CONFIG)):
        with placed(folder / name) as new, (source / name).open('rb') as old:
            shutil.copyfileobj(old, new)


def files_below(folder: Path) -> list[Path]:
    """List every file below a directory, relative to it; hidden directories (.cache, .git) are left out.

    Args:
      folder: the directory.
    """
    # Sorted, since the order of a directory differs between file systems.
    names = sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
    return [name for name in names if not any(part.startswith('.') for part in name.parts[:-1])]


def files_beside(folder: Path) -> list[Path]:
    """List every file below a directory that holds no weights, relative to it.

    Args:
      folder: the directory.
    """
    return [name for name in files_below(folder) if name.suffix not in WEIGHTS]


def _check_paths(paths: Iterable[str], flat: dict[str, Leaf]) -> set[str]:
    """Return the paths as a set.

    Raises:
      StorageError: a path that the params lack.
    """
    paths = set(paths)
    unknown = sorted(paths - flat.keys())
    if unknown:
        raise StorageError(f'{unknown[0]}: named as changed, but the model has no such parameter')
    return paths


def _find_changed(flat: dict[str, Leaf], pieces: Iterable[Piece]) -> set[str]:
    """Return the paths of the arrays to write: those that differ from the source's, cast to the array's dtype.

    An array that holds every number of its file is among them unread: writing it gives the same bytes.
    """
    changed: set[str] = set()
    for piece in pieces:
        # One piece that differs decides, so a pruned kernel is compared in its first piece alone.
        if piece.path in changed:
            continue
        array = flat[piece.path]
        # A stack on disk gives the file's own numbers where nothing changed them.
        if isinstance(array, Stack) or _holds(array.dtype, piece.entry.dtype) or _differs(array, piece):
            changed.add(piece.path)
    return changed


def _holds(dtype: np.dtype, file_dtype: np.dtype) -> bool:
    """Return whether an array of a dtype holds every number of a file's dtype."""
    with jax.numpy_dtype_promotion('standard'):
        return jnp.promote_types(dtype, file_dtype) == dtype


def _differs(array: jax.Array | np.ndarray, piece: Piece) -> bool:
    """Return whether a block of an array is another than the source's, cast as loading casts it."""
    # On the device, as `streaming` casts: NumPy may treat the smallest numbers in another way.
    original = jnp.asarray(safetensors_format.read(piece.entry, piece.rows)).astype(array.dtype)
    block = streaming.read_block(array, piece, array.dtype)
    return not np.array_equal(_bytes(block), _bytes(np.asarray(original)))


def _claim(folder: Path, source: Checkpoint, others: Iterable[Path]) -> None:
    """Make the folder, which may hold nothing but what an earlier export of the same source has left.

    Raises:
      StorageError: the folder is the source, or holds files of something else.
    """
    # Resolved, so that a link to the source is found too: its files would be emptied while they are read.
    if folder.resolve() == source.folder.resolve():
        raise StorageError(f'{folder}: is the directory the model was read from; export into another')
    own = {path.relative_to(source.folder) for path in source.files} | set(others)
    # An export that was killed leaves the partial files that it wrote.
    own |= {name.with_name(name.name + PARTIAL) for name in own}
    foreign = [str(name) for name in files_below(folder) if name not in own]
    if foreign:
        raise StorageError(f'{folder}: holds files of something else ({", ".join(foreign[:3])}); choose an empty one')
    folder.mkdir(parents=True, exist_ok=True)
    # The config is written last: a folder without it is not taken for a model.
    (folder / CONFIG).unlink(missing_ok=True)


def write_texts(folder: Path, texts: Mapping[Path, str] | Mapping[str, str]) -> None:
    """Write text files.

    Args:
      folder: the directory to write to.
      texts: what the files hold, by their names.
    """
    for name, text in texts.items():
        with placed(folder / name) as file:
            file.write(text.encode())


@contextmanager
def placed(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, which takes its place once all of it is on the disk.

    Args:
      path: the file; directories above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open('wb') as file:
        yield file


def write_pieces(new: BinaryIO, pieces: Iterable[Piece], params: dict, old: BinaryIO | None = None) -> None:
    """Write the pieces of one file, each at its place.

    Args:
      new: the file to write.
      pieces: in the order of the file's bytes.
      params: the arrays that they are pieces of.
      old: the file that gives what lies between the pieces; None: nothing does.
    """
    blocks = _Blocks(rules.flatten(params))
    for piece in pieces:
        start = piece.entry.start + piece.rows[0] * piece.entry.row_size
        if old is not None:
            _copy(old, new, start - new.tell())
        data = _bytes(blocks.read(piece))
        new.write(data)
        # Both files are of one length and layout: the old one stands where the new one does.
        if old is not None:
            old.seek(data.size, os.SEEK_CUR)


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    """Copy bytes from where one file stands to where another stands, a piece's worth at a time."""
    while count:
        data = old.read(min(count, layout.PIECE))
        new.write(data)
        count -= len(data)


class _Blocks:
    """The blocks of arrays that a file is to hold.

    The last layer of a stack on disk is kept: a large kernel is written in several pieces, and each would read all of
    its layer again.
    """

    def __init__(self, flat: dict[str, Leaf]):
        """Note the arrays by path; nothing is read."""
        self._flat = flat
        self._last: tuple[str, int] | None = None
        self._layer: np.ndarray | None = None

    def read(self, piece: Piece) -> Shaped[np.ndarray, '...']:
        """Return what a piece of a file is to hold.

        Raises:
          StorageError: a number is too large for float16.
        """
        array = self._flat[piece.path]
        if isinstance(array, Stack):
            array = self._read_layer(array, piece.path, piece.starts[0])
            # The layer alone is at hand, so the piece starts in layer 0 of it.
            piece = piece._replace(starts=(0, *piece.starts[1:]))
        block = streaming.read_block(array, piece)
        # Of the dtypes of checkpoints, only float16 has a range so small that weights may leave it.
        if piece.entry.dtype == np.float16 and not np.isfinite(block).all():
            problem = f'numbers too large for float16, the dtype of {piece.entry.name} in its file'
            raise StorageError(f'{piece.path}: {problem}')
        return block

    def _read_layer(self, stack: Stack, path: str, layer: int) -> Shaped[np.ndarray, '1 ...']:
        if self._last != (path, layer):
            self._layer = None  # let go of it first, so that one layer is held at a time
            self._layer = stack.in_file_dtype(layer)[None]
            self._last = (path, layer)
        return self._layer


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array: NaNs equal themselves there, and -0 is not 0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
