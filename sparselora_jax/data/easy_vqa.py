"""easy-VQA (github.com/vzhou842/easy-VQA, MIT): a tensorflow-datasets builder over the files of its Python package.

It has 5,000 images of 64x64 pixels, each with one shape of one colour, 38,575 training and 9,673 test questions.
TensorFlow is not needed: the records are array_record files, read through `builder.as_data_source(split)`.
"""

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import tensorflow_datasets as tfds

from sparselora_jax.data.dataset import DataRequest, Dataset, Split
from sparselora_jax.runtime import processes

COLOURS = ('black', 'gray', 'red', 'green', 'blue', 'yellow', 'teal', 'brown')
SHAPES = ('rectangle', 'circle', 'triangle')
KINDS = ('yes/no', 'shape', 'colour')
UNKNOWN = -1  # index of a colour or shape that the questions about an image do not reveal


class EasyVqa(tfds.core.GeneratorBasedBuilder):
    """A tensorflow-datasets builder with one example per question, in the package's order."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            'image': tfds.features.Image(shape=(64, 64, 3), encoding_format='png'),
            'image_id': np.int64,
            'question': tfds.features.Text(),
            'answer': tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(features),
            homepage='https://github.com/vzhou842/easy-VQA',
            # Records stay in the package's order, so an index always means the same question.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        # Only the package's files are read, so it is looked up without importing it.
        spec = importlib.util.find_spec('easy_vqa')
        if spec is None:
            raise FileNotFoundError('the package easy-vqa is not installed; run: pip install easy-vqa')
        (folder,) = spec.submodule_search_locations
        return {split: self._generate_examples(Path(folder) / 'data' / split) for split in ('train', 'test')}

    def _generate_examples(self, folder: Path) -> Iterator[tuple[int, dict]]:
        questions = json.loads((folder / 'questions.json').read_text())
        for index, (question, answer, image_id) in enumerate(questions):
            image = (folder / 'images' / f'{image_id}.png').read_bytes()
            yield index, {'image': image, 'image_id': image_id, 'question': question, 'answer': answer}


def prepare(data_dir: str | Path) -> tfds.core.DatasetBuilder:
    """Write the records under `data_dir` if they are missing (takes 5 seconds), and return their builder.

    Args:
      data_dir: folder that holds prepared data sets.
    """
    builder = EasyVqa(data_dir=str(data_dir), file_format='array_record')
    if Path(builder.data_path).is_dir():
        return builder
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    tfds.disable_progress_bar()
    with filelock.FileLock(Path(data_dir) / 'easy_vqa.lock'):
        # Another run may have written the records while this one waited; a new builder reads what it wrote.
        builder = EasyVqa(data_dir=str(data_dir), file_format='array_record')
        # TFDS prints to stdout, which is reserved for the results of a script.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    return builder


class _DecodedRecords:
    """The builder's records, with text decoded from TFDS's bytes to `str`."""

    def __init__(self, source: Sequence[Mapping[str, Any]]):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        record = self.source[index]
        return record | {name: record[name].decode() for name in ('question', 'answer')}


def read_texts(builder: tfds.core.DatasetBuilder, split: str) -> list[tuple[str, str, int]]:
    """Return (question, answer, image_id) of every record, without decoding images.

    Args:
      builder: the builder that `prepare` returns.
      split: 'train' or 'test'.
    """
    source = builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
    # Read all records in one call: reading one by one takes three times as long.
    records = source.__getitems__(range(len(source)))
    return [(record['question'].decode(), record['answer'].decode(), int(record['image_id'])) for record in records]


def load(data_dir: str | Path) -> Dataset:
    """Return the data set, and write its records under `data_dir` if they are missing.

    Args:
      data_dir: folder that holds prepared data sets.
    """
    builder = prepare(data_dir)

    def split(name: str) -> Split:
        # Cached, because a job reads the texts several times, and each time takes seconds.
        records = functools.cache(lambda: read_texts(builder, name))
        return Split(
            _DecodedRecords(builder.as_data_source(name)),
            lambda: [(question, answer) for question, answer, _ in records()],
            lambda: [str(image_id) for _, _, image_id in records()],
        )

    return Dataset(split('train'), split('test'), KINDS, kind_of)


class EasyVqaLoader:
    """The `Loader` of easy-VQA. All texts are short, so `request.misfit` is not called."""

    kinds = KINDS

    def __call__(self, request: DataRequest) -> Dataset:
        """Load easy-VQA; process 0 prepares the files, and the others wait and then read them.

        Args:
          request: only `data_dir`, the folder of the files, is used.
        """
        return processes.first_then_others(lambda: load(request.data_dir))


def kind_of(answer: str) -> str:
    """Return the kind of an answer, one of `KINDS`.

    Args:
      answer: an answer of easy-VQA.

    >>> kind_of('no'), kind_of('circle'), kind_of('teal')
    ('yes/no', 'shape', 'colour')
    """
    if answer in ('yes', 'no'):
        return 'yes/no'
    return 'shape' if answer in SHAPES else 'colour'


def image_facts(questions: Iterable[tuple[str, str, int]]) -> dict[int, tuple[int, int]]:
    """Return the colour and shape that the questions reveal: {image_id: (colour index, shape index)}.

    Args:
      questions: (question, answer, image_id), as `read_texts` returns them. Unrevealed facts are `UNKNOWN`.

    >>> image_facts([('what color is the circle?', 'teal', 7), ('is there not a red shape?', 'no', 8)])
    {7: (6, 1), 8: (2, -1)}
    """
    facts: dict[int, list[int]] = {}
    for question, answer, image_id in questions:
        words = question.strip('?').split()
        fact = facts.setdefault(image_id, [UNKNOWN, UNKNOWN])
        # "is there a red shape?" - "no" means that the image is not red, and so does "is there no red shape?" -
        # "yes". The words of such a question do not describe the image.
        is_negated = 'not' in words or 'no' in words
        is_denied = (answer == 'no') != is_negated
        true_words = [answer] if kind_of(answer) == 'yes/no' and is_denied else [*words, answer]
        for word in true_words:
            if word in COLOURS:
                fact[0] = COLOURS.index(word)
            elif word in SHAPES:
                fact[1] = SHAPES.index(word)
    return {image_id: (colour, shape) for image_id, (colour, shape) in facts.items()}
