"""Estimates with intervals: means over seeds and questions, shares, AUROC, rank correlation.

Every function returns an `Estimate` at one confidence level, so that a claim is judged on an interval and never on a
bare number. No interval has width 0: where the sample shows no variation, a closed form says how much a sample of that
size can have missed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import brentq

Array = np.ndarray

ROUNDING = 2.0**-8
"""Relative rounding error of bfloat16, in which models compute: no measured number is known better."""


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float
    n: int
    """Units behind the value, such as questions; with several seeds, those of each seed."""
    level: float = 0.95
    seeds: tuple[int, ...] = ()
    """Training seeds behind the value; empty where nothing was trained."""

    def __format__(self, spec: str) -> str:
        """`f"{estimate:.2f}"` gives `0.12 [0.05, 0.20]`."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    @property
    def detectable(self) -> float:
        """The smallest effect that such a sample would have told from none in four of five runs.

        A normal approximation: half the interval's width, times (z_0.975 + z_0.8) / z_0.975.
        """
        z = float(stats.norm.ppf((1 + self.level) / 2))
        return (self.high - self.low) / 2 * (z + float(stats.norm.ppf(0.8))) / z


def _finite(values: ArrayLike, name: str) -> Float[Array, "*shape"]:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"'{name}' must be a non-empty list of numbers; it has shape {array.shape}.")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {array.size} numbers in '{name}' are NaN or infinite; drop them and report how many."
        )
    return array


def _column(values: ArrayLike, name: str) -> Float[Array, " n"]:
    column = _finite(values, name)
    if column.ndim != 1:
        raise ValueError(f"'{name}' must be a non-empty list of numbers; it has shape {column.shape}.")
    return column


def mean_estimate(values: ArrayLike, *, seeds: Sequence[int] = (), level: float = 0.95) -> Estimate:
    """Mean of `values` (question) or (seed, question), with a t interval.

    Seeds and questions are crossed: every seed is asked the same questions. The variance of the mean is that of a
    two-way analysis of variance without replication, (MS_seed + MS_question - MS_error) / (S Q), at least
    MS_error / (S Q); degrees of freedom by Satterthwaite (Biometrics Bulletin 1946), at least S - 1 where seeds vary
    beyond the error. With one seed the interval speaks of the questions alone. A difference of two arms is taken per
    seed and question first, and passed here.

    Booleans are shares: Wilson's interval, at the sample size that this variance amounts to. Where nothing
    varies, an unseen share of the questions (exact binomial limit for 0 of n) may differ, by 1 where values are whole
    numbers, else by the rounding of bfloat16. One number alone has no bounds, unless it is a share.

    Args:
        values: one number a question, or one row a seed.
        seeds: the seeds of the rows; without them rows are only counted.

    Raises:
        ValueError: for numbers that are not finite, more than two axes, or seeds that are not one a row.
    """
    shares = np.asarray(values).dtype == bool
    table = np.atleast_2d(_finite(values, "values"))
    if table.ndim != 2:
        raise ValueError(f"'values' must be (question) or (seed, question); it has shape {table.shape}.")
    rows, count = table.shape
    if seeds and len(seeds) != rows:
        raise ValueError(f"There are {len(seeds)} seeds for {rows} rows of values; pass one seed a row.")
    value = float(table.mean())
    variance, freedom = _two_way(table)
    if table.size == 1 and not shares:
        low, high = -np.inf, np.inf
    elif variance == 0:
        missed = 1 - ((1 - level) / 2) ** (1 / count)  # exact upper limit of a share seen in 0 of n
        step = 1.0 if (table == np.round(table)).all() else max(abs(value), ROUNDING) * ROUNDING
        low, high = value - missed * step, value + missed * step
    elif shares:
        low, high = _wilson(value, value * (1 - value) / variance, float(stats.t.ppf((1 + level) / 2, freedom)))
    else:
        reach = float(stats.t.ppf((1 + level) / 2, freedom)) * variance**0.5
        reach = max(reach, 8 * np.finfo(float).eps * float(np.abs(table).max()))
        low, high = value - reach, value + reach
    if shares:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(value, float(low), float(high), count, level, tuple(seeds))


def _two_way(table: Float[Array, "seed question"]) -> tuple[float, float]:
    """Variance of the grand mean of crossed seeds and questions, and its degrees of freedom."""
    rows, count = table.shape
    centred = table - table.mean()
    by_seed, by_question = centred.mean(1), centred.mean(0)
    if rows == 1 or count == 1:
        if table.size == 1:
            return 0.0, 1.0
        return float(centred.var(ddof=1) / table.size), table.size - 1.0
    of_seeds = count * float((by_seed**2).sum()) / (rows - 1)
    of_questions = rows * float((by_question**2).sum()) / (count - 1)
    left = centred - by_seed[:, None] - by_question[None]
    free = (rows - 1) * (count - 1)
    error = float((left**2).sum()) / free
    total = of_seeds + of_questions - error
    if total <= error:
        return error / table.size, float(free)
    freedom = total**2 / (of_seeds**2 / (rows - 1) + of_questions**2 / (count - 1) + error**2 / free)
    if of_seeds > of_questions:
        freedom = max(freedom, rows - 1.0)
    return total / table.size, freedom


def _wilson(value: float, count: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval for a share of so many independent units."""
    square = quantile**2 / count
    centre = (value + square / 2) / (1 + square)
    reach = quantile / (1 + square) * (value * (1 - value) / count + square / (4 * count)) ** 0.5
    return centre - reach, centre + reach


def jackknife(statistic: Callable[..., float], *samples: Array, ratio: bool = False, level: float = 0.95) -> Estimate:
    """`statistic(*samples)` with a jackknife interval: row by row, what leaving it out of all samples changes.

    For what has no closed form, such as how many directions carry some rows; a bootstrap would not do for these, since
    a resample holds rows twice and so shows fewer directions than there are. With t quantiles; a `ratio` of positive
    numbers is treated on the log scale. Where no row changes anything, the interval is the rounding of bfloat16.

    Raises `ValueError` for samples of different lengths, or of fewer than two rows.
    """
    n = len(samples[0])
    if n < 2 or any(len(sample) != n for sample in samples):
        raise ValueError(
            f"A jackknife needs equally long samples of two rows or more; got {[len(s) for s in samples]}."
        )
    of, back = (np.log, np.exp) if ratio else (np.asarray, np.asarray)
    value = float(statistic(*samples))
    left_out = np.array([of(statistic(*(np.delete(sample, i, 0) for sample in samples))) for i in range(n)])
    error = np.sqrt((n - 1) * left_out.var())
    least = max(abs(value), ROUNDING) * ROUNDING
    reach = stats.t.ppf((1 + level) / 2, n - 1) * error
    low, high = back(of(value) - reach), back(of(value) + reach)
    return Estimate(value, min(float(low), value - least), max(float(high), value + least), n, level)


def share(successes: int | np.integer, n: int | np.integer, *, level: float = 0.95) -> Estimate:
    """Share of successes with the exact (Clopper-Pearson) interval, which has width even at n of n."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"A share needs 0 <= successes <= n and n > 0; got {successes} of {n}.")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(confidence_level=level, method="exact")
    return Estimate(successes / n, float(interval.low), float(interval.high), int(n), level)


def share_difference(first: ArrayLike, second: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Share of true values in `first` minus that in `second`, of different units.

    Newcombe's hybrid score interval (method 10 of Statistics in Medicine 17 (1998) 873-890), which has width even where
    the shares are 0 and 1. For the same units measured twice, pass differences to `mean_estimate`.
    """
    z = float(stats.norm.ppf((1 + level) / 2))
    (p, low_p, high_p, n), (q, low_q, high_q, m) = (
        (float(x.mean()), *_wilson(float(x.mean()), float(x.size), z), x.size)
        for x in (_column(first, "first"), _column(second, "second"))
    )
    return Estimate(
        p - q,
        p - q - ((p - low_p) ** 2 + (high_q - q) ** 2) ** 0.5,
        p - q + ((high_p - p) ** 2 + (q - low_q) ** 2) ** 0.5,
        n + m,
        level,
    )


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


def auroc_difference(first: ArrayLike, second: ArrayLike, labels: ArrayLike, *, level: float = 0.95) -> Estimate:
    """AUROC of `first` minus AUROC of `second` on the same rows, with the interval of DeLong et al. (Biometrics 1988).

    Both classes are sampled. Where the scores rank every row alike, an unseen share of the smaller class (exact
    binomial limit for 0 of n) may be ranked otherwise. Raises ValueError if a class is missing.
    """
    truth = np.asarray(labels).astype(bool)
    if not 0 < truth.sum() < truth.size:
        raise ValueError("AUROC needs at least one positive and one negative label.")
    wins = []
    for scores in (_column(first, "first"), _column(second, "second")):
        wins.append((np.sign(scores[truth][:, None] - scores[~truth][None]) + 1) / 2)  # (positive, negative)
    gained = wins[0] - wins[1]
    value = float(gained.mean())
    positives, negatives = gained.shape
    parts = [side for side in (gained.mean(1), gained.mean(0)) if side.size > 1]
    variance = sum(float(side.var(ddof=1)) / side.size for side in parts)
    missed = 1 - ((1 - level) / 2) ** (1 / min(positives, negatives))
    reach = float(stats.norm.ppf((1 + level) / 2)) * variance**0.5 or missed
    return Estimate(value, max(value - reach, -1.0), min(value + reach, 1.0), truth.size, level)


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
