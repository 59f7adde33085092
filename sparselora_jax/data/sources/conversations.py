r"""Conversations of LLaVA (github.com/haotian-liu/LLaVA): a list of rows with turns of a person and of a model.

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat colour is the bus?"}, {"from": "gpt", "value": "It is red."}]}

Each turn of the person with the answer after it is a record; earlier turns are not part of its prompt. A row without
`image` is a text without an image. The mark `<image>` is dropped, because the prompt's template says where an image is.
"""

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparselora_jax.data.benchmarks import records
from sparselora_jax.data.benchmarks.json_stream import Entry, entries, for_each
from sparselora_jax.data.benchmarks.sniff import FileFacts, Head, facts
from sparselora_jax.data.sources.columns import TextColumn
from sparselora_jax.data.sources.pictures import ImageFile, check_missing, find_images
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import SourceRecord
from sparselora_jax.runtime.errors import DataError

KIND = 'conversations'  # see `sniff.FileFacts`
PERSON = 'human'
MODEL = 'gpt'
IMAGE_MARK = '<image>'
NO_IMAGE = -1

_FOLDERS = ('train2017', 'train2014', 'images')


class Conversations:
    """The turns of a file of conversations; see `source.OpenedSource`."""

    def __init__(self, path: Path, place: Place):
        """Read a file, and find its images.

        Args:
          path: the file.
          place: where its images are looked for.

        Raises:
          DataError: the file is broken, or too many images are missing.
        """
        self.path = path
        self._questions = TextColumn()
        self._answers = TextColumn()
        self._rows = array('i')  # row of each turn
        images = array('i')  # image of each turn
        names: dict[str, int] = {}  # name of an image -> its number

        def add(entry: Entry) -> None:
            image = NO_IMAGE
            if records.optional_text(entry.value, 'image'):
                image = names.setdefault(entry.value['image'], len(names))
            for question, answer in turns_of(entry.value):
                self._questions.append(question)
                self._answers.append(answer)
                self._rows.append(entry.index)
                images.append(image)

        for_each(entries(path), path, add)
        self._images = np.array(images, np.int32)
        self._names = list(names)
        self.notes = ()
        is_missing = np.zeros(len(names), bool)
        self._pictures = None
        if names:
            self._pictures = find_images(place.image_trees(), self._names, _FOLDERS)
            self.notes = check_missing(path, self._pictures, place.tolerance)
            is_missing[self._pictures.missing] = True
        # The last entry stands for turns without an image, whose number is -1.
        self._turns = np.flatnonzero(~np.append(is_missing, False)[self._images])
        if not len(self._turns):
            raise DataError(f'{path}: no turn of {PERSON!r} with an answer of {MODEL!r}')

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, index: int) -> SourceRecord:
        turn = int(self._turns[index])
        number = int(self._images[turn])
        image = None if number == NO_IMAGE else ImageFile(self._pictures[number].path)
        return SourceRecord(image, self._answers[turn], self._questions[turn])

    def image_name(self, index: int) -> str:
        """Return the name of an image as the file has it.

        Args:
          index: which record.
        """
        number = self._images[self._turns[index]]
        return '' if number == NO_IMAGE else self._names[number]

    def name_record(self, index: int) -> str:
        """Return the file and the row of a record.

        Args:
          index: which record.
        """
        return f'{self.path}, element [{self._rows[self._turns[index]]}]'


def turns_of(row: object) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a person's turn and the model's answer.

    Args:
      row: a decoded row, with a field `conversations`.

    Raises:
      DataError: the turns have another form.
    """
    question = None
    for turn in records.items(row, 'conversations'):
        speaker = records.text(turn, 'from')
        value = records.text(turn, 'value')
        if speaker == PERSON:
            question = value.replace(IMAGE_MARK, '').strip()
        elif speaker != MODEL:
            raise DataError(f'from is {records.quote(speaker)}, expected {PERSON!r} or {MODEL!r}')
        # Some rows begin with a turn of the model, which answers nothing.
        elif question is not None:
            yield question, value.strip()
            question = None


def recognise(head: Head) -> FileFacts | None:
    """Return the facts of a file of conversations; None for other files.

    Args:
      head: the beginning of the file.
    """
    record = head.records[0] if head.form == 'list' and head.records else None
    if not isinstance(record, dict) or not isinstance(record.get('conversations'), list):
        return None
    # All published files are for training.
    return facts(head.path, KIND, subset='train')
