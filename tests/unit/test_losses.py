"""The response loss is Hugging Face's, at a fraction of the logits."""

import pytest
import torch

from helpers.chat import collate
from helpers.interventions import Steer
from helpers.losses import evaluate_losses, sequence_losses, token_losses

PAD = 2


def labels_of(batch):
    return torch.where(batch.response, batch.ids, -100)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_loss_is_that_of_hugging_face_with_labels_on_the_response_only(tiny, examples, side):
    batch = collate(examples[:4], PAD, side=side)
    places = (batch.attention.cumsum(1) - 1).clamp(min=0) if side == "left" else None
    with torch.no_grad():
        expected = tiny.hf(
            input_ids=batch.ids,
            attention_mask=batch.attention.long(),
            position_ids=places,
            labels=labels_of(batch),
        ).loss
        losses, _ = token_losses(tiny, batch)
    torch.testing.assert_close(losses.mean(), expected, atol=1e-5, rtol=0)


def test_each_sequence_has_the_loss_that_it_has_alone(tiny, examples):
    with torch.no_grad():
        together = sequence_losses(tiny, collate(examples, PAD))
        for i, example in enumerate(examples):
            alone = collate([example], PAD)
            expected = tiny.hf(input_ids=alone.ids, labels=labels_of(alone)).loss
            torch.testing.assert_close(together[i], expected, atol=1e-5, rtol=0)


def test_token_losses_are_minus_the_log_probability_of_each_response_token(tiny, examples):
    batch = collate(examples[:3], PAD)
    with torch.no_grad():
        losses, rows = token_losses(tiny, batch)
        logprobs = tiny.hf(input_ids=batch.ids, attention_mask=batch.attention.long()).logits.log_softmax(-1)
    expected, places = [], []
    for i, example in enumerate(examples[:3]):
        for t in range(example.prompt_length, len(example)):
            expected.append(-logprobs[i, t - 1, example.ids[t]])
            places.append(i)
    torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=0)
    assert rows.tolist() == places


def test_logits_are_computed_only_where_a_response_token_is_predicted(tiny, examples):
    batch, met = collate(examples[:4], PAD), []
    counter = tiny.hf.lm_head.register_forward_hook(lambda module, args, out: met.append(out.shape[:-1].numel()))
    try:
        with torch.no_grad():
            token_losses(tiny, batch)
    finally:
        counter.remove()
    assert met == [sum(len(e) - e.prompt_length for e in examples[:4])]
    assert met[0] < batch.attention.sum()


def test_what_the_prompt_says_of_itself_carries_no_loss(tiny, examples):
    """The last layer's states feel a gradient exactly where a response token is predicted."""
    batch, kept = collate(examples[:3], PAD), []
    keeper = tiny.hf.base_model.norm.register_forward_hook(lambda module, args, out: kept.append(out))
    try:
        losses, _ = token_losses(tiny, batch)
        (gradient,) = torch.autograd.grad(losses.mean(), kept)
    finally:
        keeper.remove()
    assert torch.equal(gradient.abs().sum(-1) > 0, batch.predicting)


def test_models_that_cap_their_logits_are_scored_with_capped_logits(tiny, examples, monkeypatch):
    monkeypatch.setattr(tiny.hf.config, "final_logit_softcapping", 0.05, raising=False)
    batch = collate(examples[:1], PAD)
    with torch.no_grad():
        losses, _ = token_losses(tiny, batch)
        logits = tiny.hf(input_ids=batch.ids).logits[batch.predicting]
    capped = 0.05 * torch.tanh(logits / 0.05)
    expected = torch.nn.functional.cross_entropy(capped, batch.ids[batch.response], reduction="none")
    assert (logits.abs() > 0.05).any()
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)


def test_evaluated_losses_come_in_the_order_given_whatever_the_batches(tiny, examples):
    losses = evaluate_losses(tiny, examples)
    torch.testing.assert_close(evaluate_losses(tiny, examples, batch_size=1), losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluate_losses(tiny, examples[::-1], batch_size=4), losses.flip(0), atol=1e-5, rtol=0)
    assert not losses.requires_grad


def test_losses_are_evaluated_under_interventions_and_only_then(tiny, examples):
    plain = evaluate_losses(tiny, examples)
    steered = evaluate_losses(tiny, examples, interventions=[Steer(0, torch.ones(32), 5.0)])
    assert (steered - plain).abs().min() > 1e-4
    assert torch.equal(evaluate_losses(tiny, examples), plain)
