"""GQA's accuracy against LAVIS's normalisation and cases computed by hand."""

import answer_pairs
import lavis_evaluator
import pytest

from sparselora_jax.evaluation.metrics.gqa import gqa_accuracy
from sparselora_jax.runtime.errors import DataError


@pytest.mark.parametrize(
    ('prediction', 'reference', 'exact', 'lavis'),
    [
        ('yes', 'yes', 1, 1),
        ('Yes', 'yes', 0, 1),
        ('yes.', 'yes', 0, 1),
        ('the left', 'left', 0, 1),
        # References stay as they are, so a prediction that equals them may be wrong.
        ('two', 'two', 1, 0),
        ('t-shirt', 't-shirt', 1, 0),
        ('', '', 1, 1),
    ],
)
def test_answers_are_compared_by_rule(prediction, reference, exact, lavis):
    assert gqa_accuracy([prediction], [reference]).per_item.tolist() == [exact]
    assert gqa_accuracy([prediction], [reference], rule='lavis').per_item.tolist() == [lavis]


@pytest.mark.parametrize('count', [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_scores_are_those_of_lavis(count):
    """The steps of LAVIS's `GQATask`, on its evaluator."""
    pairs = answer_pairs.pairs(count, seed=5)
    references = [answers[0] for answers in pairs.references]
    tool = lavis_evaluator.evaluator()
    want = []
    for prediction, reference in zip(pairs.predictions, references, strict=True):
        want.append(float(tool.processDigitArticle(tool.processPunctuation(prediction)) == reference))
    assert 0.02 < sum(want) / len(want) < 0.9
    result = gqa_accuracy(pairs.predictions, references, rule='lavis')
    assert result.per_item.tolist() == want


def test_values_are_by_type_too():
    types = {'structural': ['query', 'verify', 'verify']}
    values = gqa_accuracy(['a', 'b', 'c'], ['a', 'b', 'x'], groups=types).aggregate()
    assert values == pytest.approx({'overall': 200 / 3, 'structural/query': 100, 'structural/verify': 50})


@pytest.mark.parametrize(
    ('predictions', 'references', 'rule', 'message'),
    [
        ([], [], 'exact', 'no prediction to score'),
        (['a'], ['a', 'b'], 'exact', '2 entries of reference for 1 predictions: expected one for each'),
        (['a'], ['a'], 'official', "rule 'official': expected one of exact, lavis"),
    ],
)
def test_bad_input_is_one_clear_line(predictions, references, rule, message):
    with pytest.raises(DataError, match=message):
        gqa_accuracy(predictions, references, rule=rule)
