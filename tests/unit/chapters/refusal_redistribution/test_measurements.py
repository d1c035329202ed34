"""Planted refusals, divergences and probes get the verdicts on redistribution that they deserve."""

from dataclasses import replace

import numpy as np
import pytest

from helpers.chapters.refusal_redistribution import measurements as measured
from helpers.chapters.refusal_redistribution.attack import coherent, smallest_k
from helpers.chapters.refusal_redistribution.measurements import Attacked
from helpers.statistics import Estimate
from helpers.verdicts import Control

N, TRIED = 40, 8
SEEDS = (0, 1, 2)
SANE = Control("training is sane", 0.0, True, "validity")
INSANE = Control("training is sane", 9.0, False, "validity")
DRAWS = {"seed": 0, "resamples": 300}


def refused(share, seed=0, n=N):
    """Exactly this share of the requests, in a random order."""
    return np.random.default_rng(seed).permutation(n) < round(share * n)


def values(mean, seed=0, n=N):
    return mean + 0.05 * np.random.default_rng(seed).standard_normal(n)


def attacked(k, seed=0, kl=0.02, odd=0.0, before=1.0):
    """A model that stops refusing with `k` directions removed, at this divergence and rise in perplexity."""
    rows = np.stack([refused(before if row < k else 0.05, seed + row) for row in range(TRIED + 1)])
    removed = np.arange(TRIED + 1) > 0
    rise = np.outer(removed, np.full(N, odd))
    noise = np.random.default_rng(seed).random((TRIED + 1, N))
    return Attacked(rows, np.outer(removed, np.full(N, kl)) * noise * 2, {"harmful": 2 + rise, "harmless": 1 + rise})


# Before the attack


def test_a_start_model_that_refuses_what_is_harmful_is_reproduced_and_records_its_seed(verdict_of):
    found = measured.taught(refused(1.0), refused(0.02), values(0.1), values(0.0, 1), seeds=(0,))
    assert verdict_of(found) == "reproduced" and found.estimate.seeds == (0,) and found.estimate.n == 2 * N


@pytest.mark.parametrize(
    ("harmful", "harmless", "losses", "verdict"),
    [(0.0, 1.0, 0.1, "contradicted"), (1.0, 0.7, 0.1, "contradicted"), (1.0, 0.0, 0.5, "invalid")],
)
def test_swapped_kinds_and_lost_capability_change_the_verdict_on_the_start_model(
    verdict_of, harmful, harmless, losses, verdict
):
    found = measured.taught(refused(harmful), refused(harmless), values(losses), values(0.0, 1), seeds=(0,))
    assert verdict_of(found) == verdict


def intact(harmful=1.0, harmless=0.05, start=0.05, losses=0.05, start_losses=0.0, sane=SANE):
    kinds = refused(harmful), refused(harmless, 1), refused(start, 1)
    return measured.intact(*kinds, values(losses), values(start_losses, 1), seeds=(3,), sane=sane)


def test_a_condition_that_changes_nothing_else_keeps_both(verdict_of):
    found = intact()
    assert [verdict_of(m) for m in found] == ["reproduced", "reproduced"]
    assert all(m.estimate.seeds == (3,) for m in found)


@pytest.mark.parametrize(
    ("changed", "verdicts"),
    [
        ({"harmless": 0.6}, ["contradicted", "reproduced"]),
        ({"losses": 0.6}, ["reproduced", "contradicted"]),
        ({"harmful": 0.1}, ["invalid", "reproduced"]),
        ({"sane": INSANE}, ["invalid", "invalid"]),
    ],
)
def test_refusing_more_losing_language_and_refusing_nothing_are_noticed(verdict_of, changed, verdicts):
    assert [verdict_of(m) for m in intact(**changed)] == verdicts


def test_arms_the_wrong_way_round_would_hide_over_refusal():
    more, worse = intact(harmless=0.6, losses=0.6)
    assert more.estimate.value == pytest.approx(0.55) and worse.estimate.value > 0.5


def test_tensors_are_equal_or_not_and_whole_batches_have_to_differ(verdict_of):
    same, other = np.ones(200, bool), np.zeros(200, bool)
    assert verdict_of(measured.as_published(same, other)) == "reproduced"
    assert verdict_of(measured.as_published(other, other)) == "contradicted"
    assert verdict_of(measured.as_published(same, same)) == "invalid"
    assert verdict_of(measured.as_published(np.arange(200) < 150, other)) == "direction only"


# The attack


def one_direction(run, by_rule=True):
    return measured.one_direction(run, by_rule=by_rule, seeds=(0,), **DRAWS)


def test_a_direction_that_the_fallback_chose_shows_the_direction_alone(verdict_of):
    assert verdict_of(one_direction(attacked(1), by_rule=False)) == "direction only"


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (attacked(1), "reproduced"),
        (attacked(3), "contradicted"),
        (attacked(1, kl=1.5), "invalid"),
        (attacked(1, odd=1.5), "invalid"),
        (attacked(1, before=0.1), "invalid"),
    ],
)
def test_one_direction_counts_if_the_model_refused_before_and_still_talks(verdict_of, run, verdict):
    assert verdict_of(one_direction(run)) == verdict


def compared(cov, start=1, kd=3, means=4, sane=SANE, runs=None):
    found = {"start": [attacked(start)], "LM+KD": [attacked(kd, 1)], "L1+KD": [attacked(means, 2)]}
    found["Cov+KD"] = [attacked(cov, 3)]
    controls = dict.fromkeys(("LM+KD", "L1+KD"), SANE) | {"Cov+KD": sane}
    return measured.redistribution(found | (runs or {}), seeds=(0,), sane=controls, **DRAWS)


def test_more_directions_needed_than_by_any_other_is_reproduced_and_fewer_contradicted(verdict_of):
    assert [verdict_of(m) for m in compared(8)] == ["reproduced"] * 3
    assert [verdict_of(m) for m in compared(2, start=4, kd=5, means=6)] == ["contradicted"] * 3
    assert [m.estimate.value for m in compared(6, start=1, kd=2, means=4)] == [5, 4, 2]


def test_each_claim_has_its_own_other_condition(verdict_of):
    assert [verdict_of(m) for m in compared(5, start=1, kd=7, means=3)] == ["reproduced", "contradicted", "reproduced"]


@pytest.mark.parametrize("name", ["start", "LM+KD", "L1+KD", "Cov+KD"])
def test_either_model_falling_silent_at_the_first_direction_makes_a_comparison_invalid(verdict_of, name):
    found = compared(8, runs={name: [attacked(1 if name == "start" else 8, kl=1.5)]})
    hit = dict(zip(("start", "LM+KD", "L1+KD"), map(verdict_of, found), strict=True))
    assert all((verdict == "invalid") == (name in (other, "Cov+KD")) for other, verdict in hit.items())


def test_a_model_that_refuses_nothing_and_insane_training_are_no_test(verdict_of):
    assert verdict_of(compared(8, runs={"Cov+KD": [attacked(8, before=0.1)]})[0]) == "invalid"
    assert {verdict_of(m) for m in compared(8, sane=INSANE)} == {"invalid"}


def test_a_difference_that_is_gone_where_only_a_model_that_talks_counts_is_no_more_than_a_direction(verdict_of):
    """The start is suppressed by one direction and falls silent only later; Cov+KD by eight: as planted, and broken."""
    late = attacked(5)
    silent = replace(late, kl=np.where((np.arange(TRIED + 1) > 1)[:, None], 2.0, late.kl))
    found = compared(8, start=1, runs={"LM+KD": [silent]})
    assert [verdict_of(m) for m in found[:2]] == ["reproduced", "direction only"]


def test_a_floor_and_a_ceiling_are_said_and_have_intervals_with_width(verdict_of):
    floor, ceiling = compared(1, start=1)[0], compared(9, kd=9)[1]
    assert verdict_of(floor) == "contradicted" and "K* is 1 for both" in floor.reason
    assert verdict_of(ceiling) == "invalid" and "Neither is suppressed" in ceiling.reason
    assert "counts as 9" in compared(9)[0].reason and compared(5)[0].reason == ""
    for estimate in (floor.estimate, ceiling.estimate):
        assert (estimate.low, estimate.value, estimate.high) == (-0.5, 0, 0.5)


def test_conditions_left_out_are_not_judged(verdict_of):
    runs = {"start": [attacked(1)], "Cov+KD": [attacked(8)]}
    found = measured.redistribution(runs, seeds=(0,), sane={"Cov+KD": SANE}, **DRAWS)
    assert [verdict_of(m) for m in found] == ["reproduced", "not judged", "not judged"]


def test_training_counts_for_the_conditions_compared(verdict_of):
    runs = {"start": [attacked(1)], "LM+KD": [attacked(3, 1)], "Cov+KD": [attacked(8, 3)]}
    sane = {"Cov+KD": SANE, "LM+KD": INSANE}
    found = measured.redistribution(runs, seeds=(0,), sane=sane, **DRAWS)
    assert [verdict_of(m) for m in found] == ["reproduced", "invalid", "not judged"]


def test_what_another_condition_shows_is_not_judged_as_covariance_matching(verdict_of):
    assert [verdict_of(m) for m in measured.of_covariance("Cov+KD", *intact())] == ["reproduced", "reproduced"]
    other = measured.of_covariance("LM+KD", *intact())
    assert [verdict_of(m) for m in other] == ["not judged", "not judged"]
    assert [m.claim for m in other] == [m.claim for m in intact()]


def test_runs_are_paired_by_seed_and_a_single_run_is_compared_with_each():
    one, other = ([attacked(k, i) for i, k in enumerate(ks)] for ks in ((4, 5, 6), (3, 4, 5)))
    gain = measured.k_gain(one, other, seeds=SEEDS, **DRAWS)
    assert (gain.value, gain.low, gain.high) == (1, 0.5, 1.5) and gain.seeds == SEEDS
    alone = measured.k_gain(one, [attacked(1)], seeds=SEEDS, **DRAWS)
    assert alone.value == 4 and alone.high - alone.low > 1  # seeds differ here
    with pytest.raises(ValueError, match=r"3 runs cannot be compared with K\* of 2"):
        measured.k_gain(one, other[:2], **DRAWS)


def test_k_star_is_that_of_the_attack_and_the_coherence_mask_is_resampled():
    run = attacked(3)
    assert measured.k_star([run], **DRAWS).value == smallest_k(run.refused) == 3
    assert [c.passed for c in measured.still_talks({"it": [run]}, **DRAWS)] == [
        coherent(run.kl, list(run.base_nll.values()))[1]
    ]
    half = 2 * (np.arange(N) < N // 4)[None] * (np.arange(TRIED + 1) > 0)[:, None]  # a mean of just the limit
    edge = replace(run, kl=half.astype(float))
    talking = measured.k_star([edge], talking=True, **DRAWS)
    assert talking.value == 3 and talking.high == TRIED + 1
    assert measured.k_star([edge], **DRAWS).high < TRIED


def subspace(run, sane=SANE):
    return measured.subspace(run, seeds=(0,), sane=sane, **DRAWS)


@pytest.mark.parametrize(
    ("run", "verdict"),
    [
        (attacked(2), "reproduced"),
        (attacked(TRIED + 1), "contradicted"),
        (attacked(2, kl=1.5), "invalid"),
        (attacked(2, before=0.1), "invalid"),
    ],
)
def test_a_subspace_attack_has_to_leave_a_model_that_talks(verdict_of, run, verdict):
    assert verdict_of(subspace(run)) == verdict
    assert verdict_of(subspace(run, INSANE)) == "invalid"


# Probes

HARMFUL = np.arange(120) < 60


def scores(gap, seed=0):
    return gap * (HARMFUL - 0.5) + np.random.default_rng(seed).standard_normal(120)


def test_a_probe_that_reads_what_words_do_not_is_reproduced(verdict_of):
    def found(gap, by_words, sane=SANE):
        return verdict_of(measured.readable(scores(gap), scores(by_words, 1), HARMFUL, seeds=(0,), sane=sane))

    assert found(6.0, 0.5) == "reproduced"
    assert found(-6.0, 0.5) == "contradicted"
    assert found(6.0, 6.0) == "direction only"
    assert found(6.0, 0.5, INSANE) == "invalid"


LABELS = np.arange(200) % 2 == 0


def reviews(gap, seed=0, features=60):
    x = np.random.default_rng(seed).standard_normal((200, features))
    x[:, 0] += gap * (LABELS - 0.5)
    return x


def test_a_squared_gap_is_unbiased_and_does_not_mind_scale():
    found = np.array([measured.squared_gap(reviews(0.0, seed), LABELS) for seed in range(200)])
    assert abs(found.mean()) < 3 * found.std() / 200**0.5
    there = np.mean([measured.squared_gap(reviews(1.0, seed), LABELS) for seed in range(200)])
    assert there == pytest.approx(1.0, abs=0.1)
    assert measured.squared_gap(7 * reviews(1.0), LABELS) == pytest.approx(measured.squared_gap(reviews(1.0), LABELS))


def test_gaps_without_each_row_are_those_of_the_other_rows():
    x, labels = reviews(1.0)[:30], np.arange(30) % 3 == 0
    found = measured._squared_gaps(x, labels)
    assert found[0] == measured.squared_gap(x, labels)
    for row in range(30):
        kept = np.arange(30) != row
        one, zero = x[kept & labels], x[kept & ~labels]
        variances = [part.var(0, ddof=1).sum() for part in (one, zero)]
        raw = np.square(one.mean(0) - zero.mean(0)).sum() - variances[0] / len(one) - variances[1] / len(zero)
        assert found[1 + row] == pytest.approx(raw / (sum(variances) / 2 / x.shape[1]))


def test_what_is_left_of_a_gap_has_the_coverage_that_it_should():
    inside = 0
    for seed in range(100):
        left = measured.gap_left(reviews(1.0, seed), reviews(2.0, 1000 + seed), LABELS)
        inside += left.low <= 0.25 <= left.high
    assert inside >= 90
    same = measured.gap_left(reviews(2.0), reviews(2.0), LABELS)
    assert same.value == 1 and same.low < 1 < same.high


def test_a_reader_of_means_reads_a_gap_and_no_spread():
    assert measured.read_by_means(reviews(2.0), LABELS, reviews(2.0, 1), LABELS).low > 0.7
    wide = np.where(LABELS, 3.0, 0.1)[:, None]
    train, fresh = (np.random.default_rng(seed).standard_normal((200, 3)) * wide for seed in (0, 1))
    found = measured.read_by_means(train, LABELS, fresh, LABELS)
    assert found.low < 0.5 < found.high


def equal_means(matched=0.8, erased=0.5, start=0.8, left=0.2, by_means=0.5, sane=SANE):
    right = None if matched is None else refused(matched, 0, 200)
    states = reviews(2 * left**0.5), reviews(2.0, 1)
    measure = measured.gap_left(*states, LABELS)
    return measured.equal_means(
        refused(start, 2, 200),
        right,
        refused(erased, 1, 200),
        Estimate(by_means, by_means - 0.08, by_means + 0.08, 200),
        measure,
        seeds=(0,),
        sane=[sane],
    )


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "reproduced"),
        ({"matched": 0.5, "erased": 0.8}, "contradicted"),
        ({"start": 0.6}, "invalid"),
        ({"left": 0.9}, "invalid"),
        ({"by_means": 0.8}, "invalid"),
        ({"sane": INSANE}, "invalid"),
        ({"matched": None}, "not judged"),
    ],
)
def test_equal_means_are_readable_only_where_there_was_something_to_read_and_the_gap_was_closed(
    verdict_of, changed, verdict
):
    assert verdict_of(equal_means(**changed)) == verdict
