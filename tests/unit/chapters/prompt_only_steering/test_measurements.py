"""Planted ratings get the verdicts on prompt-only steering that they deserve."""

import numpy as np
import pytest

from helpers.chapters.prompt_only_steering import measurements as measured
from helpers.statistics import Estimate

SEEDS, CONCEPTS, ITEMS = (0, 1, 2), 12, 60
GOOD, BAD = ({"concept": Estimate(v, v - 0.05, v + 0.05, 40)} for v in (0.95, 0.6))


def around(mean, seed=0, rows=3, columns=CONCEPTS, sd=0.05):
    return mean + sd * np.random.default_rng(seed).standard_normal((rows, columns))


ARMS = {
    "unsteered": 0.1,
    "prompting": 0.5,
    "PrOSV, lang": 1.0,
    "FSSV, lang": 0.8,
    "FSSV, factor searched": 0.7,
    "difference in means, factor searched": 0.4,
    "PrOSV, simpo": 1.2,
    "random": 0.5,
    "user words": 0.4,
}
UNTRAINED = ("unsteered", "prompting", "difference in means, factor searched")


def compared(judges=GOOD, moved=1.5, without=(), **changed):
    arms = {
        n: around(v, i, 1 if n in UNTRAINED else 3)
        for i, (n, v) in enumerate((ARMS | changed).items())
        if n not in without
    }
    factor = measured.factor_trains([2.0] * CONCEPTS, np.full((3, CONCEPTS), 2.0 * moved))
    found = measured.comparisons(arms, seeds=SEEDS, judges=measured.trusted(judges), factor=factor)
    return {m.claim.removeprefix("prompt."): m for m in found}


def test_an_arm_above_its_rival_is_reproduced_over_its_seeds(verdict_of):
    found = compared()
    assert {verdict_of(m) for m in found.values()} == {"reproduced"}
    assert all(m.estimate.seeds == SEEDS for m in found.values())


def test_an_arm_below_its_rival_is_contradicted(verdict_of):
    for claim, (one, other) in measured.COMPARED.items():
        swapped = {one: ARMS[other], other: ARMS[one]}
        if measured.PROSV in swapped:
            swapped = {n: v + 0.5 for n, v in swapped.items()}  # so that PrOSV still steers
        assert verdict_of(compared(**swapped)[claim.removeprefix("prompt.")]) == "contradicted", claim
    assert verdict_of(compared(**{"PrOSV, lang": 0.1, "unsteered": 1.0})["steers"]) == "contradicted"


def test_judges_that_fail_and_an_arm_that_does_not_steer_make_comparisons_invalid(verdict_of):
    assert {verdict_of(m) for m in compared(judges=BAD).values()} == {"invalid"}
    idle = compared(**{"PrOSV, lang": 0.1})
    assert {verdict_of(m) for name, m in idle.items() if name != "steers"} == {"invalid"}


def test_a_factor_that_does_not_train_decides_nothing_about_joint_training(verdict_of):
    found = compared(moved=0.99)
    assert verdict_of(found["joint"]) == "invalid" and verdict_of(found["beats-full"]) == "reproduced"


def test_what_a_run_leaves_out_is_not_judged(verdict_of):
    found = compared(without=("PrOSV, simpo", "random"))
    assert verdict_of(found["simpo"]) == verdict_of(found["ends-not-random"]) == "not judged"


def grid(slow, fast, best):
    losses = np.full((4, 2, 30), 3.0) + 0.05 * np.random.default_rng(0).standard_normal((4, 2, 30))
    losses[best, 0] -= slow
    losses[best, 1] -= fast
    return losses


def test_a_fast_factor_has_to_reach_the_lower_loss_inside_the_grid(verdict_of):
    def verdict(losses):
        return verdict_of(measured.factor_rate(losses, (0.01, 1.0), 0.1))

    assert verdict(grid(0.2, 1.0, 2)) == "reproduced"
    assert verdict(grid(1.0, 0.2, 2)) == "contradicted"
    assert verdict(grid(0.2, 1.0, 3)) == "direction only", "the best start lies at the grid's edge"
    assert verdict_of(measured.factor_rate(grid(0.2, 1.0, 2), (1.0, 2.0), 0.1)) == "not judged"


def quiz(unsteered=0.8, prosv=0.78, fssv=0.5, works=0.5):
    rights = {
        "unsteered": around(unsteered, 0, 1, ITEMS),
        "PrOSV": around(prosv, 1, 3, ITEMS),
        "FSSV": around(fssv, 2, 3, ITEMS),
    }
    arms = {"PrOSV, lang": around(works), "unsteered": around(0.1, 1, 1)}
    return [*measured.utility(rights, seeds=SEEDS, works=measured.steers(arms, seeds=SEEDS))]


@pytest.mark.parametrize(
    ("planted", "verdicts"),
    [
        ({}, ["reproduced", "reproduced"]),
        ({"prosv": 0.5, "fssv": 0.78}, ["contradicted", "contradicted"]),
        ({"unsteered": 0.1, "prosv": 0.1, "fssv": 0.0}, ["invalid", "invalid"]),
        ({"works": 0.1}, ["invalid", "invalid"]),
    ],
)
def test_ability_has_to_be_there_and_to_be_kept(verdict_of, planted, verdicts):
    assert [verdict_of(m) for m in quiz(**planted)] == verdicts


def test_a_model_that_names_what_is_forbidden_without_steering_fails_the_control(verdict_of):
    def verdict(prosv, prompting, unsteered):
        forbidden = {
            "PrOSV": around(prosv),
            "prompting": around(prompting, 1, 1),
            "unsteered": around(unsteered, 2, 1),
        }
        works = measured.steers({"PrOSV, lang": around(1.0), "unsteered": around(0.1, 1, 1)}, seeds=SEEDS)
        judged = measured.robustness(forbidden, seeds=SEEDS, judges=measured.trusted(GOOD), works=works)
        return verdict_of(judged)

    assert verdict(0.9, 0.3, 0.2) == "reproduced"
    assert verdict(0.3, 0.9, 0.2) == "contradicted"
    assert verdict(0.9, 0.3, 0.95) == "direction only"
