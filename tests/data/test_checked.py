"""What a loader returns wrongly is named with the split and the record, before a model reads it."""

import dataclasses
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from sparselora_jax.data.checked import load_dataset
from sparselora_jax.data.dataset import DataRequest, Dataset, Split
from sparselora_jax.runtime.errors import DataError

IMAGE = np.full((4, 5, 3), 200, np.uint8)
RECORD = {'image': IMAGE, 'question': 'what?', 'answer': 'red'}
REQUEST = DataRequest('mine:LOADER', Path('not read'))


@pytest.fixture(autouse=True)
def without_the_type_checker(monkeypatch):
    """Users do not run with the type checker of the tests, which would refuse wrong objects first."""
    monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)


def load(result):
    """The data set of a loader that returns `result`, or calls it."""

    class Loader:
        kinds = ('colour',)

        def __call__(self, request):
            return result() if callable(result) else result

    return load_dataset(Loader(), REQUEST)


def split_of(records, texts=None):
    texts = [(record['question'], record['answer']) for record in records] if texts is None else texts
    return Split(records, lambda: texts)


def dataset(train, test=None, kinds=('colour',), kind_of=lambda answer: 'colour'):
    return Dataset(train, train if test is None else test, kinds, kind_of)


def fail():
    return {}['no such key']


@pytest.mark.parametrize(
    ('result', 'message'),
    [
        (None, 'its loader returned a NoneType, expected a data.dataset.Dataset'),
        (fail, "fails: KeyError: 'no such key'"),
        (lambda: Dataset(None, split_of([]), (), str), 'train is a NoneType, expected a data.dataset.Split'),
        (lambda: dataset(split_of([]), test=[]), 'test is a list, expected a data.dataset.Split'),
        (lambda: dataset(split_of([]), kinds='colour'), "kinds is 'colour', expected a tuple"),
        (lambda: dataset(Split(iter([]), list)), 'the source of train is a list_iterator, which lacks __len__'),
    ],
)
def test_what_is_no_data_set_is_named(result, message):
    with pytest.raises(DataError, match=f'data set mine:LOADER:? {message}'):
        load(result)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'image': IMAGE.astype(np.float32) / 255}, r'image is float32 of shape \[4, 5, 3\], expected uint8 of shape'),
        ({'image': IMAGE > 0}, r'image is bool of shape'),
        ({'image': IMAGE[..., 0]}, r'image is uint8 of shape \[4, 5\]'),
        ({'image': IMAGE.transpose(2, 0, 1)}, r'image is uint8 of shape \[3, 4, 5\]'),
        ({'image': IMAGE[:0]}, r'image is uint8 of shape \[0, 5, 3\]'),
        ({'image': 'a.png'}, 'image is a str, expected a NumPy array'),
        ({'question': None}, 'question is None, expected a text'),
        ({'answer': ['red']}, r"answer is \['red'\], expected a text"),
    ],
)
def test_a_record_of_a_wrong_form_is_named(changes, message):
    data = load(dataset(split_of([RECORD]), test=split_of([RECORD, RECORD | changes])))
    assert data.train.source[0] is RECORD
    with pytest.raises(DataError, match=f'data set mine:LOADER, test, record 1: {message}'):
        data.test.source[1]


def test_a_record_that_lacks_fields_or_cannot_be_read_is_named():
    data = load(dataset(split_of([RECORD, {'image': IMAGE}, 'text'], texts=[])))
    with pytest.raises(DataError, match='train, record 1 has no question, answer'):
        data.train.source[1]
    with pytest.raises(DataError, match='train, record 2 is a str, expected a dict'):
        data.train.source[2]
    with pytest.raises(DataError, match='train, record 7 fails: IndexError'):
        data.train.source[7]


@pytest.mark.parametrize(
    ('texts', 'message'),
    [
        ([('q', 'a')], 'read_texts returned 1 values for 2 records'),
        ([('q', 'a'), 'q'], r"read_texts returned 'q', expected \(question, answer\) of each record"),
        ([('q', 'a'), ('q', 2)], r"read_texts returned \('q', 2\), expected"),
        (3, "read_texts fails: TypeError: 'int' object is not iterable"),
    ],
)
def test_texts_of_a_wrong_form_are_named(texts, message):
    data = load(dataset(split_of([RECORD, RECORD], texts)))
    with pytest.raises(DataError, match=f'data set mine:LOADER, train: {message}'):
        data.train.read_texts()


def test_texts_that_are_drawn_are_checked():
    split = split_of([RECORD, RECORD, RECORD])
    data = load(dataset(dataclasses.replace(split, draw_texts=lambda index, rng: ('q', 'a') if index == 0 else 'q')))
    assert data.train.draw_texts(0, np.random.default_rng(0)) == ('q', 'a')
    with pytest.raises(DataError, match=r"train, record 1: draw_texts returned 'q', expected \(question, answer\)"):
        data.train.draw_texts(1, np.random.default_rng(0))
    data = load(dataset(dataclasses.replace(split, draw_texts=lambda index, rng: fail())))
    with pytest.raises(DataError, match="train, record 0 fails: KeyError: 'no such key'"):
        data.train.draw_texts(0, np.random.default_rng(0))


@pytest.mark.parametrize(
    ('kind_of', 'message'),
    [
        (lambda answer: 'other', "is 'other', expected colour"),
        (lambda answer: None, 'is None, expected colour'),
    ],
)
def test_a_kind_that_is_unknown_is_named(kind_of, message):
    data = load(dataset(split_of([RECORD]), kind_of=kind_of))
    with pytest.raises(DataError, match=rf"kind_of\('red'\) {message}"):
        data.kind_of('red')
    failing = load(dataset(split_of([RECORD]), kind_of={}.__getitem__))
    with pytest.raises(DataError, match="kind_of fails: KeyError: 'red'"):
        failing.kind_of('red')
