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

    Scores of 0 and 1 alone get Newcombe's interval for paired proportions (Statistics in Medicine 17, 1998, pp.
    2635-2650, method 10), which keeps a width where both models gave the same answers. Other scores get a percentile
    bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Both keep the pairs: the two
    models answered the same questions, so what makes a question hard cancels out.

    Args:
      first: scores of one model, one per question.
      second: scores of the other model on the same questions, in the same order.

    Returns:
      The lower and the upper end of the interval. The same scores give the same interval on every call.

    >>> [round(end, 3) for end in paired_interval(np.ones(100), np.zeros(100))]
    [0.948, 1.0]
    """
    if not (_is_binary(first) and _is_binary(second)):
        # One sample of differences, not two samples of scores: this is what keeps the pairs together.
        return _bootstrap(first - second)
    first_low, first_high = score_interval(first)
    second_low, second_high = score_interval(second)
    # The distances from each mean to the ends of its own interval.
    first_below = first.mean() - first_low
    first_above = first_high - first.mean()
    second_below = second.mean() - second_low
    second_above = second_high - second.mean()
    # Two models that are right on the same questions differ by less than two models of the same scores elsewhere.
    correlation = _correlation(first, second)
    below = first_below**2 + second_above**2 - 2 * correlation * first_below * second_above
    above = first_above**2 + second_below**2 - 2 * correlation * first_above * second_below
    difference = first.mean() - second.mean()
    return float(difference - below**0.5), float(difference + above**0.5)


def score_interval(scores: Float[np.ndarray, ' questions']) -> tuple[float, float]:
    """Return the 95 % confidence interval of one model's mean score.

    Scores of 0 and 1 alone get Wilson's interval, which stays honest near 0 % and 100 %. Other scores are resampled.

    Args:
      scores: one score per question, from 0 to 1.

    >>> [round(end, 3) for end in score_interval(np.ones(100))]
    [0.963, 1.0]
    """
    if not _is_binary(scores):
        return _bootstrap(scores)
    # A bootstrap of equal scores has no width, although 100 right answers do not prove a model without faults.
    interval = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(LEVEL, method='wilson')
    return float(interval.low), float(interval.high)


def normal_interval(value: float, draws: Float[np.ndarray, ' resamples']) -> tuple[float, float]:
    """Return the 95 % interval of a value whose spread is known from a bootstrap.

    It is the value plus and minus 1.96 standard deviations of the draws (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, section 13.2), which needs far fewer draws than percentiles.

    Args:
      value: the value on all items.
      draws: its values in the resamples. Of a difference, those of the paired draws.

    >>> [round(end, 2) for end in normal_interval(1.0, np.array([0.0, 1.0, 2.0]))]
    [-0.96, 2.96]
    """
    half = stats.norm.ppf((1 + LEVEL) / 2) * np.std(draws, ddof=1)
    return float(value - half), float(value + half)


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


def _is_binary(scores: Float[np.ndarray, ' questions']) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _correlation(first: Float[np.ndarray, ' questions'], second: Float[np.ndarray, ' questions']) -> float:
    """Return the correlation of scores of 0 and 1, with Newcombe's correction for continuity; 0 if one is constant."""
    both = first @ second
    neither = (1 - first) @ (1 - second)
    covariance = both * neither - (first @ (1 - second)) * ((1 - first) @ second)
    if covariance > 0:
        covariance = max(covariance - len(first) / 2, 0.0)
    spread = first.sum() * (1 - first).sum() * second.sum() * (1 - second).sum()
    return float(covariance / spread**0.5) if spread else 0.0


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
