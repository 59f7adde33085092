"""easy-VQA (github.com/vzhou842/easy-VQA, MIT): a tensorflow-datasets builder over the files of its Python package.

5,000 images of 64x64 pixels, each one shape of one colour; 38,575 questions to train on and 9,673 to test. No
TensorFlow: the records are array_record files, read through `builder.as_data_source(split)`.
"""

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sparselora_jax.data.dataset import Dataset, Split

COLOURS = ('black', 'gray', 'red', 'green', 'blue', 'yellow', 'teal', 'brown')
SHAPES = ('rectangle', 'circle', 'triangle')
KINDS = ('yes/no', 'shape', 'colour')


class EasyVqa(tfds.core.GeneratorBasedBuilder):
    """One example a question, in the package's order of images."""

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
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        spec = importlib.util.find_spec('easy_vqa')
        if spec is None:
            raise FileNotFoundError('the package easy-vqa is not installed; run: pip install easy-vqa')
        (folder,) = spec.submodule_search_locations
        return {split: self._generate_examples(Path(folder) / 'data' / split) for split in ('train', 'test')}

    def _generate_examples(self, folder: Path):
        for index, (question, answer, image_id) in enumerate(json.loads((folder / 'questions.json').read_text())):
            image = (folder / 'images' / f'{image_id}.png').read_bytes()
            yield index, {'image': image, 'image_id': image_id, 'question': question, 'answer': answer}


def prepare(data_dir: str | Path) -> tfds.core.DatasetBuilder:
    """The builder, its records written under `data_dir` unless they are there (5 seconds)."""
    builder = EasyVqa(data_dir=str(data_dir), file_format='array_record')
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for a script's result
        builder.download_and_prepare()
    return builder


class _Records:
    """The builder's records with text as text."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        record = self.source[index]
        return record | {name: record[name].decode() for name in ('question', 'answer')}


def read_texts(builder: Any, split: str) -> list[tuple[str, str, int]]:
    """(question, answer, image_id) of every record, images not decoded."""
    from tensorflow_datasets import decode

    source = builder.as_data_source(split, decoders={'image': decode.SkipDecoding()})
    records = source.__getitems__(range(len(source)))  # at once: one by one takes three times as long
    return [(r['question'].decode(), r['answer'].decode(), int(r['image_id'])) for r in records]


def load(data_dir: str | Path) -> Dataset:
    """The data set, its records written under `data_dir` unless they are there."""
    builder = prepare(data_dir)

    def split(name: str) -> Split:
        texts = functools.cache(lambda: [text[:2] for text in read_texts(builder, name)])
        return Split(_Records(builder.as_data_source(name)), texts)

    return Dataset(split('train'), split('test'), KINDS, kind_of)


def kind_of(answer: str) -> str:
    """The kind of an answer, one of `KINDS`.

    >>> kind_of('no'), kind_of('circle'), kind_of('teal')
    ('yes/no', 'shape', 'colour')
    """
    return 'yes/no' if answer in ('yes', 'no') else 'shape' if answer in SHAPES else 'colour'


def image_facts(questions: Iterable[tuple[str, str, int]]) -> dict[int, tuple[int, int]]:
    """What the questions and answers say about each image: {image_id: (colour index, shape index)}, -1 where untold.

    >>> image_facts([('what color is the circle?', 'teal', 7), ('is there not a red shape?', 'no', 8)])
    {7: (6, 1), 8: (2, -1)}
    """
    facts: dict[int, list[int]] = {}
    for question, answer, image_id in questions:
        words = question.strip('?').split()
        said = facts.setdefault(image_id, [-1, -1])
        denies = (answer == 'no') != ('not' in words or 'no' in words)
        told = [answer] if kind_of(answer) == 'yes/no' and denies else [*words, answer]
        for word in told:
            if word in COLOURS:
                said[0] = COLOURS.index(word)
            elif word in SHAPES:
                said[1] = SHAPES.index(word)
    return {image_id: (colour, shape) for image_id, (colour, shape) in facts.items()}
