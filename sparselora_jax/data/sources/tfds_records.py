"""Data sets that tensorflow-datasets has prepared, read without TensorFlow: `coco_captions`, builders of big_vision.

Name the folder of a version, such as `coco_captions/2014/1.1.0`, or a folder above it that holds no other. The records
must be array_record files: prepare them with `file_format='array_record'`.

Fields tell what a data set holds: `image` with `captions` (texts, or a list of `text`), or with a question
(`question_text` or `question`) and its answers (`answers`, `top_answer` or `answer`). Of several captions or answers of
an image, each record has one, chosen by a hash of its number.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from sparselora_jax.data import images
from sparselora_jax.data.parts import find_part
from sparselora_jax.data.sources.place import Place
from sparselora_jax.data.sources.source import SourceRecord
from sparselora_jax.runtime.errors import DataError

FEATURES = 'features.json'
TRAINING = ('train', 'restval')  # splits for training, where a data set has them
QUESTIONS = ('question_text', 'question')
ANSWERS = ('top_answer', 'answers', 'answer')
CAPTIONS = ('captions', 'caption')
MOST_LEVELS = 3  # folders between the named one and that of the version


@dataclass(frozen=True)
class StoredBytes:
    """An image whose bytes are in a record; see `pictures.StoredImage`.

    Attributes:
      data: the bytes of the image file.
      name: where it is, for messages.
    """

    data: bytes
    name: str

    def read(self) -> UInt8[np.ndarray, 'height width 3']:
        """Read the image as RGB.

        Raises:
          DataError: it is damaged.
        """
        return images.decode_image(self.data, self.name, is_benchmark=True)

    def check(self) -> None:
        """Check that the bytes can be opened as an image.

        Raises:
          DataError: they cannot.
        """
        images.check_bytes(self.data, self.name)

    def fingerprint(self) -> str:
        """Return a hash of the bytes."""
        return hashlib.sha256(self.data).hexdigest()


class TfdsRecords:
    """The records of the training splits of a prepared data set; see `source.OpenedSource`."""

    def __init__(self, folder: Path, builder: tfds.core.DatasetBuilder):
        """Open the records.

        Args:
          folder: the folder of the version.
          builder: reads it.

        Raises:
          DataError: there are no splits for training, other fields, or files that need TensorFlow.
        """
        self.folder = folder
        self.notes = ()
        # Sorted, because TFDS gives them in another order in each process.
        fields = sorted(builder.info.features)
        self._question = _first(QUESTIONS, fields)
        self._answer = _first(ANSWERS if self._question else CAPTIONS, fields)
        if 'image' not in fields or not self._answer:
            raise DataError(f'{folder}: the fields are {", ".join(fields)}; expected image, and captions or a question')
        self._splits = [split for split in TRAINING if split in builder.info.splits]
        if not self._splits:
            raise DataError(f'{folder}: the splits are {", ".join(builder.info.splits)}; expected {TRAINING[0]}')
        decoders = {'image': tfds.decode.SkipDecoding()}
        try:
            self._sources = [builder.as_data_source(split, decoders=decoders) for split in self._splits]
        # TFDS raises NotImplementedError for files of TensorFlow, and others for missing files.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{folder}: cannot be read without TensorFlow ({reason}); prepare it with file_format='array_record'"
            ) from None
        self._ends = np.cumsum([len(source) for source in self._sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> SourceRecord:
        split, place = find_part(self._ends, index)
        name = self.name_record(index)
        try:
            record = self._sources[split][place]
        # Readers of array_record raise errors of several classes for damaged files.
        except Exception as error:
            raise DataError(f'{name}: {(str(error).splitlines() or [type(error).__name__])[0]}') from None
        texts = _texts(record[self._answer], f'{name}: {self._answer}')
        answer = texts[_hash(name) % len(texts)]
        question = _texts(record[self._question], f'{name}: {self._question}')[0] if self._question else None
        return SourceRecord(StoredBytes(bytes(record['image']), name), answer, question)

    def image_name(self, index: int) -> str:
        """Return the split and the number of a record.

        Args:
          index: which record.
        """
        # Names of images would have to be read with the images.
        split, place = find_part(self._ends, index)
        return f'{self._splits[split]} {place}'

    def name_record(self, index: int) -> str:
        """Return the folder, the split and the number of a record.

        Args:
          index: which record.
        """
        return f'{self.folder}, {self.image_name(index)}'


def _first(names: Sequence[str], fields: Sequence[str]) -> str:
    return next((name for name in names if name in fields), '')


def _texts(value: Any, name: str) -> list[str]:
    """Return the texts of a field: one text, a list of them, or a list of objects with a field `text`.

    Raises:
      DataError: there is none.
    """
    if isinstance(value, Mapping):
        if 'text' not in value:
            raise DataError(f'{name} has the fields {", ".join(value)}; expected text')
        value = value['text']
    values = [value] if isinstance(value, bytes | str) else list(value)
    if not values:
        raise DataError(f'{name} is empty')
    return [text.decode(errors='replace') if isinstance(text, bytes) else str(text) for text in values]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


class TfdsFormat:
    """Opens prepared data sets; see `source.SourceFormat`."""

    title = 'a data set that tensorflow-datasets has prepared as array_record files'
    takes_images = False

    def open(self, place: Place) -> TfdsRecords | None:
        """Return the records; None if there is no prepared data set.

        Args:
          place: the folder of a version, or a folder above it.

        Raises:
          DataError: several versions could be meant, or the data set cannot be read.
        """
        if not place.path.is_dir():
            return None
        folders = []
        for level in range(MOST_LEVELS + 1):
            folders += sorted(path.parent for path in place.path.glob('*/' * level + FEATURES))
        if not folders:
            return None
        if len(folders) > 1:
            names = ', '.join(str(folder) for folder in folders[:4])
            raise DataError(f'{place.path}: {len(folders)} data sets could be meant: {names}; name one of them')
        try:
            builder = tfds.builder_from_directory(str(folders[0]))
        # Damaged descriptions raise errors of any class.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f'{folders[0]}: tensorflow-datasets does not read it ({reason})') from None
        return TfdsRecords(folders[0], builder)
