"""METEOR through the package pycocoevalcap, and what is said where it or Java is missing."""

import importlib.util
import shutil

import pytest
from coco_oracle import REASON, needs_java

from sparselora_jax.evaluation.metric import MetricError
from sparselora_jax.evaluation.metrics.meteor import meteor
from sparselora_jax.runtime.errors import DataError


@pytest.fixture
def installed(monkeypatch):
    """Java and the package seem to be installed."""
    monkeypatch.setattr(shutil, 'which', lambda name: f'/bin/{name}')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())


def test_without_java_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.raises(MetricError, match='install a Java runtime'):
        meteor(['a'], [['a']])


def test_without_the_package_the_error_says_what_to_install(installed, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(MetricError, match=r'pip install --no-deps pycocoevalcap==1\.2'):
        meteor(['a'], [['a']])


@pytest.mark.parametrize('caption', ['a ||| b', 'a\nb'])
def test_a_caption_that_the_program_would_split_is_refused(installed, caption):
    """It would wait for ever for the rest of a line."""
    with pytest.raises(DataError, match='image 1: METEOR cannot score'):
        meteor(['a', 'b'], [['a'], ['b', caption]])
    with pytest.raises(DataError, match='image 1: METEOR cannot score'):
        meteor(['a', caption], [['a'], ['b']])


def test_a_program_that_fails_is_one_line(installed, monkeypatch):
    def broken(name):
        raise OSError('no such jar\nmore lines')

    monkeypatch.setattr(importlib, 'import_module', broken)
    with pytest.raises(MetricError, match='METEOR fails: OSError: no such jar') as error:
        meteor(['a'], [['a']])
    assert '\n' not in str(error.value)


@needs_java
@pytest.mark.slow
def test_meteor_knows_stems_and_word_order():
    pytest.importorskip('pycocoevalcap', reason=REASON)
    predictions = ['two dogs play', 'dogs two play', 'two dog plays', 'a cat', '']
    scores = meteor(predictions, [['two dogs play', 'some dogs']] * 5)
    same, other_order, stems, other, empty = scores.per_image
    assert same == pytest.approx(100)
    assert 0 == empty == other < other_order < same
    assert 0 < stems < same
    assert scores.corpus != pytest.approx(scores.per_image.mean())
