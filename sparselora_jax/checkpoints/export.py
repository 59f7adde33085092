"""A model -> a Hugging Face directory.

`export_model` writes the directory that a model was read from once more, with our numbers in the places of its own:
same files, keys, dtypes and shards, because nothing but the bytes of tensors is replaced. A model that was read from
none is written by `hf_new`. Weights stream, a piece at a time, and a file appears whole or not at all.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jaxtyping import Shaped

from sparselora_jax.checkpoints import checkpoint_files, layout, streaming
from sparselora_jax.checkpoints.checkpoint_files import CONFIG, Checkpoint
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.checkpoints.trees import check_shapes
from sparselora_jax.models.model import Model
from sparselora_jax.runtime.files import PARTIAL, StorageError, whole
from sparselora_jax.sparse import rules

# Files that hold weights: those that are ours to write, and others, which would hold the model as it was before.
WEIGHTS = ('.safetensors', *checkpoint_files.PICKLES, '.h5', '.msgpack', '.onnx', '.gguf', '.ot')


def export_model(
    folder: str | Path,
    model: Model,
    params: dict,
    *,
    source: str | Path | None = None,
    texts: dict[str, str] | None = None,
) -> None:
    """Writes a directory that differs from the model's own in the values of its weights alone.

    Tensors that the model does not read are copied. An interrupted export can be repeated into the same folder; until
    it has ended, the folder has no config.json.

    Args:
      params: plain arrays, merged, or stacks that give a layer when they are indexed (`on_disk`); cast to the dtype
        that each tensor has in its file.
      source: the directory to follow; `model.source` by default.
      texts: more files to write, by name.

    Raises:
      StorageError: there is no source, or it no longer fits the model; the folder is the source, or holds other files;
        a number is too large for its file's dtype.
    """
    source = source or model.source
    if source is None:
        raise StorageError('the model was read from no Hugging Face directory: pass source, or use hf_new')
    folder, checkpoint = Path(folder), checkpoint_files.open_checkpoint(source)
    pieces = layout.pieces(model.family, model.cfg, checkpoint)
    check_shapes(folder, params, model.shapes())
    texts = {Path(name): text for name, text in (texts or {}).items()}
    others = [path for path in files_below(checkpoint.folder) if path.suffix not in WEIGHTS and path not in texts]
    _claim(folder, checkpoint, {*others, *texts})
    for file in checkpoint.files:
        with placed(folder / file.relative_to(checkpoint.folder)) as new, file.open('rb') as old:
            write_pieces(new, [piece for piece in pieces if piece.entry.file == file], params, old)
            _copy(old, new, file.stat().st_size - new.tell())
    write_texts(folder, texts)
    copy_beside(folder, checkpoint.folder, others)


def copy_beside(folder: Path, source: Path, names: Iterable[Path]) -> None:
    """Copies files that lie beside weights; the config last: the directory is whole then."""
    for name in sorted(names, key=lambda name: name == Path(CONFIG)):
        with placed(folder / name) as new, (source / name).open('rb') as old:
            shutil.copyfileobj(old, new)


def check_export(folder: str | Path, model: Model, params: dict) -> None:
    """Reads a written directory back.

    Raises:
      StorageError: it is not whole, or a number in it is not that of `params`, cast to the file's dtype.
    """
    flat = rules.flatten(params)
    for piece in layout.pieces(model.family, model.cfg, checkpoint_files.open_checkpoint(folder)):
        read = checkpoint_files.read(piece.entry, piece.rows)
        if not np.array_equal(_bytes(read), _bytes(_block(flat, piece))):
            name = f'{piece.entry.name} ({piece.path})'
            raise StorageError(f'{piece.entry.file}: {name}, read back, is not what was written; export it again')


def files_below(folder: Path) -> list[Path]:
    """Every file below a directory, relative to it; what lies in hidden directories (.cache, .git) is left out."""
    names = sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
    return [name for name in names if not any(part.startswith('.') for part in name.parts[:-1])]


def _claim(folder: Path, checkpoint: Checkpoint, others: Iterable[Path]) -> None:
    """Makes the folder, which may hold nothing but what an earlier export of the same source has left."""
    if folder.resolve() == checkpoint.folder.resolve():
        raise StorageError(f'{folder}: is the directory the model was read from; export into another')
    own = {path.relative_to(checkpoint.folder) for path in checkpoint.files} | set(others)
    own |= {name.with_name(name.name + PARTIAL) for name in own}
    if foreign := [str(name) for name in files_below(folder) if name not in own]:
        raise StorageError(f'{folder}: holds files of something else ({", ".join(foreign[:3])}); choose an empty one')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)


def write_texts(folder: Path, texts: dict[Any, str]) -> None:
    """Writes text files by name."""
    for name, text in texts.items():
        with placed(folder / name) as file:
            file.write(text.encode())


@contextmanager
def placed(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes its place once all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, partial.open('wb') as file:
        yield file


def write_pieces(new: BinaryIO, pieces: list[Piece], params: dict, old: BinaryIO | None = None) -> None:
    """Writes the pieces of one file, in order, each at its place; what lies between them comes from `old`."""
    flat = rules.flatten(params)
    for piece in pieces:
        start = piece.entry.start + piece.rows[0] * piece.entry.row_size
        if old is not None:
            _copy(old, new, start - new.tell())
        data = _bytes(_block(flat, piece))
        new.write(data)
        if old is not None:
            old.seek(data.size, os.SEEK_CUR)


def _copy(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        data = old.read(min(count, layout.PIECE))
        new.write(data)
        count -= len(data)


def _block(flat: dict[str, Any], piece: Piece) -> Shaped[np.ndarray, '...']:
    """What a piece of a file is to hold."""
    array = flat[piece.path]
    if not isinstance(array, jax.Array | np.ndarray):  # lies on disk
        array, piece = array[piece.starts[0]][None], piece._replace(starts=(0, *piece.starts[1:]))
    block = streaming.read_block(array, piece)
    if piece.entry.dtype == np.float16 and not np.isfinite(block).all():
        raise StorageError(f'{piece.path}: numbers too large for float16, the dtype of {piece.entry.name} in its file')
    return block


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
