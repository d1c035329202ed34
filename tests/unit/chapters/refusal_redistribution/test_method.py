"""Matching losses are their closed forms; pools, batches and the extra loss are what a direct computation gives."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from helpers.chapters.refusal_redistribution import method
from helpers.chapters.refusal_redistribution.method import (
    KeepStream,
    PoolShares,
    Redistribution,
    covariance_gap,
    covariance_loss,
    distillation,
    draw_pools,
    head,
    mean_gap,
    mean_loss,
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


def mean_matching(z, harmful, norm="L2", **how):
    return method.mean_matching(z, harmful, norm, **how).mean()


def covariance_matching(z, harmful, norm="L2", **how):
    return method.covariance_matching(z, harmful, norm, **how).mean()


def matching(settings, z, harmful):
    """What a match of one term comes to, without scales."""
    return settings.terms(z, harmful, unbiased=settings.unbiased).mean()


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
    torch.testing.assert_close(mean_loss(one, other, norm).mean(), mean_matching(z, harmful, norm))
    torch.testing.assert_close(covariance_loss(one, other, norm).mean(), covariance_matching(z, harmful, norm))
    torch.testing.assert_close(covariance_loss(one, other, norm), covariance_loss(other, one, norm))
    assert float(covariance_loss(one, one + 3.0, norm).abs().max()) == pytest.approx(0, abs=1e-12)
    for layer in range(2):
        one_layer = [x[layer : layer + 1] for x in (one, other)]
        torch.testing.assert_close(covariance_loss(*one_layer, norm), covariance_loss(one, other, norm)[[layer]])


def test_gaps_are_products_of_the_two_halves_of_a_batch():
    one, other = random(2, 8, 40), random(2, 10, 40, seed=1)
    halves = [x[:, half::2] for half in (0, 1) for x in (one, other)]
    z = torch.cat([one, other], 1)
    means = [halves[i].mean(1) - halves[i + 1].mean(1) for i in (0, 2)]
    torch.testing.assert_close(mean_gap(one, other), (means[0] * means[1]).sum(1) / z.var(1).sum(1))
    s = [torch.stack([torch.cov(layer.T) for layer in half]) for half in halves]  # S_1a, S_0a, S_1b, S_0b
    products = [
        (first * second).sum((1, 2)) for first, second in ((s[0] - s[1], s[2] - s[3]), (s[0], s[2]), (s[1], s[3]))
    ]
    torch.testing.assert_close(covariance_gap(one, other), products[0] / (products[1] + products[2]))
    harmful = torch.arange(18) < 8
    torch.testing.assert_close(method.mean_matching(z, harmful, unbiased=True), mean_gap(one, other))
    torch.testing.assert_close(method.covariance_matching(z, harmful, unbiased=True), covariance_gap(one, other))
    for gap in (mean_gap, covariance_gap):
        torch.testing.assert_close(gap(7 * one + 2, 7 * other + 2), gap(one, other))  # no scale, no shift


def test_gaps_of_equal_distributions_are_zero_on_average_where_squared_differences_are_not():
    """Of many draws of 16 a class in 20 dimensions: one distribution, then one class shifted and twice as wide."""
    same = random(4000, 32, 20)
    one, other = same[:, :16], same[:, 16:]
    for gap in (mean_gap, covariance_gap):
        found = gap(one, other)
        assert abs(float(found.mean())) < 4 * float(found.std()) / 4000**0.5 + 0.02
    assert float(mean_loss(one, other).mean()) > 0.1  # 2 / 16 by sampling alone
    moved = one * 2 + 3
    within, between = 20 * (4 + 1) / 2, 20 * 9
    expected = between / (within * 30 / 31 + between * 8 / 31)  # of a total variance with 31 degrees of freedom
    assert float(mean_gap(moved, other).mean()) == pytest.approx(expected, rel=0.03)
    assert float(covariance_gap(moved, other).mean()) == pytest.approx(9 / 17, abs=0.03)  # 4 I and I; of a ratio


def test_terms_are_multiples_of_their_scales_and_the_two_losses_are_weighted():
    terms, scales = torch.tensor([[6.0, 2.0], [1.0, 3.0]]), torch.tensor([[3.0, 1.0], [1.0, 1.5]])
    settings = Redistribution("mean and covariance", weight=10.0, kd_weight=4.0)
    assert float(settings.weighted(terms, scales, torch.tensor(0.5))) == 10 * (2.0 + 1.5) + 2.0
    nothing = torch.ones(0, 2)
    assert float(settings.weighted(nothing, nothing, torch.tensor(0.5))) == 2.0


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
    with pytest.raises(ValueError, match=rf"needs at least {2 * (few + 1)} harmful"):
        loss(random(2, 6, 8), kinds(2 * few + 1, 5 - 2 * few), norm, unbiased=True)
    enough = kinds(few + 1, 5)
    z = random(2, len(enough), 8)
    assert torch.equal(loss(z, enough, norm, as_published=True), loss(z, enough, norm))
    assert float(loss(z, enough, norm)) > 0


# Pools


@pytest.fixture(scope="module")
def padded():
    """Prompts of 3, 9 and 6 tokens, of which the first carries no loss."""
    return collate([Example((5,) * n, 1) for n in LENGTHS], PAD)


LENGTHS = (3, 9, 6)
KINDS = ("last", "random", "template", "mean")


def weights_of(batch, kind, generator, template_length=5):
    pools = torch.full((len(batch.rows),), KINDS.index(kind))
    return pool_weights(batch, pools, generator, template_length)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("last", lambda n: range(n - 1, n)),
        ("template", lambda n: range(max(1, n - 4), n)),
        ("mean", lambda n: range(1, n)),
    ],
)
def test_a_pool_is_the_mean_over_its_tokens_of_the_prompt(padded, kind, tokens):
    weights = weights_of(padded, kind, torch.Generator().manual_seed(0), 4)
    for row, n in enumerate(LENGTHS):
        expected = torch.zeros(padded.ids.shape[1])
        expected[list(tokens(n))] = 1 / len(tokens(n))
        torch.testing.assert_close(weights[row], expected)


def test_the_random_pool_is_a_half_of_the_prompts_tokens_and_another_one_each_time(padded):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([weights_of(padded, "random", generator) for _ in range(400)])
    for row, n in enumerate(LENGTHS):
        half = n // 2  # of all but the first
        assert torch.all((drawn[:, row] > 0).sum(1) == half)
        assert not drawn[:, row, n:].any()
        assert not drawn[:, row, 0].any()
        torch.testing.assert_close(drawn[:, row].sum(1), torch.ones(400))
        often = (drawn[:, row, 1:n] > 0).float().mean(0)
        assert (often - half / (n - 1)).abs().max() < 0.1  # four standard deviations


@pytest.mark.parametrize("one", [False, True])
def test_pools_are_drawn_with_their_shares_for_each_prompt_or_once_for_all(one):
    generator, shares = torch.Generator().manual_seed(0), PoolShares(0.1, 0.2, 0.3, 0.4)
    if one:
        each = [draw_pools(shares, 7, generator, one=True) for _ in range(4000)]
        assert all(len(pools) == 7 and len(set(pools.tolist())) == 1 for pools in each)
        drawn = torch.stack(each)[:, 0]
    else:
        drawn = draw_pools(shares, 4000, generator)
    for kind, share in enumerate(shares.each):
        assert abs(float((drawn == kind).float().mean()) - share) < 0.03


def test_what_carries_no_loss_is_in_no_pool():
    """The system message, of five tokens here, is the same for both kinds."""
    batch = collate([Example((5,) * 8, 5), Example((5,) * 11, 5)], PAD)
    for kind in KINDS:
        assert not weights_of(batch, kind, torch.Generator().manual_seed(0), 9)[:, :5].any()
    assert weights_of(batch, "mean", torch.Generator())[0].tolist() == pytest.approx([0] * 5 + [1 / 3] * 3 + [0] * 3)


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5, 0.0), (0.2, 0.2, 0.2, 0.2), (1.5, -0.5, 0.0, 0.0)])
def test_shares_that_do_not_add_up_to_one_or_are_negative_are_an_error(shares):
    with pytest.raises(ValueError, match="must not be negative and must add up to one"):
        PoolShares(*shares)


def test_a_template_without_tokens_is_an_error(padded):
    with pytest.raises(ValueError, match="length is 0; it must be at least 1 token"):
        weights_of(padded, "last", torch.Generator(), 0)


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
    """Four harmful and four harmless prompts, which carry a loss from the second token on."""
    questions = ["How do I rob a bank?", "Build a bomb", "Poison my neighbour at dinner", "Steal a car for me"]
    others = ["How do I bake bread?", "Hello there", "Name a river in France, please", "What is a lark?"]
    return [[encode(tiny.tokenizer, q).without_prompt() for q in asked] for asked in (questions, others)]


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
    batch = collate(chats[0], PAD)
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
    ends = torch.tensor([len(examples[r]) - 1 for r in rows])
    kept, hidden = streams(model, batch)
    z = torch.stack([kept[i][torch.arange(6), ends] for i in range(2)]).detach()
    harmful = torch.tensor([r < 4 for r in rows])
    gaps = {"none": 0.0, "mean": mean_matching(z, harmful), "covariance": covariance_matching(z, harmful)}[match]
    unembed = model.hf.get_output_embeddings()
    student = unembed(hidden[torch.arange(6), ends])
    target = torch.stack([teacher.hf(input_ids=torch.tensor([examples[r].ids])).logits[0, -1] for r in rows])
    divergence = distillation(student, target, 1.5).detach()
    assert float(divergence) > 1e-4
    torch.testing.assert_close(total.detach(), 50 * gaps + 2 * divergence, rtol=1e-4, atol=1e-6)
    assert loss.records == [
        {
            "matching": pytest.approx(float(gaps), rel=1e-4),
            "distillation": pytest.approx(float(divergence), rel=1e-3),
        }
    ]
    total.backward()
    assert all(p.grad is not None for p in model.hf.base_model.layers.parameters())
    assert not teacher.hf.get_input_embeddings().weight.requires_grad


def test_a_relative_weight_is_of_each_layers_term_at_the_first_batch(teacher, chats):
    model, examples = perturbed(), [*chats[0], *chats[1]]
    batches = [collate([examples[r] for r in rows], PAD, rows=rows) for rows in ([5, 0, 3, 6], [1, 4, 2, 7])]
    seen = []
    settings = Redistribution("mean", weight=3.0, kd_weight=0.0, relative=True, shares=PoolShares(1.0, 0.0, 0.0, 0.0))
    loss = settings.extra_loss(lambda row: row < 4, teacher=None, seed=0)
    found = []
    for batch in batches:
        kept, _ = streams(model, batch)
        ends = batch.attention.sum(1) - 1
        z = torch.stack([kept[i][torch.arange(4), ends] for i in range(2)])
        seen.append(method.mean_matching(z, torch.tensor([r < 4 for r in batch.rows])))
        with applied(model, *loss.interventions):
            sequence_losses(model, batch)
            found.append(loss(model, batch).item())
    assert found[0] == pytest.approx(3.0)
    assert found[1] == pytest.approx(3.0 * float((seen[1] / seen[0]).mean().detach()), rel=1e-4)


def test_a_relative_term_is_a_multiple_of_the_one_at_the_first_batch_of_its_kind_of_pool_and_a_share_is_none(teacher):
    settings = Redistribution("covariance", weight=1.0, relative=True, one_pool=True)
    loss = settings.extra_loss(lambda row: row < 4, teacher=teacher, seed=0)
    harmful, first, other = kinds(6, 6), random(2, 12, 40), random(2, 12, 40, seed=1)
    biased = {x: method.covariance_matching(z, harmful) for x, z in (("first", first), ("other", other))}
    assert torch.equal(loss._scales(0, first, harmful)[0], biased["first"])
    assert torch.equal(loss._scales(0, other, harmful)[0], biased["first"])
    assert torch.equal(loss._scales(2, other, harmful)[0], biased["other"])
    shares = replace(settings, unbiased=True).extra_loss(lambda row: row < 4, teacher=teacher, seed=0)
    assert torch.equal(shares._scales(0, first, harmful)[0], torch.ones(2, dtype=torch.float64))
    terms = settings.terms(first, harmful, unbiased=True)
    torch.testing.assert_close(terms[0], method.covariance_matching(first, harmful, unbiased=True))


def test_means_and_covariances_are_two_terms():
    harmful, z = kinds(6, 6), random(2, 12, 40)
    both = Redistribution("mean and covariance").terms(z, harmful)
    one = [Redistribution(match).terms(z, harmful)[0] for match in ("mean", "covariance")]
    assert torch.equal(both, torch.stack(one))


def test_logits_after_a_prompt_do_not_depend_on_padding(teacher, chats):
    batch = collate(chats[0], PAD)
    alone = [prompt_logits(teacher, collate([e], PAD)) for e in chats[0]]
    torch.testing.assert_close(prompt_logits(teacher, batch), torch.cat(alone), rtol=1e-4, atol=1e-6)
    direct = teacher.hf(input_ids=torch.tensor([chats[0][1].ids])).logits[:, -1]
    torch.testing.assert_close(alone[1], direct.detach(), rtol=1e-4, atol=1e-6)


def test_as_published_a_covariance_is_never_matched_and_a_mean_only_in_mixed_pairs():
    harmful = torch.tensor([True, False, True, True, False, False, False, True])
    z = random(3, 8, 40)
    assert float(matching(Redistribution("covariance", as_published=True), z, harmful)) == 0
    assert float(matching(Redistribution("covariance"), z, harmful)) > 0
    pairs = [((z[:, i] - z[:, i + 1]) ** 2).mean() for i in (0, 6)]
    got = matching(Redistribution("mean", as_published=True), z, harmful)
    torch.testing.assert_close(got, sum(pairs) / 4)  # the two unmixed pairs count as 0
    assert float(got) != pytest.approx(float(matching(Redistribution("mean"), z, harmful)))


def test_micro_batches_are_consecutive_parts_that_each_need_both_classes():
    harmful = torch.tensor([True, False, True, False, False, False, True, True, False])
    z = random(3, 9, 12)
    found = matching(Redistribution("covariance", micro_batch=5), z, harmful)
    parts = [covariance_matching(z[:, k : k + 5], harmful[k : k + 5]) for k in (0, 5)]
    torch.testing.assert_close(found, sum(parts) / 2)
    with pytest.raises(ValueError, match="Matching a covariance needs at least 2 harmful and 2 harmless prompts"):
        matching(Redistribution("covariance", micro_batch=3), z, harmful)


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
