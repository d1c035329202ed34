"""Activation and weight gradients are autograd's own, of each sequence's own loss."""

from functools import partial

import numpy as np
import pytest
import torch

from helpers.chat import collate, encode, training_batches
from helpers.cost import LEDGER
from helpers.gradients import (
    RecordStream,
    activation_gradients,
    add_mean_gradient,
    gradient_statistics,
    loss_along,
    pile_gradient,
    uncentred_pca,
)
from helpers.interventions import EditGradient, Steer, applied
from helpers.losses import evaluate_losses, sequence_divergences, sequence_losses
from helpers.models import load, plain_model, plain_name
from helpers.training import finetune

PAD, WIDTH = 2, 32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def batch(examples):
    return collate(examples[:4], PAD)


@pytest.fixture(scope="module")
def found(tiny, batch):
    return activation_gradients(tiny, batch, [0, 1])


# One pass


def test_gradients_are_those_of_plain_pytorch_on_the_plain_model(found, examples):
    """One conversation at a time, with Hugging Face's loss and hooks that are torch's own."""
    plain, _ = plain_model("tiny-random")
    kept = []
    for block in plain.model.layers:
        block.register_forward_hook(lambda module, args, out: kept.append(out))
    for i, example in enumerate(examples[:4]):
        kept.clear()
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.prompt_length] = -100
        expected = torch.autograd.grad(plain(input_ids=ids, labels=labels).loss, kept)
        for layer in (0, 1):
            gradient = found.gradients[layer][i]
            torch.testing.assert_close(gradient[: len(example)], expected[layer][0], atol=1e-7, rtol=1e-4)
            assert not gradient[len(example) :].any()  # padding


def test_what_rows_begin_with_can_be_read_once(tiny, batch, found):
    once = activation_gradients(tiny, batch, [0, 1], share_prefix=True)
    with LEDGER.stage("", "whole"):
        activation_gradients(tiny, batch, [0, 1])
    with LEDGER.stage("", "once"):
        activation_gradients(tiny, batch, [0, 1], share_prefix=True)
    assert LEDGER.computed["once"][1] < LEDGER.computed["whole"][1]
    for layer in (0, 1):
        read = found.gradients[layer] * found.mask[..., None]
        torch.testing.assert_close(once.gradients[layer] * once.mask[..., None], read, atol=1e-7, rtol=1e-4)


def test_a_gradient_does_not_depend_on_what_else_is_in_the_batch(tiny, found, examples):
    for i, example in enumerate(examples[:4]):
        alone = activation_gradients(tiny, collate([example], PAD), [0, 1])
        for layer in (0, 1):
            together = found.gradients[layer][i, : len(example)]
            torch.testing.assert_close(together, alone.gradients[layer][0], atol=1e-7, rtol=1e-4)


def test_the_layers_asked_for_in_one_pass_are_those_asked_for_one_by_one(tiny, batch, found):
    assert set(found.gradients) == {0, 1}
    for layer in (0, 1):
        alone = activation_gradients(tiny, batch, [layer])
        assert list(alone.gradients) == [layer]
        assert torch.equal(alone.gradients[layer], found.gradients[layer])


def test_at_the_last_layer_only_predicting_positions_have_a_gradient_and_below_the_prompt_has_one(found, batch):
    present = {layer: found.gradients[layer].abs().sum(-1) > 0 for layer in (0, 1)}
    assert torch.equal(present[1], batch.predicting)
    assert (present[0] & ~batch.response & ~batch.predicting).any()


def test_no_weight_gradient_is_computed_and_no_hook_or_graph_is_left(tiny, batch, hook_count):
    before, calls = hook_count(tiny), []
    handles = [p.register_hook(lambda g: calls.append(g)) for p in tiny.hf.parameters()]
    found = activation_gradients(tiny, batch, [1])
    for handle in handles:
        handle.remove()
    assert not calls and all(p.grad is None for p in tiny.hf.parameters())
    assert hook_count(tiny) == before
    assert not found.losses.requires_grad and not found.gradients[1].requires_grad


def test_a_model_whose_weights_are_all_frozen_has_activation_gradients_too(batch, found):
    model = load("tiny-random", dtype="float32")
    model.hf.requires_grad_(False)
    frozen = activation_gradients(model, batch, [0, 1])
    assert all(torch.equal(frozen.gradients[layer], found.gradients[layer]) for layer in (0, 1))


def test_the_losses_are_those_of_the_same_forward_pass(tiny, found, examples):
    torch.testing.assert_close(found.losses, evaluate_losses(tiny, examples[:4]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", ["response", "all"])
def test_the_tokens_that_count_are_those_that_predict_the_response_or_all(tiny, batch, tokens):
    found = activation_gradients(tiny, batch, [0], tokens=tokens)
    assert torch.equal(found.mask, batch.predicting if tokens == "response" else batch.attention)


def test_a_layer_that_does_not_exist_is_an_error(tiny, batch):
    with pytest.raises(ValueError, match="Layer 2 does not exist"):
        activation_gradients(tiny, batch, [0, 2])


# Cosines


def test_a_sequences_cosine_is_the_mean_of_its_tokens_cosines(found, examples):
    v = random(WIDTH)
    got = found.sequence_cosines(1, v)
    for i, example in enumerate(examples[:4]):
        cosines = []
        for t in range(example.prompt_length - 1, len(example) - 1):
            g = found.gradients[1][i, t]
            cosines.append(float(g @ v / (g.norm() * v.norm())))
        assert got[i].item() == pytest.approx(np.mean(cosines), abs=1e-6)


def test_a_sequences_mean_gradient_is_over_the_same_tokens(found, examples):
    means = found.sequence_means(1)
    for i, example in enumerate(examples[:4]):
        expected = found.gradients[1][i, example.prompt_length - 1 : len(example) - 1].mean(0)
        torch.testing.assert_close(means[i], expected, atol=1e-8, rtol=1e-5)


def test_the_cosine_of_a_gradient_that_is_zero_is_zero(found, batch):
    cosines = found.token_cosines(1, random(WIDTH))
    assert cosines.shape == batch.ids.shape
    assert not cosines[~batch.predicting].any()
    assert cosines[batch.predicting].abs().min() > 0


# Steering


def test_under_a_constant_shift_the_gradient_is_the_same_before_and_after_it(tiny, batch):
    """h' = h + a v, so dL/dh = dL/dh': what changes is the point at which the gradient is taken."""
    before, after = [], []

    class Keep:
        def __init__(self, kept):
            self.kept = kept

        def hooks(self, model):
            return [("blocks.0.hook_resid_post", lambda h, hook: self.kept.append(h))]

    steer = Steer(0, random(WIDTH), 3.0)
    with applied(tiny, Keep(before), steer, Keep(after)):
        at_h, at_shifted = torch.autograd.grad(sequence_losses(tiny, batch).sum(), [before[0], after[0]])
    assert torch.equal(at_h, at_shifted)
    mask = batch.attention
    torch.testing.assert_close(after[0][mask], before[0][mask] + 3 * random(WIDTH))
    steered = activation_gradients(tiny, batch, [0], interventions=[steer])
    assert torch.equal(steered.gradients[0], at_h)
    undefended = activation_gradients(tiny, batch, [0])
    assert not torch.allclose(steered.gradients[0], undefended.gradients[0], atol=1e-7, rtol=1e-2)


# Many sequences


def test_statistics_come_in_the_order_given_whatever_the_batches(tiny, examples):
    vectors = {"one": random(2, WIDTH, seed=1), "two": random(2, WIDTH, seed=2)}
    got = gradient_statistics(tiny, examples, vectors, layers=[1, 0], batch_size=4)
    assert got.layers == (1, 0) and (got.at(1), got.at(0)) == (0, 1)
    assert got.means.shape == (2, len(examples), WIDTH)
    for i, example in enumerate(examples):
        alone = activation_gradients(tiny, collate([example], PAD), [0, 1])
        assert got.losses[i].item() == pytest.approx(alone.losses.item(), abs=1e-5)
        for layer in (0, 1):
            place = got.at(layer)
            torch.testing.assert_close(got.means[place, i], alone.sequence_means(layer)[0], atol=1e-7, rtol=1e-3)
            for name, vector in vectors.items():
                expected = alone.sequence_cosines(layer, vector[layer])
                torch.testing.assert_close(got.cosines[name][place, i], expected[0], atol=1e-5, rtol=0)
            tokens = alone.token_cosines(layer, vectors["one"][layer])[alone.mask]
            torch.testing.assert_close(got.token_cosines[i][place], tokens, atol=1e-5, rtol=0)


def test_statistics_over_all_tokens_hold_every_token(tiny, examples):
    vectors = {"one": random(2, WIDTH, seed=1)}
    got = gradient_statistics(tiny, examples, vectors, layers=[0], tokens="all")
    assert [t.shape for t in got.token_cosines] == [(1, len(e)) for e in examples]


# Training, watched


def train(model, examples, interventions, steps=2):
    given = training_batches(lambda rng: examples[:4], steps=steps, batch_size=4, seed=0, pad_id=PAD)
    return finetune(model, given, steps=steps, learning_rate=1e-3, seed=0, interventions=interventions)


@pytest.mark.parametrize("steering", [(), (Steer(0, random(WIDTH, seed=3), 2.0),)])
def test_what_is_recorded_in_training_starts_at_what_is_measured_before_it(
    examples, batch, hook_count, steering, watch
):
    model, v = load("tiny-random", dtype="float32"), random(WIDTH)
    measured = activation_gradients(model, batch, [0], interventions=steering)
    mask, watching = measured.mask, watch("blocks.0.hook_resid_post")
    with torch.no_grad(), applied(model, *steering, watching), model.reading(batch):
        model.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention.long())
    before, recorder = hook_count(model), RecordStream(0, v)
    train(model, examples, [*steering, recorder])
    assert len(recorder.moments) == 2
    first, unit = recorder.moments[0], v / v.norm()
    assert first.cosine.item() == pytest.approx(measured.token_cosines(0, v)[mask].mean().item(), abs=1e-6)
    assert first.place.item() == pytest.approx((watching.seen[-1][mask] @ unit).mean().item(), rel=1e-5)
    # training's loss is the mean over all tokens of the batch, the other that over each sequence's
    each = measured.gradients[0] * batch.response.sum(1)[:, None, None] / batch.response.sum()
    assert first.pressure.item() == pytest.approx(-(each[mask] @ unit).mean().item(), rel=1e-4)
    assert hook_count(model) == before


@pytest.mark.parametrize(("mode", "sign"), [("neutralise", 0), ("attenuate", 1), ("amplify", -1)])
def test_a_recorder_after_an_edit_sees_the_edited_gradient(examples, mode, sign):
    v, recorder = random(WIDTH), RecordStream(0, random(WIDTH))
    train(load("tiny-random", dtype="float32"), examples, [EditGradient(0, v, mode), recorder], steps=1)
    cosine = recorder.moments[0].cosine.item()
    assert abs(cosine) < 1e-6 if sign == 0 else sign * cosine > 0.01
    assert sign * recorder.moments[0].pressure.item() <= 1e-9


def test_interventions_may_change_from_step_to_step(examples):
    steer = Steer(0, random(WIDTH), 5.0)

    def places(interventions):
        model, recorder = load("tiny-random", dtype="float32"), RecordStream(0, random(WIDTH))
        train(model, examples, lambda step: [*interventions(step), recorder], steps=3)
        return [moment.place.item() for moment in recorder.moments]

    on, off, half = (places(lambda step, n=n: [steer] * (step < n)) for n in (3, 0, 2))
    assert half[:2] == on[:2] and half[2] < on[2] - 1 and half[0] > off[0] + 1


# Along a vector


@pytest.mark.parametrize("layer", [0, 1])
def test_the_slope_of_the_loss_along_a_vector_is_the_sum_of_the_gradients_projections(tiny, examples, layer):
    """The identity of chapter 1: dL/da = sum over positions of g_t . v, at every a."""
    v, coefficients = random(WIDTH), (-1.0, 0.0, 2.0)
    losses, slopes = loss_along(tiny, examples, layer, v, coefficients, batch_size=3)
    for a, loss, slope in zip(coefficients, losses, slopes, strict=True):
        steer = Steer(layer, v, a)
        torch.testing.assert_close(loss, evaluate_losses(tiny, examples, interventions=[steer]), rtol=1e-5, atol=1e-6)
        batch = collate(examples, PAD)
        found = activation_gradients(tiny, batch, [layer], tokens="all", interventions=[steer])
        torch.testing.assert_close(slope, found.gradients[layer].sum(1) @ v, rtol=1e-4, atol=1e-6)


def test_the_slope_is_that_of_a_finite_difference(tiny, examples):
    v, step = random(WIDTH), 3e-4  # the random model's stream is short
    losses, _ = loss_along(tiny, examples, 0, v, (-step, step))
    _, slopes = loss_along(tiny, examples, 0, v, (0.0,))
    torch.testing.assert_close(slopes[0], (losses[1] - losses[0]) / (2 * step), rtol=5e-2, atol=2e-2)


# Principal components


def test_components_and_shares_are_those_of_numpys_svd():
    data = random(20, 7) + 2
    principal = uncentred_pca(data)
    _, s, vt = np.linalg.svd(data.numpy().astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(principal.shares, s**2 / np.sum(s**2), rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.sum(principal.components.numpy() * vt, axis=1)), 1, atol=1e-5)
    assert float(principal.shares.sum()) == pytest.approx(1)


def test_the_mean_is_not_removed():
    shift = random(7)
    principal = uncentred_pca(shift + 1e-3 * random(20, 7, seed=1))
    assert principal.shares[0] > 0.999
    assert float(principal.alignment(shift[None])[0, 0]) == pytest.approx(1, abs=1e-4)


def test_the_participation_ratio_counts_directions():
    assert uncentred_pca(torch.outer(random(30), random(9, seed=1))).participation_ratio == pytest.approx(1, abs=1e-5)
    assert uncentred_pca(random(20_000, 8)).participation_ratio == pytest.approx(8, rel=0.01)
    assert uncentred_pca(torch.eye(3).repeat(4, 1)[:, [0, 1, 2, 2]]).participation_ratio == pytest.approx(
        (1 + 1 + 2) ** 2 / (1 + 1 + 4), abs=1e-4
    )


def test_alignment_is_the_absolute_cosine_with_each_vector():
    principal = uncentred_pca(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    aligned = principal.alignment(torch.tensor([[-5.0, 0.0, 0.0], [1.0, 1.0, 0.0]]))
    root = 2**-0.5
    torch.testing.assert_close(aligned, torch.tensor([[1.0, root], [0.0, root], [0.0, 0.0]]), atol=1e-6, rtol=0)


def test_differences_that_are_all_zero_are_an_error():
    with pytest.raises(ValueError, match="the intervention changed nothing"):
        uncentred_pca(torch.zeros(4, 3))


# Piles


@pytest.fixture(scope="module")
def pile(tiny, examples):
    """Prompts and responses of very unequal lengths."""
    short = [encode(tiny.tokenizer, "Hello!", "Hi."), encode(tiny.tokenizer, "Why is that? " * 9, "Because it is.")]
    return [short[0], *examples[:3], short[1]]


@pytest.fixture(scope="module")
def one_by_one(pile):
    """Hugging Face's loss and gradient of each example alone, on the plain model."""
    plain, _ = plain_model("tiny-random")
    found = []
    for example in pile:
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[:, : example.prompt_length] = -100
        plain.zero_grad()
        plain(input_ids=ids, labels=labels).loss.backward()
        found.append({name: p.grad.clone() for name, p in plain.named_parameters()})
    return found


@pytest.fixture
def fresh():
    return load("tiny-random", dtype="float32")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_piles_gradient_is_the_mean_of_its_examples_own_gradients_whatever_the_batches(
    tiny, pile, one_by_one, batch_size
):
    assert len({len(e) - e.prompt_length for e in pile}) == len(pile)
    found = pile_gradient(tiny, pile, batch_size=batch_size)
    assert found.keys() == one_by_one[0].keys()
    for name, gradient in found.items():
        expected = torch.stack([g[name] for g in one_by_one]).mean(0)
        assert gradient.dtype == torch.float32 and not gradient.requires_grad
        assert float((gradient - expected).abs().max()) < 2e-5 * float(expected.abs().max()), name
    assert all(p.grad is None for p in tiny.hf.parameters())


def test_a_mean_gradient_is_added_to_what_is_there(fresh, pile):
    expected = pile_gradient(fresh, pile)
    for _ in range(2):
        add_mean_gradient(fresh, pile, sequence_losses, 2)
    for name, p in fresh.hf.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * expected[plain_name(name)], atol=1e-6, rtol=1e-4)


def test_a_longer_answer_weighs_no_more_than_a_short_one(tiny, pile, one_by_one):
    """Were every token to weigh the same, the embedding's gradient would be another one."""
    found = pile_gradient(tiny, pile)["model.embed_tokens.weight"]
    tokens = torch.tensor([float(len(e) - e.prompt_length) for e in pile])
    every = torch.stack([g["model.embed_tokens.weight"] for g in one_by_one])
    by_token = torch.tensordot(tokens / tokens.sum(), every, dims=1)
    assert (found - by_token).norm() > 0.3 * found.norm()


def test_the_gradient_of_a_linear_softmax_model_is_the_one_in_closed_form(tiny, pile):
    """L = -log softmax(W x)_y has dL/dW = (p - e_y) x^T; W is a corner of the embedding, x and y are each row's own."""
    x, y = random(len(pile), WIDTH, seed=4), torch.tensor([0, 3, 1, 3, 2])
    weight = tiny.hf.get_input_embeddings().weight

    def loss(model, batch):
        rows = list(batch.rows)
        return torch.nn.functional.cross_entropy(x[rows] @ weight[:4].T, y[rows], reduction="none")

    found = pile_gradient(tiny, pile, loss=loss, batch_size=2)
    p = (x @ weight[:4].detach().T).softmax(-1)
    expected = (p - torch.eye(4)[y]).T @ x / len(pile)
    torch.testing.assert_close(found["model.embed_tokens.weight"][:4], expected, atol=1e-6, rtol=1e-5)
    assert not found["model.embed_tokens.weight"][4:].any()
    assert not any(g.any() for name, g in found.items() if name != "model.embed_tokens.weight")  # not in this loss


def test_the_output_matrix_has_the_closed_form_gradient_of_the_response_loss(pile, fresh):
    """dL/dW_out = mean over examples of (1/T) sum_t (p_t - e_t) h_t^T; untied, for the embedding has another part."""
    head = fresh.hf.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    found = pile_gradient(fresh, pile, batch_size=3)
    expected = torch.zeros_like(head.weight)
    with torch.no_grad():
        for example in pile:
            h = fresh.hf.base_model(input_ids=torch.tensor([example.ids]))[0][0, example.prompt_length - 1 : -1]
            answer = torch.tensor(example.ids[example.prompt_length :])
            p = (h @ head.weight.T).softmax(-1)
            p[range(len(answer)), answer] -= 1
            expected += p.T @ h / len(answer) / len(pile)
    torch.testing.assert_close(found["lm_head.weight"], expected, atol=1e-6, rtol=1e-4)


def test_a_loss_over_the_full_sequence_has_another_gradient_of_which_the_prompt_is_a_part(tiny, pile):
    example = pile[1]
    plain, _ = plain_model("tiny-random")
    ids = torch.tensor([example.ids])
    plain(input_ids=ids, labels=ids).loss.backward()
    found = pile_gradient(tiny, [example.without_prompt()])
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)
    responses = pile_gradient(tiny, [example])
    assert (found["model.norm.weight"] - responses["model.norm.weight"]).norm() > 0.1 * found[
        "model.norm.weight"
    ].norm()


def test_an_empty_pile_is_one_sentence(tiny):
    with pytest.raises(ValueError, match="The pile is empty: it needs at least one example") as error:
        pile_gradient(tiny, [])
    assert "\n" not in str(error.value)


def test_a_model_without_trainable_weights_has_no_pile_gradient(pile):
    with pytest.raises(ValueError, match="No weight is trainable, so there is no gradient") as error:
        pile_gradient(load("tiny-random", dtype="float32", weights="frozen"), pile)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_one_sentence_and_no_gradient_is_left(fresh, pile, value):
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return sequence_losses(model, batch) * (value if len(seen) == 2 else 1.0)  # the first batch has been added

    with pytest.raises(ValueError, match="The loss of the pile is not finite, so it has no gradient") as error:
        pile_gradient(fresh, pile, loss=loss, batch_size=2)
    assert len(seen) == 2 and "\n" not in str(error.value)
    assert all(p.grad is None for p in fresh.hf.parameters())
    assert fresh.current is None


def test_gradients_that_were_there_before_are_there_afterwards_and_are_not_counted(fresh, pile):
    expected = pile_gradient(fresh, pile)
    earlier = {}
    for name, p in fresh.hf.named_parameters():
        p.grad = torch.full_like(p, 7.0)
        earlier[name] = p.grad
    found = pile_gradient(fresh, pile)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    with pytest.raises(ValueError, match="not finite"):
        pile_gradient(fresh, pile, loss=lambda model, batch: sequence_losses(model, batch) * float("nan"))
    for name, p in fresh.hf.named_parameters():
        assert p.grad is earlier[name] and bool((p.grad == 7.0).all())


def test_what_is_returned_does_not_change_with_the_next_gradient(fresh, pile):
    first = pile_gradient(fresh, pile[:1])
    kept = {name: gradient.clone() for name, gradient in first.items()}
    pile_gradient(fresh, pile[1:])
    assert all(torch.equal(first[name], gradient) for name, gradient in kept.items())


def test_weights_that_are_frozen_have_no_part_in_the_pile_gradient(fresh, pile):
    whole = pile_gradient(fresh, pile)
    fresh.hf.get_input_embeddings().weight.requires_grad_(False)
    part = pile_gradient(fresh, pile)
    assert whole.keys() - part.keys() == {"model.embed_tokens.weight"}
    assert all(torch.allclose(part[name], whole[name], atol=1e-7) for name in part)


def test_the_gradient_of_the_divergence_is_zero_at_the_reference_and_points_away_from_it_elsewhere(tiny, pile, fresh):
    """Near the reference KL is a quadratic form, d^T F d / 2, so <G, d> is twice the divergence."""
    divergence = partial(sequence_divergences, reference=tiny)
    at_reference = pile_gradient(fresh, pile, loss=divergence, batch_size=2)
    usual = pile_gradient(fresh, pile)
    for name, gradient in at_reference.items():
        assert float(gradient.norm()) < 1e-4 * float(usual[name].norm()), name
    deltas = {}
    with torch.no_grad():
        for i, (name, p) in enumerate(fresh.hf.named_parameters()):
            deltas[plain_name(name)] = 1e-2 * p.std().clamp(min=0.1) * random(*p.shape, seed=i)
            p += deltas[plain_name(name)]
        distance = float(sum(divergence(fresh, collate([e], PAD)).sum() for e in pile) / len(pile))
    away = pile_gradient(fresh, pile, loss=divergence, batch_size=2)
    assert sum(float((away[name] * d).sum()) for name, d in deltas.items()) == pytest.approx(2 * distance, rel=0.1)
    assert all(p.grad is None for p in tiny.hf.parameters())
