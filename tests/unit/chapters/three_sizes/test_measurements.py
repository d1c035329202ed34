"""Planted models get the estimates and the verdicts that they deserve, and size is said to change what it changes."""

from dataclasses import replace

import numpy as np
import pytest

from helpers.chapters.three_sizes import measurements as sizes
from helpers.chapters.three_sizes.readings import Gradients, Readings, States
from helpers.chat import Answer
from helpers.statistics import Estimate
from helpers.studies.alignment import Behaviour

N, WIDTH = 24, 64
COEFFICIENTS = (0.0, 1.0, 2.0)
SMALL, MIDDLE, LARGE = "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"


def noise(scale, *shape, seed=0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def asked(log_odds, kl, said, count=N):
    return Behaviour((Answer(said),) * count, log_odds + noise(0.3, count), np.abs(kl + noise(0.01, count)))


def states(gap, lengthened):
    rows = np.repeat([1.0, 0.0], N)
    lengths = 20 + lengthened * rows + noise(2, 2 * N, seed=4)
    found = [noise(1, 2 * N, WIDTH, seed=s) + gap * rows[:, None] * np.eye(WIDTH)[0] for s in (1, 2)]
    return States(found[0], rows, found[1], rows, lengths[:, None], lengths[:, None])


@pytest.fixture
def planted():
    """A model in which every claim holds."""
    vector = np.eye(WIDTH)[0]
    plain = noise(0.1, N, WIDTH)
    refuses, answers = "I can't help with that.", "Here are three ways to do it."
    scales = np.array([1.0, 2.0])[:, None]
    gain = np.stack([0.4 * scales + noise(0.02, 1, N), 0.2 * scales + noise(0.02, 1, N, seed=3)])
    kl = np.stack([0.05 * scales + 0 * noise(1, 1, N), 0.05 * scales + 0 * noise(1, 1, N)])
    return Readings(
        np.array([[-0.5], [0.1], [0.5]]) + noise(0.05, 1, N),
        Gradients(plain, plain + vector * (1 + noise(0.1, N, 1)), plain + noise(0.2, N, WIDTH, seed=5), vector),
        {
            "none": noise(0.1, 1, N),
            "eliciting": noise(0.1, 1, N) + 0.3 + noise(0.02, 2, N, seed=6),
            "placebo": noise(0.1, 1, N) + 0.05 + noise(0.02, 2, N, seed=7),
        },
        {"gain": gain, "kl": kl},
        {"harmful": asked(2, 0.5, refuses), "harmless": asked(-5, 0.01, answers)},
        {"harmful": asked(-2, 0.5, answers), "harmless": asked(-5, 0.03, answers)},
        states(8, 0),
    )


def judged(verdict_of, *readings):
    found = {f"model-{i}": sizes.estimates(of, COEFFICIENTS, 0.1) for i, of in enumerate(readings)}
    return {m.claim.split(".")[1]: verdict_of(m) for m in sizes.weakest(found)}


def test_every_number_is_the_planted_one(planted):
    found = sizes.estimates(planted, COEFFICIENTS, 0.1).estimates
    assert found.keys() == sizes.MEASURES.keys()
    wanted = {"a*": 5 / 6, "prompts": 0.25, "fall": 4, "log-odds": -2, "KL": 0.03, "prompt tokens": 0.4}
    for name, value in wanted.items():
        assert found[name].value == pytest.approx(value, abs=0.1), name
    assert found["probe"].value > 0.9 and found["beyond length"].value > 0.3


def test_what_holds_in_every_model_is_reproduced(verdict_of, planted):
    assert set(judged(verdict_of, planted, planted).values()) == {"reproduced"}


def test_a_claim_is_decided_by_the_model_in_which_it_is_weakest(verdict_of, planted):
    margins = {**planted.margins, "eliciting": planted.margins["placebo"] - 0.2}
    found = judged(verdict_of, planted, replace(planted, margins=margins))
    assert found.pop("prompts-elicit") == "contradicted"
    assert set(found.values()) == {"reproduced"}


def test_a_pressure_that_never_turns_gives_no_verdict_whatever_the_other_models_do(verdict_of, planted):
    assert judged(verdict_of, planted, replace(planted, slopes=-abs(planted.slopes)))["pressure-turns"] == "not judged"


def test_a_model_that_refuses_nothing_tests_no_attack(verdict_of, planted):
    card = {**planted.card, "harmful": asked(2, 0.5, "Here are three ways to do it.")}
    assert judged(verdict_of, replace(planted, card=card))["one-direction"] == "invalid"


def test_an_ablation_that_costs_much_or_leaves_refusal_shows_the_direction_alone(verdict_of, planted):
    for kind, left in (("harmless", asked(-5, 0.4, "Well.")), ("harmful", asked(0.5, 0.4, "Well."))):
        found = judged(verdict_of, replace(planted, attacked={**planted.attacked, kind: left}))
        assert found["one-direction"] == "direction only"


def test_swapped_defences_are_not_more_concentrated(verdict_of, planted):
    of = planted.gradients
    swapped = replace(planted, gradients=replace(of, pps=of.ip, ip=of.pps))
    assert judged(verdict_of, swapped)["concentrated"] == "contradicted"


def test_a_probe_that_reads_what_length_tells_is_not_beyond_it(verdict_of, planted):
    assert judged(verdict_of, replace(planted, states=states(4, 20)))["probe-beyond-length"] == "contradicted"


def test_places_that_are_swapped_turn_the_sign(verdict_of, planted):
    swapped = {"gain": planted.steering["gain"][::-1], "kl": planted.steering["kl"]}
    assert judged(verdict_of, replace(planted, steering=swapped))["prompt-tokens"] == "contradicted"


def test_a_place_that_costs_more_is_read_where_it_costs_as_much(planted):
    """Twice the gain at twice the divergence is the same gain at the same one, but for what the rows vary."""
    gain, kl = planted.steering["gain"], planted.steering["kl"]
    doubled, _ = sizes.places(np.stack([2 * gain[1], gain[1]]), np.stack([2 * kl[1], kl[1]]), 0.1)
    assert doubled.value == pytest.approx(0, abs=0.01)


def test_changes_are_told_by_family_and_by_what_their_intervals_decide():
    def of(value):
        return {"KL": Estimate(value, value - 0.1, value + 0.1, 9), "a*": Estimate(1.0, 0.9, 1.1, 9)}

    found = sizes.changes({SMALL: of(0.1), MIDDLE: of(0.2), LARGE: of(0.6)})
    assert [(c.measure, c.decided) for c in found if c.same_family] == [("KL", True), ("a*", False)]
    assert not any(c.decided for c in found if not c.same_family)
    said = sizes.said(found)
    assert f"Within one family: from {MIDDLE} to {LARGE}, 1 of 2" in said and "KL (+0.40 [+0.26, +0.54])" in said
    assert f"Between two families: from {SMALL} to {MIDDLE}, 0 of 2" in said


def test_one_model_and_a_number_that_is_missing_say_nothing_of_size():
    missing = {"KL": Estimate(np.nan, 0.0, 1.0, 9)}
    assert sizes.changes({SMALL: missing, LARGE: missing}) == []
    assert sizes.said(sizes.changes({SMALL: {}})) == "One model alone says nothing of size."


def test_openers_are_the_first_words_of_refusals_alone():
    answers = ["I'm sorry.", "Sorry, no.", "Sorry, but no.", "Sure."]
    found = sizes.openers(answers, np.array([True, True, True, False]))
    assert list(found.items()) == [("Sorry", 2), ("I'm", 1)]
