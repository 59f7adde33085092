"""VQA accuracy against LAVIS's evaluator, loops written from the rules, and cases computed by hand."""

import importlib
from types import SimpleNamespace

import answer_pairs
import lavis_evaluator
import numpy as np
import pytest

from sparselora_jax.evaluation.metrics.scored import Scored, rounded
from sparselora_jax.evaluation.metrics.vqa_accuracy import NOT_LEMMATISED, leave_one_out, vqa_accuracy
from sparselora_jax.runtime.errors import DataError

TEN = ['two dogs'] * 3 + ['Two dogs.'] * 2 + ['dogs'] * 5


def score(prediction, references, rule='official'):
    return float(vqa_accuracy([prediction], [references], rule=rule).per_item[0])


@pytest.mark.parametrize('rule', ['official', 'lavis', 'evalai'])
@pytest.mark.parametrize(('count', 'want'), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_an_answer_scores_by_the_number_of_references_that_agree(rule, count, want):
    assert score('red', ['red'] * count + ['blue'] * (10 - count), rule) == want


@pytest.mark.parametrize(
    ('prediction', 'references', 'official', 'lavis', 'evalai'),
    [
        # Five references become '2 dogs' if both sides are normalised. LAVIS leaves the word 'two' in references.
        ('2 dogs', TEN, 1.0, 0.0, 1.0),
        # References that agree are compared as they are, by LAVIS with a prediction that has become '2'.
        ('two', ['two'] * 10, 1.0, 0.0, 1.0),
        ('2', ['two'] * 10, 0.0, 0.0, 1.0),
        ('2', ['two'] * 9 + ['3'], 1.0, 0.0, 1.0),
        ('Yes', ['yes'] * 10, 0.0, 1.0, 1.0),
        ('Yes', ['yes'] * 9 + ['no'], 1.0, 1.0, 1.0),
        ('yes\n', ['yes'] * 10, 1.0, 1.0, 1.0),
        # The official rule strips references before it looks whether they agree, LAVIS does not strip them at all.
        ('2', ['two'] * 9 + ['two '], 0.0, 0.0, 1.0),
        ('yes', ['yes '] * 10, 1.0, 0.0, 1.0),
        # Only EvalAI deletes a comma that is between letters, and makes a word of 's.
        ('ab', ['a,b'] * 9 + ['c'], 0.0, 0.0, 1.0),
        ("man 's", ["man's"] * 9 + ['c'], 0.0, 0.0, 1.0),
        ('', ['', 'red'] * 5, 1.0, 1.0, 1.0),
        ('the', ['a', 'red'] * 5, 1.0, 0.0, 1.0),
    ],
)
def test_rules_differ_where_they_should(prediction, references, official, lavis, evalai):
    assert score(prediction, references) == official
    assert score(prediction, references, 'lavis') == lavis
    assert score(prediction, references, 'evalai') == evalai


def mean_of_left_out(matching):
    """The mean of min(1, m / 3), where each reference in turn is left out."""
    scores = []
    for left_out in range(len(matching)):
        others = matching[:left_out] + matching[left_out + 1 :]
        scores.append(min(1, sum(others) / 3))
    return sum(scores) / len(scores)


@pytest.mark.parametrize('references', range(2, 13))
def test_leaving_one_out_is_done_with_any_number_of_references(references):
    for matches in range(references + 1):
        want = mean_of_left_out([True] * matches + [False] * (references - matches))
        assert leave_one_out(matches, references) == pytest.approx(want, abs=1e-15)


def test_few_references_cannot_give_a_full_score_and_a_note_says_so():
    result = vqa_accuracy(['red', 'red', 'red'], [['red'] * 2, ['red'] * 3, ['red'] * 4])
    np.testing.assert_allclose(result.per_item, [1 / 3, 2 / 3, 1])
    assert result.notes == ('2 questions have fewer than 4 references, so no answer to them can score 1',)


def test_values_are_means_in_percent_overall_and_by_type():
    references = [['red'] * 10, ['red'] * 3 + ['blue'] * 7, ['2'] * 10]
    types = {'answer_type': ['other', 'other', 'number'], 'question_type': ['what', 'which', 'how many']}
    result = vqa_accuracy(['red', 'red', '3'], references, groups=types)
    assert isinstance(result, Scored)
    assert result.per_item.dtype == np.float64
    assert result.notes == ()
    assert rounded(result.aggregate()) == {
        'overall': 63.33,
        'answer_type/other': 95.0,
        'answer_type/number': 0.0,
        'question_type/what': 100.0,
        'question_type/which': 90.0,
        'question_type/how many': 0.0,
    }


def agree_with_lavis(pairs):
    """Compare each score and each rounded value with those of LAVIS's evaluator."""
    groups = {'answer_type': pairs.answer_types, 'question_type': pairs.question_types}
    result = vqa_accuracy(pairs.predictions, pairs.references, rule='lavis', groups=groups)
    tool = lavis_evaluator.evaluated(pairs)
    assert [round(100 * score, 2) for score in result.per_item.tolist()] == list(tool.evalQA.values())
    assert 0.2 < result.per_item.mean() < 0.8  # neither all right nor all wrong
    values = rounded(result.aggregate())
    want = {'overall': tool.accuracy['overall']}
    want |= {f'answer_type/{name}': value for name, value in tool.accuracy['perAnswerType'].items()}
    want |= {f'question_type/{name}': value for name, value in tool.accuracy['perQuestionType'].items()}
    assert values == want


def reference_score(tool, prediction, references, rule):
    """The other two rules, step by step, with the punctuation and words of LAVIS, which are the official ones."""

    def stripped(text):
        return text.replace('\n', ' ').replace('\t', ' ').strip()

    def normalised(text):
        return tool.processDigitArticle(tool.processPunctuation(text))

    def of_evalai(text):
        words = text.lower().replace(',', '').replace('?', '').replace("'s", " 's").strip()
        return normalised(stripped(words))

    if rule == 'evalai':
        prediction = of_evalai(prediction)
        references = [of_evalai(reference) for reference in references]
    else:
        prediction = stripped(prediction)
        references = [stripped(reference) for reference in references]
        if len(set(references)) > 1:
            prediction = normalised(prediction)
            references = [normalised(reference) for reference in references]
    return mean_of_left_out([reference == prediction for reference in references])


def agree_with_loops(pairs, rule):
    tool = lavis_evaluator.evaluator()
    result = vqa_accuracy(pairs.predictions, pairs.references, rule=rule)
    want = [reference_score(tool, *pair, rule) for pair in zip(pairs.predictions, pairs.references, strict=True)]
    np.testing.assert_allclose(result.per_item, want, atol=1e-12)
    assert 0.2 < result.per_item.mean() < 0.9
    assert rounded(result.aggregate())['overall'] == round(100 * sum(want) / len(want), 2)


def test_scores_and_values_are_those_of_lavis():
    agree_with_lavis(answer_pairs.pairs(1000, seed=0))
    agree_with_lavis(answer_pairs.pairs(200, seed=1, references=5))


@pytest.mark.parametrize('rule', ['official', 'evalai'])
def test_scores_are_those_of_loops(rule):
    agree_with_loops(answer_pairs.pairs(500, seed=2), rule)


@pytest.mark.slow
def test_20000_scores_are_those_of_lavis_and_of_loops():
    pairs = answer_pairs.pairs(20_000, seed=3)
    agree_with_lavis(pairs)
    agree_with_loops(pairs, 'official')
    agree_with_loops(pairs, 'evalai')


def stub_spacy(monkeypatch, load):
    """Let `import spacy` find a stub whose `load` is this."""
    real = importlib.import_module
    stub = SimpleNamespace(load=load)
    monkeypatch.setattr(importlib, 'import_module', lambda name: stub if name == 'spacy' else real(name))


def test_predictions_are_lemmatised_where_they_are_nouns_or_verbs(monkeypatch):
    """Each different prediction once; the lemma of another part of speech is not taken."""
    tags = {'dogs': ('dog', 'NOUN'), 'running': ('run', 'VERB'), 'bigger': ('big', 'ADJ')}
    read = []

    def pipeline(text):
        read.append(text)
        tokens = [(word, *tags[word]) for word in text.split()]
        return [SimpleNamespace(text=word, lemma_=lemma, pos_=pos) for word, lemma, pos in tokens]

    stub_spacy(monkeypatch, lambda model: {'en_core_web_sm': pipeline}[model])
    references = [['bigger dog run', 'x'] * 5] * 2
    result = vqa_accuracy(['bigger dogs running'] * 2, references, lemmatise=True)
    assert result.per_item.tolist() == [1.0, 1.0]
    assert result.notes == ()
    assert read == ['bigger dogs running']
    assert vqa_accuracy(['bigger dogs running'] * 2, references).per_item.tolist() == [0.0, 0.0]


def missing_model(name):
    raise OSError(f"[E050] Can't find model '{name}'.")


def missing_package(name):
    raise ImportError(name)


@pytest.mark.parametrize('load', [missing_model, missing_package])
def test_without_spacy_scores_come_with_a_note(monkeypatch, load):
    stub_spacy(monkeypatch, load)
    result = vqa_accuracy(['dogs'], [['dog'] * 5 + ['dogs'] * 5], lemmatise=True)
    assert result.per_item.tolist() == [1.0]
    assert result.notes == (NOT_LEMMATISED,)


@pytest.mark.parametrize(
    ('predictions', 'references', 'options', 'message'),
    [
        ([], [], {}, 'no prediction to score: the list is empty'),
        (['a'], [['a'] * 10] * 2, {}, '2 lists of references for 1 predictions: expected one for each'),
        (['a', 'a'], [['a'] * 10, ['a']], {}, r"references 1 are \['a'\]: VQA accuracy leaves one out.*two;.*exact"),
        (['a'], [[]], {}, r'references 0 are \[\]'),
        (['a'], [['a'] * 10], {'rule': 'best'}, "rule 'best': expected one of official, lavis, evalai"),
        (['a'], [['a'] * 10], {'groups': {'type': []}}, '0 entries of type for 1 predictions'),
        (['a'], [['a'] * 10], {'groups': {'a/b': ['x']}}, "grouping 'a/b': its name must not contain '/'"),
    ],
)
def test_bad_input_is_one_clear_line(predictions, references, options, message):
    with pytest.raises(DataError, match=message) as error:
        vqa_accuracy(predictions, references, **options)
    assert '\n' not in str(error.value)
