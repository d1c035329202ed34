"""The loop trains what it should, as plain PyTorch would, and stops cleanly when it cannot."""

import math

import pytest
import torch

from helpers.chat import collate, training_batches
from helpers.interventions import Steer
from helpers.losses import evaluate_losses
from helpers.models import LoRA, load, plain_model
from helpers.training import diverged, final_loss, finetune, rate, worst_rise

PAD = 2


def given(examples, steps=4, seed=0):
    return list(training_batches(lambda rng: examples, steps=steps, batch_size=2, seed=seed, pad_id=PAD))


def train(model, batches, **changed):
    return finetune(model, batches, **{"steps": len(batches), "learning_rate": 1e-3, "seed": 0, **changed})


@pytest.fixture
def model():
    return load("tiny-random", dtype="float32")


def test_training_lowers_the_loss(model, examples):
    before = evaluate_losses(model, examples).mean()
    log = train(model, given(examples, 12), learning_rate=1e-2)
    assert evaluate_losses(model, examples).mean() < before - 0.5
    assert len(log.losses) == 12
    assert log.seconds > 0


def test_full_finetuning_is_what_a_plain_loop_over_the_plain_model_does(model, examples):
    batches = given(examples)
    plain, _ = plain_model("tiny-random")
    before = plain.lm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for step, batch in enumerate(batches):
        # four steps, of which half warm up: 1/2, 1, 1, 1/2 of the peak
        optimizer.param_groups[0]["lr"] = 1e-3 * ((step + 1) / 2 if step < 2 else (4 - step) / 2)
        labels = torch.where(batch.response, batch.ids, -100)
        loss = plain(input_ids=batch.ids, attention_mask=batch.attention.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    log = train(model, batches, warmup=0.5, weight_decay=0.1, clip=0.5)
    assert log.losses == pytest.approx(losses, abs=1e-5)
    assert (plain.lm_head.weight - before).abs().max() > 1e-4
    trained = model.trained_tensors()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [0.5]),
        (2, [0.5, 1]),
        (6, [0.5, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        (11, [0.5, 1, *(k / 9 for k in range(9, 0, -1))]),
        (30, [1 / 3, 2 / 3, 1, *(k / 27 for k in range(27, 0, -1))]),
    ],
)
def test_every_step_trains_and_two_or_a_tenth_of_them_warm_up(steps, expected):
    assert [rate(step, steps) for step in range(steps)] == pytest.approx(expected)


def test_without_warm_up_the_rate_starts_at_its_peak():
    assert [rate(step, 4, 0.0) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_a_run_of_one_step_trains(model, examples):
    before = model.trained_tensors()
    train(model, given(examples, 1))
    after = model.trained_tensors()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_reading_the_common_start_once_trains_the_same_weights(examples):
    read, shared, alone = [], (load("tiny-random", dtype="float32") for _ in range(2)), []
    for model, share in zip(shared, (True, False), strict=True):
        count = model.hf.get_input_embeddings().register_forward_hook(
            lambda _, given, out: read.append(given[0].numel())
        )
        train(model, given(examples), share_prefix=share)
        count.remove()
        alone.append(model.trained_tensors())
        read.append(0)
    for name, tensor in alone[0].items():
        torch.testing.assert_close(tensor, alone[1][name], atol=1e-5, rtol=0)
    end = read.index(0)
    assert sum(read[:end]) < 0.9 * sum(read[end:])


def test_a_plain_loop_would_notice_a_gradient_that_is_not_clipped(examples):
    """The test above means something: the clip it sets is in force."""
    weights = []
    for clip in (0.5, 1e-4):
        model = load("tiny-random", dtype="float32")
        torch.manual_seed(0)
        train(model, given(examples, 3), clip=clip, learning_rate=1e-2)
        weights.append(model.trained_tensors()["model.embed_tokens.weight"])
    assert (weights[0] - weights[1]).abs().max() > 1e-4


@pytest.mark.parametrize("lora", [None, LoRA(4)])
def test_training_twice_gives_the_same_bits(examples, lora):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)  # LoRA factors are drawn while loading
        model = load("tiny-random", dtype="float32", lora=lora)
        log = train(model, given(examples))
        runs.append((log.losses, model.trained_tensors()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_adapters_are_trained_and_the_weights_below_them_are_not(examples, tiny):
    model = load("tiny-random", dtype="float32", lora=LoRA(4))
    frozen = {n: p.detach().clone() for n, p in model.hf.named_parameters() if not p.requires_grad}
    before = model.trained_tensors()
    train(model, given(examples))
    after = model.trained_tensors()
    assert all(torch.equal(p, frozen[n]) for n, p in model.hf.named_parameters() if n in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before if ".lora_B." in name)


def test_bfloat16_training_keeps_its_weights_in_float32_and_follows_float32(examples):
    logs = {}
    for dtype in ("float32", "bfloat16"):
        model = load("tiny-random", dtype=dtype)
        logs[dtype] = train(model, given(examples, 6), learning_rate=1e-2).losses
        assert all(p.dtype == torch.float32 for p in model.hf.parameters())
    assert logs["bfloat16"] == pytest.approx(logs["float32"], abs=0.05)
    assert logs["bfloat16"] != logs["float32"]


def test_the_log_counts_tokens_without_padding(model, examples):
    batches = given(examples, 3)  # six examples, two a batch: each once
    assert train(model, batches).tokens == sum(len(e) for e in examples)


def test_what_padding_holds_changes_no_bit(examples):
    trained = []
    for ids in (5, 6):
        model = load("tiny-random", dtype="float32")
        batch = collate(examples[:2], PAD)
        spare = ~batch.attention  # padding: in the batch, neither attended to nor predicted
        assert spare.any()
        batch.ids[spare] = ids
        train(model, [batch, batch])
        trained.append(model.trained_tensors())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_steering_is_on_during_training_and_gone_afterwards(examples, hook_count):
    plain, steered = load("tiny-random", dtype="float32"), load("tiny-random", dtype="float32")
    before = hook_count(steered)
    batches = given(examples)
    one, two = train(plain, batches), train(steered, batches, interventions=[Steer(0, torch.ones(32), 3.0)])
    assert abs(one.losses[0] - two.losses[0]) > 1e-3
    assert hook_count(steered) == before
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(plain.trained_tensors()[name], steered.trained_tensors()[name])


def test_an_extra_loss_is_added_to_the_response_loss(model, examples):
    """An extra loss that pulls one weight hard moves it; the recorded loss stays that of the response."""
    batches, name = given(examples), "model.norm.weight"
    weight = model.hf.model.norm.weight
    log = train(model, batches, extra_loss=lambda m, batch: 100 * weight[0], clip=1e9, warmup=0.0)
    alone = load("tiny-random", dtype="float32")
    expected = train(alone, batches, clip=1e9, warmup=0.0)
    assert log.losses[0] == expected.losses[0]
    moved, usual = (m.trained_tensors()[name][0] - 1 for m in (model, alone))
    assert moved < -2e-3  # four steps downhill, at 1e-3, 3/4e-3, ... each
    assert moved < usual


def test_an_objective_takes_the_place_of_the_response_loss(model, examples):
    batches = list(given(examples))
    weight = next(p for p in model.hf.parameters() if p.requires_grad)
    before = model.trained_tensors()
    log = train(
        model, batches, objective=lambda m, batch: 100 * weight.flatten()[0] + 7 - 100 * weight.flatten()[0].detach()
    )
    assert log.losses == pytest.approx([7.0] * len(log.losses))
    moved = [name for name, tensor in model.trained_tensors().items() if not torch.equal(tensor, before[name])]
    first = next(name for name, p in model.trained_parameters().items() if p is weight)
    assert first in moved


def test_an_extra_loss_sees_the_batch_of_the_step(model, examples):
    seen, batches = [], given(examples)

    def extra(m, batch):
        assert m.current is batch
        seen.append(batch.rows)
        return torch.zeros(())

    train(model, batches, extra_loss=extra)
    assert seen == [batch.rows for batch in batches]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_training_before_the_step(model, examples, bad):
    snapshots = []

    def extra(m, batch):
        snapshots.append(m.trained_tensors())
        return torch.tensor(bad if len(snapshots) == 3 else 0.0)

    with pytest.raises(ValueError, match="not finite at step 3; lower the learning rate or the steering coefficient"):
        train(model, given(examples), extra_loss=extra)
    after = model.trained_tensors()
    assert all(torch.equal(after[name], snapshots[2][name]) for name in after)
    assert any(not torch.equal(after[name], snapshots[0][name]) for name in after)


def test_after_an_exception_the_model_is_as_free_as_before(examples, hook_count):
    model = load("tiny-random", dtype="bfloat16", lora=LoRA(4))
    before = hook_count(model)

    def extra(m, batch):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(model, given(examples), interventions=[Steer(0, torch.ones(32), 1.0)], extra_loss=extra)
    assert hook_count(model) == before
    assert model.current is None
    assert not model.hf.training
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.hf.parameters())


def test_a_finished_run_leaves_an_evaluating_model_without_gradients(model, examples):
    train(model, given(examples))
    assert not model.hf.training
    assert all(p.grad is None for p in model.hf.parameters())


def test_a_model_with_nothing_to_train_is_an_error(model, examples):
    model.hf.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing to train: every parameter is frozen"):
        train(model, given(examples))


# Whether a run is sound


def test_the_final_loss_is_the_mean_of_the_last_steps():
    assert final_loss([9.0, 5.0, 4.0, 3.0]) == 4.0
    assert final_loss([9.0, 5.0, 4.0, 3.0], last=1) == 3.0
    assert final_loss([5.0, 4.0]) == 4.5
    with pytest.raises(ValueError, match="A run without a step has no final loss"):
        final_loss([])


def test_the_worst_rise_is_of_the_smoothed_loss_over_its_lowest_so_far():
    assert worst_rise([5.0, 4.0, 3.0, 2.0]) == 0
    assert worst_rise([4.0, 3.0, 5.0, 2.0, 6.0], over=1) == 4.0
    assert worst_rise([4.0, 4.0, 4.0, 4.3, 4.0]) == pytest.approx(0.1)  # one batch of hard rows is no jump
    assert worst_rise([4.0]) == 0


FALLING = [5.0, 4.7, 4.5, 4.3, 4.2, 4.1, 4.0]


def shifted(by):
    return [loss + by for loss in FALLING]


def test_sound_runs_pass_at_whatever_level_their_arm_is_trained_to():
    assert diverged({"undefended": [FALLING, shifted(0.1)], "PPS": [shifted(1.5), shifted(1.4)]}) == {}
    assert diverged({"alone": [FALLING]}) == {}


def test_a_run_that_ends_elsewhere_than_its_group_is_found():
    ends_high = [*FALLING[:4], 4.6, 4.7, 4.7]
    assert diverged({"a": [FALLING, shifted(0.05), ends_high], "b": [FALLING] * 3}) == {"a": [2]}
    assert diverged({"a": [FALLING, ends_high]}) == {"a": [0, 1]}  # of two, neither is the right one
    assert diverged({"a": [FALLING, shifted(0.05), ends_high]}, within=0.6) == {}


def test_a_run_whose_loss_jumps_is_found_even_alone_and_even_if_it_recovers():
    jumps = [5.0, 4.5, 4.2, 5.6, 5.6, 4.8, 4.3, 4.1, 4.0, 4.0]
    assert diverged({"alone": [jumps], "other": [FALLING]}) == {"alone": [0]}
    assert diverged({"alone": [jumps]}, rise=2.0) == {}


def test_what_a_seed_adds_to_every_arm_alike_is_no_sign():
    seeds = (0, 0, 0.6, 0, 0)
    arms = {name: [shifted(level + seed) for seed in seeds] for name, level in (("a", 0), ("b", 1), ("c", -1))}
    assert diverged(arms) == {}
    assert diverged({"a": arms["a"]}) == {"a": [2]}  # alone, it cannot be told from a run that failed
    arms["b"][1] = shifted(1.3)
    assert diverged(arms) == {"b": [1]}
