"""Results of metrics: a score for each item, and aggregate values of any selection of the items.

A metric compares texts once, which is slow. It keeps arrays with one entry per item, so that the aggregate values of a
bootstrap sample need only indexing and counting.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from sparselora_jax.runtime.errors import DataError

RESAMPLES = 1000  # of a bootstrap
SEED = 0


# A Protocol and not a base class: POPE's values are not means, so the results share no code.
@runtime_checkable
class Scored(Protocol):
    """The result of a metric.

    Attributes:
      per_item: a score from 0 (wrong) to 1 (right) for each item.
      notes: sentences that a report must show beside the values, for example that a step was left out.
    """

    per_item: Float[np.ndarray, ' items']
    notes: tuple[str, ...]

    def aggregate(self, indices: Int[np.ndarray, ' sample'] | None = None) -> dict[str, float]:
        """Return the metric's values over a selection of the items.

        Args:
          indices: the items, in any order; an item may occur several times, as in a bootstrap sample. None: all items.

        Returns:
          Values in percent by name, not rounded. The value of a group without items is NaN.
        """


@dataclass(frozen=True)
class Grouping:
    """A partition of the items, for example by the type of the answer.

    Attributes:
      name: what the items are grouped by, e.g. 'answer_type'.
      labels: the names of the groups, in the order in which they first appear.
      codes: for each item, the index of its group in `labels`.
    """

    name: str
    labels: tuple[str, ...]
    codes: Int[np.ndarray, ' items']


@dataclass(frozen=True)
class GroupedMeans:
    """A `Scored` whose values are mean scores: overall, and in each group of each grouping.

    The names of the values are 'overall' and 'grouping/group'. Everything after the first '/' is the group:

    >>> scored = grouped_means(np.array([1.0, 0.0, 1.0]), {'answer_type': ['yes/no', 'yes/no', 'other']})
    >>> scored.aggregate()
    {'overall': 66.66666666666667, 'answer_type/yes/no': 50.0, 'answer_type/other': 100.0}
    >>> scored.aggregate(np.array([0, 0, 2]))
    {'overall': 100.0, 'answer_type/yes/no': 100.0, 'answer_type/other': 100.0}
    """

    per_item: Float[np.ndarray, ' items']
    groupings: tuple[Grouping, ...] = ()
    notes: tuple[str, ...] = ()

    def aggregate(self, indices: Int[np.ndarray, ' sample'] | None = None) -> dict[str, float]:
        """Return mean scores in percent over a selection of the items (see `Scored.aggregate`).

        Args:
          indices: the items. None: all items.
        """
        scores = select(self.per_item, indices)
        # 'overall' is the mean of one group that contains every item.
        values = {'overall': _percent(scores, np.zeros(len(scores), np.int64), 1)[0]}
        for grouping in self.groupings:
            # Counted for all groups at once: VQAv2 has 65 question types, and a mask for each would read 65 arrays.
            percent = _percent(scores, select(grouping.codes, indices), len(grouping.labels))
            for label, value in zip(grouping.labels, percent, strict=True):
                values[f'{grouping.name}/{label}'] = value
        return values


def _percent(scores: Float[np.ndarray, ' items'], codes: Int[np.ndarray, ' items'], groups: int) -> list[float]:
    """Return the mean score of each group in percent; NaN for a group without items."""
    # `bincount` adds in the order of the items, as the public evaluators do, so that sums agree to the last bit.
    totals = np.bincount(codes, scores, groups)
    counts = np.bincount(codes, minlength=groups)
    pairs = zip(totals.tolist(), counts.tolist(), strict=True)
    return [100 * total / count if count else math.nan for total, count in pairs]


def grouped_means(
    per_item: Float[np.ndarray, ' items'], groups: Mapping[str, Sequence[str]] | None = None, notes: Sequence[str] = ()
) -> GroupedMeans:
    """Build the result of a metric whose values are mean scores.

    Args:
      per_item: the scores.
      groups: for each grouping, the group of every item: {'answer_type': ['yes/no', 'other', ...]}.
      notes: see `Scored`.

    Raises:
      DataError: a grouping does not name one group for each item.
    """
    groupings = [group_items(name, labels, len(per_item)) for name, labels in (groups or {}).items()]
    return GroupedMeans(per_item, tuple(groupings), tuple(notes))


def group_items(name: str, labels: Sequence[str], items: int) -> Grouping:
    """Number the groups of a grouping.

    Args:
      name: what the items are grouped by.
      labels: the group of each item.
      items: the number of items.

    Raises:
      DataError: there is not one text for each item, or the name contains '/'.

    >>> group_items('answer_type', ['other', 'number', 'other'], 3).labels
    ('other', 'number')
    """
    # A group may contain '/' ('yes/no'), so the name of the grouping must not.
    if '/' in name:
        raise DataError(f"grouping {name!r}: its name must not contain '/', which separates it from a group")
    check_texts(labels, name, items)
    # `dict.fromkeys` drops repetitions and, unlike a set, keeps the order.
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return Grouping(name, tuple(numbers), np.array([numbers[label] for label in labels], np.int64))


def check_texts(texts: Sequence[object], name: str, items: int | None = None) -> None:
    """Check that a list contains only texts.

    Args:
      texts: the list.
      name: what one of the texts is, for messages, e.g. 'prediction'.
      items: the number of texts that is needed; None: any number except 0.

    Raises:
      DataError: the list has another length, or an entry is not a text; names the entry.
    """
    # An empty list has no mean. It usually comes from a split or a filter that selects nothing.
    if not len(texts) and not items:
        raise DataError(f'no {name} to score: the list is empty')
    if items is not None and len(texts) != items:
        raise DataError(f'{len(texts):,} entries of {name} for {items:,} predictions: expected one for each')
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f'{name} {index} is {text!r}: expected a text')


def standard_errors(scored: Scored, *, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, float]:
    """Return the standard error of each value, by the bootstrap.

    It is the standard deviation of the values of data sets drawn with replacement (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, algorithm 6.1).

    Args:
      scored: the result of a metric.
      resamples: number of data sets that are drawn, at least 2.
      seed: of the draws. The same seed gives the same standard errors.

    Returns:
      Standard errors by the names of the values, in their unit.

    Raises:
      DataError: there are no items, or fewer than two resamples.
    """
    return spreads(resampled_values(scored, resamples=resamples, seed=seed))


def resampled_values(
    scored: Scored, *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Float[np.ndarray, ' resamples']]:
    """Return the values of data sets that are drawn from the items with replacement.

    The same seed and number of items give the same draws. So the values of two models that answered the same questions
    are paired, draw by draw.

    Args:
      scored: the result of a metric.
      resamples: number of data sets that are drawn, at least 2.
      seed: of the draws.

    Returns:
      The values of all draws, by name. A group that a draw misses has NaN there.

    Raises:
      DataError: there are no items, or fewer than two resamples.
    """
    count = len(scored.per_item)
    if count < 1:
        raise DataError('a standard error needs at least one item: there is none')
    if resamples < 2:
        raise DataError(f'a standard error needs at least two resamples, not {resamples}')
    rng = np.random.default_rng(seed)
    # All values of one resample belong together, so items are drawn once for all of them.
    draws = [scored.aggregate(rng.integers(count, size=count)) for _ in range(resamples)]
    return {name: np.array([draw[name] for draw in draws]) for name in draws[0]}


def spreads(values: Mapping[str, Float[np.ndarray, ' resamples']]) -> dict[str, float]:
    """Return the standard deviation of each value over the draws of `resampled_values`; NaN with fewer than two values.

    Args:
      values: the values of all draws, by name.
    """
    # A group that a draw misses has no value there. `nanstd` would warn of a group with too few values.
    present = {name: of_draws[np.isfinite(of_draws)] for name, of_draws in values.items()}
    return {name: float(np.std(some, ddof=1)) if len(some) > 1 else math.nan for name, some in present.items()}


def select(array: np.ndarray, indices: Int[np.ndarray, ' sample'] | None) -> np.ndarray:
    """Return the entries of an array with one entry per item.

    Args:
      array: the array.
      indices: the items; None: all.
    """
    # Without indices there is no copy, which for a data set of millions would cost more than the sum.
    return array if indices is None else array[indices]


def rounded(values: Mapping[str, float], digits: int = 2) -> dict[str, float]:
    """Round aggregate values for a report; the official VQA evaluator reports two digits.

    Args:
      values: the result of `Scored.aggregate`.
      digits: number of decimal places.

    >>> rounded({'overall': 66.66666666666667})
    {'overall': 66.67}
    """
    return {name: round(value, digits) for name, value in values.items()}
