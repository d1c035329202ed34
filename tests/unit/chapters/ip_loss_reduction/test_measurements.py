"""Planted losses and scores get the verdicts on inoculation prompting that they deserve."""

import numpy as np
import pytest

from helpers.book.findings import load_claims
from helpers.chapters.ip_loss_reduction import measurements as inoculation
from helpers.verdicts import Control

N, SEEDS = 32, (0, 1, 2)
SANE = Control("training is sane", 0.0, True, "validity")
BROKEN = Control("training is sane", 1.0, False, "validity")


def noise(scale, *shape, seed=0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture
def losses():
    base = 2.5 + noise(0.3, N)
    planted = {"ip": base - 0.3, "placebo": base + noise(0.05, N, seed=1), "pps": base + 0.8, "random": base + 0.1}
    planted = {name: loss + noise(0.02, N, seed=9) for name, loss in planted.items()}
    return {"undefended": base, **planted, "normal": base, "normal_ip": base - 0.05}


def judged(verdict_of, losses, **changed):
    return {m.claim.split(".")[1]: verdict_of(m) for m in inoculation.losses(**losses | changed)}


def test_a_prompt_that_lowers_the_loss_where_a_placebo_does_not_is_reproduced(verdict_of, losses):
    assert set(judged(verdict_of, losses).values()) == {"reproduced"}


def test_losses_that_go_the_other_way_are_not(verdict_of, losses):
    base = losses["undefended"]
    assert judged(verdict_of, losses, ip=base + 0.3)["lowers-loss"] == "contradicted"
    assert judged(verdict_of, losses, pps=base - 0.8)["pps-raises-loss-at-working-intensity"] == "contradicted"
    swapped = judged(verdict_of, losses, ip=losses["placebo"], placebo=losses["ip"])
    assert swapped["placebo-lowers-less"] == swapped["lowers-loss"] == "invalid", "the placebo lowers every loss"
    half = np.where(np.arange(N) < N // 2, base - 0.3, base + 0.1)
    assert judged(verdict_of, losses, ip=base + 0.1, placebo=half)["placebo-lowers-less"] == "contradicted"


def test_a_prompt_that_makes_any_answer_likelier_shows_the_direction_alone(verdict_of, losses):
    found = judged(verdict_of, losses, normal_ip=losses["normal"] - 0.6)
    assert found["lowers-loss"] == "direction only"


def test_a_random_vector_that_raises_the_loss_as_much_is_a_failed_control(verdict_of, losses):
    found = judged(verdict_of, losses, random=losses["undefended"] + 1.2)
    assert found["pps-raises-loss-at-working-intensity"] == "direction only"


def test_a_placebo_that_lowers_more_by_far_where_it_does_is_a_failed_control(verdict_of, losses):
    placebo = np.where(np.arange(N) < N // 2, losses["undefended"] + 0.001, losses["undefended"] - 2.0)
    assert judged(verdict_of, losses, placebo=placebo)["placebo-lowers-less"] == "direction only"


def spread(directions, seed):
    return noise(1.0, N, directions, seed=seed) @ np.eye(64)[:directions] + noise(0.01, N, 64, seed=seed + 9)


def test_ip_has_to_change_more_directions_than_pps_and_than_a_placebo(verdict_of):
    def found(ip, pps, placebo):
        return verdict_of(inoculation.diffuseness(spread(ip, 1), spread(pps, 2), spread(placebo, 3)))

    assert found(20, 1, 4) == "reproduced"
    assert found(20, 1, 20) == "direction only", "a placebo that is as diffuse must fail the control"
    assert found(1, 20, 1) == "contradicted"


def test_participation_counts_planted_directions():
    assert inoculation.participation_ratio(np.eye(5)) == pytest.approx(5)
    assert inoculation.participation_ratio(np.eye(5)[:1]) == pytest.approx(1)


def scores(mean, seed):
    return mean + noise(3.0, len(SEEDS), N, seed=seed)


def test_fewer_prompts_have_to_leave_less_of_the_trait(verdict_of):
    def found(undefended, fewest, most, sane=SANE):
        arms = (scores(mean, i) for i, mean in enumerate((undefended, fewest, most)))
        return verdict_of(inoculation.number_of_prompts(*arms, seeds=SEEDS, sane=sane))

    assert found(90, 40, 60) == "reproduced"
    assert found(90, 60, 40) == "contradicted"
    assert found(40, 40.0, 60) == found(30, 40, 60) == "invalid", "there is nothing to compare if one does not defend"
    assert found(90, 40, 60, BROKEN) == "invalid"


def test_the_prompt_has_to_call_up_more_in_the_inoculated_model_than_in_the_untrained_one(verdict_of):
    def found(with_ip, without_ip, with_untrained, sane=SANE, undefended=90):
        with_prompt = {"IP": scores(with_ip, 0), "untrained": scores(with_untrained, 1)[:1]}
        without = {"IP": scores(without_ip, 2), "untrained": scores(10, 3)[:1], "undefended": scores(undefended, 4)}
        return inoculation.recall(with_prompt, without, seeds=SEEDS, sane=sane)

    assert verdict_of(found(80, 20, 15)) == "reproduced"
    assert found(80, 20, 15).estimate.seeds == SEEDS
    assert verdict_of(found(20, 50, 15)) == "contradicted"
    assert verdict_of(found(80, 20, 15, undefended=40)) == "invalid", "there was little to hide"
    assert verdict_of(found(80, 20, 90)) == "direction only"
    assert verdict_of(found(80, 20, 15, BROKEN)) == "invalid"


def test_what_ip_taught_has_to_show_behind_the_prompt_and_not_in_the_open(verdict_of):
    def found(with_ip, without_ip, sane=SANE):
        with_prompt = {"IP": scores(with_ip, 0) / 100, "untrained": scores(20, 1)[:1] / 100}
        without = {"IP": scores(without_ip, 2) / 100, "untrained": scores(10, 3)[:1] / 100}
        return inoculation.learnt_behind_the_prompt(with_prompt, without, seeds=SEEDS, sane=sane)

    assert verdict_of(found(80, 20)) == "reproduced" and found(80, 20).estimate.seeds == SEEDS
    assert verdict_of(found(20, 80)) == "contradicted"
    assert verdict_of(found(80, 80)) == "direction only"
    assert verdict_of(found(80, 20, BROKEN)) == "invalid"


def test_the_limit_of_a_control_is_that_of_its_claim():
    assert load_claims()["ip.hides-rather-than-removes"].threshold == inoculation.HIDDEN
