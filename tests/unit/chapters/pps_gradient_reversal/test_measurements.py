"""Planted cosines and scores get the verdicts on preventative steering that they deserve."""

import numpy as np
import pytest
import torch

from helpers.book.findings import load_claims
from helpers.chapters.pps_gradient_reversal import measurements as measured
from helpers.statistics import Estimate, mean_estimate
from helpers.studies import nulls
from helpers.verdicts import Control

N, SEEDS, WIDTH = 32, (0, 1, 2), 64
SANE = Control("training is sane", 0.0, True, "validity")
BROKEN = Control("training is sane", 1.0, False, "validity")


def around(mean, seed=0, sd=0.02, shape=(N,)):
    return mean + sd * np.random.default_rng(seed).standard_normal(shape)


def reversal(undefended=-0.1, pps=0.2, random=-0.1, null_sd=0.02):
    null = around(0.0, 5, null_sd, (4000,))
    arms = (around(undefended), around(pps, 1), around(random, 2, shape=(8, N)))
    return measured.reversal(*arms, {"isotropic directions": null})


def test_a_pressure_that_pps_reverses_and_random_vectors_do_not_is_reproduced(verdict_of):
    assert [verdict_of(m) for m in reversal()] == ["reproduced"] * 3


def test_flipped_cosines_contradict(verdict_of):
    assert verdict_of(reversal(undefended=0.1)[0]) == "contradicted"
    assert verdict_of(reversal(pps=-0.2)[1]) == "contradicted"
    assert verdict_of(reversal(random=0.1)[2]) == "contradicted"


def test_the_mean_gradient_has_to_turn_under_pps_and_not_under_random_vectors(verdict_of):
    def found(pps, random):
        return verdict_of(measured.reversal_of_means(around(pps), around(random, 2, shape=(8, N))))

    assert found(0.2, -0.1) == "reproduced"
    assert found(-0.2, -0.1) == "contradicted"
    assert found(0.2, 0.1) == "direction only"


def test_a_cosine_that_meaningless_directions_reach_and_random_vectors_that_reverse_fail_controls(verdict_of):
    assert verdict_of(reversal(null_sd=0.3)[0]) == "direction only"
    assert verdict_of(reversal(random=0.1)[1]) == "direction only"


def changes(rank, seed, axis=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((N, rank)) @ np.eye(WIDTH)[axis : axis + rank] + 0.01 * rng.standard_normal((N, WIDTH))


def concentration(pps_rank, ip_rank, axis=0):
    vector = np.eye(WIDTH)[0]
    null = nulls.isotropic(WIDTH, seed=0).double().numpy()
    return measured.concentration(changes(pps_rank, 1, axis), changes(ip_rank, 2), vector, null)


def test_pps_has_to_change_fewer_directions_than_ip_and_along_the_trait(verdict_of):
    assert verdict_of(concentration(1, 20)) == "reproduced"
    assert verdict_of(concentration(20, 1)) == "contradicted"
    assert verdict_of(concentration(1, 20, axis=40)) == "direction only"


SCORES = {"undefended": 90.0, "PPS": 15.0, "random": 85.0, "untrained": 5.0}
PROJECTIONS = {"undefended": 1.0, "PPS": 0.2, "random": 0.9}


MARGINS = {"undefended": 0.6, "PPS": 0.1, "random": 0.58, "untrained": 0.0}


def training(margins=(), scores=(), projections=(), loops=0.0, elsewhere=0.0, least=0.2, sane=SANE):
    likely = {
        n: around(v, i, 0.05, (1 if n == "untrained" else 3, N))
        for i, (n, v) in enumerate((MARGINS | dict(margins)).items())
    }
    arms = {
        n: around(v, i, 5.0, (1 if n == "untrained" else 3, N))
        for i, (n, v) in enumerate((SCORES | dict(scores)).items())
    }
    along = {n: around(v, i, 0.05, (3, N)) for i, (n, v) in enumerate((PROJECTIONS | dict(projections)).items())}
    repeated = {"PPS": around(loops, 1, 0.01, (3, N)), "untrained": around(0.0, 2, 0.01, (1, N))}
    normal = {"PPS": around(2.0 + elsewhere, 8, 0.05, (3, N)), "untrained": around(2.0, 9, 0.05, (1, N))}
    falls = {"half the steps": 0.4, "double the rate": least}
    steady = measured.recipes({n: mean_estimate(around(v, 3, 0.05, (3, N))) for n, v in falls.items()})
    return measured.training(likely, normal, arms, along, repeated, seeds=SEEDS, sane=sane, steady=steady)


def test_a_defence_that_keeps_the_trait_out_is_reproduced_over_its_seeds(verdict_of):
    found = training()
    assert [verdict_of(m) for m in found] == ["reproduced", "reproduced", "reproduced"]
    assert all(m.estimate.seeds == SEEDS for m in found)


@pytest.mark.parametrize(
    ("planted", "verdicts"),
    [
        ({"margins": {"PPS": 0.6, "undefended": 0.1}}, ["contradicted", "reproduced", "reproduced"]),
        ({"margins": {"random": 0.1}}, ["direction only", "reproduced", "reproduced"]),
        ({"margins": {"untrained": 0.7}}, ["invalid", "reproduced", "reproduced"]),
        ({"elsewhere": 0.5}, ["direction only", "reproduced", "reproduced"]),
        ({"least": 0.0}, ["direction only", "reproduced", "reproduced"]),
        ({"scores": {"PPS": 90, "undefended": 15}}, ["reproduced", "contradicted", "reproduced"]),
        ({"scores": {"random": 15}}, ["reproduced", "direction only", "reproduced"]),
        ({"projections": {"PPS": 1.0, "undefended": 0.2}}, ["reproduced", "reproduced", "contradicted"]),
        ({"projections": {"random": 0.1}}, ["reproduced", "reproduced", "direction only"]),
        ({"loops": 0.5}, ["reproduced", "invalid", "reproduced"]),
        ({"sane": BROKEN}, ["invalid", "invalid", "invalid"]),
    ],
)
def test_swapped_arms_and_failed_controls_change_the_verdict(verdict_of, planted, verdicts):
    assert [verdict_of(m) for m in training(**planted)] == verdicts


def test_an_identity_that_holds_is_reproduced_and_one_that_is_off_is_not(verdict_of):
    slopes = around(0.3, 0, 0.1, (2, N))
    assert verdict_of(measured.identity(slopes, slopes * (1 + 1e-5))) == "reproduced"
    assert verdict_of(measured.identity(slopes, slopes * 1.05)) == "contradicted"
    assert verdict_of(measured.identity(slopes, slopes[:, ::-1])) == "contradicted"  # sequences exchanged


GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def slopes(turn, seed=0, spread=0.3):
    return np.array(GRID)[:, None] - turn - spread * np.random.default_rng(seed).standard_normal(N)


def turning(own=1.2, random=0.1, other=0.4):
    drawn = np.stack([slopes(random, k, 0.05) for k in range(1, 9)])
    return measured.turning(GRID, slopes(own), drawn, {"pirate": slopes(other, 20)})


def test_the_own_vector_has_to_turn_later_than_random_and_other_ones(verdict_of):
    assert verdict_of(turning()) == "reproduced"
    assert verdict_of(turning(random=1.6)) == "contradicted"
    assert verdict_of(turning(other=1.3)) == "direction only"
    assert turning(random=-0.5).estimate.value == pytest.approx(1.2, abs=0.2)  # turned before 0: counts as 0


def test_a_vector_along_which_the_loss_never_stops_falling_counts_as_turning_at_the_end_of_the_grid(verdict_of):
    assert verdict_of(turning(random=9.0)) == "contradicted"
    assert turning(random=9.0).estimate.value == pytest.approx(1.2 - GRID[-1], abs=0.2)
    assert verdict_of(turning(other=9.0)) == "direction only"


DOSES = (0.0, 0.5, 1.0, 1.5, 2.0)


def dose(per_dose=-0.3, random=0.0, untrained=-0.6, zero=1.0, push=2.0, turn=1.2, sane=SANE):
    noise = np.random.default_rng(3).standard_normal((len(DOSES), 3, N))
    lines = np.array(DOSES)[:, None, None]
    return measured.dose(
        DOSES,
        per_dose * lines + 0.05 * noise,
        around(untrained, 4, 0.05, (1, N)),
        random=random * lines + 0.05 * noise[::-1],
        shifts=push * (1 - lines / zero) + 0.1 * noise,
        turn=Estimate(turn, turn - 0.1, turn + 0.1, N),
        seeds=SEEDS,
        sane=sane,
    )


@pytest.mark.parametrize(
    ("planted", "verdicts"),
    [
        ({}, ["reproduced", "reproduced"]),
        ({"per_dose": 0.3}, ["contradicted", "reproduced"]),
        ({"random": -0.25}, ["direction only", "reproduced"]),
        ({"untrained": 0.1}, ["invalid", "reproduced"]),
        ({"zero": 2.2}, ["reproduced", "contradicted"]),
        ({"push": -2.0}, ["reproduced", "invalid"]),
        ({"turn": float("nan")}, ["invalid", "invalid"]),
        ({"sane": BROKEN}, ["invalid", "invalid"]),
    ],
)
def test_a_dose_has_to_act_and_its_shift_to_end_where_the_pressure_turns(verdict_of, planted, verdicts):
    assert [verdict_of(m) for m in dose(**planted)] == verdicts


def test_shuffled_doses_show_no_effect():
    """Doses dealt anew to every question, as shuffled labels."""
    rng = np.random.default_rng(0)
    noise = np.random.default_rng(3).standard_normal((len(DOSES), 3, N))
    margins = -0.3 * np.array(DOSES)[:, None, None] + 0.05 * noise

    def found():
        dealt = np.stack([margins[rng.permutation(len(DOSES)), :, q] for q in range(N)], -1)
        return mean_estimate(measured.per_dose(DOSES, dealt), seeds=SEEDS)

    deals = [found() for _ in range(200)]
    assert np.mean([e.low < 0 < e.high for e in deals]) > 0.88


def behind(steered=(), plain=(), sane=SANE):
    on = {"PPS": 0.42, "undefended": 1.0, "untrained": 0.4} | dict(steered)
    off = {"PPS": 0.1, "undefended": 0.6, "untrained": 0.0} | dict(plain)
    arms = [
        {n: around(v, i, 0.05, (1 if n == "untrained" else 3, N)) for i, (n, v) in enumerate(of.items())}
        for of in (on, off)
    ]
    return measured.behind_the_vector(*arms, seeds=SEEDS, sane=sane)


def test_what_is_behind_the_vector_is_read_against_the_untrained_model_with_it(verdict_of):
    assert verdict_of(behind()) == "reproduced"
    assert verdict_of(behind(steered={"PPS": 0.9})) == "contradicted"  # hidden
    assert verdict_of(behind(plain={"undefended": 0.1})) == "invalid"
    assert verdict_of(behind(plain={"untrained": 0.45, "undefended": 1.0})) == "invalid"  # the vector does nothing
    assert verdict_of(behind(sane=BROKEN)) == "invalid"


def test_the_recipe_with_which_pps_does_least_is_the_one_named():
    weakest = measured.recipes({"half": Estimate(0.4, 0.3, 0.5, 9), "double": Estimate(0.5, -0.1, 1.1, 9)})
    assert "double" in weakest.name and not weakest.passed


def test_pps_that_acts_as_much_on_normal_data_does_not_act_on_the_trait(verdict_of):
    def found(strong, normal, sane=SANE):
        margins = {
            level: {"undefended": around(0.6, k, 0.02, (3, N)), "PPS": around(0.6 - fall, k + 1, 0.02, (3, N))}
            for k, (level, fall) in zip((1, 3), (("strong", strong), ("normal", normal)), strict=True)
        }
        return measured.data(margins, seeds=SEEDS, sane=sane)

    assert verdict_of(found(0.4, 0.1)) == "reproduced"
    assert verdict_of(found(0.4, 0.4)) == verdict_of(found(0.1, 0.4)) == "contradicted"
    assert verdict_of(found(0.0, -0.4)) == verdict_of(found(0.4, 0.1, BROKEN)) == "invalid"
    assert "On normal answers PPS takes 0.1" in found(0.4, 0.1).reason


def test_the_chapters_block_has_to_keep_out_more_than_the_others(verdict_of):
    def found(chosen=0.1, others=0.4, sane=SANE):
        margins = {b: around(chosen if b == 15 else others, b, 0.02, (3, N)) for b in (3, 9, 15, 21)}
        return measured.steered_block(margins, 15, around(0.6, 9, 0.02, (3, N)), seeds=SEEDS, sane=sane)

    assert verdict_of(found()) == "reproduced" and "by block 15" in found().reason
    assert verdict_of(found(chosen=0.4, others=0.1)) == "contradicted"
    assert verdict_of(found(chosen=0.7, others=0.9)) == verdict_of(found(sane=BROKEN)) == "invalid"


def test_a_model_that_relearns_faster_had_only_hidden_the_trait(verdict_of):
    def found(pps, without=0.3, untrained=0.3, hidden=0.5):
        gains = {"PPS": pps, "normal data, PPS": without, "untrained": untrained, "IP": hidden}
        before = {n: around(0.1, i, 0.02, (3, N)) for i, n in enumerate(gains)}
        after = {n: m + around(gains[n], 5, 0.02, (3, N)) for n, m in before.items()}
        return verdict_of(measured.relearning(before, after, seeds=SEEDS))

    assert found(0.3) == "reproduced"
    assert found(0.5) == "contradicted"
    assert found(0.5, without=0.5) == "reproduced", "what every model gains that lost the vector is not the trait"
    assert found(0.3, hidden=0.3) == "invalid", "steps that cannot see a hidden trait show nothing"
    assert found(0.0, untrained=0.0) == "invalid"


def test_a_rebound_is_the_rise_after_the_steering_ends(verdict_of):
    def found(removed, kept=0.1, undefended=0.6, sane=SANE):
        arms = (around(v, i, 0.05, (3, N)) for i, v in enumerate((kept, removed, undefended)))
        return verdict_of(measured.rebound(*arms, seeds=SEEDS, sane=sane))

    assert found(0.4) == "reproduced"
    assert found(0.1) == found(0.0) == "contradicted"
    assert found(0.4, undefended=0.12) == found(0.4, sane=BROKEN) == "invalid"


def crossed(slope=1.0, spread=0.05, traits=4, between=0.0, seed=0):
    """Vectors whose cosine tells what they keep out, by `slope`; and data that differ in both, by `between`."""
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-0.2, 0.3, (traits, traits))
    kept = slope * cosines + spread * rng.standard_normal((traits, traits))
    level = between * np.arange(traits)[:, None]
    return measured.cross_trait(cosines + level, kept + level, seed=0)


def test_few_pairs_of_data_and_vector_decide_nothing_and_twelve_may(verdict_of):
    few = crossed(traits=3)
    assert verdict_of(few) == "not judged" and "6 pairs of data and vector cannot decide" in few.reason
    assert verdict_of(crossed()) == "reproduced"
    assert verdict_of(crossed(slope=-1.0)) == "contradicted"


def test_data_that_differ_are_not_vectors_that_predict(verdict_of):
    apart = crossed(slope=0.0, between=2.0, seed=3)
    assert apart.estimate.low > 0 and not apart.controls[0].passed
    assert verdict_of(apart) == "direction only"


def elsewhere(undefended=-0.1, pps=0.2, random=-0.1, one=None):
    found = {
        name: {"undefended": around(undefended, k), "PPS": around(pps, k + 1), "random": around(random, k + 2)}
        for k, name in enumerate(("pirate", "impolite"))
    }
    if one is not None:
        found["pirate"]["PPS"] = around(one, 7)
    return measured.reversal_elsewhere(found)


def test_the_reversal_has_to_hold_on_every_other_trait(verdict_of):
    assert verdict_of(elsewhere()) == "reproduced"
    assert verdict_of(elsewhere(pps=-0.2)) == "contradicted"
    assert verdict_of(elsewhere(random=0.2)) == verdict_of(elsewhere(undefended=0.2)) == "direction only"
    assert verdict_of(elsewhere(one=-0.2)) != "reproduced"


def test_other_traits_have_to_be_kept_out_each(verdict_of):
    def found(pirate, impolite):
        kept = {"pirate": around(pirate, 1, 0.1, (3, N)), "impolite": around(impolite, 2, 0.1, (3, 20))}
        return verdict_of(measured.trained_elsewhere(kept, seeds=SEEDS))

    assert found(0.8, 0.9) == "reproduced"
    assert found(-0.8, -0.9) == "contradicted"
    assert found(1.5, 0.0) == found(0.3, 0.3) == "direction only"


def test_a_step_has_to_move_down_under_pps_alone(verdict_of):
    def found(undefended=2.0, pps=-2.0, random=1.0):
        moved = {
            n: around(v, i, 0.5)
            for i, (n, v) in enumerate((("undefended", undefended), ("PPS", pps), ("random", random)))
        }
        return verdict_of(measured.step(moved))

    assert found() == "reproduced"
    assert found(pps=2.0) == "contradicted"
    assert found(undefended=-2.0) == found(random=-2.0) == "direction only"


def test_pps_is_held_against_concept_ablation_and_against_ip(verdict_of):
    def found(sane=SANE, **planted):
        arms = {"undefended": 0.6, "PPS": 0.1, "IP": 0.4, "PPS + IP": 0.0, "CAFT, mean": 0.5} | planted
        margins = {n: around(v, i, 0.02, (3, N)) for i, (n, v) in enumerate(arms.items())}
        both = measured.other_defences(margins, around(0.0, 9, 0.02, (1, N)), seeds=SEEDS, sane=sane)
        return [verdict_of(m) for m in both]

    assert found() == ["reproduced", "reproduced"]
    assert found(**{"CAFT, mean": 0.0, "PPS + IP": 0.3}) == ["contradicted", "contradicted"]
    assert found(IP=-0.1) == ["reproduced", "direction only"]
    assert found(undefended=0.1) == found(sane=BROKEN) == ["invalid", "invalid"]


SCALES = pytest.mark.parametrize(
    ("scale", "unit"), [(measured.SCORE, 1.0), (measured.MARGIN, 0.01)], ids=["score", "margin"]
)
"""What is planted is written in points; a hundredth of it is planted as a margin."""


def existing(scale, unit, start=90.0, sane=SANE, **after):
    arms = {"undefended": 90.0, "PPS": 40.0, "IP": 89.0} | after
    found = {n: unit * around(v, i, 5.0, (3, N)) for i, (n, v) in enumerate(arms.items())}
    before, untrained = unit * around(start, 7, 5.0, (3, N)), unit * around(5.0, 8, 5.0, (1, N))
    return measured.existing_trait(before, untrained, found, scale, seeds=SEEDS, sane=sane)


@SCALES
def test_pps_has_to_lower_a_trait_that_is_there_and_ip_must_not(verdict_of, scale, unit):
    def verdicts(**planted):
        return [verdict_of(m) for m in existing(scale, unit, **planted)]

    assert verdicts() == ["reproduced", "reproduced"]
    assert verdicts(PPS=89.0, IP=40.0) == ["contradicted", "contradicted"]
    assert verdicts(undefended=30.0) == ["direction only", "reproduced"]
    assert verdicts(start=10.0) == verdicts(sane=BROKEN) == ["invalid", "invalid"]


def edited(scale, unit, undefended=70.0, untrained=5.0, at_random=(70.0, 70.0), **changed):
    arms = {"neutralise": 69.0, "attenuate": 20.0, "amplify": 90.0} | changed
    found = {m: unit * around(v, i, 3.0, (3, N)) for i, (m, v) in enumerate(arms.items())}
    random = {
        m: unit * around(v, i, 3.0, (3, N))
        for i, (m, v) in enumerate(zip(("attenuate", "amplify"), at_random, strict=True))
    }
    before, plain = unit * around(untrained, 8, 3.0, (1, N)), unit * around(undefended, 9, 3.0, (3, N))
    return measured.edits(plain, found, random, before, scale, seeds=SEEDS, sane=SANE)


@SCALES
def test_edits_along_the_trait_are_held_against_the_same_edits_along_a_random_vector(verdict_of, scale, unit):
    def verdicts(**planted):
        return [verdict_of(m) for m in edited(scale, unit, **planted)]

    assert verdicts() == ["reproduced"] * 3
    assert verdicts(at_random=(25.0, 70.0)) == ["reproduced", "direction only", "reproduced"]
    assert verdicts(at_random=(70.0, 88.0)) == ["reproduced", "reproduced", "direction only"]


@SCALES
def test_edits_that_do_the_opposite_contradict(verdict_of, scale, unit):
    def verdicts(**planted):
        return [verdict_of(m) for m in edited(scale, unit, **planted)]

    opposite = verdicts(neutralise=20.0, attenuate=90.0, amplify=50.0)
    assert opposite == ["invalid", "contradicted", "contradicted"]
    assert verdicts(neutralise=20.0)[0] == "contradicted"
    no_edit_works = verdicts(neutralise=70.0, attenuate=70.0, amplify=70.0)
    assert no_edit_works[0] == "invalid", "nothing can be said of one edit where none does anything"
    assert set(verdicts(untrained=65.0)) == {"invalid"}


def test_a_full_scale_shows_nothing_of_amplifying_and_margins_have_no_top(verdict_of):
    full = {"undefended": 99.0, "amplify": 99.5}
    assert verdict_of(edited(measured.SCORE, 1.0, **full)[2]) == "invalid"
    assert verdict_of(edited(measured.MARGIN, 0.01, **full)[2]) != "invalid"


def test_nulls_are_unit_vectors_of_the_kind_they_say():
    states = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, WIDTH)
    for rows in (
        nulls.isotropic(WIDTH, seed=0, count=2000),
        nulls.like_states(states, seed=0, count=2000),
        nulls.shuffled_labels(states, seed=0, count=2000),
    ):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(2000))
        assert rows.mean(0).abs().max() < 0.1
    spread = nulls.like_states(states, seed=0, count=2000).std(0)
    assert spread[0] > 5 * spread[-1]
    aligned = torch.eye(WIDTH)[:1].repeat(50, 1)
    assert (nulls.shuffled_labels(aligned, seed=0, count=100).abs()[:, 0] > 0.99).sum() > 80


def test_a_direction_is_held_against_the_null_on_its_own_side():
    null = np.linspace(-1, 1, 1001)
    assert nulls.rarely("they", null, -0.95).passed and nulls.rarely("they", null, 0.95).passed
    assert not nulls.rarely("they", null, -0.5).passed and not nulls.rarely("they", null, 0.5).passed


def test_the_limit_of_a_control_is_that_of_its_claim():
    assert load_claims()["pps.trains-lower-margin"].threshold == measured.ELSEWHERE
