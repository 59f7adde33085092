"""Compute confidence intervals of the difference between two models, by a paired bootstrap over questions."""

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95  # confidence level of the interval
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
    differences = first - second
    if len(differences) == 1:
        # With one question every resample is the same, and scipy rejects samples of fewer than two.
        return float(differences[0]), float(differences[0])
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method='percentile',
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)
