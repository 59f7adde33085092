"""Aggregate values against plain loops, on all items and on bootstrap samples."""

import math

import numpy as np
import pytest

from sparselora_jax.evaluation.metrics.scored import Scored, check_texts, grouped_means, rounded
from sparselora_jax.runtime.errors import DataError


def drawn(items=500, seed=0):
    rng = np.random.default_rng(seed)
    groups = {
        'answer_type': rng.choice(['yes/no', 'number', 'other'], items).tolist(),
        'question_type': rng.choice([f'type {number}' for number in range(20)], items).tolist(),
    }
    return grouped_means(rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], items), groups), groups


def means(scores, groups, indices):
    """The values by loops over items."""
    listed = {'overall': [scores[index] for index in indices]}
    for name, labels in groups.items():
        for index in indices:
            listed.setdefault(f'{name}/{labels[index]}', []).append(scores[index])
    return {name: 100 * math.fsum(values) / len(values) for name, values in listed.items()}


def test_values_are_means_of_the_selected_items():
    result, groups = drawn()
    assert isinstance(result, Scored)
    for indices in (np.arange(500), np.random.default_rng(1).integers(0, 500, 500)):
        assert result.aggregate(indices) == pytest.approx(means(result.per_item, groups, indices), rel=1e-12)
    assert result.aggregate() == result.aggregate(np.arange(500))


def test_groups_are_in_the_order_of_their_first_item():
    result = grouped_means(np.array([1.0, 0.0, 1.0]), {'kind': ['b', 'a', 'b']})
    assert list(result.aggregate()) == ['overall', 'kind/b', 'kind/a']


def test_a_group_that_a_sample_misses_has_no_value():
    values = grouped_means(np.array([1.0, 0.0]), {'kind': ['a', 'b']}).aggregate(np.array([0, 0]))
    assert values['kind/a'] == values['overall'] == 100.0
    assert math.isnan(values['kind/b'])
    assert all(map(math.isnan, grouped_means(np.array([1.0])).aggregate(np.array([], int)).values()))


def test_a_sum_is_that_of_the_official_evaluator_to_the_last_bit():
    """It adds in the order of the questions. numpy's mean adds pairs, and differs here."""
    scores = np.tile([0.3, 0.6, 0.9, 1.0], 250)
    assert grouped_means(scores).aggregate()['overall'] == 100 * float(sum(scores.tolist())) / len(scores)
    assert sum(scores.tolist()) != scores.sum()


def test_values_are_rounded_as_the_official_evaluator_rounds():
    assert rounded({'overall': 200 / 3, 'half': 0.125}) == {'overall': 66.67, 'half': 0.12}
    assert rounded({'overall': 200 / 3}, digits=0) == {'overall': 67.0}


def test_a_grouping_needs_a_group_for_each_item():
    with pytest.raises(DataError, match='1 entries of kind for 2 predictions: expected one for each'):
        grouped_means(np.zeros(2), {'kind': ['a']})


@pytest.mark.parametrize(
    ('texts', 'items', 'message'),
    [
        (['yes', None], 2, 'prediction 1 is None: expected a text'),
        ([{'answer': 'yes'}], None, "prediction 0 is {'answer': 'yes'}: expected a text"),
        ([], None, 'no prediction to score: the list is empty'),
        (['yes'], 2, '1 entries of prediction for 2 predictions: expected one for each'),
    ],
)
def test_a_list_of_texts_is_checked(texts, items, message):
    with pytest.raises(DataError) as error:
        check_texts(texts, 'prediction', items)
    assert str(error.value) == message
