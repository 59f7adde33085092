"""Read large JSON files record by record, so that no file is ever in memory as a whole.

`json.load` of the annotations of VQAv2's validation split needs about a gigabyte. Here a window of the text is decoded
at a time: one element of a top-level list, or one element of a list that is a member of the top-level object.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from sparselora_jax.runtime import os_errors
from sparselora_jax.runtime.errors import DataError

# A megabyte holds hundreds of records, and only the last one is decoded twice.
WINDOW = 2**20  # bytes that are read at a time
LARGEST_RECORD = 2**26  # bytes; a broken record must not make the reader swallow the rest of the file
BYTE_ORDER_MARK = b'\xef\xbb\xbf'

_BLANKS = re.compile(r'[ \t\n\r]*')
# Decodes the value that begins at a place in a text, and says where it ends: the decoder in C that `json.load` uses.
_decode_value = json.JSONDecoder().raw_decode


class Entry(NamedTuple):
    """A record of a JSON file and its place.

    Attributes:
      key: name of the member of the top-level object that holds the record; '' in a top-level list and in JSON lines.
      index: place of the record in its list, or number of its line, from 1; None if the member is not a list.
      value: the decoded record.
      is_line: True in JSON lines.
    """

    key: str
    index: int | None
    value: object
    is_line: bool = False

    @property
    def place(self) -> str:
        """Say where the record is, for messages: 'questions[17]', 'line 3'."""
        if self.is_line:
            return f'line {self.index}'
        if self.index is None:
            return f'member {self.key!r}'
        return f'{self.key or "element "}[{self.index}]'


class CutError(Exception):
    """Raised where a limit of bytes was given, and the text up to it ends before the value does."""


def entries(path: Path, *, most_bytes: int | None = None) -> Iterator[Entry]:
    """Read the records of a JSON file one by one.

    Args:
      path: a file with a list, or an object whose lists hold the records.
      most_bytes: read no further than this.

    Yields:
      The elements of a top-level list. Of a top-level object, the elements of its members that are lists, and the other
      members.

    Raises:
      DataError: the file cannot be read or is not JSON; names the byte.
      CutError: `most_bytes` have been read.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / 'a.json'
    ...     _ = file.write_text('{"info": {"year": 2014}, "questions": [{"id": 1}, {"id": 2}]}')
    ...     [(entry.place, entry.value) for entry in entries(file)]
    [("member 'info'", {'year': 2014}), ('questions[0]', {'id': 1}), ('questions[1]', {'id': 2})]
    """
    try:
        with path.open('rb') as file:
            window = _Window(path, file, most_bytes)
            opening = window.peek()
            if opening == '[':
                yield from _elements(window, '')
            elif opening == '{':
                yield from _members(window)
            else:
                raise window.broken('expected a list or an object')
            if window.peek():
                raise window.broken('text after the end of the value')
    except OSError as error:
        raise DataError(os_errors.describe(error)) from None


def _members(window: '_Window') -> Iterator[Entry]:
    """Read an object, and yield the elements of members that are lists, and the other members."""
    window.advance()
    if window.peek() == '}':
        window.advance()
        return
    while True:
        if window.peek() != '"':
            raise window.broken('expected the name of a member')
        key = window.value()
        if window.peek() != ':':
            raise window.broken("expected ':'")
        window.advance()
        # Only lists are long. An object is decoded whole: it is a question of GQA, or the header of a file.
        if window.peek() == '[':
            yield from _elements(window, key)
        else:
            yield Entry(key, None, window.value())
        if window.separator('}'):
            return


def _elements(window: '_Window', key: str) -> Iterator[Entry]:
    """Read a list, and yield its elements."""
    window.advance()
    if window.peek() == ']':
        window.advance()
        return
    index = 0
    while True:
        window.peek()
        yield Entry(key, index, window.value())
        index += 1
        if window.separator(']'):
            return


class _Window:
    """The part of a file that is decoded next, and where it lies in the file."""

    def __init__(self, path: Path, file: BufferedReader, most_bytes: int | None):
        self.path = path
        self.file = file
        self.bytes_left = most_bytes
        self.text = ''
        self.position = 0
        self.has_ended = False
        # A character may lie across two reads; the decoder keeps the first part of it.
        self.decoder = codecs.getincrementaldecoder('utf-8')()
        self.bytes_before = 0  # bytes of the file before `text`
        self.bytes_read = 0
        if file.peek(3).startswith(BYTE_ORDER_MARK):
            file.read(3)
            self.bytes_before = 3
            self.bytes_read = 3

    def peek(self) -> str:
        """Skip blanks and return the next character, or '' at the end of the file."""
        while True:
            self.position = _BLANKS.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ''

    def advance(self) -> None:
        """Move behind the character that `peek` returned."""
        self.position += 1

    def separator(self, closing: str) -> bool:
        """Move behind a comma or the closing bracket, and return whether it was the bracket."""
        character = self.peek()
        # `''` is the end of the file.
        if character not in (',', closing) or not character:
            raise self.broken(f"expected ',' or '{closing}'")
        self.advance()
        return character == closing

    def value(self) -> object:
        """Decode the value at the position, and move behind it."""
        while True:
            try:
                value, end = _decode_value(self.text, self.position)
            except json.JSONDecodeError as error:
                # The value may only be incomplete in the window. The decoder cannot tell that from a fault, so a fault
                # is reported after some more of the file was read in vain.
                if len(self.text) - self.position < LARGEST_RECORD and self.grow():
                    continue
                raise self.broken(error.msg, error.pos) from None
            except RecursionError:
                raise self.broken('brackets are nested too deeply') from None
            except ValueError:  # Python refuses to convert thousands of digits
                raise self.broken('a number has too many digits') from None
            # A number at the end of the window may go on behind it: of '1.5e+3', '1.5e+' may have been read, which is
            # decoded as 1.5 and leaves two characters.
            if len(self.text) - end <= 2 and self.grow():
                continue
            self.position = end
            return value

    def grow(self) -> bool:
        """Read more of the file, drop what has been decoded, and return whether there was more.

        Raises:
          DataError: the file is not UTF-8.
          CutError: no more may be read.
        """
        if self.has_ended:
            return False
        # The size doubles, so that a long value is not decoded again for each megabyte of it.
        size = max(WINDOW, len(self.text) - self.position)
        if self.bytes_left is not None:
            size = min(size, self.bytes_left)
            self.bytes_left -= size
        chunk = self.file.read(size)
        # At the limit nothing more is read, but the file goes on: this is not its end.
        if not chunk and self.bytes_left == 0 and self.file.peek(1):
            raise CutError
        # Bytes of a character whose rest is in this chunk; the error counts from them.
        undecoded = len(self.decoder.getstate()[0])
        try:
            more = self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            byte = self.bytes_read - undecoded + error.start
            raise DataError(f'{self.path}: not UTF-8 at byte {byte:,}; download or convert the file again') from None
        if not chunk:
            # The text stays as it is, because errors name places in it.
            self.has_ended = True
            return False
        self.bytes_read += len(chunk)
        # Characters have one to four bytes, so the place in the file is counted while the text is still there.
        self.bytes_before += len(self.text[: self.position].encode())
        self.text = self.text[self.position :] + more
        self.position = 0
        return True

    def broken(self, reason: str, position: int | None = None) -> DataError:
        """Return the error of a file that is not JSON; the message names the byte."""
        position = self.position if position is None else position
        byte = self.bytes_before + len(self.text[:position].encode())
        # The most frequent fault is a download that was interrupted.
        if self.has_ended and not self.text[position:].strip():
            return DataError(f'{self.path}: the file is cut off: it ends at byte {byte:,}; download it again')
        return DataError(f'{self.path}: broken JSON at byte {byte:,}: {reason}')


def lines(path: Path) -> Iterator[Entry]:
    """Read the records of a file of JSON lines one by one; blank lines are skipped.

    Args:
      path: a file with one JSON value per line.

    Yields:
      The values, with the numbers of their lines from 1.

    Raises:
      DataError: the file cannot be read, or a line is not JSON; names the line and the byte in the file.
    """
    try:
        with path.open('rb') as file:
            start = 0  # byte of the file at which the line begins
            # Lines are cut at a length, so that a file without line breaks does not fill the memory.
            for number, line in enumerate(iter(lambda: file.readline(LARGEST_RECORD), b''), start=1):
                content = line
                skipped = 0
                if number == 1 and line.startswith(BYTE_ORDER_MARK):
                    content = line[3:]
                    skipped = 3
                if content.strip():
                    yield Entry('', number, _decode_line(path, number, start + skipped, content), True)
                start += len(line)
    except OSError as error:
        raise DataError(os_errors.describe(error)) from None


def _decode_line(path: Path, number: int, start: int, line: bytes) -> object:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f'{path}, line {number}: not UTF-8 at byte {start + error.start:,}') from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        byte = start + len(text[: error.pos].encode())
        raise DataError(f'{path}, line {number}: broken JSON at byte {byte:,}: {error.msg}') from None
    except RecursionError:
        raise DataError(f'{path}, line {number}: brackets are nested too deeply') from None
    except ValueError:  # Python refuses to convert thousands of digits
        raise DataError(f'{path}, line {number}: a number has too many digits') from None


def for_each(records: Iterator[Entry], path: Path, use: Callable[[Entry], None]) -> None:
    """Use each record; an error names the file and the record.

    Args:
      records: the records, of `entries` or `lines`.
      path: their file, for messages.
      use: called with each record.

    Raises:
      DataError: the file is broken, or `use` refuses a record.
    """
    for entry in records:
        try:
            use(entry)
        except DataError as error:
            raise DataError(f'{path}, {entry.place}: {error}') from None
