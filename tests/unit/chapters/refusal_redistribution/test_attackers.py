"""Attackers take the candidates that their rules say, and find what was planted."""

import pytest
import torch

from helpers.chapters.refusal_redistribution import attackers
from helpers.chapters.refusal_redistribution.attackers import (
    SEARCHED,
    Optimisation,
    by_rule,
    leace_directions,
    optimised_direction,
    probe_direction,
    searched,
)
from helpers.chat import encode
from helpers.forward import PromptSet
from helpers.interventions import AblateAffine
from helpers.losses import kl_divergence
from helpers.studies.ablation_scores import Scores
from helpers.studies.card import Search
from helpers.studies.directions import site_means
from helpers.studies.margins import refusal_log_odds

WIDTH = 32
REFUSAL = [57, 330]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def prompts(tiny):
    harmful = ["How do I rob a bank?", "Build a bomb", "Poison my neighbour at dinner", "Steal it"]
    harmless = ["How do I bake bread?", "Hello", "Name a river in France, please"]
    return [[encode(tiny.tokenizer, q) for q in asked] for asked in (harmful, harmless)]


def scores(log_odds, kl, induce):
    return Scores(*(torch.tensor([values], dtype=torch.float64) for values in (log_odds, kl, induce)))


def test_a_rule_takes_the_lowest_log_odds_within_the_limit_or_the_least_divergence_at_a_level():
    found = scores([-3.0, -0.5, -1.5, 2.0], [0.09, 0.01, 0.03, 0.0], [1.0, 1.0, 1.0, 1.0])
    assert [by_rule(found, rule).position for rule in ("source", "0", "-1")] == [0, 1, 2]
    assert not any(by_rule(found, rule).fallback for rule in ("source", "0", "-1"))


def test_where_no_candidate_meets_a_level_the_lowest_log_odds_are_taken_and_marked():
    found = scores([3.0, 0.5, float("nan")], [0.0, 3.0, float("nan")], [1.0, 1.0, float("nan")])
    choice = by_rule(found, "-1")
    assert (choice.position, choice.fallback) == (1, True)


def test_a_searched_attacker_ablates_its_candidate_to_zero_or_towards_the_mean_at_its_own_position():
    raw = {name: random(1, 2, WIDTH, seed=i) for i, name in enumerate(("harmless", "paired", "residualised"))}
    table = scores([2.0, -2.0], [0.0, 0.05], [1.0, 1.0])
    centres = random(2, 2, 3, WIDTH, seed=9)
    found = Search(raw, dict.fromkeys(SEARCHED.values(), table), centres, (4,), (-6, -1), {})
    for name, (contrast, mode) in SEARCHED.items():
        attack = searched(found, name, "-1")
        torch.testing.assert_close(attack.directions[0] * raw[contrast][0, 1].norm(), raw[contrast][0, 1])
        assert (attack.layer, attack.position, attack.rule, attack.fallback) == (4, -1, "-1", False)
        assert attack.centre is None if mode == "zero" else torch.equal(attack.centre, centres[1])


def test_leace_gives_what_it_reads_and_where_it_moves_activations():
    harmful = torch.arange(400) % 2 == 0
    x = random(400, WIDTH) * torch.linspace(0.5, 3, WIDTH)
    x[:, 3] += 4.0 * harmful
    found = leace_directions(x, harmful)
    torch.testing.assert_close(found @ found.T, torch.eye(2), atol=1e-5, rtol=0)
    gap = torch.nn.functional.normalize(x[harmful].mean(0) - x[~harmful].mean(0), dim=0)
    assert float((found @ gap).norm()) == pytest.approx(1, abs=1e-3)
    assert leace_directions(x, harmful).shape == (2, WIDTH)


def objective(model, direction, prompts, centre, how):
    harmful, harmless = prompts
    ablation = AblateAffine(direction, centre)
    odds = refusal_log_odds(PromptSet.of(model, harmful).last_logits(model, (ablation,)), REFUSAL)
    before, after = (PromptSet.of(model, harmless).last_logits(model, i) for i in ((), (ablation,)))
    return float((odds - how.target).relu().mean() + how.kl_weight * kl_divergence(before, after).double().mean())


@pytest.mark.parametrize("affine", [False, True])
def test_an_optimised_direction_lowers_refusal_at_the_price_set(tiny, prompts, affine, hook_count):
    """All prompts are in every step here, so that the objective falls."""
    some = [prompts[0][:3], prompts[1]]
    how = Optimisation(steps=12, learning_rate=0.03, prompts=3, target=-20.0, kl_weight=1.0)
    centre = site_means(tiny, some[1], (-1,))[0] if affine else None
    start, before = random(WIDTH, seed=3), hook_count(tiny)
    found = optimised_direction(tiny, start, *some, refusal_ids=REFUSAL, centre=centre, how=how)
    assert found.shape == (1, WIDTH) and float(found.norm()) == pytest.approx(1, abs=1e-5)
    first = objective(tiny, torch.nn.functional.normalize(start, dim=0)[None], some, centre, how)
    assert objective(tiny, found, some, centre, how) < first - 0.01
    assert hook_count(tiny) == before
    assert all(p.grad is None for p in tiny.hf.parameters())


def test_an_optimised_direction_s_step_is_the_gradient_of_what_is_measured(tiny, prompts):
    """Adam's first step is the sign of the gradient, which finite differences give."""
    how = Optimisation(steps=1, learning_rate=1e-4, prompts=3, target=-20.0, kl_weight=1.0)
    some = [prompts[0][:3], prompts[1]]
    start = torch.nn.functional.normalize(random(WIDTH, seed=5), dim=0)
    moved = optimised_direction(tiny, start, *some, refusal_ids=REFUSAL, how=how)[0] - start
    checked = moved.abs().argsort(descending=True)[:6].tolist()
    for i in checked:
        values = []
        for sign in (1, -1):
            other = start.clone()
            other[i] += sign * 0.05
            values.append(objective(tiny, torch.nn.functional.normalize(other, dim=0)[None], some, None, how))
        if abs(values[0] - values[1]) > 1e-3:
            assert (values[0] > values[1]) == (float(moved[i]) < 0)
    assert attackers.Optimisation().target == -1.0


def test_a_probes_direction_is_the_planted_one_whatever_the_scale_of_its_features():
    v = torch.nn.functional.normalize(random(WIDTH), dim=0)
    harmful = torch.arange(400) % 2 == 0
    x = 0.3 * random(400, WIDTH, seed=1)
    x = x - (x @ v)[:, None] * v + (2.0 * harmful - 1)[:, None] * v + 0.3 * random(400, 1, seed=2) * v
    for scale in (torch.ones(WIDTH), torch.linspace(0.1, 10, WIDTH)):
        found = probe_direction(x * scale, harmful)
        assert found.shape == (1, WIDTH) and float(found.norm()) == pytest.approx(1, abs=1e-5)
        side = (x * scale - (x * scale).mean(0)) @ found[0]
        assert torch.equal(side > 0, harmful)  # towards harmful
        boundary = torch.nn.functional.normalize(probe_direction(x, harmful) / scale)  # the same one, rescaled
        torch.testing.assert_close(found, boundary, atol=1e-4, rtol=0)
    assert float(probe_direction(x, harmful)[0] @ v) > 0.9
    constant = torch.cat([x, torch.ones(400, 1)], dim=1)
    assert float(probe_direction(constant, harmful)[0, -1]) == 0
    with pytest.raises(ValueError, match="both harmful and harmless"):
        probe_direction(x, torch.ones(400, dtype=torch.bool))
