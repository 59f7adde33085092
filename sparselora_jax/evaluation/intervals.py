"""Compute 95 % confidence intervals: of a score, of the difference between two models, of a mean of a few values."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95  # confidence level of every interval
RESAMPLES = 2000
SEED = 0


def paired_interval(
    first: Float[np.ndarray, ' questions'], second: Float[np.ndarray, ' questions']
) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of `first` minus the mean of `second`.

    Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Questions are
    resampled in pairs: both models answered the same ones, so what makes a question hard cancels out.

    Args:
      first: scores of one model, one per question.
      second: scores of the other model on the same questions, in the same order.

    Returns:
      The lower and the upper end of the interval. The same scores give the same interval on every call.

    >>> paired_interval(np.ones(100), np.zeros(100))
    (1.0, 1.0)
    """
    # One sample of differences, not two samples of scores: this is what keeps the pairs together.
    return _bootstrap(first - second)


def score_interval(scores: Float[np.ndarray, ' questions']) -> tuple[float, float]:
    """Return the 95 % confidence interval of one model's mean score.

    Scores of 0 and 1 alone get Wilson's interval, which stays honest near 0 % and 100 %. Other scores are resampled.

    Args:
      scores: one score per question, from 0 to 1.

    >>> [round(end, 3) for end in score_interval(np.ones(100))]
    [0.963, 1.0]
    """
    if not np.isin(scores, (0.0, 1.0)).all():
        return _bootstrap(scores)
    # A bootstrap of equal scores has no width, although 100 right answers do not prove a model without faults.
    interval = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(LEVEL, method='wilson')
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half width of its 95 % interval by Student's t, which is None for a single value.

    Args:
      values: independent values, such as one for each seed.

    >>> mean_interval([1.0, 2.0, 3.0])[0], round(mean_interval([1.0, 2.0, 3.0])[1], 3), mean_interval([2.0])
    (2.0, 2.484, (2.0, None))
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    deviation = np.std(values, ddof=1)  # of a sample, not of the population
    if deviation == 0:
        # scipy returns NaN for a distribution without spread.
        return mean, 0.0
    # The interval is around 0, because only the half width is needed: subtracting the mean would lose digits.
    _, half = stats.t.interval(LEVEL, df=len(values) - 1, loc=0.0, scale=deviation / len(values) ** 0.5)
    return mean, float(half)


def _bootstrap(values: Float[np.ndarray, ' questions']) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean."""
    if len(values) == 1:
        # With one question every resample is the same, and scipy rejects samples of fewer than two.
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method='percentile',
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)
