"""Tables of captions, one tab-separated line for each: of Conceptual Captions (CC3M) and Flickr30k as published.

- `Train_GCC-training.tsv`: caption and address, without a head. The images are files that a download has named after
  the row: `<row>_<crc32 of the address>.jpg` (LAVIS) or `GCC_train_<row>.jpg` (LLaVA), with rows from 0.
- with a head: a column `caption`, and the name of the image in one of `NAME_COLUMNS`, as in reports of downloads
- `results_20130124.token` of Flickr30k: `<image>#<number>` and caption, without a head

Files may be compressed by gzip. Images of rows that could not be downloaded are missing, see `mixture.tolerance`.
"""

import codecs
import gzip
import re
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sparselora_jax.data.benchmarks.picture_files import FileTree, PictureFiles
from sparselora_jax.data.sources.columns import TextColumn
from sparselora_jax.data.sources.pictures import ImageFile, check_missing, find_images
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import SourceRecord
from sparselora_jax.runtime import os_errors
from sparselora_jax.runtime.errors import DataError

SUFFIXES = ('.tsv', '.token', '.tsv.gz')
CAPTION = 'caption'
NAME_COLUMNS = ('path', 'image', 'filepath', 'file_name')
LONGEST_LINE = 2**20  # bytes: a file without line breaks must not fill the memory

_USUAL_FOLDERS = ('flickr30k-images', 'flickr30k_images', 'training', 'train')
_CAPTION_OF_FLICKR = re.compile(r'(?P<image>.+\.\w+)#\d+')
_ADDRESS = re.compile(r'\w+://')

# Maps the number of a row and its cells to the name of the image and the caption.
Parser = Callable[[int, list[str]], tuple[str, str]]


def _by_checksum(number: int, cells: list[str]) -> tuple[str, str]:
    return f'{number}_{zlib.crc32(cells[1].encode())}.jpg', cells[0]


def _by_number(number: int, cells: list[str]) -> tuple[str, str]:
    return f'GCC_train_{number:09d}.jpg', cells[0]


def _of_flickr(number: int, cells: list[str]) -> tuple[str, str]:
    match = _CAPTION_OF_FLICKR.fullmatch(cells[0])
    if match is None:
        raise DataError(f'{cells[0][:60]!r} is not the name of an image and the number of a caption')
    return match['image'], cells[1]


class Table:
    """The rows of a table; see `source.OpenedSource`."""

    def __init__(self, path: Path, trees: list[FileTree], parse: Parser, *, has_head: bool):
        """Read the rows, and find their images.

        Args:
          path: the file.
          trees: where the images are looked for.
          parse: returns the image and the caption of a row.
          has_head: whether the first line names the columns.

        Raises:
          DataError: a row has another number of cells, or cannot be read.
        """
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._captions = TextColumn()
        self._lines = array('i')
        images = array('i')
        numbers: dict[str, int] = {}  # name of an image -> its number
        rows = _read_rows(path)
        width = 0
        if has_head:
            _, head = next(rows)
            width = len(head)
        for line, cells in rows:
            width = width or len(cells)
            if len(cells) != width:
                raise DataError(f'{path}, line {line}: {len(cells)} columns, and {width} in the first line')
            try:
                name, caption = parse(line - 1, cells)
            except DataError as error:
                raise DataError(f'{path}, line {line}: {error}') from None
            self._captions.append(caption)
            self._lines.append(line)
            images.append(numbers.setdefault(name, len(numbers)))
        if not numbers:
            raise DataError(f'{path}: no row')
        self._images = np.array(images, np.int32)
        self._names = list(numbers)
        self.pictures: PictureFiles = find_images(trees, self._names, _USUAL_FOLDERS)
        is_missing = np.zeros(len(numbers), bool)
        is_missing[self.pictures.missing] = True
        self._usable = np.flatnonzero(~is_missing[self._images])

    def __len__(self) -> int:
        return len(self._usable)

    def __getitem__(self, index: int) -> SourceRecord:
        row = int(self._usable[index])
        return SourceRecord(ImageFile(self.pictures[int(self._images[row])].path), self._captions[row])

    def image_name(self, index: int) -> str:
        """Return the name of an image as the file has it.

        Args:
          index: which record.
        """
        return self._names[self._images[self._usable[index]]]

    def name_record(self, index: int) -> str:
        """Return the file and the line of a record.

        Args:
          index: which record.
        """
        return f'{self.path}, line {self._lines[self._usable[index]]}'


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line, from 1, and its cells; blank lines are skipped."""
    open_file = gzip.open if path.suffix.lower() == '.gz' else open
    try:
        with open_file(path, 'rb') as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b''), start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                try:
                    text = line.decode()
                except UnicodeDecodeError:
                    raise DataError(f'{path}, line {number}: not UTF-8; convert the file') from None
                yield number, text.rstrip('\r\n').split('\t')
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f'{path}: damaged or cut off ({error}); download it again') from None
    except OSError as error:
        raise DataError(os_errors.describe(error)) from None


def _by_columns(name_column: int, caption_column: int) -> Parser:
    return lambda number, cells: (cells[name_column], cells[caption_column])


def open_table(path: Path, place: Place) -> Table:
    """Return the rows of a table, whose form the first line tells.

    Args:
      path: the file.
      place: where its images are looked for.

    Raises:
      DataError: the file is broken or has other columns, or too many images are missing.
    """
    _, first = next(_read_rows(path), (0, []))
    trees = list(place.image_trees())
    names = [column for column in NAME_COLUMNS if column in first]
    if CAPTION in first and names:
        parse = _by_columns(first.index(names[0]), first.index(CAPTION))
        table = Table(path, trees, parse, has_head=True)
    elif len(first) == 2 and _ADDRESS.match(first[1]):
        # The table does not say how a download has named the files.
        table = max((Table(path, trees, parse, has_head=False) for parse in (_by_checksum, _by_number)), key=len)
    elif len(first) == 2 and _CAPTION_OF_FLICKR.fullmatch(first[0]):
        table = Table(path, trees, _of_flickr, has_head=False)
    else:
        expected = f'{CAPTION!r} and one of {", ".join(NAME_COLUMNS)}, or caption and address'
        raise DataError(f'{path}: the columns are {", ".join(first)[:120] or "none"}; expected {expected}')
    table.notes = check_missing(path, table.pictures, place.tolerance)
    return table


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


class TableFormat:
    """Opens tables; see `source.SourceFormat`."""

    title = 'a table of captions (.tsv), of Conceptual Captions or Flickr30k'
    takes_images = True

    def open(self, place: Place) -> Table | None:
        """Return the rows of the table; None if there is none.

        Args:
          place: the file, or a folder with one table.

        Raises:
          DataError: the table is broken or has other columns, or a folder holds several.
        """
        if place.path.is_file():
            return open_table(place.path, place) if _is_table(place.path) else None
        paths = sorted(path for path in place.path.iterdir() if _is_table(path))
        if len(paths) > 1:
            names = ', '.join(str(path) for path in paths)
            raise DataError(f'{place.path}: {len(paths)} tables could be meant: {names}; name one of them')
        return open_table(paths[0], place) if paths else None
