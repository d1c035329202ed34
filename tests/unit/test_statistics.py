import numpy as np
import pytest
from scipy import stats

from helpers.statistics import auroc, auroc_difference, bootstrap_difference, bootstrap_mean, rank_correlation, share


def coverage(covers, repeats: int = 200) -> float:
    """Share of simulated data sets whose interval covers the truth, as `covers(rng, number)` says."""
    rng = np.random.default_rng(0)
    return float(np.mean([covers(rng, number) for number in range(repeats)]))


def test_a_bootstrap_interval_of_a_mean_is_close_to_the_normal_theory_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    estimate = bootstrap_mean(values, seed=0, resamples=4000)
    low, high = stats.norm.interval(0.95, values.mean(), values.std() / np.sqrt(400))
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.02)
    assert estimate.n == 400


def test_a_bootstrap_is_the_same_for_the_same_seed_and_differs_for_another():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_bootstrap_intervals_of_a_mean_cover_the_truth_about_95_times_in_100():
    def covers(rng, number):
        estimate = bootstrap_mean(rng.exponential(size=60), seed=number, resamples=500)
        return estimate.low <= 1.0 <= estimate.high

    assert 0.88 <= coverage(covers) <= 0.985


def test_hierarchical_resampling_widens_the_interval_when_groups_differ():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(5), 40)
    values = rng.normal(size=200) + np.array([-3.0, -1.0, 0.0, 1.0, 3.0])[groups]
    flat, nested = bootstrap_mean(values), bootstrap_mean(values, groups=groups)
    assert nested.value == pytest.approx(flat.value)
    # The spread of five group means dominates: standard error sqrt(mean of squares / 5) = 0.89 against 0.16.
    assert nested.high - nested.low == pytest.approx(2 * 1.96 * np.sqrt(4 / 5 + 1 / 200), rel=0.1)
    assert flat.high - flat.low < 0.4 * (nested.high - nested.low)


def test_groups_of_unequal_size_count_alike():
    estimate = bootstrap_mean([0.0] * 90 + [1.0] * 10, groups=[0] * 90 + [1] * 10)
    assert estimate.value == 0.5


def test_a_paired_difference_is_tighter_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    before = rng.normal(size=100)
    after = before + 0.2 + 0.05 * rng.normal(size=100)
    paired = bootstrap_difference(after, before, paired=True)
    unpaired = bootstrap_difference(after, before, paired=False)
    assert paired.value == pytest.approx(unpaired.value) == pytest.approx((after - before).mean())
    assert paired.low > 0.18 and paired.high < 0.22
    assert unpaired.low < 0 < unpaired.high


def test_an_unpaired_difference_covers_the_truth_about_95_times_in_100():
    def covers(rng, number):
        a, b = rng.normal(1.0, 1.0, size=40), rng.normal(0.0, 3.0, size=60)
        estimate = bootstrap_difference(a, b, paired=False, seed=number, resamples=500)
        return estimate.low <= 1.0 <= estimate.high

    assert 0.89 <= coverage(covers) <= 0.985


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
        (lambda: bootstrap_mean([1.0, np.nan, 2.0]), "1 of 3 numbers in 'values' are NaN"),
        (lambda: bootstrap_mean([]), "non-empty"),
        (lambda: bootstrap_mean([1.0, 2.0], groups=[0]), "one label per value"),
        (lambda: bootstrap_difference([1.0], [1.0, 2.0], paired=True), "equal length"),
        (lambda: bootstrap_difference([1.0], [2.0], paired=False, groups=[0]), "paired=True"),
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
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="one positive and one negative"):
        auroc_difference(first, second, np.ones(80))
