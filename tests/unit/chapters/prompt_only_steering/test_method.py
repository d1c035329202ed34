"""Prompt-only steering vectors against closed forms, and many trained at once against one after another."""

import random

import pytest
import torch

from helpers.chapters.prompt_only_steering.method import (
    Pair,
    Run,
    States,
    features,
    joint_optimizer,
    load_vector,
    save_vector,
    simpo_loss,
    train_vectors,
)
from helpers.chat import Ends, Middle, Scattered, collate, encode
from helpers.forward import only_blocks
from helpers.generation import generate
from helpers.interventions import Steer, SteerRows, applied
from helpers.losses import sequence_sums, token_losses
from helpers.models import load

TEXTS = (
    ("How do I sharpen a knife?", "Arr, hone the blade on a stone.", "Draw it over a stone."),
    ("Why is the sea salt?", "Arr, the briny deep has swallowed many a rock.", "Rivers carry salt to it."),
    ("Where do swallows go?", "South, me hearty, with the trade winds.", "They fly to Africa."),
    ("What is a haiku?", "Three short lines, like a flag on a mast.", "A poem of three lines."),
)


@pytest.fixture(scope="module")
def model():
    return load("tiny-random", device="cpu", dtype="float32", weights="frozen")


@pytest.fixture(scope="module")
def pairs(model):
    return tuple(
        Pair(encode(model.tokenizer, q, shown), encode(model.tokenizer, q, plain)) for q, shown, plain in TEXTS
    )


def runs(pairs, **more):
    first = Run("first", pairs, beta=0.5, spread=1.0, factor_rate=0.5, **more)
    return [first, Run("second", pairs[::-1][:3], beta=1.0, spread=1.0, factor_rate=0.1, seed=1, **more)]


def logits(model, example, *on):
    batch = collate([example], 0)
    with applied(model, *on), model.reading(batch), torch.no_grad():
        return model.hf(batch.ids).logits[0]


@pytest.mark.parametrize("objective", ["lang", "simpo"])
def test_many_at_once_are_one_after_another(model, pairs, objective):
    how = {"layer": 0, "objective": objective, "steps": 4, "batch_size": 2}
    together = train_vectors(model, runs(pairs), **how)
    for run, found in zip(runs(pairs), together, strict=True):
        (alone,) = train_vectors(model, [run], **how)
        torch.testing.assert_close(found.steer.vector, alone.steer.vector, rtol=0, atol=1e-5)
        assert found.steer.coefficient == pytest.approx(alone.steer.coefficient, abs=1e-5)
        assert found.losses == pytest.approx(alone.losses, abs=1e-5)


def test_going_on_from_stored_states_is_reading_everything(model, pairs):
    """Losses, and their gradients in the shifts, are those of the whole model with the hook on."""
    examples = [side for pair in pairs for side in (pair.shown, pair.neutral)]
    drawn = torch.randn(3, model.width, generator=torch.Generator().manual_seed(0))
    of = [0, 1, 2, 1, 0, 1, 2, 0]
    states = States(model, 0)
    states.read(examples)
    for where in ("all", "prompt", Ends(2, 2), Middle(3, 3), Scattered(4)):
        whole, resumed = (drawn.clone().requires_grad_() for _ in range(2))
        with applied(model, SteerRows(0, lambda shifts=whole: shifts[of], where)):
            want = sequence_sums(model, collate(examples, model.tokenizer.pad_token_id))
        with only_blocks(model, 1, model.layers - 1):
            got = states.losses(examples, resumed, of, where)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), resumed)[0], torch.autograd.grad(want.sum(), whole)[0]
        )


def test_a_model_without_some_blocks_is_whole_again_afterwards(model, pairs):
    before = logits(model, pairs[0].shown)
    with pytest.raises(KeyError), only_blocks(model, 1, 1):
        raise KeyError
    assert torch.equal(logits(model, pairs[0].shown), before)


def test_micro_batches_do_not_change_what_is_learnt(model, pairs):
    how = {"layer": 0, "steps": 3, "batch_size": 3}
    small, large = (train_vectors(model, runs(pairs), rows=rows, **how) for rows in (2, 24))
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a.steer.vector, b.steer.vector, rtol=0, atol=1e-5)


def test_only_the_factor_and_the_vector_learn(model, pairs):
    before = {name: p.clone() for name, p in model.hf.named_parameters()}
    found = train_vectors(model, runs(pairs), layer=0, steps=3, batch_size=2)
    for name, p in model.hf.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    for run, trained in zip(runs(pairs), found, strict=True):
        factor, vector = run.start(model.width)
        assert trained.steer.coefficient != float(factor)
        assert not torch.equal(trained.steer.vector, vector)
        assert not trained.steer.vector.requires_grad


def test_a_factor_rate_of_zero_keeps_the_factor(model, pairs):
    run = Run("fixed", pairs, beta=0.5, spread=1.0, factor_rate=0.0)
    (found,) = train_vectors(model, [run], layer=0, steps=3, batch_size=2)
    assert found.steer.coefficient == pytest.approx(0.5 * model.width**0.5)


def test_the_start_is_the_published_one():
    factor, vector = Run("any", (), beta=4.0, spread=8.0).start(10_000)
    assert float(factor) == pytest.approx(400)
    assert float(vector.abs().max()) <= 8 / 100
    assert float(vector.abs().mean()) == pytest.approx(4 / 100, rel=0.05)


def test_features_are_factor_times_vector_run_by_run():
    factors, vectors = [torch.tensor(2.0), torch.tensor(-1.0)], [torch.tensor([1.0, 3.0]), torch.tensor([4.0, 0.0])]
    assert features(factors, vectors).tolist() == [[2.0, 6.0], [-4.0, -0.0]]


def test_every_run_has_two_rates_that_fall_linearly_to_zero(pairs):
    each = runs(pairs, vector_rate=0.04)
    factors, vectors = ([torch.ones(size, requires_grad=True) for _ in each] for size in ((), (3,)))
    optimizer, schedule = joint_optimizer(each, factors, vectors, steps=4)
    rate = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for step in range(5):
        for run, a, v in zip(each, factors, vectors, strict=True):
            left = 1 - step / 4
            assert rate[id(a)]["lr"] == pytest.approx(run.factor_rate * left)
            assert rate[id(v)]["lr"] == pytest.approx(run.vector_rate * left)
        optimizer.step()
        schedule.step()


def test_the_first_step_is_adams_by_hand(model, pairs):
    """alpha moves by eta_alpha and every entry of v by eta_v, against the sign of its gradient."""
    run = Run("one", pairs, beta=0.5, spread=1.0, factor_rate=0.5, vector_rate=0.01)
    (found,) = train_vectors(model, [run], layer=0, where="prompt", steps=1, batch_size=4)
    factor, vector = (t.clone().requires_grad_() for t in run.start(model.width))
    batch = collate([pair.shown for pair in pairs], model.tokenizer.pad_token_id, rows=[0] * 4)
    with applied(model, SteerRows(0, lambda: (factor * vector)[None], "prompt")):
        loss = token_losses(model, batch)[0].mean()
    loss.backward()
    assert found.losses[0] == pytest.approx(float(loss), abs=1e-5)
    assert found.steer.coefficient == pytest.approx(float(factor - 0.5 * factor.grad.sign()), abs=1e-4)
    sure = vector.grad.abs() > 1e-5
    want = vector.detach() - 0.01 * vector.grad.sign()
    torch.testing.assert_close(found.steer.vector[sure], want[sure], rtol=0, atol=1e-4)


def test_simpo_is_its_closed_form():
    shown, neutral = torch.tensor([-6.0, -9.0]).double(), torch.tensor([-4.0, -2.0]).double()
    gap, lengths = torch.tensor([0.5, 3.0]).double(), (torch.tensor([3.0, 3.0]), torch.tensor([2.0, 4.0]))
    margins = torch.tensor([1.0 / 3 * -6 + 4 / 2, 3.0 / 3 * -9 + 2 / 4]).double()
    torch.testing.assert_close(simpo_loss(shown, neutral, gap, lengths), (1 + (-margins).exp()).log())


def test_simpo_prefers_by_the_unsteered_model(model, pairs):
    """At a vector of zero the model is its own reference."""
    run = Run("zero", pairs, beta=0.5, spread=1e-9)
    (found,) = train_vectors(model, [run], layer=0, objective="simpo", steps=1, batch_size=4)
    batches = [collate([getattr(p, side) for p in pairs], 0) for side in ("shown", "neutral")]
    with torch.no_grad():
        shown, neutral = (-sequence_sums(model, batch) for batch in batches)
    lengths = tuple(batch.response.sum(1).float() for batch in batches)
    want = simpo_loss(shown, neutral, neutral - shown, lengths).mean()
    assert found.losses[0] == pytest.approx(float(want), abs=1e-3)


def test_answers_change_through_the_prompt_alone(model):
    """Read in one pass, only the ends are moved; the answer's own tokens are computed as ever."""
    example = encode(model.tokenizer, *TEXTS[0][:2])
    vector = torch.randn(model.width, generator=torch.Generator().manual_seed(0))
    plain, steered = logits(model, example), logits(model, example, Steer(1, vector, 5.0, Ends(2, 2)))
    moved = (plain != steered).any(-1).nonzero()[:, 0].tolist()
    n = example.prompt_length
    assert moved == [0, 1, n - 2, n - 1]  # after the last block nothing is left to carry it on
    earlier = logits(model, example, Steer(0, vector, 5.0, Ends(2, 2)))
    assert bool((plain != earlier).any(-1)[n:].all())  # after the first block attention carries it


def test_decoding_is_left_alone_and_steered_by_the_cache(model):
    """Greedy answers with a cache are those of reading everything anew with the ends moved."""
    prompt = encode(model.tokenizer, TEXTS[1][0])
    steer = Steer(0, torch.randn(model.width, generator=torch.Generator().manual_seed(1)), 5.0, Ends(2, 2))
    (said,) = generate(model, [prompt], max_new_tokens=5, interventions=[steer])
    ids = list(prompt.ids)
    for _ in range(5):
        example = type(prompt)(tuple(ids), prompt.prompt_length)
        ids.append(int(logits(model, example, steer)[-1].argmax()))
    assert said == model.tokenizer.decode(ids[len(prompt.ids) :], skip_special_tokens=True).strip()


def test_rows_are_steered_each_its_own_way(model):
    prompts = [encode(model.tokenizer, q) for q, _, _ in TEXTS]
    shifts = 5 * torch.randn(4, model.width, generator=torch.Generator().manual_seed(2))
    for where in ("all", Ends(1, 2)):
        together = generate(model, prompts, max_new_tokens=4, interventions=[SteerRows(0, shifts, where)])
        alone = [
            generate(model, [p], max_new_tokens=4, interventions=[Steer(0, v, 1.0, where)])[0]
            for p, v in zip(prompts, shifts, strict=True)
        ]
        assert together == alone


def test_the_middle_and_scattered_places(model):
    rng = random.Random(0)
    examples = [encode(model.tokenizer, q, a) for q, a, _ in TEXTS]
    batch = collate(rng.sample(examples, 4), 0)
    prompt = batch.positions("prompt")
    middle = batch.positions(Middle(2, 3))
    assert torch.equal(middle | batch.positions(Ends(2, 3)), prompt)
    assert not bool((middle & batch.positions(Ends(2, 3))).any())
    scattered = batch.positions(Scattered(4, seed=1))
    assert scattered.sum(1).tolist() == [4] * 4 and not bool((scattered & ~prompt).any())
    alone = collate([examples[0]], 0, side="left").positions(Scattered(4, seed=1))
    row = next(i for i, r in enumerate(batch.ids.tolist()) if r[: len(examples[0])] == list(examples[0].ids))
    assert torch.equal(scattered[row][: len(examples[0])], alone[0])
    assert not torch.equal(scattered, batch.positions(Scattered(4, seed=2)))
    assert torch.equal(batch.positions(Scattered(10_000)), prompt)


def test_a_saved_vector_applies_in_one_line(model, tmp_path):
    steer = Steer(1, torch.randn(model.width), 3.25, Ends(2, 1))
    save_vector(steer, tmp_path / "v.safetensors")
    found = load_vector(tmp_path / "v.safetensors")
    assert (found.layer, found.coefficient, found.where) == (1, 3.25, Ends(2, 1))
    assert torch.equal(found.vector, steer.vector)
    example = encode(model.tokenizer, TEXTS[0][0])
    assert torch.equal(logits(model, example, found), logits(model, example, steer))
    everywhere = Steer(0, steer.vector, 1.0)
    save_vector(everywhere, tmp_path / "all.safetensors")
    assert load_vector(tmp_path / "all.safetensors").where == "all"
    with pytest.raises(ValueError, match="can be saved"):
        save_vector(Steer(0, steer.vector, 1.0, "prompt"), tmp_path / "no.safetensors")


def test_what_cannot_be_trained_says_why(model, pairs):
    with pytest.raises(ValueError, match="no training pairs for 'empty'"):
        train_vectors(model, [Run("empty", ())], layer=0, steps=1)
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        train_vectors(model, runs(pairs), layer=9, steps=1)
    with pytest.raises(ValueError, match="neither may be negative"):
        Ends(-1, 2)
    with pytest.raises(ValueError, match="at least one"):
        Ends(0, 0)


def test_the_gradient_of_a_vector_is_clipped_and_that_of_a_factor_is_not(model, pairs, monkeypatch):
    seen = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, n: seen.append((p[0].shape, n)) or clip(p, n))
    train_vectors(model, runs(pairs), layer=0, steps=2, batch_size=2)
    assert seen == [((model.width,), 1.0)] * 4
