"""Metrics: how well a generated answer agrees with the reference answer.

A metric scores one answer. `vqa.Answers` averages the scores over all questions and over each kind of question.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sparselora_jax.runtime.errors import SparseloraError
from sparselora_jax.runtime.registry import Registry


class MetricError(SparseloraError, ValueError):
    """A metric that fails, or whose score is not a number from 0 to 1."""


@runtime_checkable
class Metric(Protocol):
    """Scores one generated answer.

    Attributes:
      title: the name of the mean score in reports, e.g. 'accuracy'.
    """

    title: str

    def __call__(self, predicted: str, reference: str) -> float:
        """Return the score of one answer.

        Args:
          predicted: the generated answer.
          reference: the correct answer.

        Returns:
          A number from 0 (wrong) to 1 (right).
        """


@dataclass(frozen=True)
class ExactMatch:
    """Score 1 if the whole answers are equal, ignoring case.

    Punctuation counts: answer texts that end with a full stop need answers that do so too.

    >>> ExactMatch()('Yes', 'yes'), ExactMatch()('circles', 'circle'), ExactMatch()('yes.', 'yes')
    (1.0, 0.0, 0.0)
    """

    title: str = 'accuracy'

    def __call__(self, predicted: str, reference: str) -> float:
        """Return 1.0 if the answers are equal without regard to case, otherwise 0.0."""
        return float(predicted.lower() == reference.lower())


# A config names a metric by its name here, or as `package.module:Name`.
METRICS: Registry[Metric] = Registry('metric')
EXACT_MATCH = METRICS.register('exact_match', ExactMatch())


def score(metric: Metric, predicted: str, reference: str) -> float:
    """Score one answer, and check the score.

    Args:
      metric: the metric.
      predicted: the generated answer.
      reference: the correct answer.

    Raises:
      MetricError: the metric raises, or returns anything but a number from 0 to 1.
    """
    try:
        value = metric(predicted, reference)
        is_score = 0 <= value <= 1  # False for NaN
    except Exception as error:  # a metric may be anybody's code
        raise MetricError(f'metric {metric.title!r} fails on {predicted!r}, {reference!r}: {error!r}') from error
    if not is_score:
        raise MetricError(
            f'metric {metric.title!r} returns {value!r} for {predicted!r}, {reference!r}: expected a number from 0 to 1'
        )
    return float(value)
