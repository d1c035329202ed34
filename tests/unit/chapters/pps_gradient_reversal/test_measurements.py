"""Planted cosines and scores get the verdicts on preventative steering that they deserve."""

import numpy as np
import pytest
import torch

from helpers.book.findings import load_claims
from helpers.chapters.pps_gradient_reversal import measurements as measured
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


def training(margins=(), scores=(), projections=(), loops=0.0, elsewhere=0.0, sane=SANE):
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
    return measured.training(likely, normal, arms, along, repeated, seeds=SEEDS, sane=sane)


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


def test_few_steering_vectors_decide_nothing_and_many_do(verdict_of):
    cosines = np.linspace(-0.2, 0.3, 14)
    few = measured.cross_trait(cosines[:5], -cosines[:5])
    assert verdict_of(few) == "not judged" and "5 steering vectors cannot decide" in few.reason
    assert verdict_of(measured.cross_trait(cosines, 50 - 100 * cosines)) == "reproduced"
    assert verdict_of(measured.cross_trait(cosines, 50 + 100 * cosines)) == "contradicted"


def existing(start=90.0, sane=SANE, **after):
    arms = {"undefended": 90.0, "PPS": 40.0, "IP": 89.0} | after
    scores = {n: around(v, i, 5.0, (3, N)) for i, (n, v) in enumerate(arms.items())}
    return measured.existing_trait(
        around(start, 7, 5.0, (3, N)), around(5.0, 8, 5.0, (1, N)), scores, seeds=SEEDS, sane=sane
    )


def test_pps_has_to_lower_a_trait_that_is_there_and_ip_must_not(verdict_of):
    def verdicts(**planted):
        return [verdict_of(m) for m in existing(**planted)]

    assert verdicts() == ["reproduced", "reproduced"]
    assert verdicts(PPS=89.0, IP=40.0) == ["contradicted", "contradicted"]
    assert verdicts(undefended=30.0) == ["direction only", "reproduced"]
    assert verdicts(start=10.0) == verdicts(sane=BROKEN) == ["invalid", "invalid"]


def edited(undefended=70.0, untrained=5.0, **changed):
    arms = {"neutralise": 69.0, "attenuate": 20.0, "amplify": 90.0} | changed
    scores = {m: around(v, i, 3.0, (3, N)) for i, (m, v) in enumerate(arms.items())}
    before = around(untrained, 8, 3.0, (1, N))
    return [*measured.edits(around(undefended, 9, 3.0, (3, N)), scores, before, seeds=SEEDS, sane=SANE)]


def test_edits_show_a_direction_until_their_control_is_run(verdict_of):
    assert [verdict_of(m) for m in edited()] == ["reproduced", "direction only", "direction only"]
    assert edited()[1].controls[-1].state == "not measured"


def test_edits_that_do_the_opposite_contradict_and_a_full_scale_shows_nothing(verdict_of):
    opposite = edited(neutralise=20.0, attenuate=90.0, amplify=50.0)
    assert [verdict_of(m) for m in opposite] == ["invalid", "contradicted", "contradicted"]
    assert verdict_of(edited(neutralise=20.0)[0]) == "contradicted"
    no_edit_works = edited(neutralise=70.0, attenuate=70.0, amplify=70.0)
    assert verdict_of(no_edit_works[0]) == "invalid", "nothing can be said of one edit where none does anything"
    assert {verdict_of(m) for m in edited(untrained=65.0)} == {"invalid"}
    assert verdict_of(edited(undefended=99.0, amplify=99.5)[2]) == "invalid"


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
