"""Look at the head of a JSON file to tell what it holds: the names of its keys and its first records."""

import json
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sparselora_jax.data.benchmarks.json_stream import CutError, entries
from sparselora_jax.runtime.errors import DataError

# Headers of COCO and VQA, and records of GQA, have a few kilobytes.
HEAD = 2**16  # bytes of a file that are read first
LONGEST_HEAD = 2**22  # bytes that are read if a first record does not fit
MOST_RECORDS = 64  # records of the head that are kept

_KEY_END = re.compile(rb'"\s*:\s*')
_decode_value = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class FileFacts:
    """What a data file holds.

    Attributes:
      path: the file; of a set of files, the first.
      kind: form of its records, such as 'vqa_questions'.
      marks: what the records tell about themselves, such as {'subset': 'val2014'}. No key: it cannot be told.
      more: the other files of the set.
    """

    path: Path
    kind: str
    marks: Mapping[str, str] = field(default_factory=dict)
    more: tuple[Path, ...] = ()

    def mark(self, name: str) -> str:
        """Return a mark, or '' if it cannot be told.

        Args:
          name: name of the mark.
        """
        return self.marks.get(name, '')


def facts(path: Path, kind: str, **marks: str) -> FileFacts:
    """Return what a file holds, without marks that are empty.

    Args:
      path: the file.
      kind: form of its records.
      **marks: what the records tell about themselves.
    """
    return FileFacts(path, kind, {name: mark for name, mark in marks.items() if mark})


class Member(NamedTuple):
    """A member of the top-level object.

    Attributes:
      value: its value; if it is a list, the first element.
      is_list: whether it is a list.
    """

    value: object
    is_list: bool


@dataclass(frozen=True)
class Head:
    """The beginning of a JSON file.

    Attributes:
      path: the file.
      form: 'list', 'object', or 'lines' for JSON lines.
      records: the first elements of a top-level list.
      members: the first members of a top-level object; of JSON lines, those of the first line.
      is_whole: whether the head is the whole file.
      fault: why the file is broken behind what was read, if it is.
    """

    path: Path
    form: str
    records: list[object] = field(default_factory=list)
    members: dict[str, Member] = field(default_factory=dict)
    is_whole: bool = False
    fault: DataError | None = None

    def first(self, key: str) -> object:
        """Return the first record of a member that is a list, wherever it is in the file; None if there is none.

        Args:
          key: name of the member.
        """
        member = self.member(key)
        return member.value if member is not None and member.is_list else None

    def text(self, key: str) -> str:
        """Return a member that is a text, wherever it is in the file; '' if there is none.

        Args:
          key: name of the member.
        """
        member = self.member(key)
        return member.value if member is not None and isinstance(member.value, str) and not member.is_list else ''

    def member(self, key: str) -> Member | None:
        """Return a member, wherever it is in the file; None if there is none.

        Args:
          key: name of the member.
        """
        if key in self.members or self.is_whole or self.form != 'object':
            return self.members.get(key)
        # Remembered, because several recognisers may ask.
        member = _find_member(self.path, key)
        if member is not None:
            self.members[key] = member
        return member


def read_head(path: Path) -> Head:
    """Read the beginning of a JSON file.

    Args:
      path: the file.

    Raises:
      DataError: the file cannot be read, or its beginning is not JSON.
    """
    limit = HEAD
    while True:
        head = _read_head(path, limit)
        # A first record may be longer than the head.
        if head.records or head.members or head.is_whole or limit >= LONGEST_HEAD:
            return head
        # By eight, so that a file whose records are all too long is not read many times.
        limit *= 8


def _read_head(path: Path, limit: int) -> Head:
    records: list[object] = []
    members: dict[str, Member] = {}
    is_whole = False
    fault = None
    form = ''
    try:
        for entry in entries(path, most_bytes=limit):
            if not entry.key and entry.index is not None:
                form = 'list'
                records.append(entry.value)
            else:
                form = 'object'
                # The first element of a list tells the keys of all.
                members.setdefault(entry.key, Member(entry.value, entry.index is not None))
            if len(records) == MOST_RECORDS or len(members) == MOST_RECORDS:
                break
        else:
            is_whole = True
    except CutError:
        pass
    except DataError as error:
        # One value was read to its end, and another one follows: JSON lines.
        if form == 'object' and _is_lines(path):
            form = 'lines'
        # A broken file is still recognised by what is before the fault, so that its reader can name the fault.
        elif form:
            fault = error
        else:
            raise
    return Head(path, form, records, members, is_whole, fault)


def _is_lines(path: Path) -> bool:
    """Return whether the first line of a file is an object on its own, and another one begins in the second."""
    with path.open('rb') as file:
        file.readline(LONGEST_HEAD)
        rest = file.read(HEAD).lstrip()
    return rest.startswith(b'{')


def _find_member(path: Path, key: str) -> Member | None:
    """Find a member by the bytes of its name, which is a hundred times faster than decoding what is before it.

    A member of a record may have the same name. Callers therefore ask only for names that the records of the file in
    question do not have, and the readers check each record anyway.
    """
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 0
        while True:
            start = content.find(f'"{key}"'.encode(), start)
            if start < 0:
                return None
            colon = _KEY_END.match(content, start + len(key.encode()) + 1)
            # Without a colon, it is a text that looks like the name.
            if colon:
                break
            start += 1
        text = content[colon.end() : colon.end() + HEAD].decode(errors='replace')
    return _first_value(text)


def _first_value(text: str) -> Member | None:
    """Decode the value at the start of a text, or the first element if it is a list; None if it does not end there."""
    is_list = text.startswith('[')
    if is_list:
        text = text[1:].lstrip()
    try:
        value, _ = _decode_value(text)
    except (ValueError, RecursionError):
        return None
    return Member(value, is_list)


def count_bytes(path: Path, pattern: bytes) -> int:
    """Count how often some bytes occur in a file; of a key, that is the number of records.

    Args:
      path: the file.
      pattern: the bytes.
    """
    count = 0
    rest = b''
    with path.open('rb') as file:
        while chunk := file.read(2**22):
            window = rest + chunk
            count += window.count(pattern)
            # The pattern may lie across two chunks; what is kept is too short to be counted twice.
            rest = window[-(len(pattern) - 1) :]
    return count


def subset_in_name(path: Path, subsets: tuple[str, ...]) -> str:
    """Return the subset that the name of a file says; '' if it says none or several.

    Args:
      path: the file. Its name counts only where the records do not tell the subset.
      subsets: words to look for, such as ('train', 'val', 'test').

    >>> subset_in_name(Path('coco_karpathy_test.json'), ('train', 'val', 'test'))
    'test'
    """
    # Whole words, so that 'testdev' is not 'test', and 'validation_split' is not 'val'.
    words = re.findall(r'[a-z]+', path.stem.lower())
    named = [subset for subset in subsets if subset in words]
    return named[0] if len(named) == 1 else ''
