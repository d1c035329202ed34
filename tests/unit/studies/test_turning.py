"""Where a slope changes sign, and how well that is known."""

import numpy as np

from helpers.studies.turning import GRID, turning_estimate, turning_point


def test_the_turning_point_lies_on_the_line_between_the_points_around_it():
    assert turning_point((0.0, 1.0, 2.0), np.array([-3.0, -1.0, 1.0])) == 1.5
    assert turning_point((0.0, 2.0), np.array([-1.0, 3.0])) == 0.5
    assert np.isnan(turning_point((0.0, 1.0), np.array([1.0, 2.0])))  # already above
    assert np.isnan(turning_point((0.0, 1.0), np.array([-2.0, -1.0])))


def slopes(count, rng, turn=1.2, spread=0.3):
    """Planted: straight lines that turn about `turn`."""
    return np.array(GRID)[:, None] - turn - spread * rng.standard_normal(count)


def test_the_interval_covers_the_planted_point_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [turning_estimate(GRID, slopes(40, rng), draws=200, seed=k) for k in range(300)]
    covered = np.mean([e.low <= 1.2 <= e.high for e in found])
    assert 0.9 < covered < 0.99
    assert all(e.low < e.value < e.high and e.n == 40 for e in found)


def test_an_estimate_of_what_never_turns_has_no_value():
    estimate = turning_estimate(GRID, -np.ones((len(GRID), 5)))
    assert np.isnan(estimate.value)


def test_an_interval_is_never_empty():
    same = turning_estimate(GRID, np.repeat(slopes(1, np.random.default_rng(0)), 4, axis=1))
    assert same.low < same.value < same.high


def test_draws_that_do_not_turn_count_as_the_end_that_they_point_to():
    values = np.full((len(GRID), 6), -1.0)
    values[:, :2] = np.linspace(-1, 4, len(GRID))[:, None]  # a draw with none or one of these stays below 0
    estimate = turning_estimate(GRID, values, draws=500)
    assert GRID[0] < estimate.value < estimate.high == GRID[-1]
