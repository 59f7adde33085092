"""Write a model to a Hugging Face directory with the same layout as the one it was read from.

`export_model` copies the source directory and replaces only the bytes of changed tensors. So files, keys, dtypes and
shards stay the same. `write_new` writes a model that was not read from a directory. Weights are written a piece at a
time, and a file appears either complete or not at all.
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

# Files that hold weights: the format that we write, and others, which would still hold the old weights.
WEIGHTS = ('.safetensors', *checkpoint_files.PICKLES, '.h5', '.msgpack', '.onnx', '.gguf', '.ot')

# Types that the leaves of params may have here.
Leaf = jax.Array | np.ndarray | Stack


def export_model(
    folder: str | Path,
    model: Model,
    params: dict,
    *,
    changed: Iterable[str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a copy of the model's source directory that differs only in the values of changed weights.

    Tensors of unchanged arrays are copied byte for byte, whatever the dtype of `params`. So are tensors that the model
    does not read. An interrupted export can be repeated into the same folder; until it is complete, the folder has no
    config.json.

    Args:
      folder: the directory to write.
      model: read from a directory, `model.source`.
      params: merged plain arrays, or stacks that are read a layer at a time (`on_disk`). They are cast to the dtype of
        each tensor in its file.
      changed: the paths of the arrays that differ from the source. None: compare them. An array then counts as
        unchanged if it equals the source's array, cast to its dtype. If that dtype is narrower, the source is read
        again.
      texts: more files to write, by name.

    Raises:
      StorageError: the model has no source, or its source no longer fits it; the folder is the source, or holds other
        files; the model lacks a path of `changed`; a number is too large for its file's dtype.
    """
    if model.source is None:
        raise StorageError(
            'the model was read from no Hugging Face directory: write the embedded one by checkpoints.embedded.save, '
            'and others by checkpoints.write_new.write_new'
        )
    folder = Path(folder)
    source = checkpoint_files.open_checkpoint(model.source)
    # The source is opened again: its files may have changed since the model was read, and must still fit it.
    pieces = layout.pieces(model.family, model.cfg, source)
    check_shapes(folder, params, model.shapes())
    flat = rules.flatten(params)
    changed = _find_changed(flat, pieces) if changed is None else _check_paths(changed, flat)
    texts_by_path = {Path(name): text for name, text in (texts or {}).items()}
    others = [name for name in files_beside(source.folder) if name not in texts_by_path]
    # Do not copy the index of shards that are not read: the export would lack those shards.
    others = [name for name in others if str(name) not in source.ignored]
    _claim(folder, source, {*others, *texts_by_path})
    for file in source.files:
        # Headers, unread tensors and unchanged tensors are copied from the old file, between the pieces that are
        # written.
        to_write = [piece for piece in pieces if piece.entry.file == file and piece.path in changed]
        with placed(folder / file.relative_to(source.folder)) as new, file.open('rb') as old:
            write_pieces(new, to_write, params, old)
            _copy(old, new, file.stat().st_size - new.tell())
    write_texts(folder, texts_by_path)
    copy_beside(folder, source.folder, others)


def check_export(folder: str | Path, model: Model, params: dict, *, changed: Iterable[str] | None = None) -> None:
    """Read a written directory back, and compare it with what should have been written.

    Args:
      folder: directory that `export_model` or `write_new` wrote.
      model: the model that was written.
      params: the params that were written.
      changed: as for `export_model`.

    Raises:
      StorageError: the directory is incomplete; or a changed number differs from that of `params`, cast to the file's
        dtype; or an unchanged number differs from the source's.
    """
    flat = rules.flatten(params)
    pieces = layout.pieces(model.family, model.cfg, checkpoint_files.open_checkpoint(folder))
    originals = {}
    if model.source is None:  # written by `write_new`, which writes every array
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
    """Copy the files beside the weights, the config last, since a directory with a config counts as complete.

    Args:
      folder: the directory to copy to.
      source: the directory to copy from.
      names: names of the files, relative to `source`.
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
    """List every file below a directory, except files of weights, relative to the directory.

    Args:
      folder: the directory.
    """
    return [name for name in files_below(folder) if name.suffix not in WEIGHTS]


def _check_paths(paths: Iterable[str], flat: dict[str, Leaf]) -> set[str]:
    """Return the paths as a set.

    Raises:
      StorageError: the params lack a path.
    """
    paths = set(paths)
    unknown = sorted(paths - flat.keys())
    if unknown:
        raise StorageError(f'{unknown[0]}: named as changed, but the model has no such parameter')
    return paths


def _find_changed(flat: dict[str, Leaf], pieces: Iterable[Piece]) -> set[str]:
    """Return the paths of the arrays to write: those that differ from the source, cast to the array's dtype.

    An array whose dtype holds every number of its file is always written, without a comparison: if unchanged, it gives
      the same bytes.
    """
    changed: set[str] = set()
    for piece in pieces:
        # One piece that differs is enough, so usually only the first piece of a pruned kernel is compared.
        if piece.path in changed:
            continue
        array = flat[piece.path]
        # A stack on disk returns the file's own numbers where nothing changed them.
        if isinstance(array, Stack) or _holds(array.dtype, piece.entry.dtype) or _differs(array, piece):
            changed.add(piece.path)
    return changed


def _holds(dtype: np.dtype, file_dtype: np.dtype) -> bool:
    """Return whether an array's dtype can represent every number of a file's dtype."""
    with jax.numpy_dtype_promotion('standard'):
        return jnp.promote_types(dtype, file_dtype) == dtype


def _differs(array: jax.Array | np.ndarray, piece: Piece) -> bool:
    """Return whether a block of an array differs from the source's block, cast as loading casts it."""
    # Cast on the device, as `streaming` does: NumPy may treat the smallest numbers differently.
    original = jnp.asarray(safetensors_format.read(piece.entry, piece.rows)).astype(array.dtype)
    block = streaming.read_block(array, piece, array.dtype)
    return not np.array_equal(_bytes(block), _bytes(np.asarray(original)))


def _claim(folder: Path, source: Checkpoint, others: Iterable[Path]) -> None:
    """Create the folder, which may only hold files from an earlier export of the same source.

    Raises:
      StorageError: the folder is the source, or holds other files.
    """
    # Resolve links, so that a link to the source is refused too: its files would be overwritten while they are read.
    if folder.resolve() == source.folder.resolve():
        raise StorageError(f'{folder}: is the directory the model was read from; export into another')
    own = {path.relative_to(source.folder) for path in source.files} | set(others)
    # An export that was killed leaves the partial files that it wrote.
    own |= {name.with_name(name.name + PARTIAL) for name in own}
    foreign = [str(name) for name in files_below(folder) if name not in own]
    if foreign:
        raise StorageError(f'{folder}: holds files of something else ({", ".join(foreign[:3])}); choose an empty one')
    folder.mkdir(parents=True, exist_ok=True)
    # The config is written last: a folder without a config does not count as a model.
    (folder / CONFIG).unlink(missing_ok=True)


def write_texts(folder: Path, texts: Mapping[Path, str] | Mapping[str, str]) -> None:
    """Write text files.

    Args:
      folder: the directory to write to.
      texts: content of each file, by name.
    """
    for name, text in texts.items():
        with placed(folder / name) as file:
            # A text that quotes a file of unknown encoding holds its odd bytes as surrogates.
            file.write(text.encode(errors='surrogateescape'))


@contextmanager
def placed(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that gets its name only once all of it is on the disk.

    Args:
      path: the file; its parent directories are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open('wb') as file:
        yield file


def write_pieces(new: BinaryIO, pieces: Iterable[Piece], params: dict, old: BinaryIO | None = None) -> None:
    """Write the pieces of one file, each at its offset.

    Args:
      new: the file to write.
      pieces: in the order of the file's bytes.
      params: the arrays that the pieces belong to.
      old: the file from which the bytes between the pieces are copied; None: there are no such bytes.
    """
    blocks = _Blocks(rules.flatten(params))
    for piece in pieces:
        start = piece.entry.start + piece.rows[0] * piece.entry.row_size
        if old is not None:
            _copy(old, new, start - new.tell())
        data = _bytes(blocks.read(piece))
        new.write(data)
        # Both files have the same length and layout, so their positions agree.
        if old is not None:
            old.seek(data.size, os.SEEK_CUR)


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    """Copy bytes from the position of one file to the position of another, a piece's worth at a time."""
    while count:
        data = old.read(min(count, layout.PIECE))
        new.write(data)
        count -= len(data)


class _Blocks:
    """Reader of the blocks of arrays that a file will hold.

    It caches the last layer of a stack on disk. A large kernel is written in several pieces, and without the cache each
    piece would read the whole layer again.
    """

    def __init__(self, flat: dict[str, Leaf]):
        """Store the arrays by path; nothing is read."""
        self._flat = flat
        self._last: tuple[str, int] | None = None
        self._layer: np.ndarray | None = None

    def read(self, piece: Piece) -> Shaped[np.ndarray, '...']:
        """Return the content of a piece of a file.

        Raises:
          StorageError: a number is too large for float16.
        """
        array = self._flat[piece.path]
        if isinstance(array, Stack):
            array = self._read_layer(array, piece.path, piece.starts[0])
            # Only this layer is in memory, so the piece starts in layer 0.
            piece = piece._replace(starts=(0, *piece.starts[1:]))
        block = streaming.read_block(array, piece)
        # Of the dtypes of checkpoints, only float16 has a range that weights may exceed.
        if piece.entry.dtype == np.float16 and not np.isfinite(block).all():
            problem = f'numbers too large for float16, the dtype of {piece.entry.name} in its file'
            raise StorageError(f'{piece.path}: {problem}')
        return block

    def _read_layer(self, stack: Stack, path: str, layer: int) -> Shaped[np.ndarray, '1 ...']:
        if self._last != (path, layer):
            self._layer = None  # released first, so that memory holds one layer at a time
            self._layer = stack.in_file_dtype(layer)[None]
            self._last = (path, layer)
        return self._layer


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array: NaNs equal themselves there, and -0 is not 0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
