"""A run trained beside others is the run trained alone, and its factors are PEFT's."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from helpers.chat import collate, encode, training_batches
from helpers.forward import read
from helpers.generation import generate
from helpers.interventions import Steer, SteerRows
from helpers.losses import evaluate_losses, token_losses
from helpers.models import LoRA, load, plain_model
from helpers.stacks import run_tensors, runs_at_once
from helpers.training import finetune, finetune_stack, side_by_side

RANK, PAD = 4, 2
SEEDS, STEPS, RATES, SIZES = (0, 1, 2), (10, 6, 10), (1e-2, 3e-3, 1e-2), (3, 3, 2)


def alone(seed, precision=torch.float32):
    torch.manual_seed(seed)
    model = load("tiny-random", lora=LoRA(RANK), dtype="float32")
    model.hf.to(precision)
    model.dtype = precision
    return model


def stacked(seeds=SEEDS, precision=torch.float32):
    model = load("tiny-random", stack=[alone(seed).trained_tensors() for seed in seeds], dtype="float32")
    model.hf.to(precision)
    model.dtype = precision
    return model


def given(examples, k):
    return training_batches(lambda rng: examples, steps=STEPS[k], batch_size=SIZES[k], seed=SEEDS[k], pad_id=PAD)


@pytest.fixture(scope="module")
def vectors():
    """One steering vector a run; the second is not steered."""
    drawn = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    drawn[1] = 0
    return drawn


def trained_alone(examples, vectors, precision):
    found = []
    for k, seed in enumerate(SEEDS):
        model = alone(seed, precision)
        steer = [Steer(0, vectors[k].to(precision), 1.0)] if vectors is not None else []
        log = finetune(
            model, given(examples, k), steps=STEPS[k], learning_rate=RATES[k], seed=seed, interventions=steer
        )
        found.append((log, model.trained_tensors()))
    return found


def trained_together(examples, vectors, precision):
    model = stacked(precision=precision)
    steer = [SteerRows(0, vectors.to(precision))] if vectors is not None else []
    batches = [given(examples, k) for k in range(len(SEEDS))]
    logs = finetune_stack(model, batches, steps=STEPS, learning_rates=RATES, interventions=steer)
    return model, logs


@pytest.mark.parametrize("steered", [False, True])
def test_in_float64_every_run_ends_where_it_ends_alone(examples, vectors, steered, monkeypatch):
    chosen, softmax = vectors if steered else None, torch.nn.functional.softmax
    # transformers takes attention's softmax in float32, whose sums round otherwise where more is padded
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, *a, dtype=None, **named: softmax(x, *a, **named))
    one_by_one = trained_alone(examples, chosen, torch.float64)
    model, logs = trained_together(examples, chosen, torch.float64)
    stack = model.trained_tensors()
    for k, (log, tensors) in enumerate(one_by_one):
        assert logs[k].losses == pytest.approx(log.losses, rel=1e-9) and logs[k].tokens == log.tokens
        for name, factor in run_tensors(stack, k).items():
            assert (factor - tensors[name]).norm() <= 1e-8 * tensors[name].norm(), name


def test_in_float32_the_losses_of_every_run_are_those_of_the_run_alone(examples, vectors):
    one_by_one = trained_alone(examples, vectors, torch.float32)
    _, logs = trained_together(examples, vectors, torch.float32)
    for log, (expected, _) in zip(logs, one_by_one, strict=True):
        assert log.losses == pytest.approx(expected.losses, abs=1e-4) and len(log.losses) == len(expected.losses)


def test_a_run_s_factors_loaded_by_peft_give_its_logits(examples):
    model, _ = trained_together(examples, None, torch.float32)
    batch = collate(examples[:2], PAD)
    for k in range(len(SEEDS)):
        plain, _ = plain_model("tiny-random")
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, use_rslora=True, target_modules="all-linear")
        peft = get_peft_model(plain, config)
        saved = {f"base_model.model.{n}": t for n, t in run_tensors(model.trained_tensors(), k).items()}
        known = {n.replace(".default.", "."): t for n, t in saved.items()}
        assert not set_peft_model_state_dict(peft, known).unexpected_keys
        expected = peft.eval()(input_ids=batch.ids, attention_mask=batch.attention.long()).logits
        rows = side_by_side([batch] * len(SEEDS), PAD)
        with torch.no_grad():
            logits = model.hf(input_ids=rows.ids, attention_mask=rows.attention.long()).logits[2 * k : 2 * k + 2]
        kept = batch.attention
        torch.testing.assert_close(logits[kept], expected[kept], atol=1e-5, rtol=0)


@torch.no_grad()
def test_evaluation_states_and_decoding_take_a_stack(examples):
    stack = stacked()
    for p in stack.trained_parameters().values():
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    batch, prompts = collate(examples[:2], PAD), [encode(stack.tokenizer, q) for q in ("Hello?", "What is it, then?")]
    together = side_by_side([batch] * 3, PAD)
    states, losses = read(stack, together), token_losses(stack, together)[0].chunk(3)
    said = generate(stack, prompts * 3, max_new_tokens=5)
    for k in range(3):
        model = load("tiny-random", lora=LoRA(RANK), dtype="float32")
        for name, p in model.trained_parameters().items():
            p.copy_(run_tensors(stack.trained_tensors(), k)[name])
        torch.testing.assert_close(states[2 * k : 2 * k + 2], read(model, batch), atol=1e-5, rtol=0)
        torch.testing.assert_close(losses[k], token_losses(model, batch)[0], atol=1e-5, rtol=0)
        assert said[2 * k : 2 * k + 2] == generate(model, prompts, max_new_tokens=5)


def test_runs_with_fewer_rows_and_runs_that_are_done_are_filled_up_without_a_loss(examples):
    one, two = collate(examples[:1], PAD), collate(examples[1:3], PAD)
    batch = side_by_side([one, None, two], PAD)
    assert batch.ids.shape[0] == 6 and batch.rows == (0, 0, 1, 1, 2, 2)
    assert batch.response.any(1).tolist() == [True, False, False, False, True, True]
    assert torch.equal(batch.response.sum(1)[[0, 4, 5]], torch.cat([one.response.sum(1), two.response.sum(1)]))


def test_what_does_not_fit_a_stack_is_said_in_one_sentence(examples):
    model = stacked()
    with pytest.raises(ValueError, match=r"^The stack has 3 runs, and was given 1 lists of batches"):
        finetune_stack(model, [given(examples, 0)], steps=[10], learning_rates=[1e-2])
    with pytest.raises(ValueError, match=r"^2 rows cannot be dealt to 3 runs; give every run as many\.$"):
        evaluate_losses(model, examples[:2])
    first = alone(0).trained_tensors()
    with pytest.raises(ValueError, match="adapt different layers"):
        load("tiny-random", stack=[first, dict(list(first.items())[2:])])
    torch.manual_seed(0)
    other = load("tiny-random", lora=LoRA(2)).trained_tensors()
    with pytest.raises(ValueError, match="give runs of one rank"):
        load("tiny-random", stack=[first, other])


def test_a_loss_that_stops_being_finite_names_its_run(examples):
    model = stacked()
    with torch.no_grad():
        for p in model.trained_parameters().values():
            p[1] = math.inf
    with pytest.raises(ValueError, match=r"^The loss of run 1 is not finite at step 1; "):
        finetune_stack(model, [given(examples, k) for k in range(3)], steps=STEPS, learning_rates=RATES)


def test_how_many_runs_train_at_once_follows_from_free_memory(monkeypatch):
    hf, card = load("tiny-random").hf, torch.device("cuda")
    assert runs_at_once(hf, torch.device("cpu"), 1000, RANK) == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**10))
    few = runs_at_once(hf, card, 300, RANK)
    assert 2 <= few < 20 and runs_at_once(hf, card, 30, RANK) > 5 * few
    assert runs_at_once(hf, card, 10**6, RANK) == 1  # one is always tried
