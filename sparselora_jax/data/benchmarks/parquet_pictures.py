"""Read images from columns of parquet files, where each image is a struct of its bytes and its path.

Files of Hugging Face data sets have gigabytes. Only the rows between the start of a row group and the row in question
are read, and reading goes on from there if the next rows are asked for.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from sparselora_jax.data import images
from sparselora_jax.data.parts import find_part
from sparselora_jax.runtime import os_errors
from sparselora_jax.runtime.errors import DataError

# An image has about 100 kB, so eight take a megabyte; one at a time would cost a call of Arrow each.
ROWS_AT_A_TIME = 8
OPEN_GROUPS = 8  # row groups whose reading can go on, for all files together


def open_file(path: Path) -> pq.ParquetFile:
    """Open a parquet file; only its footer is read.

    Args:
      path: the file.

    Raises:
      DataError: it cannot be read, or is not a parquet file.
    """
    with damage_named(str(path)):
        # Mapped, so that a column of gigabytes takes no memory of its own.
        return pq.ParquetFile(path, memory_map=True)


@contextlib.contextmanager
def damage_named(place: str) -> Iterator[None]:
    """Turn errors of a damaged file into one line that names it.

    Args:
      place: the file, and possibly a part of it.

    Raises:
      DataError: the file is damaged.
    """
    try:
        yield
    # Arrow raises OSError for damaged pages, without the number of an error of the operating system. It decodes names
    # of columns, and texts, when they are asked for.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(os_errors.describe(error)) from None
        # Arrow's messages have several sentences, of which the first says what is wrong.
        reason = (str(error).splitlines() or [''])[0].partition('. ')[0]
        raise DataError(f'{place}: not a parquet file, or damaged; download it again ({reason})') from None


@dataclass(frozen=True)
class ParquetPicture:
    """An image in a row of a parquet file that is not read yet; see `items.Picture`.

    Attributes:
      path: the file.
      group: number of the row group.
      row: number of the row in its group.
      column: name of the column.
    """

    path: Path
    group: int
    row: int
    column: str

    @property
    def name(self) -> str:
        """The place of the image, for messages."""
        return f'{self.path}, row group {self.group}, row {self.row}'

    def read_bytes(self) -> bytes:
        """Read the bytes of the image file.

        Raises:
          DataError: the row has no image, or the parquet file is damaged.
        """
        data = _open_group(self.path, self.group, self.column).read(self.row)
        if data is None:
            raise DataError(f'{self.name}: no bytes in the column {self.column!r}; download the files with images')
        return data

    def read(self) -> UInt8[np.ndarray, 'height width 3']:
        """Read the image as RGB, as public evaluation code does.

        Raises:
          DataError: the row has no image, or a damaged one.
        """
        return images.decode_image(self.read_bytes(), self.name, is_benchmark=True)


@dataclass(frozen=True)
class ParquetPictures(Sequence):
    """The images of a set of parquet files, by the number of their row.

    Attributes:
      paths: the files.
      column: name of the column of images.
      files: for each row group, the number of its file.
      groups: for each row group, its number in the file.
      ends: for each row group, the number of rows of all groups up to its end.
    """

    paths: tuple[Path, ...]
    column: str
    files: Int64[np.ndarray, ' groups'] = field(repr=False)
    groups: Int64[np.ndarray, ' groups'] = field(repr=False)
    ends: Int64[np.ndarray, ' groups'] = field(repr=False)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> ParquetPicture:
        number, row = find_part(self.ends, index)
        path = self.paths[self.files[number]]
        return ParquetPicture(path, int(self.groups[number]), row, self.column)


def list_pictures(paths: Sequence[Path], column: str) -> ParquetPictures:
    """Return the images of a set of parquet files; only footers are read.

    Args:
      paths: the files, in order.
      column: name of the column of images.

    Raises:
      DataError: a file is not a parquet file.
    """
    files = []
    groups = []
    rows = []
    for number, path in enumerate(paths):
        # The footer says how many rows each group has, so no page is read.
        metadata = open_file(path).metadata
        files += [number] * metadata.num_row_groups
        groups += range(metadata.num_row_groups)
        rows += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    ends = np.cumsum(np.array(rows, np.int64))
    return ParquetPictures(tuple(paths), column, np.array(files, np.int64), np.array(groups, np.int64), ends)


def rows_without_image(path: Path, column: str) -> Int64[np.ndarray, ' rows']:
    """Return the numbers of the rows of a file that have no image.

    Args:
      path: the file.
      column: name of the column of images.

    Raises:
      DataError: the file is damaged.
    """
    file = open_file(path)
    missing = []
    start = 0
    for number in range(file.metadata.num_row_groups):
        with damage_named(str(path)):
            group = file.metadata.row_group(number)
            count = _count_missing(group, column)
        # The footer counts the missing values, so the bytes are read only where some are missing.
        if count != 0:
            row = start
            for chunk in _read_bytes(file, path, number, column):
                missing += [row + place for place, data in enumerate(chunk) if data is None]
                row += len(chunk)
        start += group.num_rows
    return np.array(missing, np.int64)


def read_paths(path: Path, column: str) -> Iterator[str | None]:
    """Yield the path that stands with each image: the name of its file where the parquet file was made.

    Args:
      path: the file.
      column: name of the column of images.

    Raises:
      DataError: the file is damaged.
    """
    file = open_file(path)
    with damage_named(str(path)):
        kind = file.schema_arrow.field(column).type
        if not pa.types.is_struct(kind) or kind.get_field_index('path') < 0:
            yield from [None] * file.metadata.num_rows
            return
        # Columns of structs are stored by their fields, so the bytes of the images are not read.
        for batch in file.iter_batches(columns=[f'{column}.path']):
            yield from (value and value['path'] for value in batch.column(0).to_pylist())


def _count_missing(group: pq.RowGroupMetaData, column: str) -> int | None:
    """Return how many rows of a group have no image; None if the footer does not say."""
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema in (column, f'{column}.bytes'):
            return chunk.statistics.null_count if chunk.statistics and chunk.statistics.has_null_count else None
    return None


# Cached for each process: a file that is open cannot be sent to another process.
@functools.lru_cache(maxsize=OPEN_GROUPS)
def _open_group(path: Path, group: int, column: str) -> '_GroupReader':
    return _GroupReader(path, group, column)


class _GroupReader:
    """Reads the images of a row group, in order or again from the start."""

    def __init__(self, path: Path, group: int, column: str):
        self.path = path
        self.group = group
        self.column = column
        self.file = open_file(path)
        # Threads that load data share the reader.
        self.lock = threading.Lock()
        self.chunks: Iterator[list[bytes | None]] = iter(())
        # The chunk before stays too: of threads that read rows in order, one may be a few rows behind the others.
        self.previous: list[bytes | None] = []
        self.chunk: list[bytes | None] = []
        self.first = 0  # number of the row at which `chunk` begins

    def read(self, row: int) -> bytes | None:
        """Return the bytes of the image in a row; None if it has none."""
        with self.lock:
            # A group is a stream: rows before the two chunks need another start. Benchmarks are read in order.
            if row < self.first - len(self.previous) or not self.chunk:
                self.chunks = _read_bytes(self.file, self.path, self.group, self.column)
                self.previous = []
                self.chunk = []
                self.first = 0
            while row >= self.first + len(self.chunk):
                self.first += len(self.chunk)
                self.previous = self.chunk
                self.chunk = next(self.chunks, None) or []
                if not self.chunk:
                    raise DataError(f'{self.path}, row group {self.group}: no row {row}; download the file again')
            place = row - self.first
            return self.chunk[place] if place >= 0 else self.previous[place]


def holds_bytes(kind: pa.DataType) -> bool:
    """Return whether a column is of bytes, or of structs with a field `bytes`.

    Args:
      kind: the type of the column.
    """
    if pa.types.is_struct(kind):
        return kind.get_field_index('bytes') >= 0 and holds_bytes(kind.field('bytes').type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _read_bytes(file: pq.ParquetFile, path: Path, group: int, column: str) -> Iterator[list[bytes | None]]:
    """Yield the bytes of the images of a row group, some rows at a time."""
    with damage_named(f'{path}, row group {group}'):
        kind = file.schema_arrow.field(column).type
        is_struct = pa.types.is_struct(kind)
        if not holds_bytes(kind):
            raise DataError(f'{path}: the column {column!r} holds {kind}, expected the bytes of images')
        # The path in the struct is that of the machine on which the file was made.
        name = f'{column}.bytes' if is_struct else column
        for batch in file.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=[name]):
            values = batch.column(0)
            yield [value and value['bytes'] for value in values.to_pylist()] if is_struct else values.to_pylist()
