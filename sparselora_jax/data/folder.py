"""A folder of images with a `data.jsonl`: one JSON object per line, with an image, a prompt and the answer.

For example, a folder with `cats/1.png` and `cats/2.jpg` may have these lines::

    {"image": "cats/1.png", "prompt": "What colour is the cat?", "answer": "teal"}
    {"image": "cats/1.png", "prompt": "Is it asleep?", "answer": "yes"}
    {"image": "cats/2.jpg", "prompt": "A picture of", "answer": "a cat on a mat", "split": "test"}

- `image`: a file of any format that Pillow reads; its path is relative to the folder and stays inside it
- `prompt`: the question, or the beginning of a caption; the recipe puts its template (`text.prompt`) around it
- `answer`: the answer that the model should give
- `split`: 'train' or 'test'; if no line of an image has it, a hash of the image's path decides for all its lines

Other fields and blank lines are ignored. Unusable lines are skipped and counted, and the summary names them by line
number.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from sparselora_jax.data import images
from sparselora_jax.data.dataset import DATASETS, Dataset, Split
from sparselora_jax.runtime.errors import DataError

FIELDS = ('image', 'prompt', 'answer')
SPLITS = ('train', 'test')
KINDS = ('yes/no', 'number', 'other')
TEST_SHARE = 0.1  # share of test images, among images whose lines name no split
TOLERANCE = 0.5  # largest share of lines that may be skipped
SHOWN_PROBLEMS = 5  # number of skipped lines that a summary names
LONGEST_QUOTE = 80  # most characters of a line that a message quotes


@dataclass(frozen=True)
class Record:
    """A usable line. `image` is the path as written in the line; the texts have no surrounding spaces."""

    line: int
    image: str
    prompt: str
    answer: str
    split: str


@dataclass(frozen=True)
class Problem:
    """A skipped line, and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class Source:
    """Random access: `source[i]` is {'image': uint8 RGB [height, width, 3], 'question': str, 'answer': str}."""

    folder: Path
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    # grain passes numpy's integers, hence `SupportsIndex`.
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Read a record and its image.

        Raises:
          DataError: the pixels of the image are corrupt.
        """
        record = self.records[index]
        try:
            pixels = images.read_image(self.folder / record.image)
        except DataError as error:
            raise DataError(f'{self.folder}/data.jsonl, line {record.line}: {error}') from error
        return {'image': pixels, 'question': record.prompt, 'answer': record.answer}


@dataclass(frozen=True)
class Folder:
    """The usable and unusable lines of a folder, in file order."""

    path: Path
    records: tuple[Record, ...]
    problems: tuple[Problem, ...]

    def summary(self) -> str:
        """Return one line, for example '1,204 examples; 3 left out: line 7: image cats/1.png does not exist; ...'."""
        count = len(self.records)
        text = f'{count:,} example{"s" * (count != 1)}'
        if not self.problems:
            return text
        reasons = [f'line {problem.line}: {problem.reason}' for problem in self.problems[:SHOWN_PROBLEMS]]
        rest = len(self.problems) - len(reasons)
        if rest > 0:
            reasons.append(f'and {rest:,} more')
        return f'{text}; {len(self.problems):,} left out: ' + '; '.join(reasons)

    def as_data_source(self, split: str) -> Source:
        """Return the records of a split.

        Args:
          split: 'train' or 'test'.

        Raises:
          DataError: the split has no records.
        """
        records = tuple(record for record in self.records if record.split == split)
        if not records:
            raise DataError(f'{self.path}: no example of split {split!r}; mark some lines with "split": "{split}"')
        return Source(self.path, records)


def read_folder(path: str | Path, *, misfit: Callable[[str, str], str] = lambda prompt, answer: '') -> Folder:
    """Read and check `data.jsonl`; images are opened, but their pixels are not decoded.

    Args:
      path: the folder.
      misfit: maps (prompt, answer) to the reason why a model cannot use them, or ''.

    Returns:
      The lines that can be used and those that cannot.

    Raises:
      DataError: no such folder or file, no usable line, or too many unusable lines.
    """
    path = Path(path)
    file = path / 'data.jsonl'
    if not path.is_dir():
        registered = ', '.join(DATASETS)
        raise DataError(f'{path}: no such folder; expected a folder, package.module:Name, or one of {registered}')
    if not file.is_file():
        raise DataError(f'{path}: no data.jsonl in this folder; see sparselora_jax/data/folder.py for its format')
    lines = file.read_bytes().removeprefix(b'\xef\xbb\xbf').split(b'\n')  # drop a byte order mark
    checker = _LineChecker(path, misfit)
    usable: dict[int, dict[str, str]] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            usable[number] = checker.check(number, line)
        except DataError as error:
            problems.append(Problem(number, str(error)))
    records = []
    for number, fields in usable.items():
        split = fields['split'] or checker.image_splits.get(fields['image']) or _split_by_hash(fields['image'])
        records.append(Record(number, fields['image'], fields['prompt'], fields['answer'], split))
    folder = Folder(path, tuple(records), tuple(problems))
    if not records:
        reason = folder.summary() if problems else 'it is empty'
        raise DataError(f'{file}: no line that can be used: {reason}')
    if len(problems) > TOLERANCE * (len(records) + len(problems)):
        raise DataError(f'{file}: more than {TOLERANCE:.0%} of the lines cannot be used: {folder.summary()}')
    return folder


class _LineChecker:
    """Checks lines one by one, and remembers earlier lines to detect duplicates."""

    def __init__(self, folder: Path, misfit: Callable[[str, str], str]):
        self.folder = folder
        self.misfit = misfit
        self.first_lines: dict[tuple[str, ...], int] = {}  # (image, prompt, answer) -> first line with this content
        self.image_problems: dict[str, str] = {}  # image -> problem or ''; each image is opened once
        self.image_splits: dict[str, str] = {}  # image -> split, from the first line that names one

    def check(self, number: int, line: bytes) -> dict[str, str]:
        """Return the fields of a line; `split` is '' if the line has none.

        Raises:
          DataError: the line cannot be used; the message says why.
        """
        fields = _parse_line(line)
        content = tuple(fields[name] for name in FIELDS)
        if content in self.first_lines:
            raise DataError(f'the same as line {self.first_lines[content]}')
        image = fields['image']
        if image not in self.image_problems:
            self.image_problems[image] = _image_problem(self.folder, image)
        if self.image_problems[image]:
            raise DataError(f'image {_quote(image)} {self.image_problems[image]}')
        reason = self.misfit(fields['prompt'], fields['answer'])
        if reason:
            raise DataError(reason)
        # Only usable lines are remembered: a bad line must neither hide a good one nor choose a split.
        self.first_lines[content] = number
        if fields['split']:
            self.image_splits.setdefault(image, fields['split'])
        return fields


def _parse_line(line: bytes) -> dict[str, str]:
    """Return the fields of a line; `split` is '' if the line has none.

    Raises:
      DataError: the line is not a JSON object, or a field is missing or has the wrong type.
    """
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        raise DataError('not UTF-8') from None
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise DataError(f'not JSON ({error})') from None
    if not isinstance(values, dict):
        raise DataError('not a JSON object')
    for name in FIELDS:
        if name not in values:
            raise DataError(f'no field {name!r}')
        value = values[name]
        if not isinstance(value, str):
            raise DataError(f'{name} is {_quote(json.dumps(value))}, not a text')
        if not value.strip():
            raise DataError(f'{name} is empty')
        # JSON can encode half of a surrogate pair, but files and tokenizers cannot represent it.
        if any('\ud800' <= character <= '\udfff' for character in value):
            raise DataError(f'{name} holds half of a surrogate pair')
    split = values.get('split')
    if split not in (None, *SPLITS):
        raise DataError(f"split is {_quote(json.dumps(split))}, neither 'train' nor 'test'")
    return {
        'image': values['image'],
        'prompt': values['prompt'].strip(),
        'answer': values['answer'].strip(),
        'split': split or '',
    }


def _image_problem(folder: Path, name: str) -> str:
    """Return why an image cannot be used, or ''; its pixels are not decoded."""
    try:
        # Links are resolved too: an untrusted data set must not give a model access to files outside its folder.
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            return 'leads outside the folder'
        with images.open_image(folder / name):
            return ''
    except FileNotFoundError:
        return 'does not exist'
    except (DataError, OSError, ValueError, RuntimeError) as error:  # a null byte or a loop of links in the path
        return f'cannot be read: {getattr(error, "strerror", None) or error}'


def _quote(text: str) -> str:
    """Shorten and escape a text from the file, so that it fits into a one-line message."""
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + '...'


def _split_by_hash(image: str) -> str:
    """Choose the split of an image by a hash of its path, so that adding or reordering lines does not change it."""
    digest = hashlib.sha256(image.encode()).digest()
    is_test = int.from_bytes(digest[:8]) < TEST_SHARE * 2**64
    return 'test' if is_test else 'train'


def kind_of(answer: str) -> str:
    """Return the kind of an answer, by the answer types of VQA (arXiv 1505.00468).

    Args:
      answer: any text.

    >>> kind_of('Yes'), kind_of('12'), kind_of('a cat')
    ('yes/no', 'number', 'other')
    """
    if answer.lower() in ('yes', 'no'):
        return 'yes/no'
    return 'number' if answer.isdigit() else 'other'


def load(path: str | Path, misfit: Callable[[str, str], str] = lambda prompt, answer: '') -> Dataset:
    """Return the folder as a data set, and print a summary of skipped lines to stderr.

    Args:
      path: the folder.
      misfit: see `read_folder`.

    Raises:
      DataError: see `read_folder`; also if one of the two splits is empty.
    """
    folder = read_folder(path, misfit=misfit)
    print(folder.summary(), file=sys.stderr)

    def split(name: str) -> Split:
        source = folder.as_data_source(name)
        return Split(
            source,
            lambda: [(record.prompt, record.answer) for record in source.records],
            lambda: _read_image_names(source),
            lambda index: f'{source.folder}/data.jsonl, line {source.records[index].line}',
        )

    return Dataset(split('train'), split('test'), KINDS, kind_of)


def _read_image_names(source: Source) -> list[str]:
    """Return the path of each record's image, with what changes if the image is replaced by another of its name."""
    # Each image once, although it may have several records.
    names = dict.fromkeys(record.image for record in source.records)
    with ThreadPoolExecutor(8) as pool:  # waits for the disk, not for the processor
        prints = dict(zip(names, pool.map(lambda name: images.fingerprint(source.folder / name), names), strict=True))
    return [f'{record.image}, {prints[record.image]}' for record in source.records]
