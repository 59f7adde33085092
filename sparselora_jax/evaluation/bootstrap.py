"""How sure a difference is: paired bootstrap over questions."""

import numpy as np
from jaxtyping import Bool


def paired_interval(
    first: Bool[np.ndarray, ' questions'],
    second: Bool[np.ndarray, ' questions'],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of accuracy(first) - accuracy(second), both measured on the same questions.

    >>> low, high = paired_interval(np.ones(100, bool), np.zeros(100, bool))
    >>> low, high
    (1.0, 1.0)
    """
    difference = first.astype(np.float64) - second.astype(np.float64)
    draws = np.random.default_rng(seed).integers(0, len(difference), (resamples, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
