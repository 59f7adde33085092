"""Parquet files of Hugging Face data sets whose rows hold an image: captions, conversations, questions with answers.

The columns tell what a row holds, besides `image` (bytes, or a struct of bytes and path):

- `conversations`: the turns of LLaVA, see `conversations.py`
- one of `CAPTIONS`: a caption, or several, each of which is a record
- `question` and one of `ANSWERS`: of several answers, the one that most people gave

Where there is a column `split`, the rows for training are read. Texts are read when a source is opened, and images one
by one by `benchmarks.parquet_pictures`. An image costs the images before it in its row group: published files have
groups of 100 rows.
"""

import functools
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparselora_jax.data import images
from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.parquet import check_shards, column_names, read_rows, split_of
from sparselora_jax.data.benchmarks.parquet_forms import COCO, IMAGE, Row
from sparselora_jax.data.benchmarks.parquet_pictures import (
    ParquetPicture,
    damage_named,
    holds_bytes,
    list_pictures,
    open_file,
    read_paths,
    rows_without_image,
)
from sparselora_jax.data.parts import find_part
from sparselora_jax.data.sources.columns import TextColumn
from sparselora_jax.data.sources.conversations import turns_of
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import SourceRecord
from sparselora_jax.runtime.errors import DataError

SUFFIX = '.parquet'
CONVERSATIONS = 'conversations'
CAPTIONS = ('caption', 'captions', 'sentences', 'text', 'annotations_captions')
QUESTION = 'question'
ANSWERS = ('multiple_choice_answer', 'answer', 'answers')
# Columns with the name of the image, which rows about one image share; next come the path in the struct, and ids.
FILE_NAMES = ('file_name', 'filename')
IDS = ('cocoid', 'image_id')
SPLIT = 'split'
TRAINING = ('train', 'restval')
SHOWN = 4  # files or columns that a message names

# Beginnings of the names of files that belong to one split.
_SPLIT_NAME = re.compile(r'(?:train(?:ing|val)?|val(?:idation)?|test(?:dev)?|dev|challenge|submission)(?![a-z])', re.I)

# Texts of one row: (question, answer); the question of a caption is None.
Texts = tuple[str | None, str]


@dataclass(frozen=True)
class RowForm:
    """The columns of texts of a file, and what they mean.

    Attributes:
      columns: the columns of texts.
      texts: returns the texts of a row.
      has_splits: whether a column names the split of each row.
      needs_image: whether rows without an image are left out. They are texts otherwise.
    """

    columns: tuple[str, ...]
    texts: Callable[[Row], list[Texts]]
    has_splits: bool
    needs_image: bool = True


class ParquetImage(ParquetPicture):
    """An image in a row of a parquet file; see `pictures.StoredImage`."""

    def check(self) -> None:
        """Check that the bytes can be opened as an image.

        Raises:
          DataError: they cannot.
        """
        images.check_bytes(self.read_bytes(), self.name)

    def fingerprint(self) -> str:
        """Return a text that changes with the file, and is another one for each row.

        A hash of the bytes would cost a second pass over files of gigabytes. The footer has the place and the size of
        each column in each row group.
        """
        status = self.path.stat()
        return f'{_fingerprint(self.path, status.st_size, status.st_mtime_ns)}, row group {self.group}, row {self.row}'


# Cached, because the images of one file ask one after the other. Size and time tell a file that was replaced.
@functools.lru_cache(maxsize=1)
def _fingerprint(path: Path, size: int, modified: int) -> str:
    with damage_named(str(path)):
        footer = str(open_file(path).metadata.to_dict())
        return hashlib.sha256(f'{footer}{images.fingerprint(path)}'.encode()).hexdigest()


class ParquetRows:
    """The rows of a set of parquet files; see `source.OpenedSource`."""

    def __init__(self, paths: Sequence[Path], form: RowForm):
        """Read the texts of the rows.

        Args:
          paths: the files, in order.
          form: their form.

        Raises:
          DataError: a file is damaged or lacks columns, a row is unusable, or there is no record.
        """
        for path in paths:
            _check_columns(path, form)
        self.paths = paths
        self._pictures = list_pictures(paths, IMAGE)
        self._ends: list[int] = []  # number of rows up to the end of each file
        self._questions = TextColumn()
        self._answers = TextColumn()
        self._is_caption = array('b')
        self._rows = array('q')  # row of each record, in all files together
        self._names = TextColumn()  # name of the image of each row; '': there is none
        without_image = 0
        for path in paths:
            first = self._ends[-1] if self._ends else 0
            # As a set of numbers: there are few or none.
            empty = frozenset(rows_without_image(path, IMAGE).tolist())
            for number, (row, name) in enumerate(zip(_rows_of(path, form), _image_names(path), strict=True)):
                self._names.append('' if number in empty else name)
                if row.get(SPLIT, TRAINING[0]) not in TRAINING:
                    continue
                if number in empty and form.needs_image:
                    without_image += 1
                    continue
                self._add(path, number, first + number, row, form)
            self._ends.append(len(self._names))
        if not len(self):
            raise DataError(f'{paths[0]}: no row with an image and a text, for training')
        self.notes = (f'{without_image:,} rows without an image are left out',) if without_image else ()

    def _add(self, path: Path, number: int, index: int, row: Row, form: RowForm) -> None:
        """Add the records of a row.

        Raises:
          DataError: it is unusable.
        """
        try:
            for question, answer in form.texts(row):
                self._answers.append(answer)
                self._questions.append(question or '')
                self._is_caption.append(question is None)
                self._rows.append(index)
        except DataError as error:
            raise DataError(f'{path}, row {number}: {error}') from None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> SourceRecord:
        row = self._rows[index]
        image = None
        if self._names[row]:
            picture = self._pictures[row]
            image = ParquetImage(picture.path, picture.group, picture.row, picture.column)
        question = None if self._is_caption[index] else self._questions[index]
        return SourceRecord(image, self._answers[index], question)

    def image_name(self, index: int) -> str:
        """Return the name of an image as the file has it, or its file and row.

        Args:
          index: which record.
        """
        return self._names[self._rows[index]]

    def name_record(self, index: int) -> str:
        """Return the file and the row of a record.

        Args:
          index: which record.
        """
        file, row = find_part(self._ends, self._rows[index])
        return f'{self.paths[file]}, row {row}'


def _check_columns(path: Path, form: RowForm) -> None:
    """Check that a file has the columns of its set: the form was found in the first file alone.

    Raises:
      DataError: the file is damaged, lacks a column, or has no bytes of images.
    """
    known = column_names(path)
    missing = [column for column in (IMAGE, *form.columns) if column not in known]
    if missing:
        raise DataError(f'{path}: no column {", ".join(missing)}; its columns are {", ".join(known[:SHOWN])}')
    with damage_named(str(path)):
        kind = open_file(path).schema_arrow.field(IMAGE).type
    if not holds_bytes(kind):
        raise DataError(f'{path}: the column {IMAGE!r} holds {kind}, expected the bytes of images')


def _rows_of(path: Path, form: RowForm) -> Iterator[Row]:
    """Yield the texts of the rows of a file.

    Raises:
      DataError: the file is damaged.
    """
    return read_rows(path, (*form.columns, SPLIT))


def _image_names(path: Path) -> Iterator[str]:
    """Yield a name of the image of each row of a file, which rows about the same image share."""
    known = column_names(path)
    for column in FILE_NAMES:
        if column in known:
            for number, row in enumerate(read_rows(path, [column])):
                yield str(row[column] or _row_name(path, number))
            return
    paths = list(read_paths(path, IMAGE))
    known_paths = [name for name in paths if name]
    # A path that all rows have names nothing.
    if len(set(known_paths)) > 1 or len(known_paths) == 1:
        for number, name in enumerate(paths):
            yield name or _row_name(path, number)
        return
    for column in IDS:
        if column in known:
            for number, row in enumerate(read_rows(path, [column])):
                value = row[column]
                # As the name of its file, by which other data sets know an image of COCO.
                name = f'{value:012d}.jpg' if column == IDS[0] and isinstance(value, int) else str(value)
                yield _row_name(path, number) if value is None else name
            return
    yield from (_row_name(path, number) for number in range(len(paths)))


def _row_name(path: Path, number: int) -> str:
    return f'{path.name}, row {number}'


def _conversation(row: Row) -> list[Texts]:
    return list(turns_of(row))


def _captions(column: str, row: Row) -> list[Texts]:
    value = row[column]
    values = value if isinstance(value, list) else [value]
    # Some data sets have the words of each caption beside it.
    texts = [text['raw'] if isinstance(text, dict) and 'raw' in text else text for text in values if text is not None]
    return [(None, text) for text in records.all_texts(texts, column)]


def _answer(column: str, row: Row) -> list[Texts]:
    value = row[column]
    # A test split has no answers.
    if value is None or value == []:
        return []
    answers = records.all_texts(value if isinstance(value, list) else [value], column)
    ((most_common, _),) = Counter(answers).most_common(1)
    return [(records.text(row, QUESTION), most_common)]


def recognise(path: Path) -> RowForm | None:
    """Return the form of a file; None if its columns are others. Only the footer is read.

    Args:
      path: the file.

    Raises:
      DataError: the file is damaged, or not a parquet file.
    """
    with damage_named(str(path)):
        schema = open_file(path).schema_arrow
        names = schema.names
        if IMAGE not in names or not holds_bytes(schema.field(IMAGE).type):
            return None
    has_splits = SPLIT in names
    if CONVERSATIONS in names:
        return RowForm((CONVERSATIONS,), _conversation, has_splits, needs_image=False)
    # Its column `question` repeats one prompt in every row.
    captions = ('answer',) if COCO.columns <= set(names) else CAPTIONS
    for column in captions:
        if column in names:
            return RowForm((column,), functools.partial(_captions, column), has_splits)
    for column in ANSWERS:
        if column in names and QUESTION in names:
            return RowForm((QUESTION, column), functools.partial(_answer, column), has_splits)
    return None


def unknown_columns(path: Path) -> DataError:
    """Return the error about a file that has none of the forms.

    Args:
      path: the file.

    Raises:
      DataError: the file is damaged, or not a parquet file.
    """
    expected = f'{IMAGE} with bytes, and {CONVERSATIONS}, one of {", ".join(CAPTIONS)}, or {QUESTION} and an answer'
    names = ', '.join(column_names(path)[:12])
    return DataError(f'{path}: the columns are {names[:200] or "none"}; expected {expected}')


class ParquetFormat:
    """Opens parquet files; see `source.SourceFormat`."""

    title = 'parquet files with images and captions, conversations, or questions and answers'
    takes_images = False

    def open(self, place: Place) -> ParquetRows | None:
        """Return the rows; None if there are no parquet files of these forms.

        Args:
          place: a parquet file, or a folder with the files of a split for training.

        Raises:
          DataError: a file is damaged or incomplete, a file that is named has other columns, or several sets of files
            could be meant.
        """
        if place.path.is_file():
            if place.path.suffix.lower() != SUFFIX:
                return None
            form = recognise(place.path)
            if form is None:
                raise unknown_columns(place.path)
            return ParquetRows([place.path], form)
        sets: dict[tuple[Path, str], list[Path]] = {}
        for path in place.tree.data_files:
            if path.suffix.lower() == SUFFIX:
                sets.setdefault((path.parent, _set_name(path)), []).append(path)
        forms = {key: form for key, paths in sets.items() if (form := recognise(paths[0])) is not None}
        if not forms:
            return None
        chosen = _only_for_training(place.path, forms)
        check_shards(sets[chosen])
        return ParquetRows(sets[chosen], forms[chosen])


def _set_name(path: Path) -> str:
    """Return the split of a file; '' if its name is not that of a split.

    Files that users have named, such as `part_3.parquet`, are one set with all others of their folder.
    """
    split = split_of(path)
    return split if _SPLIT_NAME.match(split) else ''


def _only_for_training(root: Path, forms: Mapping[tuple[Path, str], RowForm]) -> tuple[Path, str]:
    """Return the folder and the split of the files for training.

    Raises:
      DataError: there are none, or there are several sets.
    """
    named = [key for key in forms if key[1].lower().startswith(TRAINING[0])]
    # Files with a column `split` hold all splits, whatever their name. Names that say nothing come last.
    training = named or [key for key, form in forms.items() if form.has_splits] or [key for key in forms if not key[1]]
    if len(training) == 1:
        return training[0]
    names = ', '.join(f'{folder / split}*' for folder, split in (training or list(forms))[:SHOWN])
    if training:
        raise DataError(f'{root}: {len(training)} sets of files could be meant: {names}; name one of their folders')
    raise DataError(f'{root}: no files for training, only {names}; name a file if it is meant')
