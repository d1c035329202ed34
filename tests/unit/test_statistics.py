import numpy as np
import pytest
from scipy import stats

from helpers.statistics import (
    auroc,
    auroc_difference,
    jackknife,
    mean_estimate,
    rank_correlation,
    share,
    share_difference,
)


def coverage(covers, repeats: int = 200) -> float:
    """Share of simulated data sets whose interval covers the truth, as `covers(rng, number)` says."""
    rng = np.random.default_rng(0)
    return float(np.mean([covers(rng, number) for number in range(repeats)]))


def test_the_mean_over_one_seed_has_students_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=20)
    estimate = mean_estimate(values, seeds=[7])
    low, high = stats.t.interval(0.95, 19, values.mean(), stats.sem(values))
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert (estimate.n, estimate.seeds) == (20, (7,))


def test_seeds_that_differ_widen_the_interval_beyond_that_of_all_values():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, 40)) + np.array([-3.0, -1.0, 0.0, 1.0, 3.0])[:, None]
    flat, crossed = mean_estimate(table.ravel()), mean_estimate(table, seeds=range(5))
    assert crossed.value == pytest.approx(flat.value)
    # Between seeds: standard error sqrt(5 / 5) = 1, t quantile with 4 degrees of freedom 2.78
    assert crossed.high - crossed.low == pytest.approx(2 * 2.78 * table.mean(1).std(ddof=1) / 5**0.5, rel=0.05)
    assert flat.high - flat.low < 0.3 * (crossed.high - crossed.low)


def test_the_two_way_variance_is_that_of_the_mean_squares_by_hand():
    table = np.random.default_rng(2).normal(size=(3, 8)) + np.arange(3)[:, None] + np.linspace(0, 4, 8)
    seeds = 8 * table.mean(1).var(ddof=1)
    questions = 3 * table.mean(0).var(ddof=1)
    left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    error = (left**2).sum() / 14
    total = seeds + questions - error
    freedom = total**2 / (seeds**2 / 2 + questions**2 / 7 + error**2 / 14)
    freedom = max(freedom, 2) if seeds > questions else freedom
    reach = stats.t.ppf(0.975, freedom) * (total / 24) ** 0.5
    assert mean_estimate(table).high - table.mean() == pytest.approx(reach)


def test_repeating_a_seed_adds_nothing():
    row = np.random.default_rng(0).normal(size=30)
    one, copied = mean_estimate(row), mean_estimate(np.stack([row] * 5))
    assert copied.high - copied.low == pytest.approx(one.high - one.low, rel=0.1)


def test_a_difference_taken_per_seed_and_question_is_tighter_than_its_arms():
    rng = np.random.default_rng(0)
    before = rng.normal(size=(3, 40))
    after = before + 0.2 + 0.05 * rng.normal(size=(3, 40))
    paired = mean_estimate(after - before)
    assert 0.17 < paired.low < 0.2 < paired.high < 0.23
    assert mean_estimate(after).low < 0


def test_shares_over_seeds_stay_within_0_and_1_and_keep_a_width():
    shares = np.ones((3, 20), dtype=bool)
    shares[0, 0] = False
    estimate = mean_estimate(shares)
    assert 0.7 < estimate.low < estimate.value < estimate.high <= 1


@pytest.mark.parametrize("size", [2, 5, 32])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, 1e-12, 55.5, 1e6])
def test_no_sample_however_constant_has_an_interval_without_width(size, rows, value):
    nearly = np.full((rows, size), value)
    nearly[0, 0] = np.nextafter(value, np.inf)
    for table in (np.full((rows, size), value), nearly):
        found = mean_estimate(table)
        assert found.low < found.high and found.low <= found.value <= found.high
    left_out = jackknife(np.mean, np.full(size, value))
    assert left_out.low < left_out.value < left_out.high


def test_the_jackknife_of_a_mean_is_its_t_interval():
    sample = np.random.default_rng(0).normal(3.0, 1.0, 20)
    found, known = jackknife(np.mean, sample), stats.ttest_1samp(sample, 0.0).confidence_interval()
    assert (found.value, found.low, found.high) == pytest.approx((sample.mean(), known.low, known.high))
    assert jackknife(np.mean, sample, ratio=True).low > found.low, "wider above than below, on the log scale"


def participation(rows):
    squares = np.linalg.svd(rows, compute_uv=False) ** 2
    return squares.sum() ** 2 / (squares**2).sum()


def test_the_jackknife_covers_how_many_directions_samples_of_this_size_show():
    """A bootstrap's interval lies below: it covers this never."""

    def rows(rng):
        return rng.standard_normal((32, 60)) * np.repeat([1.0, 0.1], [20, 40])

    usual = np.mean([participation(rows(np.random.default_rng(i))) for i in range(1000, 1400)])
    covered = coverage(
        lambda rng, _: (e := jackknife(participation, rows(rng), ratio=True)).low <= usual <= e.high, 300
    )
    assert covered == pytest.approx(0.95, abs=0.05)


def test_samples_that_do_not_pair_have_no_jackknife():
    for samples in ((np.zeros(3), np.zeros(4)), (np.zeros(1),)):
        with pytest.raises(ValueError, match="equally long samples of two rows"):
            jackknife(lambda *_: 0.0, *samples)


def test_ones_alone_are_as_uncertain_as_an_exact_share():
    assert mean_estimate(np.ones(32, dtype=bool)).low == pytest.approx(share(32, 32).low)
    assert mean_estimate(np.zeros((5, 32), dtype=bool)).high == pytest.approx(share(0, 32).high)


def test_a_difference_that_is_0_throughout_may_be_of_either_sign():
    found = mean_estimate(np.zeros((2, 20)))
    assert found.low == -found.high < 0 < found.high == pytest.approx(share(0, 20).high)


def test_one_number_alone_has_no_bounds():
    assert np.isinf(mean_estimate([0.4]).low) and np.isinf(mean_estimate([0.4]).high)


def test_the_detectable_effect_is_found_in_four_of_five_samples():
    rng = np.random.default_rng(0)
    effect = mean_estimate(rng.normal(size=100)).detectable
    assert coverage(lambda r, _: mean_estimate(r.normal(effect, 1.0, size=100)).low > 0, 400) == pytest.approx(
        0.8, abs=0.08
    )


def test_a_difference_of_shares_has_newcombes_interval():
    found = share_difference(np.arange(70) < 56, np.arange(80) < 48)  # his example: 56/70 - 48/80
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-4)
    far = share_difference(np.ones(10), np.zeros(30))
    assert far.value == 1 and far.low < 0.75


def test_a_share_of_n_of_n_has_the_closed_form_lower_bound():
    estimate = share(20, 20)
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(0.025 ** (1 / 20))


def test_the_interval_of_a_share_is_that_of_the_beta_quantiles():
    hits = np.arange(32) < 27
    estimate = share(hits.sum(), hits.size)
    assert estimate.low == pytest.approx(stats.beta.ppf(0.025, 27, 6))
    assert estimate.high == pytest.approx(stats.beta.ppf(0.975, 28, 5))


def test_auroc_is_the_share_of_pairs_in_the_right_order_with_ties_as_half():
    positives, negatives = [3.0, 2.0, 2.0], [1.0, 2.0]
    pairs = [(p > q) + 0.5 * (p == q) for p in positives for q in negatives]
    assert auroc(positives + negatives, [1, 1, 1, 0, 0]).value == pytest.approx(np.mean(pairs))


def test_auroc_of_perfect_separation_still_has_a_width():
    estimate = auroc(np.arange(64), np.arange(64) >= 32)
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert 0.9 < estimate.low < 0.97


def test_auroc_mirrors_when_labels_are_exchanged():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=50), np.arange(50) % 2
    one, other = auroc(scores, labels), auroc(scores, 1 - labels)
    assert (one.value, one.low, one.high) == pytest.approx((1 - other.value, 1 - other.high, 1 - other.low))


def test_auroc_intervals_cover_the_truth_about_95_times_in_100():
    labels = np.arange(60) % 2
    truth = stats.norm.cdf(1.5 / np.sqrt(2))

    def covers(rng, _):
        estimate = auroc(rng.normal(size=60) + 1.5 * labels, labels)
        return estimate.low <= truth <= estimate.high

    assert 0.92 <= coverage(covers, 400) <= 0.99


def test_rank_correlation_looks_at_order_only():
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    perfect = rank_correlation(x, np.exp(x))
    assert perfect.value == pytest.approx(1.0)
    assert perfect.low < 0.95 and perfect.high == pytest.approx(1.0)
    assert rank_correlation(x, -(x**3)).value == pytest.approx(-1.0)


def test_rank_correlation_intervals_cover_the_truth_about_95_times_in_100():
    rho = 0.6
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's correlation of a bivariate normal

    def covers(rng, _):
        x = rng.normal(size=50)
        estimate = rank_correlation(x, rho * x + np.sqrt(1 - rho**2) * rng.normal(size=50))
        return estimate.low <= truth <= estimate.high

    assert 0.91 <= coverage(covers, 400) <= 0.985


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_estimate([1.0, np.nan, 2.0]), "1 of 3 numbers in 'values' are NaN"),
        (lambda: mean_estimate([]), "non-empty"),
        (lambda: mean_estimate([1.0, 2.0], seeds=[0, 1]), "2 seeds for 1 rows"),
        (lambda: mean_estimate(np.ones((2, 2, 2))), "must be"),
        (lambda: share(5, 4), "got 5 of 4"),
        (lambda: auroc([1.0, 2.0], [1, 1]), "at least one positive and one negative"),
        (lambda: rank_correlation([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]), "constant"),
    ],
)
def test_unusable_numbers_are_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_difference_of_aurocs_is_that_of_the_two_and_its_interval_is_paired():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [30, 50])
    first, second = rng.normal(labels, 1.0), np.round(rng.normal(0.3 * labels, 1.0))
    found = auroc_difference(first, second, labels)
    assert found.value == pytest.approx(auroc(first, labels).value - auroc(second, labels).value)
    assert found.low < found.value < found.high
    same = auroc_difference(first, first, labels)
    assert same.value == 0 and same.low < 0 < same.high
    with pytest.raises(ValueError, match="one positive and one negative"):
        auroc_difference(first, second, np.ones(80))


def test_delongs_interval_of_a_difference_covers_the_truth_about_95_times_in_100():
    labels = np.repeat([1, 0], [40, 40])
    truth = stats.norm.cdf(1.5 / np.sqrt(2)) - stats.norm.cdf(0.8 / np.sqrt(2))

    def covers(rng, _):
        shared = rng.normal(size=80)
        first, second = (gap * labels + 0.6 * shared + 0.8 * rng.normal(size=80) for gap in (1.5, 0.8))
        found = auroc_difference(first, second, labels)
        return found.low <= truth <= found.high

    assert 0.92 <= coverage(covers, 400) <= 0.98
