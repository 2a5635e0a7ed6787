"""What a few seeds can show: Student's t, several tests together, and rank correlation.

In NumPy alone: scipy, which has the same, would be a dependency for four numbers.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

SIGNIFICANCE = 0.05  # intervals are of 1 - SIGNIFICANCE


def student_tail(size: float, degrees: int) -> float:
    """P(|T| > size) of Student's t: with T = sqrt(degrees) tan(angle), the density is that of cos(angle)^(degrees - 1).

    Example: 4.303 with 2 degrees of freedom has 0.05.
    """

    def integral(begin: float) -> float:  # from there to a right angle, by midpoints
        angles = begin + (math.pi / 2 - begin) * (np.arange(2000) + 0.5) / 2000
        return (math.pi / 2 - begin) * float((np.cos(angles) ** (degrees - 1)).mean())

    return integral(math.atan(size / math.sqrt(degrees))) / integral(0.0)


@lru_cache
def student_quantile(degrees: int) -> float:
    """The size that |T| exceeds with probability SIGNIFICANCE: 12.706, 4.303, 3.182, ... by bisection."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, degrees) > SIGNIFICANCE else (low, middle)
    return high


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: infinite for a single value, 0 where nothing varies.

    Example: (1.0, 2.0, 3.0) gives 2.0 and 4.303 * 1 / sqrt(3) = 2.484.
    """
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return mean, math.inf
    return mean, student_quantile(count - 1) * _standard_error(values)


def p_value(values: Sequence[float]) -> float:
    """Two-sided probability of a mean at least so far from 0, were the true mean 0; 1 for fewer than two values."""
    if len(values) < 2 or not any(values):
        return 1.0
    error = _standard_error(values)
    return student_tail(abs(sum(values) / len(values)) / error, len(values) - 1) if error else 0.0


def _standard_error(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def holm(p_values: dict) -> set:
    """The keys whose p-values are significant when all are tested together, by Holm's step-down (1979)."""
    sure = set()
    for place, (key, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if value > SIGNIFICANCE / (len(p_values) - place):
            break
        sure.add(key)
    return sure


def rank_correlation(points: np.ndarray) -> float:
    """Spearman's; of equal values, each has the mean of their ranks."""
    ranks = [(column[:, None] > column).sum(1) + (column[:, None] == column).sum(1) / 2 for column in points.T]
    return float(np.corrcoef(ranks)[0, 1])
