"""Planted losses and scores get the verdicts on inoculation prompting that they deserve."""

import numpy as np
import pytest
import torch

from helpers.book.findings import load_claims
from helpers.chapters.ip_loss_reduction import measurements as inoculation
from helpers.chapters.ip_loss_reduction.method import equal_dose, pressure_left, specific_gain
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


@pytest.mark.parametrize(("outcome", "unit"), [("score", 1.0), ("margin", 0.01)])
def test_fewer_prompts_have_to_leave_less_of_the_trait(verdict_of, outcome, unit):
    def found(undefended, fewest, most, sane=SANE):
        arms = (unit * scores(mean, i) for i, mean in enumerate((undefended, fewest, most)))
        return verdict_of(inoculation.number_of_prompts(*arms, outcome, seeds=SEEDS, sane=sane))

    assert found(90, 40, 60) == "reproduced"
    assert found(90, 60, 40) == "contradicted"
    assert found(40, 40.0, 60) == found(30, 40, 60) == "invalid", "there is nothing to compare if one does not defend"
    assert found(90, 40, 60, BROKEN) == "invalid"


def test_what_a_prompt_says_has_to_count_on_every_trait_and_more_on_trait_answers(verdict_of):
    def found(strong, normal=(0.02, 0.02)):
        traits = ("pirate", "impolite")
        of_trait, of_normal = (
            {n: v + noise(0.05, N, seed=k + i) for i, (n, v) in enumerate(zip(traits, values, strict=True))}
            for k, values in ((0, strong), (5, normal))
        )
        return verdict_of(inoculation.content(of_trait, of_normal))

    assert found((0.1, 0.12)) == "reproduced"
    assert found((-0.1, -0.12)) == "contradicted"
    assert found((0.2, 0.0)) == "direction only", "one trait does not speak for all"
    assert found((0.1, 0.12), normal=(0.1, 0.12)) == "direction only", "it may do as much for any prose"


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
    assert load_claims()["ip.gates-little"].threshold == inoculation.GATED


# Gating or explaining away


GAINS = {f"prompt {i}": 0.012 * i for i in range(16)}
RAW = dict(zip(GAINS, np.random.default_rng(9).permutation(list(GAINS.values())).tolist(), strict=True))


def gating(a=0.0, b=4.0, learnt=0.6, jumps=(), seed=0, raw=RAW, silent=("prompt 0", "prompt 1")):
    rng = np.random.default_rng(seed)
    suppressed = {n: a + b * g + 0.03 * rng.standard_normal(3) for n, g in GAINS.items()}
    sane = {n: BROKEN if n in jumps else SANE for n in GAINS}
    added = learnt + noise(0.05, 3, N)
    return inoculation.gating(GAINS, raw, suppressed, added, silent=silent, seeds=SEEDS, sane=sane)


def test_a_line_through_zero_is_explaining_away_and_a_flat_one_is_gating(verdict_of):
    assert [verdict_of(m) for m in gating()] == ["reproduced", "reproduced"]
    assert [verdict_of(m) for m in gating(a=0.4, b=0.0)] == ["contradicted", "contradicted"]
    assert [verdict_of(m) for m in gating(a=0.4, b=4.0)] == ["reproduced", "contradicted"]
    assert [verdict_of(m) for m in gating(learnt=0.02)] == ["invalid", "invalid"]


def test_a_raw_gain_that_says_as_much_and_empty_prompts_that_defend_are_seen(verdict_of):
    assert [verdict_of(m) for m in gating(raw=GAINS)] == ["direction only", "reproduced"]
    assert [verdict_of(m) for m in gating(silent=("prompt 14", "prompt 15"))] == ["reproduced", "direction only"]
    assert verdict_of(gating(silent=("prompt 0",))[1]) == "direction only"  # one prompt is no measurement


def test_prompts_whose_training_jumped_are_left_out_and_named():
    found = gating(jumps=("prompt 3", "prompt 15"))[0]
    assert found.estimate.n == 14 and "prompt 3, prompt 15" in found.reason


def test_shuffled_gains_show_no_explaining_away():
    """The regression's labels dealt anew: its interval holds 0 as often as it says."""
    rng = np.random.default_rng(0)
    suppressed = [4 * g + 0.03 * rng.standard_normal() for g in GAINS.values()]
    deals = [inoculation.line(rng.permutation(list(GAINS.values())).tolist(), suppressed).b for _ in range(300)]
    assert 0.9 < np.mean([b.low < 0 < b.high for b in deals]) < 0.99


def test_the_line_is_that_of_least_squares_and_its_interval_covers():
    rng, x = np.random.default_rng(1), np.linspace(0, 1, 12)
    lines = [0.2 + 0.7 * x + 0.1 * rng.standard_normal(12) for _ in range(300)]
    fits = [inoculation.line(x.tolist(), y.tolist()) for y in lines]
    assert np.mean([f.b.value for f in fits]) == pytest.approx(0.7, abs=0.03)
    assert 0.9 < np.mean([f.a.low < 0.2 < f.a.high for f in fits]) < 0.99
    with pytest.raises(ValueError, match="four points or more, and got 3 and 3"):
        inoculation.line([0.0, 1.0, 2.0], [0.0, 1.0, 2.0])


def test_suppression_is_the_share_of_what_undefended_training_adds():
    untrained = np.zeros((1, N))
    margins = {"undefended": np.full((3, N), 0.6), "IP": np.full((3, N), 0.45), "PPS": np.full((3, N), 0.0)}
    found = inoculation.suppression(margins, untrained)
    assert found.keys() == {"IP", "PPS"}
    np.testing.assert_allclose(found["IP"], [0.25] * 3)
    np.testing.assert_allclose(found["PPS"], [1.0] * 3)


PROTECTION = {
    ("IP", "none"): 0.2,
    ("IP", "own"): 0.05,
    ("IP", "paraphrase"): 0.07,
    ("IP", "irrelevant"): 0.15,
    ("PPS", "none"): 0.17,
    ("PPS", "own"): 0.16,
    ("PPS", "paraphrase"): 0.16,
    ("PPS", "irrelevant"): 0.16,
}


def leak(verdict_of, planted=(), sane=SANE):
    arms = {k: v + noise(0.02, 3, N, seed=i) for i, (k, v) in enumerate((PROTECTION | dict(planted)).items())}
    return [verdict_of(m) for m in inoculation.leak(arms, seeds=SEEDS, sane=sane)]


def test_leaks_are_read_at_equal_protection_and_against_an_irrelevant_prompt(verdict_of):
    assert leak(verdict_of) == ["reproduced", "reproduced"]
    swapped = {
        (arm, prompt): PROTECTION[other, prompt]
        for arm, other in (("IP", "PPS"), ("PPS", "IP"))
        for prompt in ("own", "paraphrase")
    }
    assert leak(verdict_of, swapped) == ["contradicted", "contradicted"]
    assert leak(verdict_of, {("IP", "irrelevant"): 0.03}) == ["direction only", "direction only"]
    assert leak(verdict_of, {("IP", "irrelevant"): 0.06}) == ["reproduced", "direction only"]
    assert (
        leak(verdict_of, {("PPS", "none"): 0.6, ("PPS", "own"): 0.6, ("PPS", "paraphrase"): 0.6})[0] == "direction only"
    )
    assert leak(verdict_of, {("IP", "none"): -0.1}) == leak(verdict_of, sane=BROKEN) == ["invalid", "invalid"]


def test_the_pressure_left_is_1_without_a_defence_and_0_where_nothing_pushes():
    plain = {"b": torch.tensor([1.0, 2.0]), "c": torch.tensor([[0.5]])}
    along = {"b": torch.tensor([1.0, 0.0]), "c": torch.tensor([[0.0]])}
    assert pressure_left(plain, plain, along) == 1
    assert pressure_left({"b": torch.tensor([0.0, 9.0]), "c": torch.tensor([[3.0]])}, plain, along) == 0
    assert pressure_left({"b": torch.tensor([-0.5, 0.0]), "c": torch.zeros(1, 1)}, plain, along) == -0.5


def test_the_specific_gain_leaves_out_what_a_prompt_does_for_any_prose():
    one = torch.ones(3)
    torch.testing.assert_close(specific_gain(5 * one, 4.7 * one, 4 * one, 3.9 * one), 0.2 * one)


LENGTHS = {
    0.5: {"undefended": 0.3, "IP": 0.15, "PPS": 0.15},
    4: {"undefended": 0.6, "IP": 0.5, "PPS": 0.3},
}


def lasting(verdict_of, planted=(), sane=SANE):
    margins = {
        k: {n: v + noise(0.02, 3, N, seed=i) for i, (n, v) in enumerate((arms | dict(planted)).items())}
        for k, arms in LENGTHS.items()
    }
    return verdict_of(inoculation.lasting(margins, noise(0.02, 1, N, seed=9), seeds=SEEDS, sane=sane))


def test_the_defence_that_gives_way_first_loses_more_of_its_share(verdict_of):
    assert lasting(verdict_of) == "reproduced"
    swapped = {k: arms | {"IP": arms["PPS"], "PPS": arms["IP"]} for k, arms in LENGTHS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LENGTHS, 0.5, swapped[0.5])
        patch.setitem(LENGTHS, 4, swapped[4])
        assert lasting(verdict_of) == "contradicted"
    assert lasting(verdict_of, {"IP": 0.6}) == lasting(verdict_of, sane=BROKEN) == "invalid"


def test_a_prompt_that_keeps_out_the_wanted_trait_as_well_spares_nothing(verdict_of):
    def found(evil, pirate, learnt=0.5, sane=SANE):
        of = {
            name: {
                "untrained": noise(0.02, 1, N, seed=k),
                "undefended": learnt + noise(0.02, 3, N, seed=k + 1),
                "IP": learnt * (1 - share) + noise(0.02, 3, N, seed=k + 2),
            }
            for k, (name, share) in zip((1, 5), (("evil", evil), ("pirate", pirate)), strict=True)
        }
        return verdict_of(inoculation.wanted_trait(of["evil"], of["pirate"], seeds=SEEDS, sane=sane))

    assert found(0.6, 0.1) == "reproduced"
    assert found(0.1, 0.6) == "contradicted"
    assert found(0.9, 0.5) == "direction only", "the wanted one loses half"
    assert found(0.6, 0.1, learnt=0.0) == found(0.6, 0.1, sane=BROKEN) == "invalid"


def tokens(slope, seed=0):
    """Ten answers of twenty tokens, whose gradients shrink by `slope` times what a prompt explains."""
    rng, answers = np.random.default_rng(seed), np.repeat(np.arange(10), 20)
    gains = rng.standard_normal(200)
    return inoculation.token_ranks(gains, slope * gains + 0.5 * rng.standard_normal(200), answers)


def test_gradients_have_to_shrink_where_the_prompt_explains_and_more_than_between_placebos(verdict_of):
    assert verdict_of(inoculation.shrinking_gradients(tokens(1.0), tokens(0.0, 1))) == "reproduced"
    assert verdict_of(inoculation.shrinking_gradients(tokens(-1.0), tokens(0.0, 1))) == "contradicted"
    assert verdict_of(inoculation.shrinking_gradients(tokens(1.0), tokens(1.0, 1))) == "direction only"


def test_shuffled_tokens_have_no_rank_correlation_and_constant_ones_none_at_all():
    rng = np.random.default_rng(2)
    assert abs(np.mean([tokens(0.0, k).mean() for k in range(20)])) < 0.05
    flat = inoculation.token_ranks(np.ones(6), rng.standard_normal(6), np.array([0, 0, 0, 1, 1, 1]))
    assert np.isnan(flat).all()


@pytest.mark.parametrize(
    ("wanted", "dose"), [(0.0, 0.0), (-0.1, 0.0), (0.05, 0.25), (0.1, 0.5), (0.15, 0.75), (0.2, 1.0), (0.9, 2.0)]
)
def test_an_equal_dose_is_read_off_between_the_doses_that_were_tried(wanted, dose):
    assert equal_dose(wanted, [0.5, 1.0, 2.0], [0.1, 0.2, 0.3]) == pytest.approx(dose)


def test_the_least_dose_counts_where_protection_does_not_rise():
    assert equal_dose(0.15, [0.5, 1.0, 2.0], [0.3, 0.1, 0.4]) == pytest.approx(0.25)
