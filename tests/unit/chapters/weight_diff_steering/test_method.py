"""Directions in weight space do what their formulas say, and leave the weights as they found them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.chapters.weight_diff_steering.method import (
    WeightVector,
    alpha_for,
    alpha_for_change,
    cosine,
    difference,
    dot,
    finetuning_diff,
    hadamard,
    layer_of,
    low_rank,
    module_of,
    only_layers,
    profile,
    project_on_diff,
    random_like,
    sign_restricted,
    steered,
    without_layers,
)
from helpers.gradients import pile_gradient
from helpers.losses import evaluate_losses
from helpers.models import REGISTRY, load, plain_name

SHAPES = {
    "model.embed_tokens.weight": (40, 30),
    "model.layers.0.self_attn.q_proj.weight": (24, 30),
    "model.layers.0.mlp.up_proj.weight": (36, 30),
    "model.layers.1.input_layernorm.weight": (30,),
    "model.layers.1.mlp.down_proj.weight": (30, 36),
    "model.norm.weight": (30,),
}


def noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def decaying(seed):
    """Matrices whose singular values halve from one to the next, so that the leading ones are well told apart."""
    found = {}
    for name, tensor in noise(seed).items():
        if tensor.ndim == 2:
            u, s, vt = np.linalg.svd(tensor.numpy().astype(np.float64), full_matrices=False)
            tensor = torch.tensor((u * 0.5 ** np.arange(len(s))) @ vt, dtype=torch.float32)
        found[name] = tensor
    return found


def flat(vector):
    return np.concatenate([t.numpy().astype(np.float64).ravel() for t in vector.tensors.values()])


def equal(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


@pytest.fixture(scope="module")
def v():
    return WeightVector(noise(1))


@pytest.fixture(scope="module")
def delta():
    return WeightVector(noise(2))


@pytest.fixture(scope="module")
def model():
    return load("tiny-random", dtype="float32")


@pytest.fixture(scope="module")
def gradient(model, examples):
    return WeightVector(pile_gradient(model, examples[:4]))


@pytest.fixture
def weights(model):
    """What every parameter is, where it lies and what it holds."""
    return {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.hf.named_parameters()}


def untouched(model, weights):
    now = dict(model.hf.named_parameters())
    return now.keys() == weights.keys() and all(
        now[n] is p and p.data_ptr() == place and torch.equal(p.view(torch.int32), held.view(torch.int32))
        for n, (p, place, held) in weights.items()
    )


# Differences and strengths


def test_a_difference_is_the_first_minus_the_second_in_float32_whatever_they_are_stored_in():
    a, b = noise(1), noise(2)
    found = difference({n: t.bfloat16() for n, t in a.items()}, {n: t.bfloat16() for n, t in b.items()})
    for name in SHAPES:
        assert found.tensors[name].dtype == torch.float32
        assert torch.equal(found.tensors[name], a[name].bfloat16().float() - b[name].bfloat16().float())


@pytest.mark.parametrize("change", ["missing", "further", "shape"])
def test_weights_of_two_architectures_cannot_be_combined(v, change):
    other = dict(v.tensors)
    if change == "missing":
        del other["model.norm.weight"]
    elif change == "further":
        other["lm_head.weight"] = torch.zeros(40, 30)
    else:
        other["model.norm.weight"] = torch.zeros(31)
    for combine in (
        lambda: difference(v.tensors, other),
        lambda: difference(other, v.tensors),
        lambda: cosine(v, WeightVector(other)),
    ):
        with pytest.raises(ValueError, match="not those of one architecture, so they cannot be combined") as error:
            combine()
        assert "\n" not in str(error.value)


def test_the_finetuning_diff_is_what_was_added_to_the_base(model, tiny, gradient):
    with steered(model, gradient, -0.5):
        found = finetuning_diff(model, tiny)
    assert found.tensors.keys() == gradient.tensors.keys()
    for name, tensor in gradient.tensors.items():
        torch.testing.assert_close(found.tensors[name], -0.5 * tensor, atol=1e-6, rtol=0)
    assert finetuning_diff(model, tiny).norm == 0


def test_an_anchor_of_another_architecture_than_the_base_is_one_sentence(model, tiny):
    from transformers import LlamaForCausalLM

    config = type(tiny.hf.config)(**{**tiny.hf.config.to_dict(), "num_hidden_layers": 3})
    with pytest.raises(ValueError, match="take anchor, base and direction from the same model"):
        finetuning_diff(replace(model, hf=LlamaForCausalLM(config)), tiny)


def test_the_norm_and_the_cosine_are_over_all_weights_together(v, delta):
    a, b = flat(v), flat(delta)
    assert v.norm == pytest.approx(np.linalg.norm(a), rel=1e-6)
    assert cosine(v, delta) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-7)
    assert cosine(v, v) == pytest.approx(1)
    assert cosine(v, v.each(lambda _, t: -3 * t)) == pytest.approx(-1)


def test_the_inner_product_is_over_all_weights_together(v, delta):
    assert dot(v, delta.tensors) == pytest.approx(flat(v) @ flat(delta), rel=1e-5)
    with pytest.raises(ValueError, match="not those of one architecture"):
        dot(v, {name: t for name, t in delta.tensors.items() if name != "model.norm.weight"})


def test_a_digest_changes_with_any_value_or_name_and_with_nothing_else(v):
    assert v.digest == WeightVector(dict(reversed(noise(1).items()))).digest
    changed = noise(1)
    changed["model.norm.weight"][7] += 1e-6
    renamed = {name.replace("layers.1", "layers.2"): tensor for name, tensor in noise(1).items()}
    assert len({v.digest, WeightVector(changed).digest, WeightVector(renamed).digest}) == 3


def test_alpha_reaches_the_ratio_asked_for_on_either_side(v, delta):
    for ratio in (0.03, -0.1):
        alpha = alpha_for(v, delta, ratio)
        assert v.each(lambda _, t, alpha=alpha: alpha * t).norm / delta.norm == pytest.approx(abs(ratio))
        assert (alpha > 0) == (ratio > 0)


def test_a_direction_that_is_zero_has_no_strength(v, delta):
    zero = only_layers(v, [99])
    with pytest.raises(ValueError, match="zero everywhere: no strength reaches a ratio"):
        alpha_for(zero, delta, 0.03)


# Steering


def test_inside_the_weights_are_theta_plus_alpha_v_and_outside_they_are_the_very_same(model, weights, gradient):
    with steered(model, gradient, 0.7) as inside:
        assert inside is model
        for name, p in model.hf.named_parameters():
            torch.testing.assert_close(p.data, weights[name][2] + 0.7 * gradient.tensors[plain_name(name)])
    assert untouched(model, weights)


def test_the_weights_are_the_very_same_after_an_exception_inside(model, weights, gradient):
    with pytest.raises(KeyError, match="inside"), steered(model, gradient, 0.7):
        raise KeyError("inside")
    assert untouched(model, weights)


def test_the_weights_are_the_very_same_after_what_was_done_to_them_inside(model, weights, gradient):
    with steered(model, gradient, 0.7), torch.no_grad():
        for p in model.hf.parameters():
            p.fill_(float("nan"))
    assert untouched(model, weights)


def test_steering_within_steering_adds_up_and_is_undone_in_turn(model, weights, gradient):
    with steered(model, gradient, 0.7):
        outer = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
        with steered(model, gradient, -0.7):
            for name, p in model.hf.named_parameters():
                torch.testing.assert_close(p.data, weights[name][2], atol=1e-6, rtol=0)
        assert all(torch.equal(p, outer[n]) for n, p in model.hf.named_parameters())
    assert untouched(model, weights)


@pytest.mark.parametrize("alpha", [float("inf"), float("-inf"), float("nan")])
def test_an_alpha_that_makes_the_loss_non_finite_is_one_sentence_and_the_weights_stay(model, weights, gradient, alpha):
    entered = False
    with (
        pytest.raises(ValueError, match="the loss is not finite; choose an alpha nearer to 0") as error,
        steered(model, gradient, alpha),
    ):
        entered = True
    assert not entered and "\n" not in str(error.value)
    assert untouched(model, weights)


@pytest.mark.parametrize("change", ["missing", "further", "shape"])
def test_a_direction_that_does_not_fit_the_model_is_one_sentence_and_the_weights_stay(model, weights, gradient, change):
    tensors = dict(gradient.tensors)
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "further":
        tensors["model.extra.weight"] = torch.zeros(3)
    else:
        tensors["model.norm.weight"] = torch.zeros(31)
    with (
        pytest.raises(ValueError, match="not those of one architecture") as error,
        steered(model, WeightVector(tensors), 0.1),
    ):
        pass
    assert "\n" not in str(error.value)
    assert untouched(model, weights)


@pytest.mark.parametrize("sign", [1, -1])
def test_positive_alpha_raises_the_piles_loss_and_negative_alpha_lowers_it_as_the_gradient_predicts(
    model, examples, gradient, sign
):
    alpha = sign * 0.003 / gradient.norm**2
    before = evaluate_losses(model, examples[:4]).double().mean()
    with steered(model, gradient, alpha):
        after = evaluate_losses(model, examples[:4]).double().mean()
    assert float(after - before) == pytest.approx(alpha * gradient.norm**2, rel=0.04)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_of_piles_changes_each_piles_loss_by_its_product_with_that_piles_gradient(
    model, examples, gradient, sign
):
    other = WeightVector(pile_gradient(model, examples[4:]))
    vector = difference(gradient.tensors, other.tensors)
    alpha = sign * 0.01 / vector.norm**2
    changes = {}
    for name, pile, g in (("target", examples[:4], gradient), ("neutral", examples[4:], other)):
        before = evaluate_losses(model, pile).double().mean()
        with steered(model, vector, alpha):
            changes[name] = float(evaluate_losses(model, pile).double().mean() - before)
        assert changes[name] == pytest.approx(alpha * float(flat(vector) @ flat(g)), rel=0.05, abs=1e-4)
    assert sign * changes["target"] > 0 > sign * changes["neutral"]


# Variants


def ranked(seed):
    """A diff whose absolute values are 1 to n in random order, with random signs."""
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randperm(total, generator=generator) + 1) * (
        torch.randint(0, 2, (total,), generator=generator) * 2 - 1
    )
    parts = values.float().split([int(np.prod(shape)) for shape in SHAPES.values()])
    return WeightVector({n: part.reshape(s) for (n, s), part in zip(SHAPES.items(), parts, strict=True)}), total


def test_hadamard_by_percentile_divides_by_the_97th_percentile_of_all_weights_together(v):
    diff, total = ranked(3)
    s = round(0.97 * total)
    assert s == np.percentile(np.abs(flat(diff)), 97, method="inverted_cdf")
    np.testing.assert_allclose(flat(hadamard(v, diff, "percentile")), np.abs(flat(diff)) / s * flat(v), rtol=1e-5)


def test_hadamard_by_active_median_divides_by_the_median_of_what_exceeds_a_tenth_of_the_percentile(v):
    diff, total = ranked(4)
    size = np.abs(flat(diff))
    tail = size[size > round(0.97 * total) / 10]
    found = hadamard(v, diff, "active median")
    np.testing.assert_allclose(flat(found), size / np.median(tail) * flat(v), rtol=2 / total)
    assert np.median(tail) > np.median(size) * 1.05  # the tail is not everything


def test_hadamard_needs_a_diff_that_is_not_zero_nearly_everywhere(v):
    nothing = WeightVector({n: torch.zeros(s) for n, s in SHAPES.items()})
    sparse = nothing.each(lambda name, t: t + 2 * (name == "model.norm.weight"))
    for diff, scale in ((sparse, "percentile"), (nothing, "percentile"), (nothing, "active median")):
        with pytest.raises(ValueError, match="fewer than 3% of"):
            hadamard(v, diff, scale)
    few = hadamard(v, sparse, "active median")  # the median of the few that changed, which is 2
    assert equal(few, v.each(lambda name, t: t if name == "model.norm.weight" else torch.zeros_like(t)))


@pytest.mark.parametrize("rank", [1, 3])
def test_the_projection_is_on_the_leading_singular_vectors_of_the_diff_on_both_sides(v, rank):
    delta = WeightVector(decaying(5))
    found = project_on_diff(v, delta, rank)
    for name, tensor in v.tensors.items():
        d, x = (t.numpy().astype(np.float64) for t in (delta.tensors[name], tensor))
        if d.ndim == 2:
            u, _, wt = np.linalg.svd(d)
            u, w = u[:, :rank], wt[:rank].T
            expected = u @ u.T @ x @ w @ w.T
        else:
            expected = d * (x @ d) / (d @ d)
        np.testing.assert_allclose(found.tensors[name], expected, atol=1e-4)


def test_projecting_twice_is_projecting_once_and_leaves_the_rank_asked_for(v):
    delta = WeightVector(decaying(5))
    once = project_on_diff(v, delta, 3)
    np.testing.assert_allclose(flat(project_on_diff(once, delta, 3)), flat(once), atol=1e-5)
    ranks = {int(np.linalg.matrix_rank(t.numpy(), tol=1e-4)) for t in once.tensors.values() if t.ndim == 2}
    assert ranks == {3}


def test_the_diff_itself_is_projected_on_its_own_leading_part():
    delta = WeightVector(decaying(5))
    np.testing.assert_allclose(flat(project_on_diff(delta, delta, 3)), flat(low_rank(delta, 3)), atol=1e-5)
    assert project_on_diff(delta, delta, 40).norm == pytest.approx(delta.norm, rel=1e-5)


def test_where_finetuning_changed_nothing_the_projection_is_zero(v):
    nothing = WeightVector({n: torch.zeros(s) for n, s in SHAPES.items()})
    assert project_on_diff(v, nothing, 3).tensors["model.norm.weight"].abs().sum() == 0


@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_is_the_best_approximation_of_each_matrix_and_keeps_the_other_parameters(rank):
    vector = WeightVector(decaying(6))
    found = low_rank(vector, rank)
    for name, tensor in vector.tensors.items():
        if tensor.ndim == 1:
            assert torch.equal(found.tensors[name], tensor)
            continue
        x = tensor.numpy().astype(np.float64)
        u, s, vt = np.linalg.svd(x, full_matrices=False)
        np.testing.assert_allclose(found.tensors[name], (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5)
        left = np.linalg.norm(x - found.tensors[name].numpy())
        assert left == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-3)


def test_even_where_no_singular_value_stands_out_low_rank_is_nearly_the_best_approximation(v):
    """The randomised method is exact only where leading values stand out; noise is its worst case."""
    for name, tensor in low_rank(v, 4).tensors.items():
        if tensor.ndim == 2:
            s = np.linalg.svd(v.tensors[name].numpy(), compute_uv=False)
            assert np.linalg.norm(tensor) == pytest.approx(np.linalg.norm(s[:4]), rel=0.03)


def test_cutting_the_rank_draws_nothing_from_the_readers_random_numbers(v):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    one = low_rank(v, 2)
    assert torch.equal(torch.randn(3), expected)
    assert equal(low_rank(v, 2), one)


def test_sign_restricted_directions_hold_their_sign_only_and_add_up_to_the_whole(v):
    positive, negative = (flat(sign_restricted(v, sign)) for sign in ("positive", "negative"))
    np.testing.assert_array_equal(positive, np.maximum(flat(v), 0))
    np.testing.assert_array_equal(negative, np.minimum(flat(v), 0))


def test_only_and_all_but_the_chosen_layers_add_up_to_the_whole(v):
    inside, outside = only_layers(v, [1]), without_layers(v, [1])
    for name, tensor in v.tensors.items():
        chosen = ".layers.1." in name
        assert torch.equal(inside.tensors[name], tensor if chosen else torch.zeros_like(tensor)), name
        assert torch.equal(outside.tensors[name], torch.zeros_like(tensor) if chosen else tensor), name


def test_a_random_direction_has_the_norm_of_every_tensor_and_no_part_of_the_direction(v):
    big = v.each(lambda name, t: 100 * t if "mlp" in name else t)
    random = random_like(big, 0)
    for name, tensor in big.tensors.items():
        assert float(random.tensors[name].norm()) == pytest.approx(float(tensor.norm()), rel=1e-5), name
    assert abs(cosine(random, big)) < 0.1
    assert random_like(only_layers(v, [0]), 0).tensors["model.norm.weight"].abs().sum() == 0


def test_a_random_direction_depends_on_its_seed_and_on_nothing_else(v):
    one = random_like(v, 3)
    torch.manual_seed(99)
    assert equal(random_like(v, 3), one)
    assert abs(cosine(random_like(v, 4), one)) < 0.1


def test_variants_leave_the_direction_itself_alone(v, delta):
    before = v.each(lambda _, t: t.clone())
    hadamard(v, delta, "percentile")
    project_on_diff(v, delta, 2)
    low_rank(v, 2)
    sign_restricted(v, "negative")
    only_layers(v, [0])
    without_layers(v, [0])
    random_like(v, 0)
    assert equal(v, before)


# Profiles


@pytest.mark.parametrize("card", REGISTRY.values(), ids=REGISTRY)
def test_every_parameter_of_a_registered_model_has_its_layer_and_module(card):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        config = LlamaConfig(num_hidden_layers=card.layers, hidden_size=card.width, num_attention_heads=1)
        names = [name for name, _ in LlamaForCausalLM(config).named_parameters() if name != "lm_head.weight"]  # tied
    by_layer = {}
    for name in names:
        by_layer.setdefault(layer_of(name), []).append(module_of(name))
    assert by_layer.keys() == {None, *range(card.layers)}
    assert by_layer.pop(None) == ["embedding", "norm"]
    for modules in by_layer.values():
        assert sorted(modules) == ["MLP"] * 3 + ["attention"] * 4 + ["norm"] * 2


def test_the_loaded_model_has_the_names_that_profiles_read(tiny, gradient):
    assert {(layer_of(n), module_of(n)) for n in gradient.tensors} == {
        (None, "embedding"),
        (None, "norm"),
        *((layer, module) for layer in range(tiny.layers) for module in ("attention", "MLP", "norm")),
    }


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.29.mlp.down_proj.weight", 29, "MLP"),
        ("model.layers.7.post_attention_layernorm.weight", 7, "norm"),
        ("model.layers.7.self_attn.q_norm.weight", 7, "norm"),
        ("model.layers.12.self_attn.o_proj.weight", 12, "attention"),
        ("model.embed_tokens.weight", None, "embedding"),
        ("lm_head.weight", None, "embedding"),
        ("model.norm.weight", None, "norm"),
        ("transformer.h.11.attn.c_attn.weight", 11, "attention"),
        ("transformer.h.0.ln_1.bias", 0, "norm"),
        ("transformer.wte.weight", None, "embedding"),
        ("transformer.ln_f.weight", None, "norm"),
    ],
)
def test_layer_and_module_follow_from_the_name(name, layer, module):
    assert (layer_of(name), module_of(name)) == (layer, module)


def test_the_profile_adds_up_to_the_squared_norm_place_by_place(v):
    rows = profile(v)
    assert sum(row["sum_of_squares"] for row in rows) == pytest.approx(v.norm**2)
    assert [(row["layer"], row["module"]) for row in rows] == [
        (-1, "embedding"),
        (-1, "norm"),
        (0, "MLP"),
        (0, "attention"),
        (1, "MLP"),
        (1, "norm"),
    ]
    for row, name in zip(
        rows,
        (
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.1.mlp.down_proj.weight",
            "model.layers.1.input_layernorm.weight",
        ),
        strict=True,
    ):
        assert row["sum_of_squares"] == pytest.approx(float((v.tensors[name].double() ** 2).sum()))
        assert row["norm"] == pytest.approx(float(v.tensors[name].double().norm()))


def test_parameters_of_one_place_count_together(gradient):
    found = {(row["layer"], row["module"]): row["norm"] for row in profile(gradient)}
    attention = [t.double().square().sum() for n, t in gradient.tensors.items() if ".layers.1.self_attn." in n]
    assert len(attention) == 4
    assert found[1, "attention"] == pytest.approx(float(sum(attention)) ** 0.5)


@pytest.mark.parametrize("guess", [0.01, 1.0, 40.0])
def test_the_alpha_for_a_change_is_found_from_guesses_that_are_too_small_or_too_large(guess):
    assert alpha_for_change(lambda a: a**3, 8.0, 8.0 / guess, steps=30) == pytest.approx(2.0, rel=0.04)
    assert alpha_for_change(lambda a: a**2 - 0.5 * a, 3.0, 3.0 / guess, steps=30) == pytest.approx(2.0, rel=0.1)


def test_a_parabolas_alpha_is_found_at_the_second_trial():
    tried = []
    found = alpha_for_change(lambda a: tried.append(a) or 0.5 * a + a**2, 3.0, 0.5)
    assert found == pytest.approx(1.5)
    assert len(tried) == 2
