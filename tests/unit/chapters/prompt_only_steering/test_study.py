"""Concepts, arms and judges of chapter 6 are of the right data, and made once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import corpora
from helpers.chapters.prompt_only_steering import study as steering
from helpers.chapters.prompt_only_steering.params import PromptOnlyParams
from helpers.chapters.prompt_only_steering.study import ASK, AVOID, QUIZZES, SteeringMethod, SteeringStudy, corrupt
from helpers.chat import Ends, Middle, Scattered, encode


def params(**changed):
    return PromptOnlyParams(preset="tiny", dtype="float32", **changed)


@pytest.fixture(scope="module")
def exp(store):
    return SteeringStudy(params())


ENDS, FULL = SteeringMethod("trained", "ends"), SteeringMethod("trained", "all")


def test_no_question_is_in_two_parts(store):
    exp = SteeringStudy(PromptOnlyParams(preset="full", model="tiny-random", layer=0, dtype="float32"))
    tested = {q for c in exp.concepts for q in exp.questions(c)}
    checked = {row.question for c in exp.concepts for row in exp.rows(c, "check")}
    trained = {row.question for c in exp.concepts for row in exp.rows(c, "train")}
    assert not tested & checked and not tested & trained and not checked & trained
    for concept in exp.concepts:
        assert len(exp.pairs(concept)) >= 48
        assert len(exp.questions(concept)) == 20
        assert len(exp.questions(concept, "check")) == 8
        assert concept in ASK and concept in AVOID


def test_training_answers_are_cut_and_end_without_a_turn(exp):
    eos = exp.base.tokenizer.eos_token_id
    for pair in exp.pairs("weather"):
        for example in (pair.shown, pair.neutral):
            assert len(example) - example.prompt_length <= exp.params.response_tokens
            assert example.ids[-1] != eos
        assert pair.shown.ids[: pair.shown.prompt_length] == pair.neutral.ids[: pair.neutral.prompt_length]


def test_places(exp):
    assert exp.place("ends") == Ends(2, 2) and exp.place("ends 4 1") == Ends(4, 1)
    assert exp.place("random") == Scattered(4, 0)
    middle = exp.place("user words")
    question = "How do I sharpen a knife?"
    ids = encode(exp.base.tokenizer, question).ids
    assert isinstance(middle, Middle)
    assert exp.base.tokenizer.decode(ids[middle.before : len(ids) - middle.after]) == question
    assert exp.steered_share("ends").startswith("4 of ")
    with pytest.raises(ValueError, match="There is no place 'middle'"):
        exp.place("middle")


def test_the_best_cell_of_the_grid_is_used(exp):
    grid = exp.sweep("ends")
    assert grid.shape == (2, 2, exp.params.checks)
    i, j = np.unravel_index(grid.mean(-1).argmin(), (2, 2))
    run = exp.runs(ENDS)[0]
    assert (run.beta, run.factor_rate) == (exp.params.betas[i], exp.params.factor_rates[j])
    assert exp.runs(replace(ENDS, where="random"))[0].beta == run.beta
    assert exp.runs(replace(FULL, joint=False))[0].factor_rate == 0
    assert exp.unsteered_losses().shape == (exp.params.checks,)


def test_vectors_are_trained_once(exp, monkeypatch):
    first = exp.trained(ENDS)
    monkeypatch.setattr(steering, "train_vectors", None)
    again = exp.trained(ENDS)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.steer.vector, b.steer.vector)
        assert (a.steer.where, a.steer.coefficient, a.losses) == (b.steer.where, b.steer.coefficient, b.losses)
    assert len(first) == 3 and len(first[0].losses) == exp.params.steps


def test_scales_multiply_the_shift(exp):
    whole = exp.shifts(ENDS)
    torch.testing.assert_close(exp.shifts(replace(ENDS, scale=0.5)), whole / 2)
    each = exp.shifts(replace(ENDS, scale=(1.0, 2.0, 3.0)))
    torch.testing.assert_close(each, whole * torch.tensor([1.0, 2.0, 3.0])[:, None])
    means = exp.shifts(SteeringMethod("difference in means"))
    assert means.shape == whole.shape and bool(means.norm(dim=1).all())


def test_prompts_ask_for_the_concept_or_forbid_it(exp):
    text = exp._worded(SteeringMethod("prompting"), "pirate", "Why?", False)
    assert text == f"{ASK['pirate']}\n\nQuestion: Why?"
    assert exp._worded(ENDS, "pirate", "Why?", True) == f"Why? {AVOID['pirate']}"


def test_every_arm_answers_every_question(exp):
    for arm in (
        SteeringMethod(),
        SteeringMethod("prompting"),
        ENDS,
        FULL,
        SteeringMethod("difference in means"),
        SteeringMethod("LoRA"),
    ):
        said = exp.answers(arm)
        assert [len(of_one) for of_one in said] == [3, 3, 3]
        ratings = exp.ratings(arm)
        assert ratings.overall.shape == (3, 3)
        assert set(np.unique(ratings.concept)) <= {0.0, 1.0, 2.0}
    assert exp.answers(SteeringMethod()) != exp.answers(replace(FULL, scale=50.0))


def test_arms_that_answer_together_say_what_each_says_alone(exp):
    arms = [
        SteeringMethod(),
        SteeringMethod("prompting"),
        ENDS,
        replace(FULL, scale=50.0),
        SteeringMethod("difference in means"),
        SteeringMethod("LoRA"),
    ]
    together, alone = (SteeringStudy(exp.params) for _ in range(2))
    together.answer_together(arms, "check", forbidden=True)
    for arm in arms:
        assert together.answers(arm, "check", forbidden=True) == alone.answers(arm, "check", forbidden=True)
    quizzes = zip(together.utility(arms), (alone.utility([arm])[0] for arm in arms), strict=True)
    assert all(np.array_equal(one[task], other[task]) for one, other in quizzes for task in QUIZZES)


def test_the_search_takes_the_best_factor_of_each_concept(exp):
    place, scales = exp.place("all"), exp.params.scales

    def losses(scale):
        shifts = exp.shifts(replace(FULL, scale=scale))
        return [of_one.mean() for of_one in exp._check_losses(shifts, place, exp.concepts)]

    tried = np.array([losses(s) for s in scales])
    assert exp.with_best_factor(FULL).scale == tuple(scales[k] for k in tried.argmin(0))


def test_a_tie_in_the_search_goes_to_the_factor_as_it_is(exp, monkeypatch):
    monkeypatch.setattr(exp, "_check_losses", lambda shifts, place, concepts: [np.ones(3)] * len(concepts))
    assert set(exp.with_best_factor(FULL).scale) == {1.0}


def test_quiz_answers_are_told_right_from_wrong(exp):
    row = corpora.load_quiz("facts")[0]
    assert row.right("The capital is Paris.") and not row.right("Parisian, London")
    (found,) = exp.utility([SteeringMethod()])
    assert {task: right.shape for task, right in found.items()} == dict.fromkeys(QUIZZES, (2, 4))


def test_an_unknown_quiz_says_which_there_are(untyped):
    with pytest.raises(corpora.CorpusError, match="no quiz on 'chess'"):
        corpora.load_quiz("chess")


def test_planted_cases_have_both_kinds(exp):
    for part in ("train", "check"):
        for features, good in exp.planted(part).values():
            assert len(features) == len(good) and good.any() and not good.all()
            assert np.isfinite(features).all()
    texts, owners, shows = exp.concept_cases()
    assert len(texts) == len(owners) == len(shows) and 0.3 < shows.mean() < 0.4


def test_spoilt_texts_keep_their_length():
    import random

    text = "one two three four five six seven eight"
    found = {corrupt(text, random.Random(seed)) for seed in range(20)}
    assert all(len(words.split()) == 8 for words in found) and text not in found
    assert "one two three four one two three four" in found and "one one two two three three four four" in found


def test_costs_are_positive(exp):
    (row,) = exp.decoding_costs({"unsteered": SteeringMethod(), "PrOSV": ENDS}, contexts=(48,), steps=2)
    assert row["context, tokens"] == 48 and set(row) == {"context, tokens", "unsteered", "PrOSV"}
    assert min(row.values()) > 0


def test_an_unknown_concept_says_which_there_are(store):
    exp = SteeringStudy(params())
    with pytest.raises(ValueError, match="no data for the concept 'opera'"):
        exp.rows("opera", "train")


def test_axbench_rows_fall_into_three_parts(store, monkeypatch):
    """Rows in the form of the hub's: where no plain answer is given, the unsteered model gives one."""
    rows = [
        {"input": f"Question {n} of {c}?", "output": f"Shown {n}", "output_concept": f"concept {c}", "concept_id": c}
        for c in (0, 1)
        for n in range(40)
    ]
    rows = [{**row, "category": "positive"} for row in rows]
    plain = {"output": "Plain", "output_concept": "EEEEE", "concept_id": -1, "category": "negative"}
    rows.append({"input": "Question 0 of 0?", **plain})
    monkeypatch.setattr(corpora, "load_hub", lambda name, **more: rows)
    corpora.load_axbench.cache_clear()
    exp = SteeringStudy(params(data="axbench", concepts=("0", "1"), tuned_on=("0",)))
    train, check, test = (exp.rows("0", "train"), exp.rows("0", "check"), exp.questions("0"))
    assert (len(train), len(check), len(test)) == (4, 16, 3)
    assert train[0].normal == "Plain" and train[1].normal != "Plain" and train[0].strong == "Shown 0"
    assert not {r.question for r in train} & {r.question for r in check} and test[0] == "Question 20 of 0?"
    assert "concept 1" in exp.ask("1") and "concept 1" in exp.avoid("1")
    with pytest.raises(corpora.CorpusError, match="no concept 7"):
        corpora.load_axbench(7)
    corpora.load_axbench.cache_clear()
