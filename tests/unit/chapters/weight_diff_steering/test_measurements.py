"""Planted labels and losses get the verdicts on weight-space steering that they deserve."""

import numpy as np
import pytest

from helpers.chapters.weight_diff_steering import measurements as measured

N, SEEDS = 200, (0, 1, 2)


def labels(share, seed=0, shape=(3, N)):
    return np.random.default_rng(seed).random(shape) < share


def effects(mean, seed=0):
    return mean + 0.05 * np.random.default_rng(seed).standard_normal((3, N))


SHUFFLED = (3.0, np.random.default_rng(0).standard_normal(10_000))


def topic(finetuned=0.4, minus=0.7, plus=0.1, other=(0.2, 0.2), random=0.0, shuffled=SHUFFLED, loops=0.0):
    at = {"finetuned": labels(finetuned, 1), "minus": labels(minus, 2), "plus": labels(plus, 3)}
    of_other = {"minus": labels(other[0], 4), "plus": labels(other[1], 5)}
    looping = {"minus": values(loops), "plus": values(0.0)}
    found = measured.topic("bridge", at, of_other, effects(random), shuffled, looping, answers=50, seeds=SEEDS)
    return {m.claim.removeprefix("weights.bridge-"): m for m in found}


def test_a_direction_that_moves_its_own_topic_both_ways_is_reproduced(verdict_of):
    found = topic()
    assert {verdict_of(m) for m in found.values()} == {"reproduced"}
    assert found["specific"].estimate.seeds == SEEDS and found["beats-shuffled"].estimate.n == 50


@pytest.mark.parametrize(
    ("planted", "claims"),
    [
        ({"minus": 0.1, "plus": 0.7}, dict.fromkeys(("minus-raises", "plus-lowers", "specific"), "contradicted")),
        ({"other": (0.9, 0.1)}, {"specific": "contradicted", "minus-raises": "reproduced"}),
        ({"random": 0.5}, dict.fromkeys(("minus-raises", "plus-lowers", "specific"), "direction only")),
        ({"loops": 0.3}, {"minus-raises": "invalid", "specific": "invalid", "plus-lowers": "reproduced"}),
        ({"shuffled": (-3.0, SHUFFLED[1])}, {"beats-shuffled": "contradicted"}),
        ({"shuffled": (1.2, SHUFFLED[1])}, {"beats-shuffled": "undecided"}),
        ({"shuffled": (-0.3, SHUFFLED[1])}, {"beats-shuffled": "undecided"}),
    ],
)
def test_flipped_signs_other_topics_and_controls_that_fail_change_the_verdict(verdict_of, planted, claims):
    found = topic(**planted)
    assert {claim: verdict_of(found[claim]) for claim in claims} == claims


def test_a_deal_like_the_others_seldom_beats_them(verdict_of):
    found = [verdict_of(topic(shuffled=(deal, SHUFFLED[1]))["beats-shuffled"]) for deal in SHUFFLED[1][:400]]
    assert found.count("reproduced") / 400 < 0.05 and found.count("undecided") / 400 > 0.7


def test_a_deal_is_a_difference_of_pile_means_and_the_real_one_stands_out():
    slopes, of_topic = np.array([2.0, 3.0, 0.0, 1.0, -1.0]), np.array([True, True, False, False, False])
    effect, dealt = measured.deal_effects(slopes, of_topic, seed=0, deals=2000)
    assert effect == pytest.approx(2.5)
    assert dealt.max() == pytest.approx(2.5) and abs(dealt.mean()) < 0.1
    assert (dealt >= effect - 1e-9).mean() == pytest.approx(0.1, abs=0.03), "one of the ten ways to deal"


def values(mean, seed=0):
    return mean + 0.05 * np.random.default_rng(seed).standard_normal(N)


def test_coherence_is_that_of_the_worst_condition(verdict_of):
    calm = {"bridge +": values(0.0), "bridge -": values(0.1)}
    assert verdict_of(measured.coherence(calm, calm)) == "invalid", "a tenth more loops is too much"
    steady = {"bridge +": values(0.0), "bridge -": values(0.02)}
    assert verdict_of(measured.coherence(calm, steady)) == "reproduced"
    assert verdict_of(measured.coherence(calm | {"recipe -": values(1.5)}, steady)) == "contradicted"


def one(share, seed=0):
    return labels(share, seed, (N,))


def test_the_neutral_pile_is_judged_by_the_other_topic(verdict_of):
    assert verdict_of(measured.neutral_pile(one(0.6), one(0.1, 1), one(0.6, 2))) == "reproduced"
    assert verdict_of(measured.neutral_pile(one(0.6), one(0.6, 1), one(0.1, 2))) == "contradicted"


def test_the_weighted_direction_has_to_raise_the_loss_less(verdict_of):
    assert verdict_of(measured.hadamard(values(0.3), values(0.1, 1))) == "reproduced"
    assert verdict_of(measured.hadamard(values(0.1), values(0.3, 1))) == "contradicted"


def test_a_direction_is_portable_if_the_base_model_takes_the_topic_up(verdict_of):
    def found(steered, base, loops=0.0):
        return verdict_of(measured.portability(one(steered), one(base, 1), values(loops)))

    assert found(0.4, 0.01) == "direction only", "no random direction was tried"
    assert found(0.01, 0.4) == "contradicted"
    assert found(0.99, 0.01, loops=0.5) == "invalid", "an answer that loops is no answer"


def test_a_weak_signal_is_not_judged_where_it_was_not_run(verdict_of):
    assert verdict_of(measured.sparseness(None)) == "not judged"
    assert verdict_of(measured.sparseness({"minus": one(0.5), "plus": one(0.05, 1)})) == "reproduced"
    assert verdict_of(measured.sparseness({"minus": one(0.05), "plus": one(0.5, 1)})) == "contradicted"


def test_harm_has_to_move_both_ways_and_further_than_at_random(verdict_of):
    def verdicts(minus, plus, random=0.0):
        at = {"finetuned": one(0.4, 1), "minus": one(minus, 2), "plus": one(plus, 3)}
        return [verdict_of(m) for m in measured.harm(at, effects(random))]

    assert verdicts(0.7, 0.1) == ["reproduced", "reproduced"]
    assert verdicts(0.1, 0.7) == ["contradicted", "contradicted"]
    assert verdicts(0.7, 0.1, 0.5) == ["direction only", "direction only"]
