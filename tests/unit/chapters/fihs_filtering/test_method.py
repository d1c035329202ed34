"""FIHS is the first-order change of the safety score; its threshold and its search do what they say."""

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from helpers.chapters.fihs_filtering.method import (
    SafetyScore,
    anchor_similarity,
    equal_posterior,
    equal_retention,
    fihs,
    guess_threshold,
    hard_cut,
    search_threshold,
    standard_threshold,
    unsafe_over_safe,
)
from helpers.chat import Example, collate, encode
from helpers.corpora import load_points, load_refusal
from helpers.gradients import directional_derivatives, gradient_norms, pile_gradient
from helpers.losses import sequence_losses, sequence_sums
from helpers.models import LoRA, load, plain_model
from helpers.statistics import auroc


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load("tiny-random", dtype="float32")


@pytest.fixture(scope="module")
def adapted():
    torch.manual_seed(0)
    return load("tiny-random", dtype="float32", lora=LoRA(4))


@pytest.fixture(scope="module")
def points(model):
    rows = [*load_points("explicit")[:4], *load_points("list")[:3]]
    return [encode(model.tokenizer, row.request, row.reply) for row in rows]


@pytest.fixture(scope="module")
def safety(model):
    prompts = [encode(model.tokenizer, row.request) for row in load_refusal("harmful", "validate")[:5]]
    return SafetyScore.of(model.tokenizer, prompts)


def inner(first, second):
    return sum(float((first[name].double() * second[name].double()).sum()) for name in second)


# Derivatives


@pytest.mark.parametrize("kind", ["model", "adapted"])
def test_forward_mode_gives_the_inner_products_that_per_example_backward_gives(kind, points, safety, request):
    model = request.getfixturevalue(kind)
    direction = safety.gradient(model)
    found = directional_derivatives(model, points, direction, batch_size=3)
    expected = torch.tensor([inner(pile_gradient(model, [point]), direction) for point in points])
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert len(set(found.tolist())) == len(points)


def test_only_the_named_weights_move(model, points):
    name = "model.layers.1.mlp.down_proj.weight"
    direction = {name: torch.randn_like(model.hf.get_parameter(_wrapped(model, name)))}
    found = directional_derivatives(model, points, direction)
    expected = torch.tensor([inner(pile_gradient(model, [point]), direction) for point in points]).float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def _wrapped(model, name):
    return next(n for n, _ in model.hf.named_parameters() if n.replace("._original_component", "") == name)


def test_derivatives_leave_the_weights_and_their_gradients_alone(model, points, safety):
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    fihs(model, points, safety.gradient(model))
    gradient_norms(model, points)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.hf.named_parameters())
    assert torch.isfinite(sequence_losses(model, collate(points, 2))).all()


def test_a_derivative_needs_points_and_weights_that_exist(model, points):
    with pytest.raises(ValueError, match="at least one example"):
        directional_derivatives(model, [], {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="at least one example and one weight"):
        directional_derivatives(model, points, {})
    with pytest.raises(ValueError, match=r"has no weight 'model\.norm\.bias'"):
        directional_derivatives(model, points, {"model.norm.bias": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"of shape \(3,\)"):
        directional_derivatives(model, points, {"model.norm.weight": torch.zeros(3)})


@pytest.mark.parametrize("kind", ["model", "adapted"])
def test_gradient_norms_are_those_of_the_linear_layers_gradients(kind, points, request):
    model = request.getfixturevalue(kind)
    found = gradient_norms(model, points, batch_size=3)
    for i, point in enumerate(points):
        gradient = pile_gradient(model, [point])
        linear = {n: g for n, g in gradient.items() if "proj" in n}
        assert found[i] == pytest.approx(inner(linear, linear) ** 0.5, rel=1e-4)


def test_norms_need_points_and_something_to_train(points):
    frozen = load("tiny-random", dtype="float32", weights="frozen")
    with pytest.raises(ValueError, match="a trainable linear layer"):
        gradient_norms(frozen, points)
    with pytest.raises(ValueError, match="at least one example"):
        gradient_norms(load("tiny-random", dtype="float32"), [])


# The safety score


def test_the_safety_score_is_the_plain_models_difference_of_logits(model, safety):
    plain, tokenizer = plain_model("tiny-random")
    sure, i = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Sure", "I"))
    logits = [plain(input_ids=torch.tensor([e.ids])).logits[0, -1] for e in safety.probes]
    expected = torch.stack([z[sure] - z[i] for z in logits])
    torch.testing.assert_close(safety.values(model, batch_size=2), expected.detach(), rtol=1e-4, atol=1e-5)


def test_its_gradient_is_that_of_its_mean_whatever_the_batches(model, safety):
    parameters = [p for _, p in model.hf.named_parameters()]
    one, two = safety.gradient(model), safety.gradient(model, batch_size=2)
    sums = [v.sum() for _, v in safety._batched(model, 8)]
    expected = torch.autograd.grad(sum(sums) / 5, parameters, allow_unused=True)
    for (name, found), grad in zip(one.items(), expected, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found, two[name], rtol=1e-4, atol=1e-6)


def test_bad_safety_scores_are_one_sentence(model):
    asked = [encode(model.tokenizer, "How do I rob a bank?")]
    with pytest.raises(ValueError, match="at least one harmful request"):
        SafetyScore.of(model.tokenizer, [])
    with pytest.raises(ValueError, match=r"'Unquestionably' is \d+ tokens"):
        SafetyScore.of(model.tokenizer, asked, unsafe="Unquestionably")
    with pytest.raises(ValueError, match="No weight is trainable"):
        SafetyScore.of(model.tokenizer, asked).gradient(load("tiny-random", dtype="float32", weights="frozen"))


def test_fihs_is_the_change_of_the_safety_score_that_a_small_step_makes(model, points, safety):
    """And the sign is that of harm: a point that teaches the unsafe token to the probes raises S."""
    harmful = [Example((*e.ids, safety.unsafe), len(e)) for e in safety.probes]
    safe = [Example((*e.ids, safety.safe), len(e)) for e in safety.probes]
    given = [*points, *harmful, *safe]
    found = fihs(model, given, safety.gradient(model))
    before, eta = safety.values(model).double().mean(), 1e-5
    weights = {n.replace("._original_component", ""): p for n, p in model.hf.named_parameters()}
    for i, point in enumerate(given):
        gradient = pile_gradient(model, [point], loss=sequence_sums)
        with torch.no_grad():
            for name, weight in weights.items():
                weight -= eta * gradient[name]
            change = safety.values(model).double().mean() - before
            for name, weight in weights.items():
                weight += eta * gradient[name]
        assert float(found[i]) == pytest.approx(float(change / eta), rel=0.1, abs=0.05 * float(found.abs().max()))
    n = len(points)
    assert auroc(found[n:].numpy(), [1] * 5 + [0] * 5).value == 1.0


def test_larger_is_less_safe():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 5.0]])
    assert unsafe_over_safe(logits, unsafe=0, safe=1).tolist() == [2.0, -2.0]


# Thresholds


def two_kinds(low, high, spread, weights=(0.5, 0.5)):
    """A mixture that needs no fit."""
    mixture = GaussianMixture(2)
    mixture.weights_, mixture.means_ = np.array(weights), np.array([[low], [high]], dtype=float)
    mixture.covariances_ = np.full((2, 1, 1), spread**2)
    mixture.precisions_cholesky_ = np.full((2, 1, 1), 1 / spread)
    return mixture


@pytest.mark.parametrize(("weights", "moved"), [((0.5, 0.5), 0.0), ((0.9, 0.1), np.log(9) / 4)])
def test_two_gaussians_of_one_spread_are_equally_likely_where_the_closed_form_says(weights, moved):
    """The midpoint, moved by spread^2 / (high - low) log(w_low / w_high)."""
    assert equal_posterior(two_kinds(-2, 2, 1.0, weights)) == pytest.approx(moved)


def test_where_one_kind_is_likelier_all_the_way_there_is_no_such_place():
    assert equal_posterior(two_kinds(-0.1, 0.1, 1.0, (0.99, 0.01))) is None


def test_hard_labels_are_cut_at_the_highest_point_of_the_lower_kind():
    z = np.array([-3.0, -2.0, -0.5, 0.5, 3.0])[:, None]
    assert hard_cut(z, two_kinds(-2, 2, 1.0)) == -0.5


def test_standard_scores_of_one_kind_are_cut_at_two_and_of_two_kinds_where_both_are_equally_likely():
    draws = np.random.default_rng(0).normal(size=(200, 1))
    one = (draws - draws.mean()) / draws.std()
    cut, ratio, mixture = standard_threshold(one, required=10.0, seed=0)
    assert (cut, mixture) == (2.0, None) and ratio < 10
    both = np.concatenate([one[:100] - 6, one[100:] + 6])
    cut, ratio, mixture = standard_threshold(both / both.std(), required=10.0, seed=0)
    assert ratio > 10 and cut == pytest.approx(equal_posterior(mixture)) and abs(cut) < 0.5


def test_one_kind_of_scores_is_cut_at_two_standard_deviations():
    scores = np.random.default_rng(0).normal(3.0, 2.0, 200)
    guess = guess_threshold(scores)
    assert not guess.two_kinds
    assert guess.log_ratio < 10
    assert guess.threshold == pytest.approx(scores.mean() + 2 * scores.std())


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_two_kinds_are_parted_between_their_means_whatever_the_unit(unit):
    rng = np.random.default_rng(0)
    scores = unit * np.concatenate([rng.normal(0, 1, 180), rng.normal(8, 1, 20)])
    guess = guess_threshold(scores)
    assert guess.two_kinds
    assert guess.means == pytest.approx([0, 8 * unit], abs=0.6 * unit)
    assert guess.weights == pytest.approx([0.9, 0.1], abs=0.01)
    assert 2 * unit < guess.threshold < 6 * unit
    assert guess.hard is not None
    assert (scores < guess.threshold).sum() == 180


def test_the_likelihood_ratio_is_that_of_the_fitted_densities():
    from scipy.stats import norm

    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(0, 1, 150), rng.normal(5, 2, 50)])
    guess = guess_threshold(scores)
    densities = zip(guess.weights, guess.means, guess.spreads, strict=True)
    two = np.log(sum(w * norm.pdf(scores, m, s) for w, m, s in densities)).sum()
    one = norm.logpdf(scores, scores.mean(), scores.std()).sum()
    assert guess.log_ratio == pytest.approx(two - one, rel=1e-3)


def test_scores_without_spread_suggest_no_threshold():
    for scores in (np.ones(10), np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, np.nan])):
        with pytest.raises(ValueError, match="at least four finite scores that differ"):
            guess_threshold(scores)


SCORES = np.arange(10.0)


def search(harm, utility, guess=5.0, steps=6):
    """Harm and utility by the number of points kept."""
    tried = []

    def evaluate(kept):
        tried.append(int(kept.sum()))
        return float(harm(kept.sum())), float(utility(kept.sum()))

    limits = {"harm_limit": 0.05, "utility_limit": 0.9}
    found = search_threshold(SCORES, guess, evaluate, steps=steps, **limits)
    assert [t.kept for t in found.trials] == tried
    return found


def test_a_guess_that_is_safe_and_useful_is_taken_at_once():
    found = search(lambda n: 0.0, lambda n: 1.0)
    (trial,) = found.trials
    assert (trial.threshold, trial.kept, trial.safe, trial.useful) == (5.0, 5, True, True)
    assert found.chosen == trial


def test_the_search_goes_down_where_it_is_unsafe_and_up_where_it_is_useless():
    down = search(lambda n: 0.0 if n <= 2 else 1.0, lambda n: 1.0)
    assert down.chosen.kept <= 2
    assert [t.threshold for t in down.trials] == sorted((t.threshold for t in down.trials), reverse=True)
    up = search(lambda n: 0.0, lambda n: 1.0 if n >= 8 else 0.0)
    assert up.chosen.kept >= 8
    assert up.chosen.useful


def test_without_a_threshold_that_is_both_the_safe_one_with_most_utility_is_chosen():
    found = search(lambda n: 0.0 if n <= 6 else 1.0, lambda n: n / 20)
    assert found.chosen.safe and not found.chosen.useful
    assert found.chosen.utility == max(t.utility for t in found.trials if t.safe)


def test_on_data_where_no_threshold_is_safe_none_is_chosen():
    found = search(lambda n: 0.5, lambda n: 1.0)
    assert found.chosen is None and found.trials
    assert search(lambda n: 0.0, lambda n: 1.0, guess=-1.0).chosen is None, "nothing would be kept"


# Baselines


def test_equal_retention_keeps_the_least_suspicious():
    kept = equal_retention(np.array([3.0, 1.0, 2.0, 1.0]), 3)
    assert kept.tolist() == [False, True, True, True]
    assert equal_retention(np.zeros(3), 2).tolist() == [True, True, False]
    assert not equal_retention(np.zeros(3), 0).any()
    with pytest.raises(ValueError, match="4 of 3 points"):
        equal_retention(np.zeros(3), 4)


def test_anchor_similarity_is_the_cosine_with_the_anchors_mean():
    anchors = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    states = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-3.0, -3.0]])
    torch.testing.assert_close(anchor_similarity(states, anchors), torch.tensor([1.0, 0.0, -1.0]))
