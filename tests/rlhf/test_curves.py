"""Expected maximum and median of N of K scores, against all subsets; what is written of them."""

from __future__ import annotations

import csv
import io
import math
import statistics
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.rlhf.rejection.curves import Curves, order_statistic, rank_weights


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=7))
def test_they_are_means_over_all_subsets(scores):
    k = len(scores)
    curves = Curves((1.0,), k)
    curves.add(np.array([scores]))
    for n in range(1, k + 1):
        subsets = list(combinations(scores, n))
        expected = [statistics.fmean(map(f, subsets)) for f in (max, statistics.median)]
        assert curves.means[:, 0, n - 1] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_probabilities_are_exact_where_binomials_are_large():
    k = 200
    for n, r in ((1, 1), (2, 1), (99, 50), (100, 100), (150, 3), (200, 200), (200, 100)):
        exact = [
            float(Fraction(math.comb(i - 1, r - 1) * math.comb(k - i, n - r), math.comb(k, n))) for i in range(1, k + 1)
        ]
        np.testing.assert_allclose(order_statistic(k, n, r), exact, rtol=1e-10, atol=1e-300)


def test_thousands_of_samples_stay_finite():
    for n in (1, 750, 1500):
        weights = order_statistic(1500, n, n)
        assert weights.min() >= 0 and weights.sum() == pytest.approx(1, abs=1e-12)
    assert np.flatnonzero(order_statistic(1500, 1500, 1500)).tolist() == [1499]


def test_all_of_them_give_the_maximum_and_the_median_themselves():
    top, middle = rank_weights(4)
    assert top[-1].tolist() == [0, 0, 0, 1]
    assert middle[-1].tolist() == [0, 0.5, 0.5, 0]
    np.testing.assert_allclose(top[0], 0.25)
    np.testing.assert_allclose(middle[0], 0.25)


def two_temperatures() -> Curves:
    curves = Curves((0.5, 1.5), 3)
    curves.add(np.array([[1.0, 1.0, 1.0], [-4.0, 5.0, -1.0]]))
    curves.add(np.array([[2.0, 4.0, 0.0], [3.0, 3.0, 3.0]]))
    return curves


def test_prompts_count_alike_and_the_best_temperature_is_that_of_the_largest_maximum():
    curves = two_temperatures()
    np.testing.assert_allclose(curves.means[0], [[1.5, (1 + 10 / 3) / 2, 2.5], [1.5, 3.0, 4.0]])
    np.testing.assert_allclose(curves.means[1][:, -1], [1.5, 1.0])
    assert curves.best() == 1
    even = Curves((0.5, 1.5), 1)
    even.add(np.array([[0.0], [0.0]]))
    assert even.best() == 0, "of equals the first"


def test_the_table_has_a_row_for_each_temperature_and_number():
    curves = two_temperatures()
    rows = list(csv.DictReader(io.StringIO(curves.table())))
    assert [(row["temperature"], row["n"]) for row in rows] == [(t, n) for t in ("0.5", "1.5") for n in "123"]
    assert [float(row["max_mean"]) for row in rows] == curves.means[0].ravel().tolist()
    assert [float(row["median_mean"]) for row in rows] == curves.means[1].ravel().tolist()


def test_the_picture_is_a_png_and_the_same_each_time():
    picture = two_temperatures().picture()
    assert picture.startswith(b"\x89PNG\r\n") and len(picture) > 5000
    assert picture == two_temperatures().picture()
