"""What a few seeds can show: Student's t by scipy, and Holm's method for several tests together."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

SIGNIFICANCE = 0.05  # intervals are of 1 - SIGNIFICANCE


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: infinite for a single value, 0 where nothing varies.

    Example: (1.0, 2.0, 3.0) gives 2.0 and 4.303 * 1 / sqrt(3) = 2.484.
    """
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, math.inf
    return mean, float(stats.t.ppf(1 - SIGNIFICANCE / 2, len(values) - 1) * stats.sem(values))


def p_value(values: Sequence[float]) -> float:
    """Two-sided probability of a mean at least so far from 0, were the true mean 0; 1 for fewer than two values."""
    if len(values) < 2 or not any(values):
        return 1.0
    error = stats.sem(values)
    return float(2 * stats.t.sf(abs(np.mean(values)) / error, len(values) - 1)) if error else 0.0


def holm(p_values: dict) -> set:
    """The keys whose p-values are significant when all are tested together, by Holm's step-down (1979)."""
    sure = set()
    for place, (key, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if value > SIGNIFICANCE / (len(p_values) - place):
            break
        sure.add(key)
    return sure


def rank_correlation(points: np.ndarray) -> float:
    """Spearman's, of points (n, 2); of equal values, each has the mean of their ranks."""
    return float(np.corrcoef(stats.rankdata(points, axis=0).T)[0, 1])
