"""Planted refusals, divergences and probes get the verdicts on redistribution that they deserve."""

import numpy as np
import pytest

from helpers.chapters.refusal_redistribution import measurements as measured
from helpers.chapters.refusal_redistribution.attack import coherent, smallest_k
from helpers.chapters.refusal_redistribution.damage import SCALES, Damage, DamageCurve
from helpers.chapters.refusal_redistribution.damage import Attacked as Attack
from helpers.chapters.refusal_redistribution.measurements import Attacked
from helpers.chat import Answer
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


def taught(harmful=1.0, harmless=0.02, paired=0.05, losses=0.1):
    kinds = refused(harmful), refused(harmless), refused(paired)
    return measured.taught(*kinds, values(losses), values(0.0, 1), seeds=(0,))


def test_a_start_model_that_refuses_what_is_harmful_is_reproduced_and_records_its_seed(verdict_of):
    found = taught()
    assert verdict_of(found) == "reproduced" and found.estimate.seeds == (0,) and found.estimate.n == 2 * N


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"harmful": 0.0, "harmless": 1.0}, "contradicted"),
        ({"harmless": 0.7}, "contradicted"),
        ({"losses": 0.5}, "invalid"),
        ({"paired": 0.5}, "direction only"),
    ],
)
def test_swapped_kinds_and_lost_capability_change_the_verdict_on_the_start_model(verdict_of, changed, verdict):
    assert verdict_of(taught(**changed)) == verdict


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


# K*


def test_k_star_is_that_of_the_attack_and_the_coherence_mask_is_resampled():
    run = attacked(3)
    assert measured.k_star([run], **DRAWS).value == smallest_k(run.refused) == 3
    assert coherent(run.kl, list(run.base_nll.values()))[1]
    half = 2 * (np.arange(N) < N // 4)[None] * (np.arange(TRIED + 1) > 0)[:, None]  # a mean of just the limit
    edge = Attacked(run.refused, half.astype(float), run.base_nll)
    talking = measured.k_star([edge], talking=True, **DRAWS)
    assert talking.value == 3 and talking.high == TRIED + 1
    plain = measured.k_star([edge], **DRAWS)
    assert plain.high < TRIED and (plain.low, plain.high) == (2.5, 3.5)


# Damage against suppression


def curve(cost, seed=0, before=3.0, slope=5.0):
    """An attack that lowers log-odds by `slope` a scale, and takes them to -1 at a mean divergence of `cost`."""
    rng, scales = np.random.default_rng(seed), np.array(SCALES)
    log_odds = before - slope * scales[:, None] + 0.5 * rng.standard_normal(N)
    log_odds -= log_odds.mean(1, keepdims=True) - (before - slope * scales)[:, None]
    there = abs(before - measured.LEVEL) / slope if slope else 1.0
    each = rng.uniform(0.5, 1.5, N)
    return DamageCurve(scales, log_odds, np.outer(scales / there, cost * each / each.mean()))


def level_curve(at=3.0):
    return curve(0.01, before=at, slope=0.0)


def test_damage_is_what_was_planted_and_its_interval_holds_other_samples():
    found = measured.damage([curve(0.08)], **DRAWS)
    assert found.value == pytest.approx(0.08, rel=0.05) and found.low < 0.08 < found.high and found.n == N
    fresh = [measured.damage([curve(0.08, seed)], **DRAWS).value for seed in range(1, 20)]
    assert sum(found.low <= value <= found.high for value in fresh) >= 15


def test_damage_of_several_runs_is_their_geometric_mean_and_seeds_widen_it():
    several = measured.damage([curve(c, i) for i, c in enumerate((0.02, 0.08, 0.32))], seeds=SEEDS, **DRAWS)
    assert several.value == pytest.approx(0.08, rel=0.05) and several.seeds == SEEDS
    assert several.high / several.low > 4


def test_an_attack_that_never_gets_there_and_one_that_is_free_count_as_the_bounds():
    never = measured.damage([level_curve()], **DRAWS)
    free = measured.damage([curve(0.01, before=-3.0)], **DRAWS)
    assert (never.value, free.value) == (pytest.approx(measured.DEAREST), pytest.approx(measured.CHEAPEST))
    assert never.low < never.value < never.high and free.low < free.value < free.high


def test_runs_are_paired_by_seed_and_a_single_run_is_compared_with_each():
    one, other = ([curve(c * k, i) for i, c in enumerate((0.02, 0.05, 0.1))] for k in (3, 1))
    ratio = measured.dearer(one, other, seeds=SEEDS, **DRAWS)
    assert ratio.value == pytest.approx(3, rel=0.01) and ratio.high / ratio.low < 1.1  # the same draws of both
    alone = measured.dearer(one, [curve(0.05)], seeds=SEEDS, **DRAWS)
    assert alone.value == pytest.approx(3 * (0.02 * 0.05 * 0.1) ** (1 / 3) / 0.05, rel=0.1)
    assert alone.high / alone.low > 2
    with pytest.raises(ValueError, match="3 runs cannot be compared with 2"):
        measured.dearer(one, other[:2], **DRAWS)


def one_direction(run, before=1.0, without=0.0, induce=1.0, random=None):
    return measured.one_direction(
        run, refused(before), refused(without), induce, random or level_curve(), seeds=(0,), **DRAWS
    )


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (one_direction(curve(0.05)), "reproduced"),
        (one_direction(curve(0.9)), "contradicted"),
        (one_direction(level_curve()), "contradicted"),
        (one_direction(curve(0.2)), "direction only"),
        (one_direction(curve(0.05), before=0.1), "invalid"),
        (one_direction(curve(0.05, before=-2.0)), "invalid"),
        (one_direction(curve(0.05), random=level_curve(-2.0)), "invalid"),
        (one_direction(curve(0.05), without=0.9), "direction only"),
        (one_direction(curve(0.05), induce=-3.0), "direction only"),
    ],
)
def test_one_direction_counts_if_it_is_cheap_and_a_model_that_refused_complies(verdict_of, found, verdict):
    assert verdict_of(found) == verdict
    assert found.estimate.seeds == (0,)


TOOK = Control("training closed most of the gap", 0.3, True, "validity")
FAILED = Control("training closed most of the gap", 0.9, False, "validity")
CLAIMED = ("start", "LM+KD", "L1+KD")


def redistributed(costs, affine=None, took=TOOK, sane=None):
    def runs(of):
        return {name: [curve(cost, i)] for i, (name, cost) in enumerate(of.items())}

    controls = dict.fromkeys(costs, SANE) | (sane or {})
    return measured.redistribution(runs(costs), runs(affine or costs), took=took, seeds=(0,), sane=controls, **DRAWS)


DEARER = {"start": 0.05, "LM+KD": 0.06, "L1+KD": 0.07, "Cov+KD": 0.4}


def test_an_attack_that_is_dearer_than_on_any_other_is_reproduced_and_one_that_is_cheaper_contradicted(verdict_of):
    assert [verdict_of(m) for m in redistributed(DEARER)] == ["reproduced"] * 3
    assert [m.estimate.value for m in redistributed(DEARER)] == pytest.approx([8, 6.67, 5.71], rel=0.05)
    turned = {**dict.fromkeys(CLAIMED, 0.4), "Cov+KD": 0.05}
    assert [verdict_of(m) for m in redistributed(turned)] == ["contradicted"] * 3
    assert [m.claim for m in redistributed(DEARER)] == [
        "refusal.redistribution-raises-damage",
        "refusal.covariance-raises-damage",
        "refusal.covariance-beats-means",
    ]


def test_each_claim_has_its_own_other_condition(verdict_of):
    found = redistributed({"start": 0.05, "LM+KD": 0.8, "L1+KD": 0.05, "Cov+KD": 0.4})
    assert [verdict_of(m) for m in found] == ["reproduced", "contradicted", "reproduced"]


def test_an_attack_that_affine_ablation_undoes_is_no_more_than_a_direction(verdict_of):
    affine = {**DEARER, "Cov+KD": 0.05}
    assert {verdict_of(m) for m in redistributed(DEARER, affine)} == {"direction only"}


def test_training_that_did_not_take_hold_or_ran_wild_is_no_test(verdict_of):
    assert {verdict_of(m) for m in redistributed(DEARER, took=FAILED)} == {"invalid"}
    hit = redistributed(DEARER, sane={"LM+KD": INSANE})
    assert [verdict_of(m) for m in hit] == ["reproduced", "invalid", "reproduced"]


def test_conditions_left_out_are_not_judged_and_a_ceiling_is_said(verdict_of):
    found = redistributed({"start": 0.05, "Cov+KD": 5.0})
    assert [verdict_of(m) for m in found] == ["reproduced", "not judged", "not judged"]
    assert found[0].estimate.value == pytest.approx(20, rel=0.05) and "counts as 1 nat" in found[0].reason
    assert redistributed(DEARER)[0].reason == ""


def optimised(run, without=0.0, took=TOOK, sane=SANE):
    return measured.optimised([run], [refused(without)], took=took, seeds=(0,), sane=sane, **DRAWS)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (optimised(curve(0.05)), "reproduced"),
        (optimised(level_curve()), "contradicted"),
        (optimised(curve(0.05), without=0.9), "direction only"),
        (optimised(curve(0.05), took=FAILED), "invalid"),
        (optimised(curve(0.05), sane=INSANE), "invalid"),
        (optimised(curve(0.05, before=-2.0)), "invalid"),
    ],
)
def test_an_optimised_attack_counts_if_training_took_hold_and_answers_comply(verdict_of, found, verdict):
    assert verdict_of(found) == verdict


def test_an_optimised_attack_that_was_not_made_is_not_judged(verdict_of):
    found = measured.optimised(None, [], took=TOOK, seeds=(0,), sane=SANE, **DRAWS)
    assert verdict_of(found) == "not judged"


def concentrated(left=0.1, at_start=0.8, before=1.0, cost=0.05, took=TOOK, sane=SANE):
    one, start = ((curve(cost, i), refused(share, i)) for i, share in enumerate((left, at_start)))
    return measured.concentrated([one], start, [refused(before)], took=took, seeds=(0,), sane=sane)


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "reproduced"),
        ({"left": 0.8, "at_start": 0.1}, "contradicted"),
        ({"left": 0.55}, "direction only"),
        ({"before": 0.1}, "invalid"),
        ({"cost": 2.0}, "invalid"),
        ({"took": FAILED}, "invalid"),
        ({"sane": INSANE}, "invalid"),
    ],
)
def test_refusal_is_concentrated_if_leace_removes_more_of_it_and_both_models_talk(verdict_of, changed, verdict):
    assert verdict_of(concentrated(**changed)) == verdict


def test_without_leace_nothing_is_said_of_it(verdict_of):
    found = measured.concentrated(None, None, [], took=TOOK, seeds=(0,), sane=SANE)
    assert verdict_of(found) == "not judged"


def test_what_another_condition_shows_is_not_judged_as_covariance_matching(verdict_of):
    assert [verdict_of(m) for m in measured.of_covariance("Cov+KD", *intact())] == ["reproduced", "reproduced"]
    other = measured.of_covariance("LM+KD", *intact())
    assert [verdict_of(m) for m in other] == ["not judged", "not judged"]
    assert [m.claim for m in other] == [m.claim for m in intact()]


# What training moved


CLASSES = np.arange(60) % 2 == 0


def clouds(spread, seed=0, features=30):
    """Two classes with one mean; the first has variance `spread` in half of the features, the second 1 in all."""
    x = np.random.default_rng(seed).standard_normal((60, features))
    x[CLASSES, : features // 2] *= spread**0.5
    return x


def test_a_gap_of_covariances_is_unbiased_and_does_not_mind_scale_or_means():
    found = np.array([measured.covariance_gap(clouds(1.0, seed), CLASSES) for seed in range(300)])
    assert abs(found.mean()) < 4 * found.std() / 300**0.5 + 0.01
    there = np.mean([measured.covariance_gap(clouds(4.0, seed), CLASSES) for seed in range(300)])
    expected = 9 * 15 / ((16 + 1) * 15 + 30)  # ||S_1 - S_0||^2 over the sum of the squares
    assert there == pytest.approx(expected, abs=0.04)
    x = clouds(4.0)
    moved = 7 * x + 3 * CLASSES[:, None]
    assert measured.covariance_gap(moved, CLASSES) == pytest.approx(measured.covariance_gap(x, CLASSES))


def test_the_size_of_a_covariance_is_unbiased():
    found = []
    for seed in range(400):
        x = np.random.default_rng(seed).exponential(size=(8, 12))
        found.append(measured._squared_covariance(x - x.mean(0)))
    assert np.mean(found) == pytest.approx(12, abs=4 * np.std(found) / 400**0.5)


def test_what_is_left_of_a_gap_of_covariances_decides_whether_training_took_hold():
    whole, none, some = clouds(9.0), clouds(1.0, 1), clouds(9.0, 2)
    closed, open_ = (measured.covariance_left(whole, after, CLASSES) for after in (none, some))
    assert closed.low < closed.value < 0.5 and open_.low < 1 < open_.high
    assert measured.took_hold(closed).passed and not measured.took_hold(open_).passed
    assert measured.took_hold(closed).kind == "validity"


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


# Tables


def attacks_of(*costs, refuse=0.25):
    said = tuple(map(Answer, ["I can't help with that."] * round(4 * refuse) + ["Tea."] * (4 - round(4 * refuse))))
    names = [("means, zero", "source", ()), ("means, zero", "-1", said), ("LEACE", "fitted", said)]
    return Damage(
        tuple(
            Attack(name, rule, 7, -1, False, curve(cost), answers)
            for (name, rule, answers), cost in zip(names, costs, strict=True)
        )
    )


def test_the_table_of_damage_has_a_row_for_each_rule_and_the_curves_those_of_one_rule():
    damages = {"start": [attacks_of(0.3, 0.1, 0.2)], "Cov+KD": [attacks_of(0.4, 0.2, 0.3), attacks_of(0.4, 0.2, 0.3)]}
    rows = measured.damage_table(damages, **DRAWS)
    assert [(row["condition"], row["rule"]) for row in rows[:4]] == [
        ("start", "source"),
        ("start", "-1"),
        ("start", "fitted"),
        ("Cov+KD", "source"),
    ]
    assert rows[1]["at -1"] == pytest.approx(0.1, rel=0.05) and rows[1]["at 0"] < rows[1]["at -1"]
    assert rows[1]["low -1"] < rows[1]["at -1"] < rows[1]["high -1"]
    assert np.isnan(rows[0]["refused"]) and rows[1]["refused"] == 0.25
    drawn = measured.curve_table(damages)
    assert len(drawn) == 2 * 2 * len(SCALES)
    assert drawn[3]["kl"] == pytest.approx(curve(0.1).kl[3].mean()) and drawn[3]["scale"] == 1.0


def test_the_table_of_gaps_says_what_is_left_of_the_first_conditions():
    def states(spread, seed):
        return np.stack([clouds(spread, seed), clouds(spread, seed + 1)], 1)[:, :, None]

    rows = measured.gap_table({"start": states(9.0, 0), "Cov+KD": states(1.0, 9)}, CLASSES, (3, 6), (-1,))
    assert len(rows) == 2 * 2 * 2
    assert {row["left"] for row in rows if row["condition"] == "start"} == {1.0}
    left = [row["left"] for row in rows if row["condition"] == "Cov+KD" and row["gap"] == "covariances"]
    assert max(left) < 0.5
