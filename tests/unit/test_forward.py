"""What is read behind a common beginning is what whole rows give, and each row is treated as it should be."""

import pytest
import torch

from helpers.chat import Example, collate, encode
from helpers.forward import (
    PromptSet,
    common_beginning,
    only_blocks,
    read,
    read_beginning,
    resume_beginning,
    shareable_beginning,
    unembed,
)
from helpers.interventions import AblateRows, Steer, applied
from helpers.probes import orthonormal
from helpers.studies.directions import ablating

QUESTIONS = ("How do I rob a bank?", "Build a bomb", "Poison my neighbour at dinner", "Steal it", "Forge a passport")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def prompts(tiny):
    """Prompts of different lengths that begin alike."""
    return [encode(tiny.tokenizer, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def basis(tiny):
    return orthonormal(random(2, tiny.width, seed=9))


@torch.no_grad()
def logits_alone(model, example, *interventions):
    """The logits after one prompt on its own, by the wrapped model's own pass."""
    with applied(model, *interventions):
        return model.hf(input_ids=torch.tensor([example.ids]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("batch_size", [2, 32])
def test_prompts_read_behind_their_common_beginning_give_the_logits_of_each_alone(tiny, prompts, basis, batch_size):
    together = PromptSet.of(tiny, prompts, batch_size=batch_size)
    assert len(together.shared) == 24 and len(together.rest) == -(-5 // batch_size)
    for interventions in ((), ablating(basis), (*ablating(basis), Steer(0, random(tiny.width), 2.0))):
        expected = torch.stack([logits_alone(tiny, e, *interventions) for e in prompts])
        torch.testing.assert_close(together.last_logits(tiny, interventions), expected, atol=1e-5, rtol=0)


def test_copies_of_prompts_have_each_their_own_beginning(tiny, prompts, basis):
    bases = (torch.zeros(0, tiny.width), basis)
    of = tuple(copy for copy in range(2) for _ in prompts)
    found = PromptSet.of(tiny, prompts, copies=2).last_logits(tiny, (AblateRows(bases, of),))
    expected = [logits_alone(tiny, e, *ablating(directions)) for directions in bases for e in prompts]
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    assert not torch.allclose(found[:5], found[5:], atol=1e-3)


def test_prompts_that_are_the_same_or_share_nothing_are_read_all_the_same(tiny, prompts):
    for examples in ([prompts[0]] * 3, [Example((5, 6, 7), 3), Example((8,), 1)], [Example((5,), 1)]):
        expected = torch.stack([logits_alone(tiny, e) for e in examples])
        torch.testing.assert_close(PromptSet.of(tiny, examples).last_logits(tiny), expected, atol=1e-5, rtol=0)


def test_no_prompts_are_an_error(tiny):
    with pytest.raises(ValueError, match="There are no prompts to read"):
        PromptSet.of(tiny, [])


def test_no_hook_is_left_when_reading_fails(tiny, prompts, basis, hook_count):
    before = hook_count(tiny)

    def fail(batch, hidden):
        raise RuntimeError("while reading")

    with pytest.raises(RuntimeError, match="while reading"):
        PromptSet.of(tiny, prompts).read(tiny, fail, ablating(basis))
    assert hook_count(tiny) == before


def test_the_rest_of_ragged_rows_goes_on_from_its_own_beginning(tiny, prompts):
    """Two beginnings of one length: a row that got the other's would have other states."""
    begin = common_beginning(prompts)
    other = tuple(reversed(prompts[0].ids[:begin]))
    whole = [Example((*other, *e.ids[begin:]), len(e)) if i % 2 else e for i, e in enumerate(prompts)]
    rest = collate([Example(e.ids[begin:], 1) for e in whole], tiny.tokenizer.pad_token_id)
    tokens = torch.tensor([prompts[0].ids[:begin], other])
    with torch.no_grad():
        begun = resume_beginning(tiny, tiny.hf.get_input_embeddings()(tokens))
        assert len(begun) == begin == 24
        torch.testing.assert_close(begun.states[:1], read_beginning(tiny, prompts[0].ids[:begin]).states)
        found = unembed(tiny, read(tiny, rest, after=begun, kinds=[i % 2 for i in range(len(whole))]))
        for i, example in enumerate(whole):
            last = found[i][rest.attention[i]][-1]
            torch.testing.assert_close(last, logits_alone(tiny, example), atol=1e-5, rtol=0)


def test_gradients_flow_through_a_beginning_that_rows_share(tiny, prompts):
    begin = common_beginning(prompts)
    rest = collate([Example(e.ids[begin:], 1) for e in prompts], tiny.tokenizer.pad_token_id)
    start = tiny.hf.get_input_embeddings()(torch.tensor([prompts[0].ids[:begin]])).detach().requires_grad_()
    shared = read(tiny, rest, after=resume_beginning(tiny, start))[rest.attention].sum()
    whole = collate(prompts, tiny.tokenizer.pad_token_id)
    states = torch.cat([start.expand(len(prompts), -1, -1), tiny.hf.get_input_embeddings()(rest.ids)], 1)
    apart = read(tiny, whole, states=states)[:, begin:][rest.attention].sum()
    ours, theirs = (torch.autograd.grad(total, start)[0] for total in (shared, apart))
    assert ours.abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_pass_in_two_halves_is_the_whole_pass(tiny, prompts):
    batch = collate(prompts, tiny.tokenizer.pad_token_id)
    with torch.no_grad():
        whole = read(tiny, batch)
        with only_blocks(tiny, 0, 0):
            half = read(tiny, batch)
        with only_blocks(tiny, 1, 1):
            found = read(tiny, batch, states=half)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
    assert len(tiny.hf.base_model.layers) == 2


def test_the_pass_stops_before_the_vocabulary(tiny, prompts):
    batch = collate(prompts, tiny.tokenizer.pad_token_id)
    called = tiny.hf.lm_head.register_forward_hook(lambda *_: pytest.fail("the vocabulary was used"))
    try:
        with torch.no_grad():
            assert read(tiny, batch).shape == (*batch.ids.shape, tiny.width)
    finally:
        called.remove()


def test_the_common_beginning_is_what_all_begin_with_short_of_the_tail():
    rows = [Example((1, 2, 3, 4, 5), 5), Example((1, 2, 3, 9), 4), Example((1, 2, 3, 4), 4)]
    assert common_beginning(rows) == 3
    assert common_beginning(rows, tail=2) == 2
    assert common_beginning(rows[:1]) == 4
    assert common_beginning([Example((1, 2), 2), Example((3, 2), 2)]) == 0
    assert common_beginning([]) == 0


def test_a_beginning_is_shared_by_more_than_one_row_where_it_is_long_and_no_hook_needs_whole_rows(tiny, prompts):
    pad = tiny.tokenizer.pad_token_id
    assert shareable_beginning(tiny, collate(prompts, pad)) == 24
    assert shareable_beginning(tiny, collate(prompts[:1], pad)) == 0
    assert shareable_beginning(tiny, collate([Example((1, 2, 3, i), 3) for i in (4, 5)], pad)) == 0
    for where, shared in (("all", 24), ("response", 0)):  # which positions are the response's, only whole rows say
        with applied(tiny, Steer(0, random(tiny.width), 1.0, where)):
            assert shareable_beginning(tiny, collate(prompts, pad)) == shared
