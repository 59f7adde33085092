"""Recall of retrieval against its definition, by a full sort, and against ECCV Caption's code."""

import tracemalloc

import numpy as np
import pytest

from sparselora_jax.evaluation.metrics.retrieval import retrieval_ranks
from sparselora_jax.evaluation.metrics.scored import Scored, standard_errors
from sparselora_jax.runtime.errors import DataError

DEPTHS = (1, 5, 10)


def problem(seed, images=60, texts=300, signal=2.0):
    """Return similarities, where a pair that belongs together has a higher one, and the image of each text."""
    generator = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(images), generator.integers(images, size=texts - images)])
    similarity = generator.normal(size=(images, texts))
    similarity[owner, np.arange(texts)] += signal
    return similarity, owner


def plain_recalls(similarity, text_similarity, owner):
    """Compute the recalls from their definition."""
    scores = {}
    for depth in DEPTHS:
        found = [any(owner[text] == image for text in np.argsort(-row)[:depth]) for image, row in enumerate(similarity)]
        scores[f'txt_r{depth}'] = 100 * np.mean(found)
        found = [owner[text] in np.argsort(-row)[:depth] for text, row in enumerate(text_similarity)]
        scores[f'img_r{depth}'] = 100 * np.mean(found)
    scores['txt_r_mean'] = np.mean([scores[f'txt_r{depth}'] for depth in DEPTHS])
    scores['img_r_mean'] = np.mean([scores[f'img_r{depth}'] for depth in DEPTHS])
    scores['r_mean'] = (scores['txt_r_mean'] + scores['img_r_mean']) / 2
    scores['agg_metrics'] = scores['txt_r_mean']
    return scores


@pytest.mark.parametrize('signal', [0.0, 1.0, 2.0, 9.0])
@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_recalls_are_their_definition(signal, dtype):
    similarity, owner = problem(0, images=20, texts=60, signal=signal)
    # Whole numbers, each once, so that there are no ties in any precision.
    similarity = similarity.argsort(axis=None).argsort().reshape(similarity.shape).astype(dtype)
    assert len(np.unique(similarity)) == similarity.size
    recalls = retrieval_ranks(similarity, owner).aggregate()
    assert recalls == pytest.approx(plain_recalls(similarity, similarity.T, owner))


def test_each_direction_may_have_similarities_of_its_own():
    similarity, owner = problem(1)
    other, _ = problem(2)
    recalls = retrieval_ranks(similarity, owner, text_similarity=other.T).aggregate()
    assert recalls == pytest.approx(plain_recalls(similarity, other.T, owner))
    transposed = np.ascontiguousarray(similarity.T)
    assert retrieval_ranks(similarity, owner, text_similarity=transposed).aggregate() == pytest.approx(
        retrieval_ranks(similarity, owner).aggregate()
    )


def test_blocks_of_rows_do_not_matter(monkeypatch):
    similarity, owner = problem(3)
    want = retrieval_ranks(similarity, owner)
    monkeypatch.setattr('sparselora_jax.evaluation.metrics.retrieval._ROWS', 7)
    for first, second in zip(vars(want).values(), vars(retrieval_ranks(similarity, owner)).values(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_of_equal_similarities_wrong_answers_come_first():
    owner = [0, 0, 1]
    ranks = retrieval_ranks(np.zeros((2, 3)), owner)
    assert ranks.text_ranks.tolist() == [1, 2]  # an image's other texts are no wrong answers
    assert ranks.image_ranks.tolist() == [1, 1, 1]
    assert ranks.aggregate()['txt_r1'] == ranks.aggregate()['img_r1'] == 0


def test_candidates_that_were_not_scored_again_are_not_found():
    """Models that score the best candidates again give all others one low similarity."""
    similarity = np.full((2, 40), -100.0)
    owner = np.repeat([0, 1], 20)
    similarity[0, :15] = np.arange(15)  # right texts
    similarity[1, :15] = np.arange(15)  # wrong texts
    ranks = retrieval_ranks(similarity, owner)
    assert ranks.text_ranks.tolist() == [0, 20]


def test_recalls_of_some_images_count_their_texts():
    similarity, owner = problem(4)
    ranks = retrieval_ranks(similarity, owner)
    assert isinstance(ranks, Scored)
    assert ranks.aggregate(np.arange(60)) == pytest.approx(ranks.aggregate())
    indices = np.array([5, 5, 9])
    texts = np.concatenate([np.flatnonzero(owner == image) for image in indices])
    part = ranks.aggregate(indices)
    assert part['txt_r5'] == pytest.approx(100 * np.mean(ranks.text_ranks[indices] < 5))
    assert part['img_r5'] == pytest.approx(100 * np.mean(ranks.image_ranks[texts] < 5))
    errors = standard_errors(ranks)
    share = ranks.aggregate()['txt_r1'] / 100
    assert errors['txt_r1'] == pytest.approx(100 * (share * (1 - share) / 60) ** 0.5, rel=0.1)


@pytest.mark.slow
def test_ranks_take_little_memory_besides_the_matrix():
    similarity, owner = problem(5, images=1000, texts=5000)
    similarity = similarity.astype(np.float32)
    tracemalloc.start()
    try:
        retrieval_ranks(similarity, owner)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < similarity.nbytes / 4


@pytest.mark.parametrize(
    ('owner', 'shape', 'message'),
    [
        ([0, 1], None, '3 columns of similarities, but the image of 2 texts'),
        ([0, 1, 2], None, 'text 2 belongs to image 2, but there are 2 images'),
        ([0, 1, -1], None, 'text 2 belongs to image -1'),
        ([0, 0, 0], None, 'image 1 has no text'),
        ([0, 0, 1], (2, 3), r'text_similarity has the shape \(2, 3\): expected \(3, 2\)'),
    ],
)
def test_arguments_that_do_not_fit_are_named(owner, shape, message):
    text_similarity = None if shape is None else np.zeros(shape)
    with pytest.raises(DataError, match=message):
        retrieval_ranks(np.zeros((2, 3)), owner, text_similarity=text_similarity)


def test_similarities_that_are_not_numbers_are_refused():
    similarity, owner = problem(6)
    similarity[17, 3] = np.nan
    with pytest.raises(DataError, match='row 17 of the similarities has a NaN'):
        retrieval_ranks(similarity, owner)


@pytest.mark.slow
def test_recalls_of_coco_5k_are_those_of_eccv_caption():
    """The real ids of Karpathy's test split, with random features."""
    eccv_caption = pytest.importorskip('eccv_caption', reason='run: pip install --no-deps eccv-caption==0.1.0')
    metrics = eccv_caption.Metrics()
    texts_of_image = metrics.coco_gts['i2t']
    image_ids = np.array(sorted(texts_of_image))
    text_ids = np.array(sorted(metrics.coco_gts['t2i']))
    row_of_image = {image: row for row, image in enumerate(image_ids)}
    owner = np.array([row_of_image[metrics.coco_gts['t2i'][text][0]] for text in text_ids])

    generator = np.random.default_rng(0)
    image_features = generator.normal(size=(len(image_ids), 32)).astype(np.float32)
    text_features = image_features[owner] + generator.normal(size=(len(text_ids), 32)).astype(np.float32)
    similarity = image_features @ text_features.T

    def best(rows, ids, names):
        """Return the ten best of each row, in order, by id."""
        places = np.argpartition(-rows, 10, axis=1)[:, :10]
        order = np.take_along_axis(-rows, places, axis=1).argsort(axis=1)
        places = np.take_along_axis(places, order, axis=1)
        return {int(name): ids[row].tolist() for name, row in zip(names, places, strict=True)}

    retrieved = {
        'i2t': best(similarity, text_ids, image_ids),
        't2i': best(np.ascontiguousarray(similarity.T), image_ids, text_ids),
    }
    recalls = retrieval_ranks(similarity, owner).aggregate()
    for depth in DEPTHS:
        want = metrics.coco_5k_recalls(retrieved, 'all', K=depth)
        assert recalls[f'txt_r{depth}'] == pytest.approx(100 * want['i2t'])
        assert recalls[f'img_r{depth}'] == pytest.approx(100 * want['t2i'])
    assert 10 < recalls['img_r1'] < 90
