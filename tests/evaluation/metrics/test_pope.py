"""POPE against loops over questions, on all questions and on bootstrap samples, and cases computed by hand."""

import math

import numpy as np
import pytest

from sparselora_jax.evaluation.metrics.pope import pope, says_yes
from sparselora_jax.evaluation.metrics.scored import Scored
from sparselora_jax.runtime.errors import DataError

CATEGORIES = ('random', 'popular', 'adversarial')
NAMES = ('accuracy', 'precision', 'recall', 'f1', 'yes_ratio')


@pytest.mark.parametrize(
    ('text', 'yes'),
    [
        ('yes', True),
        ('Yes, there is a dog.', True),
        ('No', False),
        ('no', False),
        ('No, there is none.', False),
        ('There is not a dog', False),
        # Only the text before the first full stop counts.
        ('Yes. There is not one', True),
        ('. no', True),
        # Neither other capitals nor words that contain 'no' mean no; words are split at single spaces only.
        ('NO', True),
        ('Not', True),
        ('nothing', True),
        ('no!', True),
        ('no\n', True),
        ('', True),
        ('n,o', False),
    ],
)
def test_texts_are_read_by_the_rule_of_the_official_evaluator(text, yes):
    assert says_yes(text) is yes


def values_by_loops(predicted, true):
    """The values as the official evaluator computes them; a value whose denominator is 0 is 0."""
    outcomes = list(zip(predicted, true, strict=True))
    tp, fp, tn, fn = (outcomes.count(pair) for pair in ((1, 1), (1, 0), (0, 0), (0, 1)))
    precision = tp / (tp + fp) if tp + fp else 0
    recall = tp / (tp + fn) if tp + fn else 0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    accuracy = (tp + tn) / (tp + tn + fp + fn)
    yes_ratio = predicted.count(1) / len(predicted)
    return dict(zip(NAMES, (100 * value for value in (accuracy, precision, recall, f1, yes_ratio)), strict=True))


def all_by_loops(predicted, true, categories):
    values = values_by_loops(predicted, true)
    f1_scores = []
    for category in dict.fromkeys(categories):
        chosen = [index for index, of_item in enumerate(categories) if of_item == category]
        of_category = values_by_loops([predicted[index] for index in chosen], [true[index] for index in chosen])
        values |= {f'category/{category}/{name}': value for name, value in of_category.items()}
        f1_scores.append(of_category['f1'])
    return values | {'mean_f1': sum(f1_scores) / len(f1_scores)}


def test_values_are_those_of_loops_on_all_questions_and_on_samples():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 2, 900)
    predicted = np.where(rng.random(900) < 0.8, true, 1 - true)
    categories = np.repeat(CATEGORIES, 300)
    texts = [('Yes, there is.', 'No, there is not.')[1 - answer] for answer in predicted]
    result = pope(texts, [('no', 'yes')[answer] for answer in true], categories.tolist())
    assert isinstance(result, Scored)
    np.testing.assert_array_equal(result.per_item, predicted == true)
    want = all_by_loops(predicted.tolist(), true.tolist(), categories.tolist())
    assert result.aggregate() == pytest.approx(want, rel=1e-12)
    assert want['mean_f1'] != pytest.approx(want['f1'], rel=1e-6)  # the two headlines differ
    for _ in range(5):
        sample = rng.integers(0, 900, 900)
        want = all_by_loops(predicted[sample].tolist(), true[sample].tolist(), categories[sample].tolist())
        assert result.aggregate(sample) == pytest.approx(want, rel=1e-12)


def test_without_categories_there_are_pooled_values_alone():
    assert tuple(pope(['yes'], ['yes']).aggregate()) == NAMES


@pytest.mark.parametrize(
    ('predictions', 'labels', 'want'),
    [
        (['no', 'no'], ['yes', 'no'], (50, 0, 0, 0, 0)),
        (['yes', 'yes'], ['no', 'no'], (0, 0, 0, 0, 100)),
        (['no', 'no'], ['no', 'no'], (100, 0, 0, 0, 0)),
        (['yes', 'no'], ['yes', 'no'], (100, 100, 100, 100, 50)),
    ],
    ids=['never yes', 'no label yes', 'neither', 'all right'],
)
def test_no_value_divides_by_zero(predictions, labels, want):
    assert tuple(pope(predictions, labels).aggregate().values()) == want


def test_a_category_that_a_sample_misses_has_no_values():
    values = pope(['yes', 'no'], ['yes', 'yes'], ['random', 'popular']).aggregate(np.array([0, 0]))
    assert math.isnan(values['category/popular/f1'])
    assert values['mean_f1'] == values['f1'] == 100


@pytest.mark.parametrize(
    ('predictions', 'labels', 'categories', 'message'),
    [
        ([], [], None, 'no prediction to score'),
        (['yes'], ['yes', 'no'], None, '2 entries of label for 1 predictions: expected one for each'),
        (['yes', 'no'], ['yes', 'No'], None, "label 1 is 'No': expected 'yes' or 'no'"),
        (['yes'], ['yes'], [], '0 entries of category for 1 predictions'),
    ],
)
def test_bad_input_is_one_clear_line(predictions, labels, categories, message):
    with pytest.raises(DataError, match=message):
        pope(predictions, labels, categories)
