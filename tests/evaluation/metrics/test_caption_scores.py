"""CIDEr-D, BLEU and ROUGE-L against COCO's evaluation code, against plain definitions and against published figures."""

import math
from collections import Counter

import numpy as np
import pytest
from coco_oracle import by_image, scorer
from ptb_cases import CASES

from sparselora_jax.evaluation.metric import MetricError
from sparselora_jax.evaluation.metrics import captions as caption_metrics
from sparselora_jax.evaluation.metrics.bleu import bleu_counts
from sparselora_jax.evaluation.metrics.captions import score_captions, score_nocaps
from sparselora_jax.evaluation.metrics.cider import cider_d
from sparselora_jax.evaluation.metrics.meteor import Meteor
from sparselora_jax.evaluation.metrics.ptb_tokenizer import tokenize
from sparselora_jax.evaluation.metrics.rouge import rouge_l
from sparselora_jax.evaluation.metrics.scored import Scored, standard_errors
from sparselora_jax.runtime.errors import DataError

TOLERANCE = {'rtol': 0, 'atol': 1e-9}  # of values from 0 to 1


def random_captions(seed, images, vocabulary=12, longest=14):
    """Return captions of few different words, so that words repeat and captions share n-grams; some are empty."""
    generator = np.random.default_rng(seed)

    def caption():
        return ' '.join(f'w{word}' for word in generator.integers(vocabulary, size=generator.integers(longest + 1)))

    predictions = [caption() for _ in range(images)]
    references = [[caption() for _ in range(generator.integers(1, 7))] for _ in range(images)]
    return predictions, references


def real_captions(images=12, references=4):
    """Return captions of people, in groups: in each group the first is the prediction."""
    captions = [words for _, words in CASES[: images * (references + 1)]]
    groups = [captions[first::images] for first in range(images)]
    return [group[0] for group in groups], [group[1:] for group in groups]


SETS = {
    'random': random_captions(0, 40),
    'another seed': random_captions(1, 40),
    'few words': random_captions(2, 30, vocabulary=2),
    'long captions': random_captions(3, 10, vocabulary=50, longest=60),
    'real': real_captions(),
    'one image': (['a red bus on the street'], [['a red bus', 'the bus is red']]),
    'one reference': (['a red bus', 'two dogs play'], [['a red car'], ['two dogs']]),
    'perfect': (['a red bus stops', 'two dogs play here'], [['a red bus stops'], ['two dogs play here']]),
    'nothing in common': (['a b c d', 'e f g h'], [['i j k l'], ['m n o p']]),
    'empty predictions': (['', '', 'a dog'], [['a red bus'], ['', 'two'], ['a dog']]),
    'empty references': (['a dog', 'a cat', ''], [[''], ['', 'a cat'], ['']]),
    'one word': (['a', 'b', 'a'], [['a', 'a b'], ['a'], ['b', 'a']]),
    'repeated words': (['the the the the the', 'a a'], [['the cat the mat'], ['a a a a', 'a']]),
    'a word with a no-break space': (['1\xa01/2 cups', 'a cup'], [['1 1/2 cups', '1\xa01/2'], ['a cup']]),
}
every_set = pytest.mark.parametrize(('predictions', 'references'), SETS.values(), ids=SETS)


@every_set
def test_cider_is_that_of_coco(predictions, references):
    corpus, per_image = scorer('cider.cider', 'Cider').compute_score(*by_image(predictions, references))
    values = cider_d(predictions, references) / 100
    np.testing.assert_allclose(values, per_image, **TOLERANCE)
    np.testing.assert_allclose(values.mean(), corpus, **TOLERANCE)


@every_set
def test_bleu_is_that_of_coco(predictions, references):
    corpus, per_image = scorer('bleu.bleu', 'Bleu').compute_score(*by_image(predictions, references), verbose=0)
    counts = bleu_counts(predictions, references)
    np.testing.assert_allclose(counts.corpus() / 100, corpus, **TOLERANCE)
    np.testing.assert_allclose(counts.per_image().T / 100, per_image, **TOLERANCE)


@every_set
def test_rouge_is_that_of_coco(predictions, references):
    corpus, per_image = scorer('rouge.rouge', 'Rouge').compute_score(*by_image(predictions, references))
    values = rouge_l(predictions, references) / 100
    np.testing.assert_allclose(values, per_image, **TOLERANCE)
    np.testing.assert_allclose(values.mean(), corpus, **TOLERANCE)


def ngrams(caption, order):
    words = caption.split()
    return Counter(tuple(words[first : first + order]) for first in range(len(words) - order + 1))


def plain_cider(predictions, references):
    """Compute CIDEr-D from its definition, one n-gram after the other."""
    similarity = [[0.0] * len(captions) for captions in references]
    for order in (1, 2, 3, 4):
        images_with = Counter(
            gram for captions in references for gram in set().union(*(ngrams(other, order) for other in captions))
        )

        def weights(caption, order=order, images_with=images_with):
            return {
                gram: count * math.log(len(references) / max(1, images_with[gram]))
                for gram, count in ngrams(caption, order).items()
            }

        for image, captions in enumerate(references):
            first = weights(predictions[image])
            for place, caption in enumerate(captions):
                second = weights(caption)
                norm = math.hypot(*first.values()) * math.hypot(*second.values())
                product = sum(min(first[gram], second[gram]) * second[gram] for gram in first.keys() & second.keys())
                distance = ngrams(predictions[image], 2).total() - ngrams(caption, 2).total()
                similarity[image][place] += (product / norm if norm else 0.0) * math.exp(-(distance**2) / 72)
    return [1000 * np.mean(values) / 4 for values in similarity]


@every_set
def test_cider_is_its_definition(predictions, references):
    np.testing.assert_allclose(cider_d(predictions, references), plain_cider(predictions, references), atol=1e-9)


def test_cider_of_a_perfect_caption_is_1000_and_that_of_one_image_is_0():
    captions = ['a red bus stops here', 'two dogs play outside now']
    assert cider_d(captions, [[caption] for caption in captions]).tolist() == pytest.approx([1000, 1000])
    assert cider_d(captions[:1], [captions[:1]]).tolist() == [0]


def test_cider_of_other_lengths_has_a_gaussian_penalty():
    """The same unigrams and bigrams otherwise: a caption that repeats its reference k times."""
    caption = 'a b c d e'
    short, long = (cider_d([' '.join([caption] * times), 'x'], [[caption], ['x']])[0] for times in (1, 3))
    assert short == pytest.approx(1000)
    assert long < short * math.exp(-(10**2) / 72)


@every_set
def test_bleu_is_its_definition(predictions, references):
    """The brevity penalty is that of the whole set, and so are the precisions."""
    length = sum(len(prediction.split()) for prediction in predictions)
    reference_length = 0
    for prediction, captions in zip(predictions, references, strict=True):
        lengths = sorted(len(caption.split()) for caption in captions)
        reference_length += min(lengths, key=lambda other: abs(other - len(prediction.split())))
    penalty = min(1.0, math.exp(1 - reference_length / length))
    product = 1.0
    for order, value in zip((1, 2, 3, 4), bleu_counts(predictions, references).corpus(), strict=True):
        correct = 0
        guessed = 0
        for prediction, captions in zip(predictions, references, strict=True):
            grams = ngrams(prediction, order)
            guessed += grams.total()
            for gram, count in grams.items():
                correct += min(count, max(ngrams(caption, order)[gram] for caption in captions))
        product *= correct / guessed if guessed else 0.0
        # COCO's code adds small numbers, and their fourth root is up to 0.04.
        assert value == pytest.approx(100 * penalty * product ** (1 / order), abs=1e-4 if product else 4.0)


def test_bleu_is_that_of_the_example_of_its_paper():
    """Papineni et al. (2002), section 2.1: the modified unigram precision is 2/7."""
    counts = bleu_counts(['the the the the the the the'], [['the cat is on the mat', 'there is a cat on the mat']])
    assert counts.corpus()[0] == pytest.approx(100 * 2 / 7)


def test_bleu_takes_the_closest_reference_length_and_of_two_the_shorter():
    counts = bleu_counts(['a b c d'], [['a b c d e f', 'a b', 'a']])
    assert counts.reference_length.tolist() == [2]
    counts = bleu_counts(['a b'], [['a b c']])
    np.testing.assert_allclose(counts.corpus()[:2], 100 * math.exp(1 - 3 / 2), rtol=1e-6)


def longest_common(first, second):
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, word in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if word == other else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


@every_set
def test_rouge_is_its_definition(predictions, references):
    want = []
    for prediction, captions in zip(predictions, references, strict=True):
        words = prediction.split(' ')
        common = [longest_common(words, caption.split(' ')) for caption in captions]
        precision = max(common) / len(words)
        recall = max(length / len(caption.split(' ')) for length, caption in zip(common, captions, strict=True))
        want.append(100 * 2.44 * precision * recall / (recall + 1.44 * precision) if precision * recall else 0)
    np.testing.assert_allclose(rouge_l(predictions, references), want, atol=1e-9)


def test_raw_captions_are_tokenised():
    predictions = ["A dog's bowl.", 'Two buses']
    references = [["The dog's bowl!", 'a bowl'], ['two Buses.']]
    words = [tokenize(caption) for caption in predictions], [list(map(tokenize, group)) for group in references]
    assert score_captions(predictions, references).aggregate() == score_captions(*words, tokenised=True).aggregate()


def test_scores_of_a_set_are_those_of_its_images():
    predictions, references = SETS['random']
    scores = score_captions(predictions, references, tokenised=True)
    assert isinstance(scores, Scored)
    everything = scores.aggregate()
    assert (
        everything.keys() == scores.per_image().keys() == {'BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4', 'ROUGE-L', 'CIDEr'}
    )
    assert scores.aggregate(np.arange(len(scores.per_item))) == everything
    assert everything['CIDEr'] == pytest.approx(cider_d(predictions, references).mean())
    assert everything['ROUGE-L'] == pytest.approx(rouge_l(predictions, references).mean())
    assert everything['BLEU-4'] == pytest.approx(bleu_counts(predictions, references).corpus()[3])


def test_bleu_and_rouge_of_a_part_are_those_of_the_part_scored_alone_and_cider_is_not():
    """CIDEr's document frequencies are those of the whole set."""
    predictions, references = SETS['random']
    indices = np.array([3, 3, 17, 5])
    part = score_captions(predictions, references, tokenised=True).aggregate(indices)
    alone = score_captions([predictions[i] for i in indices], [references[i] for i in indices], tokenised=True)
    for name, value in alone.aggregate().items():
        assert (part[name] == pytest.approx(value)) == (name != 'CIDEr')


def test_scores_do_not_depend_on_the_order_of_images():
    predictions, references = SETS['random']
    order = np.random.default_rng(5).permutation(len(predictions))
    first = score_captions(predictions, references, tokenised=True)
    second = score_captions([predictions[i] for i in order], [references[i] for i in order], tokenised=True)
    np.testing.assert_allclose(second.cider, first.cider[order], atol=1e-9)
    assert second.aggregate() == pytest.approx(first.aggregate())


def test_nocaps_scores_each_domain_as_a_data_set_of_its_own():
    predictions, references = SETS['random']
    domains = ['out-domain', 'in-domain', 'in-domain', 'near-domain'] * 10
    scores = score_nocaps(predictions, references, domains, tokenised=True)
    assert list(scores) == ['in-domain', 'near-domain', 'out-domain', 'entire']
    for domain in scores:
        images = [i for i, name in enumerate(domains) if domain in (name, 'entire')]
        part = [predictions[i] for i in images], [references[i] for i in images]
        np.testing.assert_allclose(scores[domain].cider, plain_cider(*part), atol=1e-9)
        assert scores[domain].aggregate() == score_captions(*part, tokenised=True).aggregate()


def test_nocaps_leaves_out_a_domain_without_images():
    scores = score_nocaps(['A bus.', 'A dog'], [['a bus'], ['the dog']], ['in-domain', 'out-domain'])
    assert list(scores) == ['in-domain', 'out-domain', 'entire']


@pytest.mark.slow
def test_a_standard_error_of_a_mean_is_the_analytic_one():
    scores = score_captions(*random_captions(7, 400), tokenised=True)
    errors = standard_errors(scores, resamples=400)
    assert errors.keys() == scores.aggregate().keys()
    for name, values in (('ROUGE-L', scores.rouge), ('CIDEr', scores.cider)):
        assert errors[name] == pytest.approx(values.std() / 20, rel=0.15)
    first = standard_errors(scores, resamples=5)
    assert standard_errors(scores, resamples=5) == first
    assert standard_errors(scores, resamples=5, seed=1) != first


@pytest.mark.slow
def test_a_standard_error_of_bleu_is_the_spread_over_data_sets():
    """BLEU is not a mean, so the spread is that of data sets drawn anew."""
    sets = [score_captions(*random_captions(seed, 200), tokenised=True) for seed in range(40)]
    spread = np.std([scores.aggregate()['BLEU-2'] for scores in sets], ddof=1)
    errors = [standard_errors(scores, resamples=200)['BLEU-2'] for scores in sets[:5]]
    assert np.mean(errors) == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize(
    ('predictions', 'references', 'message'),
    [
        ([], [], 'empty'),
        (['a'], [], '1 predicted captions for 0 images'),
        (['a', 'b'], [['a'], []], 'image 1 has no reference'),
    ],
)
def test_captions_that_cannot_be_scored_are_named(predictions, references, message):
    with pytest.raises(DataError, match=message):
        score_captions(predictions, references)
    with pytest.raises(DataError, match=message):
        score_nocaps(predictions, references, [])


def test_domains_that_do_not_exist_are_named():
    with pytest.raises(DataError, match=r"image 1: unknown domain 'indoor': expected one of in-domain"):
        score_nocaps(['a', 'b'], [['a'], ['b']], ['in-domain', 'indoor'])
    with pytest.raises(DataError, match='2 images have 1 domains'):
        score_nocaps(['a', 'b'], [['a'], ['b']], ['in-domain'])


def test_standard_errors_that_cannot_be_computed_are_refused():
    scores = score_captions(['a'], [['a']])
    with pytest.raises(DataError, match='two resamples'):
        standard_errors(scores, resamples=1)


def test_meteor_is_a_value_where_it_can_be_computed(monkeypatch):
    known = Meteor(25.0, np.array([20.0, 40.0]))
    asked = []
    monkeypatch.setattr(caption_metrics, 'meteor', lambda *texts: asked.append(texts) or known)
    scores = score_captions(['A cat.', 'Two dogs'], [['a cat'], ['dogs', 'two dogs']], with_meteor=True)
    assert asked == [(['a cat', 'two dogs'], [['a cat'], ['dogs', 'two dogs']])]  # as words
    assert scores.aggregate()['METEOR'] == 25.0
    assert scores.per_image()['METEOR'].tolist() == [20.0, 40.0]
    assert math.isnan(scores.aggregate(np.array([0]))['METEOR'])
    assert scores.notes == ()


def test_a_note_says_that_meteor_is_left_out_and_why(monkeypatch):
    def fail(*texts):
        raise MetricError('METEOR needs Java')

    monkeypatch.setattr(caption_metrics, 'meteor', fail)
    pair = ['a cat'], [['a cat']]
    scores = score_captions(*pair, with_meteor=True)
    assert scores.notes == ('METEOR is left out: METEOR needs Java',)
    assert scores.aggregate() == score_captions(*pair).aggregate()
    assert score_nocaps(*pair, ['in-domain'], with_meteor=True)['entire'].notes == scores.notes
    assert score_captions(*pair).notes == ()
