"""Equal divergence is read off a curve where it first gets there, and a difference is as wide as its two sides."""

import math

import numpy as np
import pytest

from helpers.chapters.three_sizes.method import at_equal_kl, common_level, difference
from helpers.statistics import Estimate, mean_estimate


def test_a_gain_is_read_between_two_scales_and_before_the_first():
    kl, gain = np.array([0.1, 0.3]), np.array([0.4, 0.6])
    assert at_equal_kl(kl, gain, 0.2) == pytest.approx(0.5)
    assert at_equal_kl(kl, gain, 0.05) == pytest.approx(0.2)
    assert at_equal_kl(kl, gain, 0.3) == pytest.approx(0.6)


def test_a_curve_that_comes_back_is_read_where_it_first_gets_there():
    assert at_equal_kl(np.array([0.4, 0.1, 0.5]), np.array([1.0, 5.0, 9.0]), 0.2) == pytest.approx(0.5)


def test_a_curve_that_never_gets_there_has_no_gain():
    assert math.isnan(at_equal_kl(np.array([0.1, 0.3]), np.array([0.4, 0.6]), 0.31))


def test_places_are_held_side_by_side_at_the_most_that_each_reaches():
    kls = np.array([[0.01, 0.04], [0.1, 0.9]])
    assert common_level(kls, 0.1) == 0.04
    assert common_level(kls, 0.02) == 0.02


def test_a_difference_of_two_models_covers_the_truth_as_often_as_it_says():
    rng, holds = np.random.default_rng(0), 0
    for _ in range(1000):
        first, second = mean_estimate(rng.normal(0.7, 1, 24)), mean_estimate(rng.normal(0.2, 2, 40))
        found = difference(first, second)
        holds += found.low <= 0.5 <= found.high
    assert 0.93 <= holds / 1000 <= 0.97


def test_each_end_of_a_difference_comes_from_the_ends_that_make_it():
    found = difference(Estimate(1.0, 0.7, 1.1, 9), Estimate(0.5, 0.5, 0.9, 5))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.5, 0.0, 0.6, 5))
