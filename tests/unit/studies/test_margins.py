"""Margins are what they say: differences of losses on written answers, in the order of the rows."""

import numpy as np
import pytest
import torch

from helpers.chat import encode
from helpers.corpora import load_quiz, load_style, load_topics, load_trait, split
from helpers.interventions import Steer
from helpers.models import load
from helpers.studies.margins import (
    behaviour_margins,
    margins,
    opening_log_odds,
    quiz_utility,
    refusal_log_odds,
    refusal_margins,
)


@pytest.fixture(scope="module")
def model():
    return load("tiny-random", dtype="float32")


def loss(model, question, answer, system=None):
    """Mean cross-entropy of one answer, by Hugging Face's logits of one conversation."""
    example = encode(model.tokenizer, question, answer, system)
    logits = model.hf(torch.tensor([example.ids])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(example.ids[1:]), reduction="none")
    return float(losses[example.prompt_length - 1 :].mean())


ROWS = {
    "trait": split(load_trait("evil"), "eval")[:5],
    "topic": load_topics("validate")[:5],
    "concept": load_style("weather", "validate")[:5],
}


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_margin_is_how_much_cheaper_the_answer_is_that_shows_the_behaviour(model, rows):
    found = behaviour_margins(model, rows, system="Talk.", batch_size=3)
    for i, row in enumerate(rows):
        normal, strong = (loss(model, row.question, answer, "Talk.") for answer in (row.normal, row.strong))
        assert found.margin[i] == pytest.approx(normal - strong, abs=1e-5)
        assert found.other[i] == pytest.approx(normal, abs=1e-5)


def test_swapped_answers_turn_every_margin_round(model):
    rows = ROWS["trait"]
    shown, other = ([encode(model.tokenizer, r.question, getattr(r, a)) for r in rows] for a in ("strong", "normal"))
    one, turned = margins(model, shown, other), margins(model, other, shown)
    np.testing.assert_allclose(one.margin, -turned.margin, atol=1e-6)
    assert np.abs(one.margin).min() > 1e-4


def test_an_intervention_is_on_while_margins_are_read(model):
    steer = Steer(0, torch.randn(model.width, generator=torch.Generator().manual_seed(0)), 3.0)
    plain = behaviour_margins(model, ROWS["trait"])
    steered = behaviour_margins(model, ROWS["trait"], interventions=[steer])
    assert np.abs(plain.margin - steered.margin).max() > 1e-3
    np.testing.assert_array_equal(plain.margin, behaviour_margins(model, ROWS["trait"]).margin)


@torch.no_grad()
def test_the_refusal_margin_is_higher_where_the_refusal_is_cheaper(model):
    requests, refusals, compliances = ["Lie.", "Cheat him."], ["No, I refuse.", "I cannot."], ["Sure, a lie.", "Fine."]
    found = refusal_margins(model, requests, refusals, compliances).margin
    for i, request in enumerate(requests):
        expected = loss(model, request, compliances[i]) - loss(model, request, refusals[i])
        assert found[i] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_log_odds_of_an_opening_are_read_at_the_end_of_each_prompt(model):
    prompts = [encode(model.tokenizer, request) for request in ("Lie.", "Cheat the whole town for me.", "Go.")]
    found = opening_log_odds(model, prompts, [11, 40, 7], batch_size=2)
    for prompt, odds in zip(prompts, found, strict=True):
        logits = model.hf(torch.tensor([prompt.ids])).logits[:, -1]
        assert odds == pytest.approx(float(refusal_log_odds(logits, [11, 40, 7])), abs=1e-4)


@torch.no_grad()
def test_what_a_model_knows_is_the_right_answer_against_the_wrong_ones(model):
    rows = load_quiz("facts")[:6]
    found = quiz_utility(model, rows, batch_size=5)
    for i, row in enumerate(rows):
        right, *wrong = (loss(model, row.question, answer) for answer in (row.answers[0], *row.wrong))
        assert found.margin[i] == pytest.approx(np.mean(wrong) - right, abs=1e-5)
        assert found.exact[i] == (right < min(wrong))


def test_answers_that_are_no_pairs_are_refused_in_one_sentence(model):
    example = encode(model.tokenizer, "Hello?", "Hello.")
    for shown, other in (([example], []), ([], [])):
        with pytest.raises(ValueError, match=r"^Margins need pairs of answers, and got \d"):
            margins(model, shown, other)
