"""Text without images: a text file, or a folder of text files. A record is a paragraph, or a part of a long one.

Paragraphs are separated by blank lines. A long paragraph is cut at spaces into parts of at most `LONGEST` characters,
so that no text is lost to the limits of tokens; a longer word is cut anywhere. The files are UTF-8.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparselora_jax.data.parts import find_part
from sparselora_jax.data.sources.columns import TextColumn
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import SourceRecord
from sparselora_jax.runtime import os_errors
from sparselora_jax.runtime.errors import DataError

SUFFIX = '.txt'
LONGEST = 200  # characters of a record: some 50 tokens
SHORTEST = 2  # characters that can be divided into a prompt and the text to learn

_PARAGRAPH_END = re.compile(r'\n[ \t]*\n')


class TextFiles:
    """Parts of texts, in the order of the files; see `source.OpenedSource`."""

    def __init__(self, paths: Sequence[Path]):
        """Read the files.

        Args:
          paths: the files.

        Raises:
          DataError: a file cannot be read, or none holds a text.
        """
        self.paths = paths
        self.notes = ()
        self._texts = TextColumn()
        self._ends = array('q')  # number of records up to the end of each file
        for path in paths:
            for part in _parts(_read(path)):
                self._texts.append(part)
            self._ends.append(len(self._texts))
        if not len(self._texts):
            raise DataError(f'{paths[0]}: no text of {SHORTEST} characters or more')

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> SourceRecord:
        return SourceRecord(None, self._texts[index])

    def image_name(self, index: int) -> str:
        """Return '': there are no images.

        Args:
          index: which record.
        """
        return ''

    def name_record(self, index: int) -> str:
        """Return the file of a record, and its number there.

        Args:
          index: which record.
        """
        file, part = find_part(self._ends, index)
        return f'{self.paths[file]}, part {part + 1}'


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: not UTF-8 at byte {error.start:,}; convert the file') from None
    except OSError as error:
        raise DataError(os_errors.describe(error)) from None


def _parts(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text, long ones in parts."""
    for paragraph in _PARAGRAPH_END.split(text.replace('\r\n', '\n')):
        part = ''
        for word in _cut_words(paragraph):
            if part and len(part) + 1 + len(word) > LONGEST:
                yield part
                part = word
            else:
                part = f'{part} {word}' if part else word
        if len(part) >= SHORTEST:
            yield part


def _cut_words(paragraph: str) -> Iterator[str]:
    """Yield the words of a paragraph, those that are too long in pieces."""
    for word in paragraph.split():
        # Chinese and Japanese have no spaces.
        for start in range(0, len(word), LONGEST):
            yield word[start : start + LONGEST]


class TextFilesFormat:
    """Opens text files; see `source.SourceFormat`."""

    title = 'a text file, or a folder of text files'
    takes_images = False

    def open(self, place: Place) -> TextFiles | None:
        """Return the texts; None if there are none.

        Args:
          place: a file or a folder.

        Raises:
          DataError: a file is not UTF-8.
        """
        if place.path.is_file():
            return TextFiles([place.path]) if place.path.suffix.lower() == SUFFIX else None
        paths = sorted(path for path in place.path.rglob(f'*{SUFFIX}') if path.is_file())
        return TextFiles(paths) if paths else None
