"""Write the files of a directory: weights a piece at a time, texts, and copies of other files.

A file appears either complete or not at all.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import jax
import numpy as np
from jaxtyping import Shaped

from sparselora_jax.checkpoints import checkpoint_files, layout, streaming
from sparselora_jax.checkpoints.checkpoint_files import CONFIG
from sparselora_jax.checkpoints.layout import Piece
from sparselora_jax.checkpoints.on_disk import Stack
from sparselora_jax.runtime.files import StorageError, whole
from sparselora_jax.sparse import rules

# Files that hold weights: the format that we write, and others, which would still hold the old weights.
WEIGHTS = ('.safetensors', *checkpoint_files.PICKLES, '.h5', '.msgpack', '.onnx', '.gguf', '.ot')

# Types that the leaves of params may have here.
Leaf = jax.Array | np.ndarray | Stack


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


def text_paths(texts: Mapping[str, str] | None) -> dict[Path, str]:
    """Return texts to write beside a model by their paths, after a check.

    Args:
      texts: the texts by name; None: there are none.

    Raises:
      StorageError: a name leads outside the folder or is that of a file of the model, or a value is no text.
    """
    by_path = {}
    for name, text in (texts or {}).items():
        path = Path(name)
        if path.is_absolute() or '..' in path.parts or not path.parts:
            raise StorageError(f'text {name!r}: expected a name inside the folder of the model')
        if path == Path(CONFIG) or path.name.endswith((*WEIGHTS, '.index.json')):
            raise StorageError(f'text {name!r}: this is a file of the model itself; use another name')
        if not isinstance(text, str):
            raise StorageError(f'text {name!r} is a {type(text).__name__}, expected a string')
        by_path[path] = text
    return by_path


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
    blocks = Blocks(rules.flatten(params))
    for piece in pieces:
        start = piece.entry.start + piece.rows[0] * piece.entry.row_size
        if old is not None:
            copy_bytes(old, new, start - new.tell())
        block = blocks.read(piece)
        if not np.isfinite(block.astype(np.float32)).all():
            raise StorageError(
                f'{piece.path}: NaN or infinite weights cannot be written; the model would give no answer'
            )
        data = as_bytes(block)
        new.write(data)
        # Both files have the same length and layout, so their positions agree.
        if old is not None:
            old.seek(data.size, os.SEEK_CUR)


def copy_bytes(old: BinaryIO, new: BinaryIO, count: int) -> None:
    """Copy bytes from the position of one file to the position of another, a piece's worth at a time."""
    while count:
        data = old.read(min(count, layout.PIECE))
        new.write(data)
        count -= len(data)


class Blocks:
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


def as_bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array: NaNs equal themselves there, and -0 is not 0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
