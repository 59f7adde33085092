"""Compute the accuracy of GQA: one reference per question, and equality of texts."""

from collections.abc import Mapping, Sequence

import numpy as np

from sparselora_jax.evaluation.metrics.answer_text import Remembered, official_text
from sparselora_jax.evaluation.metrics.scored import GroupedMeans, check_texts, grouped_means
from sparselora_jax.runtime.errors import DataError

RULES = ('exact', 'lavis')


def gqa_accuracy(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    rule: str = 'exact',
    groups: Mapping[str, Sequence[str]] | None = None,
) -> GroupedMeans:
    """Score answers to the questions of GQA.

    The official evaluator also computes consistency, validity, plausibility and distribution, which need files of
    choices and scene graphs. They are not computed here.

    Args:
      predictions: the generated answers.
      references: the correct answer of each question.
      rule: 'exact' compares the texts as they are, like the official `eval.py`: capitals and full stops count. 'lavis'
        (the paper's) normalises predictions like VQA answers, and leaves references as they are.
      groups: for each grouping, the group of every question, such as the types 'structural' and 'semantic' of GQA.

    Returns:
      Scores of 0 and 1, and their means.

    Raises:
      DataError: lists differ in length, an entry is not a text, or there is no such rule.

    >>> gqa_accuracy(['Yes.', 'left'], ['yes', 'left']).aggregate()
    {'overall': 50.0}
    >>> gqa_accuracy(['Yes.', 'left'], ['yes', 'left'], rule='lavis').aggregate()
    {'overall': 100.0}
    """
    if rule not in RULES:
        raise DataError(f'rule {rule!r}: expected one of {", ".join(RULES)}')
    check_texts(predictions, 'prediction')
    check_texts(references, 'reference', len(predictions))
    if rule == 'lavis':
        # Unlike for VQA, LAVIS does not replace line breaks by spaces before it looks for spaces beside marks.
        normalised = Remembered(official_text)
        predictions = [normalised[prediction] for prediction in predictions]
    # No whitespace is stripped, and capitals count, as in the official evaluator.
    equal = [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
    return grouped_means(np.array(equal, np.float64), groups)
