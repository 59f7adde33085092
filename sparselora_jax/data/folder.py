"""A folder of images with a `data.jsonl`: one JSON object a line, each an image, a prompt and the answer to it.

    cats/1.png
    cats/2.jpg
    data.jsonl:
      {"image": "cats/1.png", "prompt": "What colour is the cat?", "answer": "teal"}
      {"image": "cats/1.png", "prompt": "Is it asleep?", "answer": "yes"}
      {"image": "cats/2.jpg", "prompt": "A picture of", "answer": "a cat on a mat", "split": "test"}

  image   a file of any format that Pillow reads; its path is relative to the folder and stays inside it
  prompt  what is asked, or how a caption begins; a recipe's template (`text.prompt`) is put around it
  answer  what the model is to say
  split   'train' or 'test'; left out, all lines of an image go to the same one, chosen by a hash of its path

Other fields and blank lines are passed over. A line that cannot be used is left out, counted and named by its number.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from PIL import Image

from sparselora_jax.data import pipeline
from sparselora_jax.data.dataset import Dataset, Split
from sparselora_jax.runtime.errors import DataError

FIELDS = ('image', 'prompt', 'answer')
SPLITS = ('train', 'test')


@dataclass(frozen=True)
class Record:
    """A line that can be used; `image` is as it is written there, the texts have no space around."""

    line: int
    image: str
    prompt: str
    answer: str
    split: str


@dataclass(frozen=True)
class Problem:
    """A line that was left out, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Source:
    """Random access: `source[i]` is {'image': uint8 RGB [height, width, 3], 'question': str, 'answer': str}."""

    folder: Path
    records: tuple[Record, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Reads the image; raises `DataError` where its pixels are broken."""
        record = self.records[index]
        try:
            pixels = pipeline.read_image(self.folder / record.image)
        except DataError as error:
            raise DataError(f'{self.folder}/data.jsonl, line {record.line}: {error}') from error
        return {'image': pixels, 'question': record.prompt, 'answer': record.answer}


@dataclass(frozen=True)
class Folder:
    """What `read_folder` found, in the order of its lines."""

    path: Path
    records: tuple[Record, ...]
    problems: tuple[Problem, ...]

    def summary(self, shown: int = 5) -> str:
        """E.g. '1,204 examples; 3 left out: line 7: image cats/1.png does not exist; ...', all on one line."""
        count = len(self.records)
        text = f'{count:,} example{"s" * (count != 1)}'
        if not self.problems:
            return text
        named = [f'line {problem.line}: {problem.reason}' for problem in self.problems[:shown]]
        rest = len(self.problems) - len(named)
        return f'{text}; {len(self.problems):,} left out: ' + '; '.join(named + [f'and {rest:,} more'] * (rest > 0))

    def as_data_source(self, split: str) -> Source:
        """The records of a split, 'train' or 'test'.

        Raises:
          DataError: there are none.
        """
        records = tuple(record for record in self.records if record.split == split)
        if not records:
            raise DataError(f'{self.path}: no example of split {split!r}; mark some lines with "split": "{split}"')
        return Source(self.path, records)

    def texts(self, split: str) -> list[tuple[str, str, str]]:
        """(prompt, answer, image path) of a split's records, images not read."""
        return [(r.prompt, r.answer, r.image) for r in self.as_data_source(split).records]


def read_folder(
    path: str | Path,
    *,
    test_share: float = 0.1,
    tolerance: float = 0.5,
    misfit: Callable[[str, str], str] = lambda prompt, answer: '',
) -> Folder:
    """Reads and checks `data.jsonl`; of the images, only that they are there and begin as images do.

    Args:
      test_share: of the images whose lines name no split.
      tolerance: the share of lines that may be left out.
      misfit: (prompt, answer) -> why a model cannot take them, '' if it can.

    Raises:
      DataError: no such folder or file, no line in it that can be used, or too many that cannot.
    """
    path, file = Path(path), Path(path) / 'data.jsonl'
    if not file.is_file():
        what = 'no data.jsonl in this folder' if path.is_dir() else 'no such folder'
        raise DataError(f'{path}: {what}; see sparselora_jax/data/folder.py for what it holds')
    records, problems, seen, images = [], [], {}, {}
    splits: dict[str, str] = {}  # of images, as some line of theirs says
    for number, line in enumerate(file.read_bytes().removeprefix(b'\xef\xbb\xbf').split(b'\n'), start=1):
        if not line.strip():
            continue
        try:
            fields = _fields(line)
            content = tuple(fields[name] for name in FIELDS)
            if content in seen:
                raise DataError(f'the same as line {seen[content]}')
            name = fields['image']
            if name not in images:  # an image has several questions: opened once
                images[name] = _image_problem(path, name)
            if images[name]:
                raise DataError(f'image {_short(name)} {images[name]}')
            if reason := misfit(fields['prompt'], fields['answer']):
                raise DataError(reason)
        except DataError as error:
            problems.append(Problem(number, str(error)))
            continue
        seen[content] = number
        if fields['split']:
            splits.setdefault(name, fields['split'])
        records.append((number, fields))

    def split_of(fields):
        name = fields['image']
        return fields['split'] or splits.get(name) or _hashed(name, test_share)

    found = tuple(Record(number, *(f[name] for name in FIELDS), split_of(f)) for number, f in records)
    folder = Folder(path, found, tuple(problems))
    if not found:
        reason = folder.summary() if problems else 'it is empty'
        raise DataError(f'{file}: no line that can be used: {reason}')
    if len(problems) > tolerance * (len(found) + len(problems)):
        raise DataError(f'{file}: more than {tolerance:.0%} of the lines cannot be used: {folder.summary()}')
    return folder


def _fields(line: bytes) -> dict[str, str]:
    """A line's fields, `split` '' where it names none; raises `DataError` with what is wrong."""
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError:
        raise DataError('not UTF-8') from None
    except (ValueError, RecursionError) as error:
        raise DataError(f'not JSON ({error})') from None
    if not isinstance(found, dict):
        raise DataError('not a JSON object')
    for name in FIELDS:
        if name not in found:
            raise DataError(f'no field {name!r}')
        if not isinstance(found[name], str):
            raise DataError(f'{name} is {_short(json.dumps(found[name]))}, not a text')
        if not found[name].strip():
            raise DataError(f'{name} is empty')
        if any('\ud800' <= character <= '\udfff' for character in found[name]):  # JSON can spell them, no file can
            raise DataError(f'{name} holds half of a surrogate pair')
    split = found.get('split')
    if split not in (None, *SPLITS):
        raise DataError(f"split is {_short(json.dumps(split))}, neither 'train' nor 'test'")
    return {'image': found['image'], 'split': split or ''} | {n: found[n].strip() for n in ('prompt', 'answer')}


def _image_problem(folder: Path, name: str) -> str:
    """Why an image cannot be used; '' if nothing speaks against it. Its pixels are not read."""
    try:
        # Links count as well: a data set from elsewhere must not show a model files that it does not hold.
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            return 'leads outside the folder'
        with Image.open(folder / name):
            return ''
    except FileNotFoundError:
        return 'does not exist'
    except pipeline.UNREADABLE as error:
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = 'no image format that Pillow knows' if unknown else getattr(error, 'strerror', None) or error
        return f'cannot be read: {reason}'


def _short(text: str) -> str:
    """Something of a line's, as part of a message of one line."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 80 else text[:77] + '...'


def _hashed(name: str, test_share: float) -> str:
    digest = hashlib.sha256(name.encode()).digest()
    return SPLITS[int.from_bytes(digest[:8]) < test_share * 2**64]


def kind_of(answer: str) -> str:
    """The kind of an answer, as VQA's evaluation tells them apart.

    >>> kind_of('Yes'), kind_of('12'), kind_of('a cat')
    ('yes/no', 'number', 'other')
    """
    return 'yes/no' if answer.lower() in ('yes', 'no') else 'number' if answer.isdigit() else 'other'


def load(path: str | Path, misfit: Callable[[str, str], str] = lambda prompt, answer: '') -> Dataset:
    """The folder as a data set; says on stderr what was left out; `misfit`: see `read_folder`.

    Raises:
      DataError: see `read_folder`; or one of the two splits is empty.
    """
    found = read_folder(path, misfit=misfit)
    print(found.summary(), file=sys.stderr)

    def split(name: str) -> Split:
        return Split(found.as_data_source(name), lambda: [text[:2] for text in found.texts(name)])

    return Dataset(split('train'), split('test'), ('yes/no', 'number', 'other'), kind_of)
