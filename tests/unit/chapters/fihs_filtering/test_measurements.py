"""Planted scores and outcomes get the verdicts on filtering that they deserve."""

import numpy as np
import pytest

from helpers.book.findings import load_claims
from helpers.chapters.fihs_filtering import measurements as measured
from helpers.chapters.fihs_filtering.method import Guess

N = 200
BAD = np.arange(N) < 40
SEEDS = (0, 1, 2)
BEFORE = np.arange(60) < 6
ALIKE = ["word " * (5 + i % 7) for i in range(N)]
LONGER = ["word " * (30 if bad else 1) for bad in BAD]
ONE, TWO = Guess(1.0, 0.0, (0.0,), (1.0,), (1.0,), None), Guess(1.0, 99.0, (0.0, 3.0), (1.0, 1.0), (0.5, 0.5), 1.0)


def scores(gap, seed=0):
    return np.random.default_rng(seed).standard_normal(N) + gap * BAD


def separation(gap=5.0, replies=ALIKE, guess=ONE):
    values = scores(gap)
    return measured.separation(values, replies, BAD, dropped=values > 2.5, clean_guess=guess)


def test_scores_that_part_harmful_from_task_points_are_reproduced(verdict_of):
    assert [verdict_of(m) for m in separation()] == ["reproduced", "reproduced"]


def test_scores_of_the_wrong_sign_are_contradicted(verdict_of):
    assert [verdict_of(m) for m in separation(-5.0)] == ["contradicted", "contradicted"]


def test_what_length_separates_as_well_is_no_more_than_a_direction(verdict_of):
    assert [verdict_of(m) for m in separation(replies=LONGER)] == ["direction only", "direction only"]


@pytest.mark.parametrize(("guess", "state"), [(TWO, "failed"), (None, "not measured")])
def test_two_kinds_in_clean_data_and_clean_data_left_out_both_fail_the_threshold(verdict_of, guess, state):
    threshold = separation(guess=guess)[1]
    assert verdict_of(threshold) == "direction only" and threshold.controls[-1].state == state


def compared(fihs, by_mean, other, replies=ALIKE):
    baselines = {"loss": scores(other, 1), "none": scores(0.0, 2)}
    return measured.against_baselines(scores(fihs), scores(by_mean, 3), baselines, replies, BAD)


def test_fihs_has_to_beat_the_best_of_the_others_and_the_mean(verdict_of):
    assert [verdict_of(m) for m in compared(4.0, 0.5, 1.0)] == ["reproduced", "reproduced"]
    assert [verdict_of(m) for m in compared(0.5, 4.0, 4.0)] == ["contradicted", "contradicted"]


def test_sum_against_mean_says_nothing_where_length_tells(verdict_of):
    assert verdict_of(compared(4.0, 0.5, 1.0, LONGER)[1]) == "invalid"


KINDS = ["task"] * 40 + ["explicit"] * 40
GROUP = np.repeat([0.0, 5.0], 40)


def test_steps_have_to_be_foreseen_within_a_kind_as_well(verdict_of):
    own = np.random.default_rng(0).standard_normal(80)
    noise = 0.1 * np.random.default_rng(1).standard_normal(80)
    assert verdict_of(measured.real_steps(GROUP + own, GROUP + own + noise, KINDS)) == "reproduced"
    assert verdict_of(measured.real_steps(-GROUP - own, GROUP + own + noise, KINDS)) == "contradicted"
    assert verdict_of(measured.real_steps(5 * GROUP + 0.01 * own, 5 * GROUP - own, KINDS)) != "reproduced"


def outcomes(share, seed=0, n=60):
    return np.random.default_rng(seed).random((len(SEEDS), n)) < share


ARMS = {"none": 0.8, "clean": 0.02, "FIHS": 0.0, "random": 0.8, "reversed": 0.9}


def protection(before=BEFORE, right=None, kept=0, without=(), **changed):
    complied = {name: outcomes(p, i) for i, (name, p) in enumerate((ARMS | changed).items()) if name not in without}
    right = {name: outcomes(p, 7) for name, p in (dict.fromkeys(ARMS, 0.9) | (right or {})).items()}
    filtered = [complied["FIHS"]] if "FIHS" in complied else []
    counts = {"harmful_kept": kept, "harmful_points": 11}
    found = measured.protection(complied, right, filtered, **counts, seeds=SEEDS, right_before=before)
    return {m.claim.split(".")[1]: m for m in found}


def test_a_filter_that_protects_is_reproduced_on_every_count(verdict_of):
    found = protection()
    assert {verdict_of(m) for m in found.values()} == {"reproduced"}
    assert all(m.estimate.seeds == SEEDS for m in found.values())


@pytest.mark.parametrize(
    ("changed", "claims"),
    [
        ({"none": 0.02, "clean": 0.8}, {"unfiltered-undoes": "contradicted", "protects": "invalid"}),
        ({"FIHS": 0.8}, {"protects": "contradicted", "as-safe-as-clean": "contradicted"}),
        ({"random": 0.02, "FIHS": 0.8}, {"beats-random": "contradicted"}),
        ({"reversed": 0.02, "FIHS": 0.8}, {"beats-reversed": "contradicted"}),
        ({"clean": 0.4, "FIHS": 0.4}, {"protects": "invalid", "unfiltered-undoes": "reproduced"}),
        ({"none": 0.02}, {"beats-random": "invalid", "as-safe-as-clean": "invalid"}),
    ],
)
def test_swapped_arms_and_data_without_harm_change_the_verdict(verdict_of, changed, claims):
    found = protection(**changed)
    assert {claim: verdict_of(found[claim]) for claim in claims} == claims


def test_lost_utility_and_models_that_did_not_learn_the_task_are_noticed(verdict_of):
    assert verdict_of(protection(right={"FIHS": 0.2, "clean": 0.9})["utility-kept"]) == "contradicted"
    unlearnt = protection(right={"none": 0.05})
    assert {verdict_of(m) for name, m in unlearnt.items() if name != "utility-kept"} == {"invalid"}
    assert verdict_of(unlearnt["utility-kept"]) == "reproduced"
    assert {verdict_of(m) for m in protection(before=np.ones(60, bool)).values()} == {"invalid"}


def test_a_filter_that_was_left_out_is_not_judged_and_what_passes_the_filter_is_said(verdict_of):
    found = protection(without=("random",), kept=3)
    assert verdict_of(found["beats-random"]) == "not judged"
    assert "lets 3 of 11" in found["protects"].reason and "drops all 11" in protection()["protects"].reason


def test_hidden_harm_has_to_score_above_the_task_and_beyond_its_length(verdict_of):
    def found(gap, replies):
        kinds = {"identity": scores(gap)[:40], "disguised": scores(gap, 1)[:40]}
        texts = dict.fromkeys(kinds, replies[:40])
        return [verdict_of(m) for m in measured.hidden(kinds, texts, scores(0.0, 2)[40:], ALIKE[40:])]

    assert found(5.0, ALIKE) == ["reproduced", "reproduced"]
    assert found(-5.0, ALIKE) == ["contradicted", "contradicted"]
    assert found(5.0, LONGER) == found(-5.0, LONGER) == ["invalid", "invalid"]


def test_where_no_threshold_is_safe_nothing_is_said_of_the_filter(verdict_of):
    found = protection(without=("FIHS",))
    assert verdict_of(found.pop("unfiltered-undoes")) == "reproduced"
    assert {verdict_of(m) for m in found.values()} == {"not judged"} and len(found) == 5


def test_the_limit_of_a_control_is_that_of_its_claim():
    assert load_claims()["filter.protects"].no_effect == measured.UNSAFE
