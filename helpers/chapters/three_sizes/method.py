"""What makes numbers of several models comparable: equal damage, and differences with intervals.

Two ways of steering are held side by side where they cost the same, as far as a model's answers elsewhere go: a vector
that is added to more tokens does more of everything. Two models are held side by side by the difference of two
estimates, each from its own model, with the interval that follows from theirs (Zou and Donner, Statistics in Medicine
2008, "MOVER").
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from helpers.statistics import Estimate


def at_equal_kl(
    kl: Float[np.ndarray, " scale"],
    gain: Float[np.ndarray, " scale"],
    level: float,
) -> float:
    """The gain where a curve over rising scales first reaches the divergence `level`, on a line between its points.

    The curve begins at no divergence and no gain. NaN where it never gets so far.
    """
    xs, ys = np.concatenate([[0.0], kl]), np.concatenate([[0.0], gain])
    for i in range(len(kl)):
        if xs[i] < level <= xs[i + 1]:
            share = (level - xs[i]) / (xs[i + 1] - xs[i])
            return float(ys[i] + share * (ys[i + 1] - ys[i]))
    return math.nan


def common_level(kls: Float[np.ndarray, "place scale"], wish: float) -> float:
    """The divergence at which all places are held side by side: `wish`, or the most that each of them reaches."""
    return min(wish, float(kls.max(axis=1).min()))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """`first` minus `second`, of different models, with the interval of MOVER."""
    value = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, value - down, value + up, min(first.n, second.n), first.level)
