"""Compute recall of retrieval between images and texts, from a matrix of similarities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sparselora_jax.runtime.errors import DataError

DEPTHS = (1, 5, 10)
PERCENT = 100.0
_ROWS = 256  # rows of the matrix that are compared at once


@dataclass(frozen=True)
class RetrievalRanks:
    """Hold how far behind the right answer comes in each search (a `scored.Scored` whose items are images).

    Attributes:
      text_ranks: for each image, the number of wrong texts at or before its best text.
      image_ranks: for each text, the number of wrong images at or before its image.
      image_of_text: the image of each text.
    """

    text_ranks: Int[np.ndarray, ' images']
    image_ranks: Int[np.ndarray, ' texts']
    image_of_text: Int[np.ndarray, ' texts']

    @property
    def per_item(self) -> Float[np.ndarray, ' images']:
        """Return 1 for each image whose best text is its own, otherwise 0."""
        return (self.text_ranks < 1).astype(np.float64)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return nothing: no step was left out."""
        return ()

    @property
    def count(self) -> int:
        """Return the number of images."""
        return len(self.text_ranks)

    def aggregate(self, indices: Int[np.ndarray, ' drawn'] | None = None) -> dict[str, float]:
        """Return the recalls in percent, by the names of LAVIS.

        Recall at k of texts (`txt_r1`, `txt_r5`, `txt_r10`) is the share of images for which one of their texts is
        among the k best. Recall at k of images (`img_r1`, ...) is the share of texts whose image is among the k best.

        Args:
          indices: the images that count, with their texts; they may repeat. None means each image once. The searches
            themselves are not repeated: each still has all images and texts as candidates.

        Returns:
          The six recalls; their means `txt_r_mean` and `img_r_mean`; the mean of these two, `r_mean`; and
          `agg_metrics`, by which LAVIS selects checkpoints: it is `txt_r_mean`.
        """
        rows = slice(None) if indices is None else indices
        texts = np.bincount(self.image_of_text, minlength=self.count)
        scores = {}
        for depth in DEPTHS:
            scores[f'txt_r{depth}'] = PERCENT * float((self.text_ranks[rows] < depth).mean())
        for depth in DEPTHS:
            is_found = self.image_ranks < depth
            found = np.bincount(self.image_of_text, weights=is_found, minlength=self.count)
            scores[f'img_r{depth}'] = PERCENT * float(found[rows].sum() / texts[rows].sum())
        text_mean = sum(scores[f'txt_r{depth}'] for depth in DEPTHS) / len(DEPTHS)
        image_mean = sum(scores[f'img_r{depth}'] for depth in DEPTHS) / len(DEPTHS)
        return scores | {
            'txt_r_mean': text_mean,
            'img_r_mean': image_mean,
            'r_mean': (text_mean + image_mean) / 2,
            'agg_metrics': text_mean,
        }


def retrieval_ranks(
    similarity: Float[np.ndarray, 'images texts'],
    image_of_text: Sequence[int] | Int[np.ndarray, ' owners'],
    *,
    text_similarity: Float[np.ndarray, 'own_texts own_images'] | None = None,
) -> RetrievalRanks:
    """Return the ranks of the right answers, in both directions of search.

    Of equal similarities, wrong answers come first. So a model that gives all pairs one similarity has a recall of 0
    and not of 100. An order by `argsort` would depend on the order of the files instead.

    The matrix is read in blocks of rows. Besides the two matrices, it takes memory for 256 rows.

    Args:
      similarity: how well each text fits each image, the higher the better. Each row is the search of one image among
        all texts.
      image_of_text: the row of the image that each text describes. Each image has one text or more.
      text_similarity: how well each image fits each text, where a model scores each direction by itself, as one does
        that scores only the best candidates of each search again. None means the transposed `similarity`.

    Returns:
      The ranks, and with `aggregate()` the recalls.

    Raises:
      DataError: shapes do not fit, an image has no text, a text has no image, or a similarity is not a number.

    >>> similarity = np.array([[0.9, 0.2, 0.1], [0.8, 0.1, 0.7]])
    >>> recalls = retrieval_ranks(similarity, [0, 0, 1]).aggregate()
    >>> recalls['txt_r1'], round(recalls['img_r1'], 1)
    (50.0, 100.0)
    """
    owner = np.asarray(image_of_text)
    _check(similarity, owner, text_similarity)
    images, texts = similarity.shape
    own = similarity[owner, np.arange(texts)]  # similarity of each text and its own image
    best = np.full(images, -np.inf, own.dtype)
    np.maximum.at(best, owner, own)
    # An image's other texts are no wrong answers, so those at or before the best one are counted and taken off.
    own_texts_before = np.bincount(owner[own >= best[owner]], minlength=images)
    text_ranks = _count_in_rows(similarity, best) - own_texts_before

    if text_similarity is None:
        image_ranks = _count_in_columns(similarity, own) - 1
    else:
        own_image = text_similarity[np.arange(texts), owner]
        image_ranks = _count_in_rows(text_similarity, own_image) - 1
    return RetrievalRanks(text_ranks, image_ranks, owner)


def _check(
    similarity: Float[np.ndarray, 'images texts'],
    owner: Int[np.ndarray, ' owners'],
    text_similarity: Float[np.ndarray, 'own_texts own_images'] | None,
) -> None:
    """Raise an error if the arguments of `retrieval_ranks` do not fit."""
    images, texts = similarity.shape
    if owner.shape != (texts,):
        raise DataError(f'{texts} columns of similarities, but the image of {len(owner)} texts: give one for each text')
    outside = np.flatnonzero((owner < 0) | (owner >= images))
    if len(outside):
        raise DataError(f'text {outside[0]} belongs to image {owner[outside[0]]}, but there are {images} images')
    without = np.flatnonzero(np.bincount(owner, minlength=images) == 0)
    if len(without):
        raise DataError(f'image {without[0]} has no text: leave its row of similarities out')
    if text_similarity is not None and text_similarity.shape != (texts, images):
        raise DataError(
            f'text_similarity has the shape {text_similarity.shape}: expected {(texts, images)}, a row for each text'
        )


def _count_in_rows(
    similarity: Float[np.ndarray, 'rows columns'], threshold: Float[np.ndarray, ' rows']
) -> Int[np.ndarray, ' rows']:
    """Return the number of similarities in each row that reach the row's threshold."""
    counts = [
        _reaches(similarity[first : first + _ROWS], threshold[first : first + _ROWS, None], first).sum(axis=1)
        for first in range(0, len(similarity), _ROWS)
    ]
    return np.concatenate(counts)


def _count_in_columns(
    similarity: Float[np.ndarray, 'rows columns'], threshold: Float[np.ndarray, ' columns']
) -> Int[np.ndarray, ' columns']:
    """Return the number of similarities in each column that reach the column's threshold."""
    counts = np.zeros(similarity.shape[1], np.int64)
    for first in range(0, len(similarity), _ROWS):
        counts += _reaches(similarity[first : first + _ROWS], threshold, first).sum(axis=0)
    return counts


def _reaches(
    similarity: Float[np.ndarray, 'rows columns'], threshold: Float[np.ndarray, '...'], first: int
) -> Bool[np.ndarray, 'rows columns']:
    """Return where similarities reach a threshold; `first` is the number of the first row."""
    # A comparison with NaN is False, so a diverged model would seem perfect.
    rows = np.flatnonzero(np.isnan(similarity).any(axis=1))
    if len(rows):
        raise DataError(f'row {first + rows[0]} of the similarities has a NaN: the model diverged, or its input is bad')
    return similarity >= threshold
