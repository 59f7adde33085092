"""Compute the accuracy of ScienceQA: find the letter of a choice in a generated text."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from sparselora_jax.evaluation.metrics.scored import GroupedMeans, check_texts, grouped_means
from sparselora_jax.runtime.errors import DataError

# No question of ScienceQA has more than five choices.
LETTERS = 'ABCDE'
# LLaVA's pattern. Its last '.' is any character, so 'The answer is A' at the very end of a text is not found.
_SENTENCE = re.compile(r'The answer is ([A-Z]).')


def answer_letter(text: str) -> str | None:
    """Find the letter that a text answers with, by the rule of LLaVA's `eval_science_qa.py`.

    The text is a letter from A to E, or begins with one and '. ', or contains 'The answer is X.' exactly once.

    Args:
      text: the generated answer. It is not stripped.

    Returns:
      The letter, or None.

    >>> answer_letter('B'), answer_letter('B. a magnet'), answer_letter('It is iron. The answer is C.')
    ('B', 'B', 'C')
    >>> answer_letter('b') is answer_letter('B.') is answer_letter(' B') is None
    True
    """
    # Tested by slices, because a letter is in 'ABCDE', but so are '' and 'AB'.
    first = text[:1]
    begins_with_letter = first != '' and first in LETTERS
    if begins_with_letter and (len(text) == 1 or text[1:3] == '. '):
        return first
    # Two sentences, even equal ones, count as no answer.
    sentences = _SENTENCE.findall(text)
    return sentences[0] if len(sentences) == 1 else None


def science_qa_accuracy(
    predictions: Sequence[str],
    answers: Sequence[int],
    choices: Sequence[int],
    has_image: Sequence[bool],
    groups: Mapping[str, Sequence[str]] | None = None,
) -> GroupedMeans:
    """Score answers to the multiple-choice questions of ScienceQA.

    A text without a letter, or with the letter of a choice that the question does not have, is wrong.

    Args:
      predictions: the generated answers.
      answers: the index of the correct choice of each question, from 0.
      choices: the number of choices of each question, at most 5.
      has_image: whether a question has an image.
      groups: for each further grouping, the group of every question, e.g. 'subject'.

    Returns:
      Scores of 0 and 1, and their means: 'overall', 'input/image' (questions with an image, which LLaVA reports as
      IMG-Accuracy) and 'input/text'.

    Raises:
      DataError: lists differ in length, a prediction is not a text, or a question does not have the choice that is
        said to be correct.

    >>> science_qa_accuracy(['A', 'D. iron'], [0, 3], [2, 4], [True, False]).aggregate()
    {'overall': 100.0, 'input/image': 100.0, 'input/text': 100.0}
    """
    check_texts(predictions, 'prediction')
    for name, values in (('answers', answers), ('choices', choices), ('has_image', has_image)):
        if len(values) != len(predictions):
            raise DataError(f'{len(values):,} {name} for {len(predictions):,} predictions: expected one for each')
    # LLaVA counts a question without a prediction as wrong. Here, an empty text does the same.
    scores = np.zeros(len(predictions), np.float64)
    for index, (prediction, answer, count) in enumerate(zip(predictions, answers, choices, strict=True)):
        if not 0 <= answer < count <= len(LETTERS):
            raise DataError(
                f'question {index}: the correct choice is number {answer} of {count}; '
                f'expected a number from 0 to {count - 1}, and at most {len(LETTERS)} choices'
            )
        # The correct letter is one of the question's, so equality also rules out letters of missing choices.
        scores[index] = answer_letter(prediction) == LETTERS[answer]
    # A grouping like any other, so that a bootstrap sample needs no special case.
    inputs = ['image' if with_image else 'text' for with_image in has_image]
    return grouped_means(scores, {'input': inputs} | dict(groups or {}))
