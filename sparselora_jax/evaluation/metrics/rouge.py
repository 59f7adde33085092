"""Compute ROUGE-L, which compares captions by their longest common subsequence of words."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

BETA = 1.2  # weight of recall against precision, in COCO's evaluation code
PERCENT = 100.0


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, ' images']:
    """Return the ROUGE-L of each image. The score of a set of images is the mean.

    The definition is that of Lin (ROUGE, ACL 2004 workshop, section 3.1), and the result that of
    `pycocoevalcap.rouge`. With several references, the highest precision and the highest recall make the score,
    although they may belong to different references. An empty caption counts as one empty word there, so an empty
    prediction has 100 if a reference is empty too, and otherwise 0.

    Args:
      predictions: one caption per image, as words separated by one space (`ptb_tokenizer.tokenize`).
      references: the reference captions of each image, likewise. Each image has at least one.

    Returns:
      ROUGE-L times 100.

    >>> rouge_l(['a red bus', ''], [['the bus', 'a bus'], ['a dog']]).round(1).tolist()
    [83.0, 0.0]
    """
    pairs = zip(predictions, references, strict=True)
    return np.array([_score(prediction.split(' '), captions) for prediction, captions in pairs], np.float64)


def _score(prediction: list[str], references: Sequence[str]) -> float:
    """Return the ROUGE-L of one image, times 100."""
    positions = _positions(prediction)
    precision = 0.0
    recall = 0.0
    for reference in references:
        words = reference.split(' ')
        common = _common_length(positions, len(prediction), words)
        precision = max(precision, common / len(prediction))
        recall = max(recall, common / len(words))
    if not precision or not recall:
        return 0.0
    return PERCENT * (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _positions(words: list[str]) -> dict[str, int]:
    """Return an integer for each word whose bits tell the positions of the word."""
    positions: dict[str, int] = {}
    for place, word in enumerate(words):
        positions[word] = positions.get(word, 0) | 1 << place
    return positions


def _common_length(positions: dict[str, int], length: int, words: list[str]) -> int:
    """Return the length of the longest common subsequence of two texts.

    One row of the usual table is the bits of an integer: a bit of 0 marks where the row increases by one. So a word
    costs a few operations on integers instead of a row of comparisons (Hyyrö, Bit-parallel LCS-length computation
    revisited, AWOCA 2004).

    Args:
      positions: the first text, from `_positions`.
      length: number of words of the first text.
      words: the second text.
    """
    everywhere = (1 << length) - 1
    row = everywhere
    for word in words:
        matches = row & positions.get(word, 0)
        # The sum carries a match to the next place where the row increases. Bits beyond the text are cut off.
        row = ((row + matches) | (row - matches)) & everywhere
    return length - row.bit_count()
