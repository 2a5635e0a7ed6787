"""Student's t, Holm's method and rank correlation, against printed tables and simulation."""

import numpy as np
import pytest

from significance import holm, p_value, rank_correlation, t_interval


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0, 2.0, 3.0), (2.0, 2.484)),  # as a table of Student's t gives it
        ((0.1, 0.1, 0.1, 0.1, 0.1), (0.1, 0.0)),
        ((1.0, 3.0), (2.0, 12.706)),
        ((4.0,), (4.0, float("inf"))),
    ],
)
def test_intervals_of_students_t(values, expected):
    assert t_interval(values) == pytest.approx(expected, abs=1e-3)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    held = [abs(mean - 3.0) <= half for mean, half in map(t_interval, draws.tolist())]
    assert 0.94 < np.mean(held) < 0.96


def test_an_interval_excludes_zero_where_the_p_value_is_below_five_percent():
    for values in np.random.default_rng(1).normal(1.0, 1.0, size=(300, 4)).tolist():
        mean, half = t_interval(values)
        assert (abs(mean) > half) == (p_value(values) < 0.05)


@pytest.mark.parametrize(("values", "expected"), [((), 1), ((2.0,), 1), ((0.0, 0.0), 1), ((0.1, 0.1), 0)])
def test_p_values_where_nothing_varies(values, expected):
    assert p_value(values) == expected


def test_holm_by_hand():
    # 0.01 <= 0.05 / 4 and 0.015 <= 0.05 / 3; 0.03 > 0.05 / 2 ends it, for what is behind it, too.
    assert holm({"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.015}) == {"b", "d"}
    assert holm({}) == set() and holm({"a": 0.06}) == set() and holm({"a": 0.05}) == {"a"}


def test_holm_is_seldom_wrong_about_any_of_twenty_true_nulls():
    generator = np.random.default_rng(2)
    wrong = [bool(holm(dict(enumerate(map(p_value, generator.normal(size=(20, 5)).tolist()))))) for _ in range(400)]
    assert 0.01 < np.mean(wrong) < 0.09


def test_rank_correlation_sees_order_alone():
    points = np.array([[1.0, 1.0], [2.0, 10.0], [3.0, 100.0], [4.0, 1000.0]])
    assert rank_correlation(points) == pytest.approx(1.0)
    assert rank_correlation(points * [1, -1]) == pytest.approx(-1.0)
    # Ranks 1, 2, 3, 4 and, with a tie, 1, 2.5, 2.5, 4: by hand 4.5 / sqrt(5 * 4.5).
    assert rank_correlation(np.array([[1.0, 5], [2, 7], [3, 7], [4, 9]])) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
