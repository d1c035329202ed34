"""Where the pressure along a vector changes sign: a*, at which the loss with a v added is least.

The slope dL/da of a training answer's loss is the sum over positions of g_t . v (`gradients.loss_along`). Below a* it
is negative: descent pushes the stream up the vector. Above a* it is positive.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from helpers.statistics import Estimate

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Multiples of a persona vector at which losses and slopes are taken."""


def turning_point(
    coefficients: Sequence[float],
    slopes: Float[np.ndarray, " point"],
) -> float:
    """The first coefficient at which slopes turn from below 0 to above, on a line between points; NaN without one."""
    for i in range(len(slopes) - 1):
        if slopes[i] <= 0 < slopes[i + 1]:
            share = -slopes[i] / (slopes[i + 1] - slopes[i])
            return float(coefficients[i] + share * (coefficients[i + 1] - coefficients[i]))
    return float("nan")


def turning_or_end(coefficients: Sequence[float], slopes: Float[np.ndarray, " point"]) -> float:
    """`turning_point`; where slopes do not turn upwards, the end of the grid that they point to: the last coefficient
    where the loss still falls there, else the first."""
    found = turning_point(coefficients, slopes)
    return found if np.isfinite(found) else float(coefficients[-1 if slopes[-1] <= 0 else 0])


def turning_estimate(
    coefficients: Sequence[float],
    slopes: Float[np.ndarray, "point example"],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """a* of the mean slope, with a percentile interval over examples drawn anew.

    A draw that does not turn counts at an end of the grid (`turning_or_end`). NaN where the mean of all examples does
    not turn.
    """
    rng, count = np.random.default_rng(seed), slopes.shape[1]
    chosen = rng.integers(count, size=(draws, count))
    means = slopes[:, chosen].mean(-1)  # [point, draw]
    found = np.array([turning_or_end(coefficients, column) for column in means.T])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    value = turning_point(coefficients, slopes.mean(1))
    grain = 2.0**-8 * max(abs(value), 2.0**-8)  # of bfloat16, in which the slopes were taken
    return Estimate(value, float(min(low, value - grain)), float(max(high, value + grain)), count, level)
