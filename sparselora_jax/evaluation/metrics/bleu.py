"""Compute BLEU-1 to BLEU-4 of a corpus, from counts of each image."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

ORDERS = 4  # n-grams of 1 to 4 words
PERCENT = 100.0
# The reference implementation adds these, so that a quotient without any n-gram is a number.
_TINY = 1e-15
_SMALL = 1e-9


@dataclass(frozen=True)
class BleuCounts:
    """Hold what each image adds to BLEU: a corpus has the sum of the counts of its images.

    Attributes:
      correct: number of the prediction's n-grams that a reference has, for n = 1 to 4.
      guessed: number of the prediction's n-grams.
      length: number of words of the prediction.
      reference_length: number of words of the reference whose length is closest. Of two, the shorter.
    """

    correct: Int[np.ndarray, 'images 4']
    guessed: Int[np.ndarray, 'images 4']
    length: Int[np.ndarray, ' images']
    reference_length: Int[np.ndarray, ' images']

    def corpus(self, indices: Int[np.ndarray, ' drawn'] | None = None) -> Float[np.ndarray, ' 4']:
        """Return BLEU-1 to BLEU-4 of a corpus, times 100.

        Args:
          indices: the images of the corpus, which may repeat; None means each image once.
        """
        rows = slice(None) if indices is None else indices
        return _bleu(
            self.correct[rows].sum(axis=0),
            self.guessed[rows].sum(axis=0),
            self.length[rows].sum(),
            self.reference_length[rows].sum(),
        )

    def per_image(self) -> Float[np.ndarray, 'images 4']:
        """Return BLEU-1 to BLEU-4 of each image, times 100. The mean over images is not BLEU of the corpus."""
        return _bleu(self.correct, self.guessed, self.length, self.reference_length)


def bleu_counts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> BleuCounts:
    """Count the n-grams that BLEU needs.

    The definition is that of Papineni et al. (BLEU, ACL 2002), with n-grams clipped by the maximum over references, and
    the result that of `pycocoevalcap.bleu`.

    Args:
      predictions: one caption per image, as words separated by spaces (`ptb_tokenizer.tokenize`).
      references: the reference captions of each image, likewise. Each image has at least one.

    >>> bleu_counts(['a red bus'], [['a red car', 'the bus']]).corpus().round(1).tolist()
    [100.0, 70.7, 0.0, 0.0]
    """
    correct = np.zeros((len(predictions), ORDERS), np.int64)
    lengths = np.zeros(len(predictions), np.int64)
    reference_lengths = np.zeros(len(predictions), np.int64)
    for image, (prediction, captions) in enumerate(zip(predictions, references, strict=True)):
        words = prediction.split()
        split = [caption.split() for caption in captions]
        lengths[image] = len(words)
        reference_lengths[image] = min((abs(len(other) - len(words)), len(other)) for other in split)[1]
        for order in range(1, ORDERS + 1):
            allowed: Counter[tuple[str, ...]] = Counter()
            for other in split:
                allowed |= _grams(other, order)  # the maximum of the counts
            # The intersection has the minimum of the counts.
            correct[image, order - 1] = (_grams(words, order) & allowed).total()
    guessed = np.maximum(lengths[:, None] - np.arange(ORDERS), 0)
    return BleuCounts(correct, guessed, lengths, reference_lengths)


def _grams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    # `zip` stops at the shortest argument, so a caption of fewer than `order` words has no n-gram.
    return Counter(zip(*(words[first:] for first in range(order)), strict=False))


def _bleu(
    correct: Int[np.ndarray, '*images 4'],
    guessed: Int[np.ndarray, '*images 4'],
    length: Int[np.ndarray, '*images'] | np.integer,
    reference_length: Int[np.ndarray, '*images'] | np.integer,
) -> Float[np.ndarray, '*images 4']:
    """Return BLEU-1 to BLEU-4, times 100, from counts."""
    precision = (correct + _TINY) / (guessed + _SMALL)
    geometric_mean = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity_penalty = np.exp(np.minimum(1 - 1 / ratio, 0))
    return PERCENT * geometric_mean * np.expand_dims(brevity_penalty, -1)
