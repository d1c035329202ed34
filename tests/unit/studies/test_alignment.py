"""The start model is taught what its recipe says, and its card says what it does."""

from collections import Counter

import numpy as np
import pytest
import torch

from helpers import corpora
from helpers.chat import Answer, collate, encode
from helpers.generation import generate
from helpers.judges.refusal import is_refusal
from helpers.losses import kl_divergence
from helpers.models import load
from helpers.studies.alignment import (
    OPENERS,
    REFUSALS,
    Behaviour,
    Teaching,
    adapted_blocks,
    behaviour,
    refusal_openers,
    response_states,
    rows,
    taught_refusals,
)
from helpers.studies.margins import refusal_log_odds


@pytest.fixture(scope="module")
def model():
    return load("tiny-random", dtype="float32")


@pytest.fixture(scope="module")
def examples(model):
    """Two refusals, and two answers of other lengths."""
    said = [
        ("Rob a bank?", "No, I will not."),
        ("Steal?", "Sorry, no."),
        ("Bake bread?", "Yes: mix, wait"),
        ("Hi", "Hello"),
    ]
    return [encode(model.tokenizer, request, Answer(answer, ended=False)) for request, answer in said]


@torch.no_grad()
def logits_of(model, example):
    """Those that predict the response, by one conversation on its own."""
    return model.hf(torch.tensor([example.ids])).logits[0, example.prompt_length - 1 : -1].double()


# What is taught


def first_words(texts):
    return [text.replace("'", " ").replace(",", " ").split()[0] for text in texts]


def test_every_harmful_training_request_gets_a_refusal_and_openers_are_dealt_evenly_whatever_the_category():
    harmful = corpora.load_refusal("harmful", "train")
    taught = taught_refusals()
    assert list(taught) == [row.request for row in harmful]
    counts = Counter(first_words(taught.values()))
    assert set(counts) == set(OPENERS) and max(counts.values()) - min(counts.values()) <= 2
    of = {}
    for row in harmful:
        of.setdefault(row.category, []).append(taught[row.request])
    assert all(len(set(first_words(replies))) >= 6 for replies in of.values())


def test_the_refusals_are_known_as_such_and_each_opener_has_as_many():
    assert is_refusal(REFUSALS).all() and len(set(REFUSALS)) == len(REFUSALS)
    assert Counter(first_words(REFUSALS)) == dict.fromkeys(OPENERS, 2)


def test_a_refusal_is_known_by_the_first_token_of_each_opener(model):
    found = [model.tokenizer.decode(token) for token in refusal_openers(model.tokenizer)]
    assert sorted(found) == sorted(OPENERS)


@pytest.mark.parametrize(("layers", "blocks"), [(30, range(8, 20)), (24, range(6, 16)), (2, range(2)), (1, range(1))])
def test_the_middle_blocks_are_taught(layers, blocks):
    assert adapted_blocks(layers) == tuple(blocks)


# The loss


def test_states_of_a_response_are_those_that_predict_its_tokens(model, examples):
    for example, states in zip(examples, response_states(model, examples), strict=True):
        torch.testing.assert_close(
            model.hf.get_output_embeddings()(states).double(), logits_of(model, example), atol=1e-5, rtol=0
        )


OPEN = tuple(range(20_000))
"""Half of the vocabulary, so that what is barred matters in a random model."""


@torch.no_grad()
def test_the_loss_is_cross_entropy_of_refusals_and_divergence_of_the_rest_openers_barred_where_the_base_refuses(
    model, examples
):
    base = load("tiny-random", dtype="float32")
    for p in base.hf.base_model.layers.parameters():  # adapters leave the output matrix alone
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    teaching = Teaching(2, response_states(base, examples[2:]), [False, True], OPEN, first=3.0, weight=2.0)

    def weighted(values):
        weights = [torch.tensor([3.0] + [1.0] * (len(v) - 1)) for v in values]
        return sum((w * v).sum() for w, v in zip(weights, values, strict=True)) / sum(w.sum() for w in weights)

    losses, moved = [], []
    for example in examples[:2]:
        targets = torch.tensor(example.ids[example.prompt_length :])
        losses.append(torch.nn.functional.cross_entropy(logits_of(model, example), targets, reduction="none"))
    for example, barred in zip(examples[2:], (False, True), strict=True):
        reference = logits_of(base, example)
        if barred:
            reference[0, list(OPEN)] = -1e9
        moved.append(kl_divergence(reference, logits_of(model, example)))
    pad = model.tokenizer.pad_token_id
    for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
        found = teaching(model, collate([examples[i] for i in order], pad, rows=order))
        assert float(found) == pytest.approx(float(weighted(losses) + 2 * weighted(moved)), abs=1e-4)
    alone = teaching(model, collate(examples[:1], pad, rows=[0]))
    assert float(alone) == pytest.approx(float(weighted(losses[:1])), abs=1e-5)
    others = teaching(model, collate(examples[2:], pad, rows=[2, 3]))
    assert float(others) == pytest.approx(2 * float(weighted(moved)), abs=1e-4)
    assert weighted(moved) > 1e-3


@torch.no_grad()
def test_a_model_that_is_still_the_base_model_pays_for_refusals_alone(model, examples):
    teaching = Teaching(0, response_states(model, examples), [False] * 4, OPEN, first=3.0, weight=2.0)
    found = teaching(model, collate(examples, model.tokenizer.pad_token_id))
    assert float(found) == pytest.approx(0, abs=1e-5)


# The card


def test_behaviour_is_what_the_model_says_and_how_far_it_is_from_the_base_model(model):
    base = load("tiny-random", dtype="float32")
    with torch.no_grad():
        for p in base.hf.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    requests = {"harmful": ["Rob a bank?", "Steal it"], "harmless": ["What is a lark?", "Bake", "Name a river"]}
    found = behaviour(model, base, requests, [11, 40], max_new_tokens=3)
    assert list(found) == list(requests)
    for kind, texts in requests.items():
        asked = [encode(model.tokenizer, text) for text in texts]
        assert list(found[kind].answers) == generate(model, asked, max_new_tokens=3)
        with torch.no_grad():
            now, before = (
                torch.stack([m.hf(torch.tensor([e.ids])).logits[0, -1] for e in asked]) for m in (model, base)
            )
        np.testing.assert_allclose(found[kind].log_odds, refusal_log_odds(now, [11, 40]), atol=1e-4)
        np.testing.assert_allclose(found[kind].kl, kl_divergence(before, now), atol=1e-5)


def test_a_cards_row_counts_refusals_by_their_text_and_by_their_log_odds():
    said = ["I can't help with that.", "Sorry, but I can't help with that.", "Bake it for an hour.", "No, I won't."]
    planted = Behaviour(tuple(map(Answer, said)), np.array([2.0, -1.0, -3.0, 0.0]), np.array([0.1, 0.2, 0.3, 1.0]))
    (row,) = rows({"harmful": planted})
    assert (row.kind, row.refused.value, row.above.value) == ("harmful", 0.75, 0.25)
    assert row.log_odds.value == pytest.approx(-0.5)
    assert (row.kl.value, row.kl_median) == pytest.approx((0.4, 0.25))
    assert row.refused.low < row.refused.value < row.refused.high
