"""Compute the metrics of POPE: yes-or-no questions about objects that may not be in the image.

POPE (Li et al., Evaluating Object Hallucination in Large Vision-Language Models, 2023) has three categories of 3,000
questions: random, popular and adversarial. 'yes' is the positive class. Free text is read as in the official evaluator,
which LLaVA's `eval_pope.py` repeats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sparselora_jax.evaluation.metrics.scored import Grouping, check_texts, group_items, select
from sparselora_jax.runtime.errors import DataError

# 'Not' and 'NO' are missing in the official evaluator, so they are missing here.
NEGATIVE_WORDS = frozenset({'No', 'no', 'not'})
CATEGORY = 'category'


def says_yes(text: str) -> bool:
    """Read a generated text as yes or no.

    Only the text before the first '.' counts, without commas. It means no if 'No', 'no' or 'not' is one of its words
    (split at single spaces), otherwise yes. So an empty text means yes.

    Args:
      text: the generated answer.

    >>> says_yes('Yes, there is a dog.'), says_yes('There is not. Yes'), says_yes('NO'), says_yes('nothing')
    (True, False, True, True)
    """
    first_sentence = text.split('.')[0]
    # Not `split()`: with line breaks as separators, 'no\n' would mean no, unlike in the official evaluator.
    words = first_sentence.replace(',', '').split(' ')
    return NEGATIVE_WORDS.isdisjoint(words)


@dataclass(frozen=True)
class PopeScored:
    """The result of POPE: a `Scored` with values that are not means of scores.

    Attributes:
      per_item: 1 for a right answer, otherwise 0.
      predicted_yes: whether the text says yes.
      truly_yes: whether the object is in the image.
      categories: the category of each question; None: there are none.
      notes: see `Scored`.
    """

    per_item: Float[np.ndarray, ' items']
    predicted_yes: Bool[np.ndarray, ' items']
    truly_yes: Bool[np.ndarray, ' items']
    categories: Grouping | None = None
    notes: tuple[str, ...] = ()

    def aggregate(self, indices: Int[np.ndarray, ' sample'] | None = None) -> dict[str, float]:
        """Return the values of POPE in percent over a selection of the items (see `Scored.aggregate`).

        Args:
          indices: the items. None: all items.

        Returns:
          'accuracy', 'precision', 'recall', 'f1' and 'yes_ratio' (share of questions that the model answers with yes)
          of all items together; the same of each category, e.g. 'category/random/f1'; and 'mean_f1', the mean of the
          categories' F1 scores, which papers report. A value whose denominator is 0 is 0, so that a model that never
          says yes has precision 0. All values of a category without items are NaN, and 'mean_f1' leaves it out.
        """
        # One number for each of the four outcomes, so that a single count gives the whole confusion matrix.
        outcomes = 2 * select(self.truly_yes, indices).astype(np.int64) + select(self.predicted_yes, indices)
        values = _confusion_values(np.bincount(outcomes, minlength=4))
        if self.categories is None:
            return values
        labels = self.categories.labels
        # The same for all categories at once: four neighbouring cells belong to one category.
        cells = 4 * select(self.categories.codes, indices) + outcomes
        f1_scores = []
        for label, counts in zip(labels, np.bincount(cells, minlength=4 * len(labels)).reshape(-1, 4), strict=True):
            of_category = _confusion_values(counts)
            values |= {f'{CATEGORY}/{label}/{name}': value for name, value in of_category.items()}
            f1_scores.append(of_category['f1'])
        # A small bootstrap sample may miss a category, which must not make the headline NaN.
        present = [score for score in f1_scores if not math.isnan(score)]
        values['mean_f1'] = sum(present) / len(present) if present else math.nan
        return values


def pope(predictions: Sequence[str], labels: Sequence[str], categories: Sequence[str] | None = None) -> PopeScored:
    """Score answers to the questions of POPE.

    Args:
      predictions: the generated texts.
      labels: the correct answers, 'yes' or 'no'.
      categories: the category of each question: 'random', 'popular' or 'adversarial'.

    Returns:
      Scores of 0 and 1, and what the aggregate values are computed from.

    Raises:
      DataError: lists differ in length, or an entry is not a text or not a label.

    >>> result = pope(['Yes.', 'No', 'There is one'], ['yes', 'no', 'no'], ['random', 'random', 'popular'])
    >>> values = result.aggregate()
    >>> values['precision'], values['recall'], values['category/random/f1'], values['mean_f1']
    (50.0, 100.0, 100.0, 50.0)
    """
    check_texts(predictions, 'prediction')
    check_texts(labels, 'label', len(predictions))
    for index, label in enumerate(labels):
        # The official evaluator takes any label but 'no' as yes, which would hide a mistake such as 'No'.
        if label not in ('yes', 'no'):
            raise DataError(f"label {index} is {label!r}: expected 'yes' or 'no'")
    predicted_yes = np.array([says_yes(prediction) for prediction in predictions], bool)
    truly_yes = np.array([label == 'yes' for label in labels], bool)
    grouping = None if categories is None else group_items(CATEGORY, categories, len(predictions))
    return PopeScored((predicted_yes == truly_yes).astype(np.float64), predicted_yes, truly_yes, grouping)


def _confusion_values(counts: Int[np.ndarray, ' 4']) -> dict[str, float]:
    """Return the five values, in percent, of counts of (true, predicted): no no, no yes, yes no, yes yes."""
    true_no, false_yes, false_no, true_yes = counts.tolist()
    items = true_no + false_yes + false_no + true_yes
    if not items:
        return dict.fromkeys(('accuracy', 'precision', 'recall', 'f1', 'yes_ratio'), math.nan)
    return {
        'accuracy': 100 * _ratio(true_yes + true_no, items),
        'precision': 100 * _ratio(true_yes, true_yes + false_yes),
        'recall': 100 * _ratio(true_yes, true_yes + false_no),
        # Equal to 2pr / (p + r), and defined where precision or recall is 0.
        'f1': 100 * _ratio(2 * true_yes, 2 * true_yes + false_yes + false_no),
        'yes_ratio': 100 * _ratio(true_yes + false_yes, items),
    }


def _ratio(part: int, whole: int) -> float:
    """Return part / whole, or 0 if whole is 0."""
    return part / whole if whole else 0.0
