"""The response loss is Hugging Face's, at a fraction of the logits."""

import pytest
import torch

from helpers.chat import collate, encode
from helpers.interventions import Steer
from helpers.losses import (
    evaluate_losses,
    kl_divergence,
    response_logits,
    sequence_divergences,
    sequence_losses,
    token_losses,
)
from helpers.models import load

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


@pytest.fixture
def same_start(tiny):
    """Questions of several lengths under one system message."""
    system = "You answer in few words, without any flourish."
    return [encode(tiny.tokenizer, "Why?" * n, "Because." * (4 - n), system=system) for n in (1, 2, 3)]


def test_what_all_rows_begin_with_is_read_once_and_the_losses_and_gradients_are_the_same(tiny, same_start):
    read = []
    hook = tiny.hf.base_model.register_forward_pre_hook(
        lambda _, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    weights = [p for p in tiny.hf.parameters() if p.requires_grad]
    try:
        together = sequence_losses(tiny, collate(same_start, PAD))
        one, rest = read
        alone = [sequence_losses(tiny, collate([example], PAD))[0] for example in same_start]
    finally:
        hook.remove()
    assert one[0] == 1
    assert one[1] > 8
    assert rest == (3, max(map(len, same_start)) - one[1])
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=0)
    found = torch.autograd.grad(together.sum(), weights, retain_graph=True)
    for ours, expected in zip(found, torch.autograd.grad(sum(alone), weights), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_where_the_common_start_is_trained_on_too_its_losses_and_logits_are_those_of_each_row(tiny, same_start):
    """Losses over full sequences: the start is read once, and what it predicts is scored once."""
    batch, read, scored = collate([example.without_prompt() for example in same_start], PAD), [], []
    hooks = [
        tiny.hf.get_input_embeddings().register_forward_hook(lambda _, given, out: read.append(given[0].numel())),
        tiny.hf.lm_head.register_forward_hook(lambda _, given, out: scored.append(out.shape[:-1].numel())),
    ]
    weights, found = [p for p in tiny.hf.parameters() if p.requires_grad], []
    try:
        for share in (True, False):
            losses, rows = token_losses(tiny, batch, share_prefix=share)
            found.append((losses.detach(), rows, torch.autograd.grad(losses.mean(), weights)))
    finally:
        for hook in hooks:
            hook.remove()
    (shared, rows, ours), (apart, expected_rows, theirs) = found
    start = read[0]
    assert read == [start, 3 * (max(map(len, same_start)) - start), 3 * max(map(len, same_start))]
    assert start > 8
    assert scored[0] == scored[1] - 2 * start
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        logits = [response_logits(tiny, batch, share_prefix=share) for share in (True, False)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_the_same_sequence_twice_is_scored_twice(tiny, same_start):
    with torch.no_grad():
        one, other, alone = sequence_losses(tiny, collate([same_start[0].without_prompt()] * 2, PAD)).tolist() + (
            sequence_losses(tiny, collate([same_start[0].without_prompt()], PAD)).tolist()
        )
    assert one == pytest.approx(alone, abs=1e-5)
    assert other == pytest.approx(alone, abs=1e-5)


def test_a_hook_that_reads_parts_is_shown_the_start_and_the_rest(tiny, same_start):
    seen, batch = [], collate(same_start, PAD)

    def look(h, hook):
        seen.append(tuple(h.shape[:2]))

    look.reads_parts = True
    with tiny.bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_post", look)]):
        sequence_losses(tiny, batch)
        (one, start), rest = seen
        assert one == 1
        assert rest == (3, batch.ids.shape[1] - start)
        with tiny.bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda h, hook: None)]):
            sequence_losses(tiny, batch)  # the other hook says nothing of parts
    assert seen[2:] == [tuple(batch.ids.shape)]


def test_under_a_hook_every_row_is_read_whole(tiny, same_start):
    seen = []
    with tiny.bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda h, hook: seen.append(h.shape))]):
        sequence_losses(tiny, collate(same_start, PAD))
    assert [tuple(shape[:2]) for shape in seen] == [(3, max(map(len, same_start)))]


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


# Divergence


@pytest.fixture(scope="module")
def changed():
    """The tiny model with other weights."""
    model = load("tiny-random", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.hf.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator) ** 3  # skewed, so that KL is not the same both ways
    return model


def test_equal_models_do_not_diverge_and_others_do(tiny, changed, examples):
    batch = collate(examples[:4], PAD)
    with torch.no_grad():
        assert sequence_divergences(load("tiny-random", dtype="float32"), batch, tiny).abs().max() < 1e-6
        assert (sequence_divergences(changed, batch, tiny) > 1e-3).all()


def test_the_divergence_is_from_the_reference_to_the_model_over_each_sequences_response(tiny, changed, examples):
    """sum_y p(y) (log p(y) - log q(y)) with p the reference's, from Hugging Face's logits of one conversation each."""
    pile = [*examples[:3], encode(tiny.tokenizer, "Hello!", "Hi.")]
    with torch.no_grad():
        found = sequence_divergences(changed, collate(pile, PAD), tiny)
        for i, example in enumerate(pile):
            ids, places = torch.tensor([example.ids]), slice(example.prompt_length - 1, -1)
            p, q = (m.hf(input_ids=ids).logits[0, places].double().log_softmax(-1) for m in (tiny, changed))
            there, back = ((a.exp() * (a - b)).sum(-1).mean().float() for a, b in ((p, q), (q, p)))
            torch.testing.assert_close(found[i], there, atol=1e-5, rtol=1e-4)
            assert (there - back).abs() > 1e-3  # the two directions are told apart


def test_only_the_models_side_of_the_divergence_is_differentiated(changed, examples):
    reference = load("tiny-random", dtype="float32")
    sequence_divergences(changed, collate(examples[:2], PAD), reference).sum().backward()
    assert all(p.grad is None for p in reference.hf.parameters())
    assert all(p.grad is not None and p.grad.any() for p in changed.hf.parameters())
    changed.hf.zero_grad()


def test_a_loss_over_the_full_sequence_is_that_of_hugging_face_with_all_tokens_as_labels(tiny, examples):
    for example in examples[:2]:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            expected = tiny.hf(input_ids=ids, labels=ids).loss
            found = sequence_losses(tiny, collate([example.without_prompt()], PAD))
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)


def test_the_divergence_of_logits_is_zero_where_nothing_moved_and_else_the_sum_over_the_vocabulary():
    before, after = (torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(kl_divergence(before, before + 1.0).round(decimals=5), torch.zeros(3))
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    torch.testing.assert_close(kl_divergence(before, after), (p.exp() * (p - q)).sum(-1))
    assert bool((kl_divergence(before, after) > 0).all())
