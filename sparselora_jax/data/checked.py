"""Load a data set by a loader that may be anybody's code, and check each record and text when it is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparselora_jax.data.dataset import DataRequest, Dataset, Loader, Records, Split
from sparselora_jax.runtime.errors import DataError, calling

_IMAGE = 'expected uint8 of shape [height, width, 3]: levels from 0 to 255'


def load_dataset(loader: Loader, request: DataRequest) -> Dataset:
    """Return the data set of a loader, whose records and texts are checked when they are read.

    Args:
      loader: the loader.
      request: what it needs to know.

    Raises:
      DataError: it fails, or does not return a data set.
    """
    part = f'data set {request.data}'
    with calling(part, DataError):
        dataset = loader(request)
    if not isinstance(dataset, Dataset):
        raise DataError(f'{part}: its loader returned a {type(dataset).__name__}, expected a data.dataset.Dataset')
    for name in ('train', 'test'):
        split = getattr(dataset, name)
        if not isinstance(split, Split):
            raise DataError(f'{part}: {name} is a {type(split).__name__}, expected a data.dataset.Split')
        if not isinstance(split.source, Records):
            raise DataError(f'{part}: the source of {name} is a {type(split.source).__name__}, which lacks __len__')
    if not isinstance(dataset.kinds, tuple | list):
        raise DataError(f'{part}: kinds is {dataset.kinds!r}, expected a tuple of texts')
    train = _checked_split(f'{part}, train', dataset.train)
    test = _checked_split(f'{part}, test', dataset.test)
    return Dataset(train, test, tuple(dataset.kinds), _checked_kind_of(part, dataset))


def _checked_split(place: str, split: Split) -> Split:
    read_image_names = None
    if split.read_image_names is not None:
        read_image_names = _checked_reader(place, 'read_image_names', split.read_image_names, split.source, _is_text)
    return Split(
        CheckedRecords(place, split),
        _checked_reader(place, 'read_texts', split.read_texts, split.source, _is_pair),
        read_image_names,
        split.name_record,
        _checked_draw(place, split),
    )


def _checked_draw(place: str, split: Split) -> Callable[[int, np.random.Generator], tuple[str, str]] | None:
    """Return `split.draw_texts`, whose results are checked."""
    draw_texts = split.draw_texts
    if draw_texts is None:
        return None

    def draw_checked(index, rng):
        of_record = f'{place}, {split.name_record(index)}'
        with calling(of_record, DataError):
            texts = draw_texts(index, rng)
        if not _is_pair(texts):
            raise DataError(f'{of_record}: draw_texts returned {texts!r}, expected (question, answer)')
        question, answer = texts
        return question, answer

    return draw_checked


@dataclass(frozen=True)
class CheckedRecords:
    """The records of a split; each is checked when it is read.

    Attributes:
      place: name of the data set and the split, for messages.
      split: the split.
    """

    place: str
    split: Split

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.split.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Read one record.

        Raises:
          DataError: it cannot be read, lacks a field, or its image is neither None nor uint8 [height, width, 3].
        """
        place = f'{self.place}, {self.split.name_record(index)}'
        with calling(place, DataError):
            record = self.split.source[index]
        if not isinstance(record, Mapping):
            raise DataError(f'{place} is a {type(record).__name__}, expected a dict of image, question and answer')
        missing = [name for name in ('image', 'question', 'answer') if name not in record]
        if missing:
            raise DataError(f'{place} has no {", ".join(missing)}')
        for name in ('question', 'answer'):
            if not isinstance(record[name], str):
                raise DataError(f'{place}: {name} is {record[name]!r}, expected a text')
        image = record['image']
        # A text without an image.
        if image is None:
            return record
        if not isinstance(image, np.ndarray):
            raise DataError(f'{place}: image is a {type(image).__name__}, expected a NumPy array')
        # Floats from 0 to 1 would be read as levels, and the model would train on black images.
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise DataError(f'{place}: image is {image.dtype} of shape {list(image.shape)}, {_IMAGE}')
        return record


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_text, value))


def _checked_reader(
    place: str, name: str, read: Callable[[], list], source: Records, is_right: Callable[[object], bool]
) -> Callable[[], list]:
    """Return a function that reads one value for each record, as `read` does, and checks number and form."""

    def read_checked():
        with calling(f'{place}: {name}', DataError):
            values = list(read())
        if len(values) != len(source):
            raise DataError(f'{place}: {name} returned {len(values)} values for {len(source)} records')
        wrong = next((value for value in values if not is_right(value)), None)
        if wrong is not None:
            expected = 'a text' if is_right is _is_text else '(question, answer)'
            raise DataError(f'{place}: {name} returned {wrong!r}, expected {expected} of each record')
        return values

    return read_checked


def _checked_kind_of(part: str, dataset: Dataset) -> Callable[[str], str]:
    """Return `dataset.kind_of`, whose results are checked."""

    def kind_of(answer):
        with calling(f'{part}: kind_of', DataError):
            kind = dataset.kind_of(answer)
        if kind not in dataset.kinds and (dataset.kinds or not isinstance(kind, str)):
            names = ', '.join(map(str, dataset.kinds)) or 'a text'
            raise DataError(f'{part}: kind_of({answer!r}) is {kind!r}, expected {names}')
        return kind

    return kind_of
