"""Estimates with intervals: bootstrap means and differences, shares, AUROC, rank correlation.

Every function returns an `Estimate` at one confidence level, so that a claim is judged on an interval and
never on a bare number. Where a resampling interval would have no width (all successes, perfect separation),
a closed form that does is used instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import brentq

Array = np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float
    n: int
    """Observations behind the value."""
    level: float = 0.95

    def __format__(self, spec: str) -> str:
        """`f"{estimate:.2f}"` gives `0.12 [0.05, 0.20]`."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def _column(values: ArrayLike, name: str) -> Float[Array, " n"]:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or column.size == 0:
        raise ValueError(f"'{name}' must be a non-empty list of numbers; it has shape {column.shape}.")
    bad = int((~np.isfinite(column)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {column.size} numbers in '{name}' are NaN or infinite; drop them and report how many."
        )
    return column


def _resampled_means(values: Float[Array, " n"], rng: np.random.Generator, resamples: int) -> Float[Array, " r"]:
    means = np.empty(resamples)
    chunk = max(1, 4_000_000 // values.size)  # bounds memory, whatever n is
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        picks = rng.integers(values.size, size=(stop - start, values.size))
        means[start:stop] = values[picks].mean(axis=1)
    return means


def _percentiles(value: float, means: Float[Array, " r"], n: int, level: float) -> Estimate:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high), n, level)


def bootstrap_mean(
    values: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 2000,
    groups: ArrayLike | None = None,
    level: float = 0.95,
) -> Estimate:
    """Mean with a percentile bootstrap interval.

    `groups` (one label per value, e.g. the training seed) makes the bootstrap hierarchical: groups are
    resampled, then values within each drawn group, and the value is the mean of the group means. With few
    groups (five seeds) such an interval is somewhat too narrow; with one group it is the plain bootstrap.
    """
    column = _column(values, "values")
    rng = np.random.default_rng(seed)
    if groups is None:
        return _percentiles(column.mean(), _resampled_means(column, rng, resamples), column.size, level)

    labels = np.asarray(groups)
    if labels.shape != column.shape:
        raise ValueError(f"'groups' needs one label per value; it has {labels.size} for {column.size} values.")
    members = [column[labels == label] for label in np.unique(labels)]
    drawn = rng.integers(len(members), size=(resamples, len(members)))
    means = np.empty(drawn.shape)
    for index, group in enumerate(members):
        slots = drawn == index
        means[slots] = _resampled_means(group, rng, int(slots.sum()))
    value = np.mean([group.mean() for group in members])
    return _percentiles(float(value), means.mean(axis=1), column.size, level)


def bootstrap_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    paired: bool,
    seed: int = 0,
    resamples: int = 2000,
    groups: ArrayLike | None = None,
    level: float = 0.95,
) -> Estimate:
    """Mean of `first` minus mean of `second`, with a percentile bootstrap interval.

    `paired=True` resamples pairs (same sequence measured twice), which is tighter; `groups` as in
    `bootstrap_mean`, for paired data only.
    """
    a, b = _column(first, "first"), _column(second, "second")
    if paired:
        if a.size != b.size:
            raise ValueError(f"Paired samples must have equal length; they have {a.size} and {b.size} values.")
        return bootstrap_mean(a - b, seed=seed, resamples=resamples, groups=groups, level=level)
    if groups is not None:
        raise ValueError("'groups' needs paired samples; pass paired=True, or average within each group first.")
    rng = np.random.default_rng(seed)
    means = _resampled_means(a, rng, resamples) - _resampled_means(b, rng, resamples)
    return _percentiles(a.mean() - b.mean(), means, a.size + b.size, level)


def mean_over_seeds(values: ArrayLike, *, seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Estimate:
    """Mean of `values` (seed, sequence): a bootstrap over sequences, and over seeds where there are several."""
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    groups = np.repeat(np.arange(len(table)), table.shape[1]) if len(table) > 1 else None
    return bootstrap_mean(table.ravel(), seed=seed, resamples=resamples, groups=groups, level=level)


def bootstrap(
    statistic: Callable[..., float], *samples: Array, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Estimate:
    """`statistic(*samples)` with a percentile interval; the rows of all samples are resampled together."""
    n = len(samples[0])
    if any(len(sample) != n for sample in samples):
        raise ValueError(f"Samples resampled together must be equally long; got {[len(s) for s in samples]} rows.")
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(n, size=n) for _ in range(resamples)]
    found = np.array([statistic(*(sample[rows] for sample in samples)) for rows in drawn])
    return _percentiles(statistic(*samples), found, n, level)


def share(successes: int | np.integer, n: int | np.integer, *, level: float = 0.95) -> Estimate:
    """Share of successes with the exact (Clopper-Pearson) interval, which has width even at n of n."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"A share needs 0 <= successes <= n and n > 0; got {successes} of {n}.")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(confidence_level=level, method="exact")
    return Estimate(successes / n, float(interval.low), float(interval.high), int(n), level)


def auroc(scores: ArrayLike, labels: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Probability that a positive scores above a negative (ties count half), with Newcombe's score interval.

    The interval is method 5 of R. G. Newcombe, Statistics in Medicine 25 (2006) 559-573: like Wilson's for
    a share, it has width even where the two classes separate perfectly.
    """
    column, truth = _column(scores, "scores"), np.asarray(labels).astype(bool)
    if truth.shape != column.shape:
        raise ValueError(f"'labels' needs one label per score; it has {truth.size} for {column.size} scores.")
    positives = int(truth.sum())
    negatives = truth.size - positives
    if not positives or not negatives:
        raise ValueError("AUROC needs at least one positive and one negative label.")
    ranks = stats.rankdata(column)
    area = (ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives)

    z = stats.norm.ppf((1 + level) / 2)
    spread = (positives + negatives) / 2 - 1

    def excess(theta: float) -> float:
        variance = theta * (1 - theta) * (1 + spread * ((1 - theta) / (2 - theta) + theta / (1 + theta)))
        return float((area - theta) ** 2 - z**2 * variance / (positives * negatives))

    # The score equation has one root on each side of the area; the trivial roots 0 and 1 are kept out.
    low = 0.0 if area == 0 else brentq(excess, 0.0, min(area, 1 - 1e-9))
    high = 1.0 if area == 1 else brentq(excess, max(area, 1e-9), 1.0)
    return Estimate(float(area), float(low), float(high), truth.size, level)


def auroc_difference(
    first: ArrayLike, second: ArrayLike, labels: ArrayLike, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Estimate:
    """AUROC of `first` minus AUROC of `second` on the same rows; a bootstrap over positives, the negatives given.

    An AUROC is the mean over positives of the share of negatives that each scores above (ties count half), and these
    shares are paired. Raises ValueError if a class is missing.
    """
    truth = np.asarray(labels).astype(bool)
    if not 0 < truth.sum() < truth.size:
        raise ValueError("AUROC needs at least one positive and one negative label.")
    shares = []
    for scores in (_column(first, "first"), _column(second, "second")):
        above = np.sign(scores[truth][:, None] - scores[~truth][None])
        shares.append((above + 1).mean(1) / 2)
    return bootstrap_mean(shares[0] - shares[1], seed=seed, resamples=resamples, level=level)


def rank_correlation(x: ArrayLike, y: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Spearman's rank correlation with a Fisher interval (variance of Bonett and Wright, Psychometrika 2000).

    At a perfect correlation the interval is that of the nearest imperfect one (two neighbours exchanged),
    so that it keeps a width, and its outer end is the perfect correlation itself.
    """
    a, b = _column(x, "x"), _column(y, "y")
    if a.size != b.size or a.size < 4:
        raise ValueError(f"A rank correlation needs two lists of equal length, 4 or more; got {a.size} and {b.size}.")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise ValueError("A rank correlation needs values that vary; one of the lists is constant.")
    rho = float(stats.spearmanr(a, b).statistic)
    n = a.size
    nearest = 1 - 12 / (n * (n**2 - 1))
    centre = float(np.clip(rho, -nearest, nearest))
    reach = stats.norm.ppf((1 + level) / 2) * np.sqrt((1 + centre**2 / 2) / (n - 3))
    low, high = np.tanh(np.arctanh(centre) + np.array([-reach, reach]))
    return Estimate(rho, float(min(low, rho)), float(max(high, rho)), n, level)
