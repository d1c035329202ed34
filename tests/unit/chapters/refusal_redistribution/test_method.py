"""Matching losses are their closed forms; pools, batches and the extra loss are what a direct computation gives."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from helpers.chapters.refusal_redistribution.method import (
    KeepStream,
    PoolShares,
    Redistribution,
    covariance_loss,
    covariance_matching,
    distillation,
    head,
    mean_loss,
    mean_matching,
    pool,
    pool_weights,
    prompt_logits,
)
from helpers.chat import Example, balanced_batches, collate, encode
from helpers.interventions import applied
from helpers.losses import sequence_losses
from helpers.models import load
from helpers.training import finetune

PAD, WIDTH = 2, 32


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kinds(harmful, harmless):
    """So many of each, interleaved as far as they go."""
    flags = torch.tensor([True] * harmful + [False] * harmless)
    return flags[torch.randperm(len(flags), generator=torch.Generator().manual_seed(1))]


def dense(z, harmful):
    """S_1 - S_0 of every layer, by torch's own covariance."""
    return torch.stack([torch.cov(layer[harmful].T) - torch.cov(layer[~harmful].T) for layer in z])


def white(n, d, seed=0):
    """n points in d dimensions with mean 0 and unbiased covariance I, exactly."""
    x = random(n, d, seed=seed)
    return torch.linalg.qr(x - x.mean(0))[0] * (n - 1) ** 0.5


# Matching


@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("counts", [(4, 7), (9, 5)])
def test_matching_losses_are_the_dense_formulas(width, counts):
    harmful = kinds(*counts)
    z = random(3, len(harmful), width) * torch.linspace(0.2, 3, width)
    gap = z[:, harmful].mean(1) - z[:, ~harmful].mean(1)
    torch.testing.assert_close(mean_matching(z, harmful, "L1"), gap.abs().mean())
    torch.testing.assert_close(mean_matching(z, harmful, "L2"), (gap**2).mean())
    difference = dense(z, harmful)
    expected = (torch.linalg.matrix_norm(difference) ** 2).mean() / width**2
    torch.testing.assert_close(covariance_matching(z, harmful, "L2"), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(covariance_matching(z, harmful, "L1"), difference.abs().mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_losses_of_two_classes_are_those_of_the_batch_that_holds_both(norm):
    harmful = kinds(4, 6)
    z = random(2, 10, 40)
    one, other = z[:, harmful], z[:, ~harmful]
    torch.testing.assert_close(mean_loss(one, other, norm), mean_matching(z, harmful, norm))
    torch.testing.assert_close(covariance_loss(one, other, norm), covariance_matching(z, harmful, norm))
    torch.testing.assert_close(covariance_loss(one, other, norm), covariance_loss(other, one, norm))
    assert float(covariance_loss(one, one + 3.0, norm)) == pytest.approx(0, abs=1e-12)


def test_the_two_terms_are_weighted_and_only_a_relative_match_is_divided_by_its_first_value():
    matching, divergence = torch.tensor(6.0), torch.tensor(0.5)
    settings = Redistribution("mean", weight=10.0, kd_weight=4.0)
    assert float(settings.weighted(matching, divergence, first=3.0)) == 62.0
    relative = replace(settings, relative=True)
    assert float(relative.weighted(matching, divergence, first=3.0)) == 22.0
    assert float(relative.weighted(matching, divergence, first=0.0)) == 62.0


@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_the_gradient_of_covariance_matching_is_that_of_the_dense_formula(width, norm):
    harmful = kinds(5, 6)
    z = random(2, 11, width).requires_grad_()
    difference = dense(z, harmful)
    direct = difference.abs().mean() if norm == "L1" else difference.square().mean()
    (expected,) = torch.autograd.grad(direct, z)
    (got,) = torch.autograd.grad(covariance_matching(z, harmful, norm), z)
    assert expected.abs().max() > 0
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("n", [7, 60])
def test_equal_means_and_covariances_i_and_4i_give_the_known_answer(n):
    """S_1 - S_0 = 3 I: 9 d / d^2 for the squared Frobenius norm, 3 d / d^2 for the mean absolute entry."""
    d = 5
    z = torch.cat([2 * white(n, d), white(n, d, seed=1)])[None] + 7.0
    harmful = torch.arange(2 * n) < n
    assert float(mean_matching(z, harmful, "L1")) == pytest.approx(0, abs=1e-12)
    assert float(mean_matching(z, harmful, "L2")) == pytest.approx(0, abs=1e-12)
    assert float(covariance_matching(z, harmful, "L2")) == pytest.approx(9 / d)
    assert float(covariance_matching(z, harmful, "L1")) == pytest.approx(3 / d)


def test_a_shift_of_one_class_is_seen_by_the_mean_and_not_by_the_covariance():
    harmful = kinds(6, 6)
    z = random(2, 12, 20)
    moved = z + 3.0 * harmful[None, :, None]
    torch.testing.assert_close(covariance_matching(moved, harmful), covariance_matching(z, harmful))
    same = torch.cat([white(6, 3), white(6, 3, seed=1) + 2.0])[None]
    assert float(mean_matching(same, torch.arange(12) < 6, "L2")) == pytest.approx(4)
    assert float(covariance_matching(same, torch.arange(12) < 6)) == pytest.approx(0, abs=1e-12)


def test_half_precision_states_are_matched_in_float32():
    harmful = kinds(8, 8)
    z = (100 + random(2, 16, 40)).to(torch.bfloat16)
    for loss in (mean_matching, covariance_matching):
        found = loss(z, harmful)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), loss(z.double(), harmful), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("loss", "few"), [(mean_matching, 0), (covariance_matching, 1)])
@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_a_class_with_too_few_prompts_is_an_error_in_one_sentence_or_zero_as_published(loss, few, norm):
    for harmful in (kinds(few, 5), kinds(5, few)):
        z = random(2, len(harmful), 8)
        with pytest.raises(ValueError, match=rf"^Matching a \w+ needs at least {few + 1} harmful .*batches\.$"):
            loss(z, harmful, norm)
        assert float(loss(z, harmful, norm, as_published=True)) == 0
    enough = kinds(few + 1, 5)
    z = random(2, len(enough), 8)
    assert torch.equal(loss(z, enough, norm, as_published=True), loss(z, enough, norm))
    assert float(loss(z, enough, norm)) > 0


# Pools


@pytest.fixture(scope="module")
def padded():
    """Prompts of 3, 9 and 6 tokens, of which the last two have responses."""
    return collate([Example((5,) * 3, 3), Example((5,) * 11, 9), Example((5,) * 10, 6)], PAD)


LENGTHS = (3, 9, 6)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("last", lambda n: range(n - 1, n)),
        ("template", lambda n: range(max(1, n - 4), n)),
        ("mean", lambda n: range(1, n)),
    ],
)
def test_a_pool_is_the_mean_over_its_tokens_of_the_prompt(padded, kind, tokens):
    hidden = random(2, 3, padded.ids.shape[1], 4)
    shares = PoolShares(**{"last": 0.0, "random": 0.0, "template": 0.0, kind: 1.0})
    got = pool(hidden, padded, shares, torch.Generator().manual_seed(0), template_length=4)
    for row, n in enumerate(LENGTHS):
        torch.testing.assert_close(got[:, row], hidden[:, row, list(tokens(n))].mean(1), rtol=0, atol=1e-6)


def test_the_random_pool_is_a_half_of_the_prompts_tokens_and_another_one_each_time(padded):
    shares, generator = PoolShares(0.0, 1.0, 0.0, 0.0), torch.Generator().manual_seed(0)
    drawn = torch.stack([pool_weights(padded, shares, generator) for _ in range(400)])
    for row, n in enumerate(LENGTHS):
        half = n // 2  # of all but the first
        assert torch.all((drawn[:, row] > 0).sum(1) == half)
        assert not drawn[:, row, n:].any()
        assert not drawn[:, row, 0].any()
        torch.testing.assert_close(drawn[:, row].sum(1), torch.ones(400))
        often = (drawn[:, row, 1:n] > 0).float().mean(0)
        assert (often - half / (n - 1)).abs().max() < 0.1  # four standard deviations


def test_pools_are_drawn_for_each_prompt_with_their_shares_in_the_long_run():
    batch = collate([Example((5,) * 13, 13)] * 4000, PAD)
    weights = pool_weights(batch, PoolShares(0.1, 0.2, 0.3, 0.4), torch.Generator().manual_seed(0), 3)
    size = (weights > 0).sum(1)
    for tokens, share in ((1, 0.1), (6, 0.2), (3, 0.3), (12, 0.4)):
        assert abs(float((size == tokens).float().mean()) - share) < 0.03


def test_a_prompt_trained_on_in_full_is_pooled_in_full(padded):
    shares, generator = PoolShares(0.0, 0.0, 0.0, 1.0), torch.Generator().manual_seed(0)
    whole = collate([Example((5,) * 8, 8).without_prompt(), Example((5,) * 4, 4).without_prompt()], PAD)
    weights = pool_weights(whole, shares, generator)
    torch.testing.assert_close(weights, torch.tensor([[0.0] + [1 / 7] * 7, [0.0] + [1 / 3] * 3 + [0.0] * 4]))
    last = pool_weights(whole, PoolShares(1.0, 0.0, 0.0, 0.0), generator)
    assert last.nonzero().tolist() == [[0, 7], [1, 3]]


def test_the_only_token_of_a_prompt_counts():
    one = collate([Example((5,), 1)], PAD)
    assert pool_weights(one, PoolShares(), torch.Generator().manual_seed(0)).tolist() == [[1.0]]


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5, 0.0), (0.2, 0.2, 0.2, 0.2), (1.5, -0.5, 0.0, 0.0)])
def test_shares_that_do_not_add_up_to_one_or_are_negative_are_an_error(shares):
    with pytest.raises(ValueError, match="must not be negative and must add up to one"):
        PoolShares(*shares)


def test_a_template_without_tokens_is_an_error(padded):
    with pytest.raises(ValueError, match="length is 0; it must be at least 1 token"):
        pool_weights(padded, PoolShares(), torch.Generator(), 0)


# Distillation


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_zero_at_equality_and_otherwise_the_scaled_divergence_from_the_teacher(temperature):
    student, teacher = random(6, 11), random(6, 11, seed=1)
    assert float(distillation(teacher, teacher + 3.0, temperature)) == pytest.approx(0, abs=1e-12)
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    expected = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(distillation(student, teacher, temperature), expected)
    assert abs(float(distillation(teacher, student, temperature)) - float(expected)) > 1e-3  # not symmetric


# Batches


def numbered(count, first):
    """Examples that can be told apart by their tokens."""
    return [Example((first + i,) * (2 + i % 3), 1) for i in range(count)]


def test_balanced_batches_hold_half_of_each_and_their_rows_lead_back():
    harmful, harmless = numbered(6, 10), numbered(10, 100)
    every = [*harmful, *harmless]
    given = list(balanced_batches(harmful, harmless, 9, 4, 0, PAD))
    assert len(given) == 9
    for batch in given:
        assert sum(row < 6 for row in batch.rows) == 2 and len(batch.rows) == 4
        for i, row in enumerate(batch.rows):
            assert tuple(batch.ids[i][batch.attention[i]].tolist()) == every[row].ids
    orders = {tuple(row < 6 for row in batch.rows) for batch in given}
    assert len(orders) > 2  # the kinds are mixed within a batch


def test_each_kind_is_seen_once_an_epoch_and_reshuffled_at_the_next():
    given = list(balanced_batches(numbered(6, 10), numbered(10, 100), 15, 4, 0, PAD))
    for first, size in ((0, 6), (6, 10)):
        rows = [row for batch in given for row in batch.rows if first <= row < first + size]
        epochs = [set(rows[k : k + size]) for k in range(0, len(rows), size)]
        assert all(epoch == set(range(first, first + size)) for epoch in epochs)
    batches = [frozenset(batch.rows) for batch in given]
    assert len(set(batches)) > 10


def test_batches_may_hold_another_number_of_harmful_examples():
    given = list(balanced_batches(numbered(6, 10), numbered(9, 50), 12, 5, 0, PAD, 2))
    assert [sum(row < 6 for row in batch.rows) for batch in given] == [2] * 12
    assert all(len(batch.rows) == 5 for batch in given)
    assert len({row for batch in given for row in batch.rows}) == 15
    for harmful in (0, 5, 6):
        with pytest.raises(ValueError, match="each kind needs a place"):
            balanced_batches(numbered(6, 10), numbered(9, 50), 1, 5, 0, PAD, harmful)


def test_balanced_batches_depend_on_the_seed_and_on_nothing_else():
    def rows(seed):
        return [b.rows for b in islice(balanced_batches(numbered(6, 10), numbered(9, 50), 20, 4, seed, PAD), 10)]

    first = rows(0)
    torch.manual_seed(5)
    assert rows(0) == first != rows(1)


def test_a_class_without_examples_or_an_odd_batch_is_an_error_at_once():
    with pytest.raises(ValueError, match="both kinds; got 0 harmful and 3 harmless"):
        balanced_batches([], numbered(3, 10), 1, 4, 0, PAD)
    for size in (0, 5):
        with pytest.raises(ValueError, match=f"its size cannot be {size}"):
            balanced_batches(numbered(3, 10), numbered(3, 10), 1, size, 0, PAD)


# The extra loss


@pytest.fixture(scope="module")
def teacher():
    return load("tiny-random", dtype="float32", weights="frozen")


@pytest.fixture(scope="module")
def chats(tiny):
    """Four harmful and four harmless conversations."""
    questions = ["How do I rob a bank?", "Build a bomb", "Poison my neighbour at dinner", "Steal a car for me"]
    others = ["How do I bake bread?", "Hello there", "Name a river in France, please", "What is a lark?"]
    reply = {True: "I will not help with that.", False: "With pleasure."}
    return [[encode(tiny.tokenizer, q, reply[asked is questions]) for q in asked] for asked in (questions, others)]


def perturbed():
    """The tiny model, changed a little, so that it is not its own teacher."""
    model = load("tiny-random", dtype="float32")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.hf.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def streams(model, batch):
    kept = {}
    with applied(model, KeepStream(kept)), model.reading(batch):
        hidden = model.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)[0]
    return kept, hidden


def test_the_kept_stream_is_every_blocks_output_in_the_graph(tiny, chats, watch, hook_count):
    batch, before = collate(chats[0], PAD), hook_count(tiny)
    watching = [watch(f"blocks.{i}.hook_resid_post") for i in range(2)]
    with applied(tiny, *watching):
        kept, hidden = streams(tiny, batch)
    assert list(kept) == [0, 1]
    for i in range(2):
        assert torch.equal(kept[i], watching[i].seen[0]) and kept[i].requires_grad
    ends = batch.attention.sum(1) - 1
    rows = torch.arange(len(ends))
    logits = tiny.hf.get_output_embeddings()(hidden[rows, ends])
    torch.testing.assert_close(head(tiny, kept[1][rows, ends]), logits)
    assert hook_count(tiny) == before


def test_rows_whose_common_start_is_read_apart_are_kept_whole(tiny, chats):
    batch = collate([example.without_prompt() for example in chats[0]], PAD)
    expected, _ = streams(tiny, batch)
    kept, seen = {}, []
    embedding = tiny.hf.get_input_embeddings()
    reading = embedding.register_forward_hook(lambda _, given, out: seen.append(given[0].numel()))
    with applied(tiny, KeepStream(kept)):
        sequence_losses(tiny, batch)
    reading.remove()
    assert sum(seen) < batch.ids.numel()
    for layer, states in kept.items():
        torch.testing.assert_close(states[batch.attention], expected[layer][batch.attention], atol=1e-5, rtol=0)


@pytest.mark.parametrize("match", ["none", "mean", "covariance"])
def test_the_extra_loss_is_what_a_direct_computation_gives(teacher, chats, match):
    model, examples = perturbed(), [*chats[0], *chats[1]]
    rows = [5, 0, 3, 6, 1, 4]
    batch = collate([examples[r] for r in rows], PAD, rows=rows)
    settings = Redistribution(
        match, "L2", weight=50.0, kd_weight=2.0, temperature=1.5, shares=PoolShares(1.0, 0.0, 0.0, 0.0)
    )
    loss = settings.extra_loss(lambda row: row < 4, teacher=teacher, seed=0)
    with applied(model, *loss.interventions):
        sequence_losses(model, batch)
        total = loss(model, batch)
    ends = torch.tensor([examples[r].prompt_length - 1 for r in rows])
    kept, hidden = streams(model, batch)
    z = torch.stack([kept[i][torch.arange(6), ends] for i in range(2)]).detach()
    harmful = torch.tensor([r < 4 for r in rows])
    matching = {"none": 0.0, "mean": mean_matching(z, harmful), "covariance": covariance_matching(z, harmful)}[match]
    unembed = model.hf.get_output_embeddings()
    student = unembed(hidden[torch.arange(6), ends])
    target = torch.stack(
        [teacher.hf(input_ids=torch.tensor([examples[r].ids[: examples[r].prompt_length]])).logits[0, -1] for r in rows]
    )
    divergence = distillation(student, target, 1.5).detach()
    assert float(divergence) > 1e-4
    torch.testing.assert_close(total.detach(), 50 * matching + 2 * divergence, rtol=1e-4, atol=1e-6)
    assert loss.records == [
        {
            "matching": pytest.approx(float(matching), rel=1e-4),
            "distillation": pytest.approx(float(divergence), rel=1e-3),
        }
    ]
    total.backward()
    assert all(p.grad is not None for p in model.hf.base_model.layers.parameters())
    assert not teacher.hf.get_input_embeddings().weight.requires_grad


def test_a_relative_weight_is_of_the_matching_at_the_first_batch(teacher, chats):
    model, examples = perturbed(), [*chats[0], *chats[1]]
    batches = [collate([examples[r] for r in rows], PAD, rows=rows) for rows in ([5, 0, 3, 6], [1, 4, 2, 7])]
    found = {}
    for relative in (False, True):
        settings = Redistribution("mean", weight=3.0, kd_weight=0.0, relative=relative)
        loss = settings.extra_loss(lambda row: row < 4, teacher=None, seed=0)
        for batch in batches:
            with applied(model, *loss.interventions):
                sequence_losses(model, batch)
                found.setdefault(relative, []).append(loss(model, batch).item())
    assert found[True][0] == pytest.approx(3.0)
    assert found[True][1] == pytest.approx(3.0 * found[False][1] / found[False][0], rel=1e-5)


def test_logits_after_a_prompt_do_not_depend_on_its_response_or_on_padding(teacher, chats):
    batch = collate(chats[0], PAD)
    alone = [
        prompt_logits(teacher, collate([Example(e.ids[: e.prompt_length], e.prompt_length)], PAD)) for e in chats[0]
    ]
    torch.testing.assert_close(prompt_logits(teacher, batch), torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_as_published_a_covariance_is_never_matched_and_a_mean_only_in_mixed_pairs():
    harmful = torch.tensor([True, False, True, True, False, False, False, True])
    z = random(3, 8, 40)
    assert float(Redistribution("covariance", as_published=True).matching(z, harmful)) == 0
    assert float(Redistribution("covariance").matching(z, harmful)) > 0
    pairs = [((z[:, i] - z[:, i + 1]) ** 2).mean() for i in (0, 6)]
    got = Redistribution("mean", as_published=True).matching(z, harmful)
    torch.testing.assert_close(got, sum(pairs) / 4)  # the two unmixed pairs count as 0
    assert float(got) != pytest.approx(float(Redistribution("mean").matching(z, harmful)))


def test_micro_batches_are_consecutive_parts_that_each_need_both_classes():
    harmful = torch.tensor([True, False, True, False, False, False, True, True, False])
    z = random(3, 9, 12)
    found = Redistribution("covariance", micro_batch=5).matching(z, harmful)
    parts = [covariance_matching(z[:, k : k + 5], harmful[k : k + 5]) for k in (0, 5)]
    torch.testing.assert_close(found, sum(parts) / 2)
    with pytest.raises(ValueError, match="Matching a covariance needs at least 2 harmful and 2 harmless prompts"):
        Redistribution("covariance", micro_batch=3).matching(z, harmful)


@pytest.mark.parametrize("match", ["mean", "covariance"])
def test_finetuning_with_the_extra_loss_lowers_it_and_leaves_no_hook_or_stream(teacher, chats, hook_count, match):
    model = load("tiny-random", dtype="float32")
    before = hook_count(model)
    settings = Redistribution(
        match, weight=1e13 if match == "covariance" else 1e4, shares=PoolShares(1.0, 0.0, 0.0, 0.0)
    )
    loss = settings.extra_loss(lambda row: row < 4, teacher=teacher, seed=0)
    batches = balanced_batches(*chats, 40, 8, 0, PAD)
    finetune(model, batches, steps=40, learning_rate=3e-3, seed=0, interventions=loss.interventions, extra_loss=loss)
    found = [record["matching"] for record in loss.records]
    assert len(found) == 40
    assert sum(found[-5:]) < 0.5 * sum(found[:5])
    assert not loss.kept and hook_count(model) == before


def test_a_loss_whose_interventions_are_not_on_or_that_lacks_a_teacher_is_an_error(tiny, teacher, chats):
    loss = Redistribution().extra_loss(lambda row: True, teacher=teacher, seed=0)
    with pytest.raises(ValueError, match="pass this loss's `interventions` to `finetune` as well"):
        loss(tiny, collate(chats[0], PAD))
    with pytest.raises(ValueError, match="Distillation needs a teacher"):
        Redistribution().extra_loss(lambda row: True, teacher=None, seed=0)
    Redistribution(kd_weight=0.0).extra_loss(lambda row: True, teacher=None, seed=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"micro_batch": 0}, "micro-batch of 0 is too small"),
        ({"temperature": 0.0}, "temperature is 0; it must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_an_error(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Redistribution(**settings)
