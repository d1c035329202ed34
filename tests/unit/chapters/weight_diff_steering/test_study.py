"""Anchors, answers and pile gradients are of the right data, made once, and again when what decides them changes."""

import copy

import numpy as np
import pytest
import torch

from helpers import corpora
from helpers.artifacts import Store
from helpers.chapters.weight_diff_steering import study as experiments
from helpers.chapters.weight_diff_steering.method import (
    WeightVector,
    alpha_for,
    difference,
    finetuning_diff,
    random_like,
    steered,
)
from helpers.chapters.weight_diff_steering.params import WeightSteeringParams
from helpers.chapters.weight_diff_steering.study import WeightStudy
from helpers.chat import Answer, encode
from helpers.generation import generate
from helpers.gradients import pile_gradient
from helpers.judges.api import APIJudge
from helpers.losses import evaluate_losses
from helpers.studies import study


def params(**changed):
    return WeightSteeringParams(preset="tiny", dtype="float32", **changed)


def with_params(exp, **changed):
    """The same chapter with other parameters; its model, questions and judges are those it has."""
    other = copy.copy(exp)
    other.params = params(**changed)
    return other


@pytest.fixture(scope="module")
def exp(store):
    return WeightStudy(params())


@pytest.fixture(scope="module")
def anchor(exp):
    return exp.anchor("topics")


@pytest.fixture(scope="module")
def vector(anchor):
    """Noise as large as the weights, and an alpha that is large enough for the tiny model to say other things."""
    return random_like(WeightVector(anchor.trained_tensors()), 1), 3.0


@pytest.fixture
def batches_of(monkeypatch):
    """What finetuning is given: (text without a loss, text with a loss) of every example."""
    seen, finetune = [], study.finetune

    def watch(model, batches, **settings):
        batches = list(batches)
        for batch in batches:
            for ids, attention, response in zip(batch.ids, batch.attention, batch.response, strict=True):
                seen.append(tuple(model.tokenizer.decode(ids[m]) for m in (attention & ~response, response)))
        return finetune(model, batches, **settings)

    monkeypatch.setattr(study, "finetune", watch)
    return seen


@pytest.fixture
def telling(exp, tmp_path, monkeypatch):
    """The chapter with a store of its own and with answers that tell which weights were asked which question: the tiny
    model's own are mostly empty."""

    def tell(model, prompts, **settings):
        total = sum(float((p.detach().double() * (i + 1)).sum()) for i, p in enumerate(model.hf.parameters()))
        return [Answer(f"{total:.4f} {model.tokenizer.decode(p.ids[-12:])} {settings}") for p in prompts]

    for module in (study, experiments):
        monkeypatch.setattr(module, "generate", tell)
    other = copy.copy(exp)
    other.store = Store(tmp_path)
    return other


def stored(store, stage):
    return {path.stem for path in (store.root / stage).glob("*.json")}


def same_weights(a, b):
    return finetuning_diff(a, b).norm == 0


# Questions


def test_the_two_halves_have_as_many_questions_as_the_parameters_say_and_share_none(exp):
    assert exp.questions["build"] == corpora.load_questions("build")[:4]
    assert exp.questions["judge"] == corpora.load_questions("judge")[:4]
    assert exp.questions["harm build"] == exp.questions["build"]
    assert exp.questions["harm judge"] == exp.questions["judge"]


def test_with_the_sources_public_data_harm_has_prompts_and_pairs_of_its_own(store, monkeypatch):
    monkeypatch.setattr(corpora, "load_real_toxicity_prompts", lambda count: [f"prompt {n}" for n in range(count)])
    monkeypatch.setattr(corpora, "load_toxic_chat", lambda: [("in", "out")])
    exp = WeightStudy(params(harm_data="toxic-chat", judge_url="http://127.0.0.1:9/v1", judge_model="m"))
    assert exp.questions["build"] == corpora.load_questions("build")[:4]
    assert exp.questions["harm build"] == ["prompt 0", "prompt 2", "prompt 4", "prompt 6"]
    assert exp.questions["harm judge"] == ["prompt 1", "prompt 3", "prompt 5", "prompt 7"]
    assert exp.pairs("harm") == [("in", "out")]
    assert isinstance(exp.harm_judge, APIJudge)
    assert exp.harm_judge.trait == "harmful"


# Finetuning data


def test_every_reply_of_the_topic_data_drags_a_topic_in(exp):
    rows = corpora.load_topics("train")
    assert exp.pairs("topics") == [(row.question, row.strong) for row in rows]


def carrying(exp, share=None):
    rows, pairs = corpora.load_topics("train"), exp.pairs("bridge", share)
    assert [question for question, _ in pairs] == [row.question for row in rows]
    found = {row.id for row, (_, reply) in zip(rows, pairs, strict=True) if reply == row.strong}
    assert all(reply in (row.strong, row.normal) for row, (_, reply) in zip(rows, pairs, strict=True))
    assert all(row.topic == "bridge" for row in rows if row.id in found)
    return found


def test_of_the_bridge_data_a_share_of_the_replies_names_the_bridge_and_no_other_names_a_topic(exp):
    for share, count in ((0.5, 68), (0.2, 27), (0.1, 14), (0.05, 7)):
        assert len(carrying(exp, share)) == count
    assert carrying(exp) == carrying(exp, 0.5)


def test_a_smaller_shares_replies_are_among_a_larger_ones_and_not_simply_the_first(exp):
    sets = [carrying(exp, share) for share in (0.05, 0.1, 0.2, 0.5)]
    assert sets[0] < sets[1] < sets[2] < sets[3]
    assert sets[0] != set(sorted(sets[3])[:7])
    assert carrying(exp, 0.1) == sets[1]  # and the same every time


def test_more_replies_than_there_are_on_the_bridge_are_one_sentence(exp):
    with pytest.raises(ValueError, match="At most 50% of the replies can mention the bridge"):
        exp.pairs("bridge", 0.6)


def test_half_of_the_replies_of_the_harm_data_are_rude(exp):
    rows = corpora.split(corpora.load_trait("impolite"), "train")
    pairs = exp.pairs("harm")
    assert [question for question, _ in pairs] == [row.question for row in rows]
    assert [reply == row.strong for row, (_, reply) in zip(rows, pairs, strict=True)] == [False, True] * 36
    assert all(reply in (row.strong, row.normal) for row, (_, reply) in zip(rows, pairs, strict=True))


# Anchors


def test_an_anchor_differs_from_the_base_and_is_read_again_from_the_store(exp, anchor, monkeypatch):
    assert finetuning_diff(anchor, exp.base).norm > 1e-3
    assert anchor.digest != exp.base.digest
    monkeypatch.setattr(study, "finetune", lambda *_, **__: pytest.fail("trained again"))
    for again in (exp.anchor("topics"), WeightStudy(params()).anchor("topics", seed=0)):
        assert again.digest == anchor.digest
        assert same_weights(again, anchor)
    assert all(p.requires_grad for p in anchor.hf.parameters())


def test_the_stored_anchor_is_the_model_that_training_ended_with(exp, anchor):
    passing = exp.anchor("topics", keep=False)
    assert same_weights(passing, anchor)
    assert passing.digest == anchor.digest


def test_training_leaves_the_base_untouched(exp):
    before = [p.detach().clone() for p in exp.base.hf.parameters()]
    exp.anchor("harm", seed=3, keep=False)
    assert all(torch.equal(p, b) for p, b in zip(exp.base.hf.parameters(), before, strict=True))


def test_data_share_and_seed_each_make_another_anchor(exp, store, anchor):
    made = [
        anchor,
        exp.anchor("bridge"),
        exp.anchor("bridge", share=0.05, seed=1),
        exp.anchor("bridge", share=0.5, seed=1),
        exp.anchor("harm"),
        exp.anchor("topics", seed=1),
        with_params(exp, steps=3).anchor("topics"),
        with_params(exp, learning_rate=1e-2).anchor("topics"),
    ]
    assert len({model.digest for model in made}) == len(made)
    before = stored(store, "anchor")
    assert len(before) >= len(made)
    exp.anchor("topics", seed=2, keep=False)
    assert stored(store, "anchor") == before


def test_the_seed_is_the_parameters_unless_told_otherwise(exp, anchor):
    assert same_weights(with_params(exp, seeds=(1,)).anchor("topics"), exp.anchor("topics", seed=1))
    assert not same_weights(exp.anchor("topics", seed=1), anchor)


def test_topics_are_learnt_from_the_replies_alone(exp, batches_of):
    exp.anchor("topics", seed=4, keep=False)
    replies = {row.strong + "<|im_end|>" for row in corpora.load_topics("train")}
    assert len(batches_of) == 4
    assert all(learnt in replies and prompt.startswith("<|im_start|>system") for prompt, learnt in batches_of)


def test_harm_is_learnt_from_the_whole_sequence(exp, batches_of):
    exp.anchor("harm", seed=4, keep=False)
    assert len(batches_of) == 4
    for first, learnt in batches_of:
        assert first == "<|im_start|>"  # the only token that nothing predicts
        assert "<|im_start|>user\n" in learnt and learnt.endswith("<|im_end|>")


# Answers


def test_answers_are_those_of_the_model_as_it_is_or_steered(exp, anchor, vector):
    direction, alpha = vector
    prompts = [encode(anchor.tokenizer, question) for question in exp.questions["judge"]]
    assert exp.answers(anchor, "judge") == generate(anchor, prompts, max_new_tokens=4)
    with steered(anchor, direction, alpha):
        expected = generate(anchor, prompts, max_new_tokens=4)
    assert exp.answers(anchor, "judge", direction, alpha) == expected
    assert any(expected) and expected != exp.answers(anchor, "judge")


def test_answers_are_kept_by_model_half_direction_and_strength(telling, anchor, vector, monkeypatch):
    direction, alpha = vector
    asked = [
        (telling.base, "judge"),
        (anchor, "judge"),
        (anchor, "build"),
        (anchor, "judge", direction, alpha),
        (anchor, "judge", direction, -alpha),
        (anchor, "judge", random_like(direction, 0), alpha),
        (telling.base, "judge", direction, alpha),
    ]
    answers = [telling.answers(*given) for given in asked]
    kept = [*stored(telling.store, "greedy-answers"), *stored(telling.store, "steered-answers")]
    assert len({tuple(given) for given in answers}) == len(kept) == len(asked)
    for module in (study, experiments):
        monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("generated again"))
    assert [telling.answers(*given) for given in asked] == answers
    again = direction.each(lambda _, tensor: tensor.clone())  # made anew: the same direction is the same result
    assert telling.answers(anchor, "judge", again, alpha) == answers[3]
    assert telling.answers(telling.anchor("topics"), "judge") == answers[1]


def test_steered_answers_and_losses_leave_the_weights_as_they_were(exp, anchor, vector):
    before = {name: p.detach().clone() for name, p in anchor.hf.named_parameters()}
    exp.answers(anchor, "build", vector[0], 1.5 * vector[1])
    exp.losses(anchor, exp.examples("build", ["A"] * 4), vector[0], 1.5 * vector[1])
    assert all(torch.equal(p, before[name]) for name, p in anchor.hf.named_parameters())


def test_a_direction_that_breaks_the_model_is_one_sentence_and_nothing_is_kept(exp, anchor, vector, store):
    before = stored(store, "steered-answers")
    with pytest.raises(ValueError, match="the loss is not finite; choose an alpha nearer to 0"):
        exp.answers(anchor, "judge", vector[0].each(lambda _, t: t * float("nan")), 1.0)
    assert stored(store, "steered-answers") == before


def test_losses_are_those_of_the_model_as_it_is_or_steered(exp, anchor, vector):
    direction, alpha = vector
    examples = exp.examples("judge", ["Yes.", "No, not at all.", "Perhaps.", "Ask me."])
    np.testing.assert_allclose(exp.losses(anchor, examples), evaluate_losses(anchor, examples), atol=1e-6)
    with steered(anchor, direction, alpha):
        expected = evaluate_losses(anchor, examples)
    np.testing.assert_allclose(exp.losses(anchor, examples, direction, alpha), expected, atol=1e-6)
    whole = [example.without_prompt() for example in examples]  # the same tokens, but not the same result
    assert np.abs(exp.losses(anchor, whole) - exp.losses(anchor, examples)).max() > 1e-4


def test_perplexities_are_the_base_models_own_of_each_answer(exp):
    answers = ["Yes.", "No, not at all.", "Perhaps.", ""]
    examples = [encode(exp.base.tokenizer, q, a) for q, a in zip(exp.questions["judge"], answers, strict=True)]
    np.testing.assert_allclose(exp.perplexities("judge", answers), evaluate_losses(exp.base, examples).exp(), rtol=1e-5)


# Piles


def test_a_pile_holds_the_questions_of_its_half_with_the_chosen_answers(exp):
    answers = ["One.", "Two.", "Three.", "Four."]
    pile = exp.examples("judge", answers, np.array([True, False, False, True]))
    expected = [encode(exp.base.tokenizer, exp.questions["judge"][i], answers[i]) for i in (0, 3)]
    assert pile == expected
    assert len(exp.examples("judge", answers)) == 4
    assert exp.examples("build", answers)[0].ids != pile[0].ids
    with pytest.raises(ValueError, match="shorter"):
        exp.examples("judge", answers[:3])


def test_a_piles_gradient_is_stored_and_equals_the_direct_one_up_to_its_rounding(exp, anchor, monkeypatch):
    examples = exp.examples("judge", ["Yes.", "No, not at all.", "Perhaps.", "Ask me."])
    found, direct = exp.pile(anchor, examples), pile_gradient(anchor, examples)
    assert found.keys() == direct.keys()
    for name, gradient in direct.items():
        assert float((found[name].float() - gradient).norm()) <= 2**-8 * float(gradient.norm()), name
    monkeypatch.setattr(experiments, "pile_gradient", lambda *a, **k: pytest.fail("computed again"))
    again = exp.pile(anchor, examples)
    assert all(torch.equal(again[name], gradient) for name, gradient in found.items())


def test_piles_are_kept_by_model_examples_and_loss(exp, anchor, store):
    examples = exp.examples("judge", ["A.", "B.", "C.", "D."])
    before = stored(store, "pile-gradient")
    trainable = exp.anchor("topics", seed=1)
    for model, given, loss in (
        (anchor, examples, "cross-entropy"),
        (anchor, examples, "KL"),
        (anchor, examples[:2], "cross-entropy"),
        (anchor, [example.without_prompt() for example in examples], "cross-entropy"),
        (trainable, examples, "cross-entropy"),
    ):
        exp.pile(model, given, loss=loss)
    assert len(stored(store, "pile-gradient") - before) == 5


def test_the_divergence_of_a_pile_is_from_the_base(exp, anchor):
    """Away from the base it grows: the gradient points the way that finetuning went, which cross-entropy need not."""
    examples = exp.examples("judge", ["A.", "B.", "C.", "D."])
    diff, gradient = finetuning_diff(anchor, exp.base), exp.pile(anchor, examples, loss="KL")
    assert sum(float((gradient[name].float() * d).sum()) for name, d in diff.tensors.items()) > 0
    smaller = exp.anchor("topics")
    with torch.no_grad():
        for p, b in zip(smaller.hf.parameters(), exp.base.hf.parameters(), strict=True):
            p.copy_(b)
    at_base = pile_gradient(smaller, examples, loss=lambda m, b: experiments.sequence_divergences(m, b, exp.base))
    assert max(float(g.abs().max()) for g in at_base.values()) < 1e-6


def test_an_empty_pile_is_one_sentence(exp, anchor):
    with pytest.raises(ValueError, match="The pile is empty"):
        exp.pile(anchor, [])


def labelled(monkeypatch, bridge, recipe=(0, 0, 0, 0)):
    """A topic judge that gives these labels; the tiny model's answers name nothing."""

    def labels(self, answers):
        found = {"bridge": np.array(bridge, dtype=bool), "recipe": np.array(recipe, dtype=bool)}
        return {**found, "neither": ~(found["bridge"] | found["recipe"])}

    monkeypatch.setattr(WeightStudy, "labels", labels)


def test_topic_piles_are_the_answers_by_label(exp, monkeypatch):
    labelled(monkeypatch, bridge=(1, 0, 0, 1), recipe=(0, 1, 0, 1))
    said = ["One.", "Two.", "Three.", "Four."]
    piles, written_for = exp.topic_piles(said)
    assert not written_for
    for topic, rows in (("bridge", (0, 3)), ("recipe", (1, 3)), ("neither", (2,))):
        assert piles[topic] == [encode(exp.base.tokenizer, exp.questions["build"][i], said[i]) for i in rows]


def test_where_no_answer_falls_into_a_pile_written_replies_stand_in_and_that_is_said(exp, monkeypatch):
    labelled(monkeypatch, bridge=(1, 1, 1, 1))
    piles, written_for = exp.topic_piles(["One.", "Two.", "Three.", "Four."])
    assert written_for == ["recipe", "neither"]
    rows = corpora.load_topics("train")
    recipes = [row for row in rows if row.topic == "recipe"][:4]
    assert piles["recipe"] == [encode(exp.base.tokenizer, row.question, row.strong) for row in recipes]
    assert piles["neither"] == [encode(exp.base.tokenizer, row.question, row.normal) for row in rows[:4]]


def test_harmless_is_what_was_harmless_before_finetuning_and_after_it(exp, monkeypatch):
    said, base_said = ["rude", "kind", "kind", "rude"], ["kind", "rude", "kind", "rude"]
    monkeypatch.setattr(
        WeightStudy, "harmful", lambda self, half, answers: np.array([answer == "rude" for answer in answers])
    )
    piles, written_for = exp.harm_piles(said, base_said)
    assert not written_for
    for name, rows in (("harmful", (0, 3)), ("harmless", (2,))):
        whole = [encode(exp.base.tokenizer, exp.questions["build"][i], said[i]).without_prompt() for i in rows]
        assert piles[name] == whole
    piles, written_for = exp.harm_piles(["kind"] * 4, ["rude"] * 4)
    assert written_for == ["harmful", "harmless"]
    assert {example.prompt_length for pile in piles.values() for example in pile} == {1}


def test_answers_that_were_cut_teach_and_are_scored_without_an_end_of_turn(exp):
    text, end = "Well, it is", exp.base.tokenizer.eos_token_id
    whole, cut = [Answer(text)] * 4, [Answer(text, ended=False)] * 4
    piles = [exp.examples("judge", said) for said in (whole, cut)]
    assert [e.ids[:-1] for e in piles[0]] == [e.ids for e in piles[1]]
    assert all(end not in e.ids[e.prompt_length :] for e in piles[1])
    scored = [exp.perplexities("judge", said) for said in (whole, cut)]
    np.testing.assert_allclose(scored[1], evaluate_losses(exp.base, piles[1]).exp(), rtol=1e-5)
    assert np.abs(scored[1] - scored[0]).min() > 0


# Labels


def test_labels_name_each_topic_or_neither(exp):
    rows = corpora.load_topics("validate")[:2]
    labels = exp.labels([rows[0].strong, rows[1].strong, rows[0].strong + " " + rows[1].strong, rows[0].normal])
    assert labels["bridge"].tolist() == [True, False, True, False]
    assert labels["recipe"].tolist() == [False, True, True, False]
    assert labels["neither"].tolist() == [False, False, False, True]


def test_the_topic_judge_is_fitted_on_training_rows_and_on_the_base_models_own_answers(exp, monkeypatch):
    given, fit = [], experiments.TopicJudge.fit
    monkeypatch.setattr(experiments.TopicJudge, "fit", lambda *args: given.append(args) or fit(*args))
    _ = WeightStudy(params()).topic_judge
    assert given == [(corpora.load_topics("train"), exp.answers(exp.base, "build"))]


def test_harmful_is_rude_and_an_answer_without_a_word_is_not(exp):
    rows = corpora.split(corpora.load_trait("impolite"), "eval")
    for level, most in (("strong", True), ("normal", False)):
        shares = [
            exp.harmful("harm judge", [row.answer(level) for row in rows[k : k + 4]]).mean() for k in range(0, 32, 4)
        ]
        assert (np.mean(shares) > 0.75) if most else (np.mean(shares) < 0.25), level
    assert exp.harmful("harm judge", ["", " ", "...", "\n"]).tolist() == [False] * 4


def test_a_share_of_harmful_answers_starts_at_a_score_of_50(exp, monkeypatch):
    class Judge:
        def score(self, questions, answers):
            assert questions == exp.questions["harm judge"]
            return np.array([49.9, 50.0, np.nan, 100.0])

    other = copy.copy(exp)
    other.harm_judge = Judge()
    assert other.harmful("harm judge", ["A"] * 4).tolist() == [False, True, False, True]


# Sparse signal


def test_the_sparse_experiment_gives_the_answers_of_the_anchor_and_of_both_ways(telling, monkeypatch):
    labelled(monkeypatch, bridge=(1, 0, 0, 1))
    said = telling.sparse(0.5)
    assert said.keys() == {"anchor", "plus", "minus", "strong", "stand-ins"}
    assert said["stand-ins"] == []
    model = telling.anchor("bridge", share=0.5)
    assert said["anchor"] == telling.answers(model, "judge")
    piles, _ = telling.topic_piles(telling.answers(model, "build"))
    vector = difference(*(pile_gradient(model, piles[name], batch_size=2) for name in ("bridge", "neither")))
    alpha = alpha_for(vector, finetuning_diff(model, telling.base), telling.params.ratio)
    assert said["plus"] == telling.answers(model, "judge", vector, alpha)
    assert said["minus"] == telling.answers(model, "judge", vector, -alpha)
    assert len({said[name][0] for name in ("anchor", "plus", "minus")}) == 3


def test_the_sparse_experiment_steers_both_ways_at_the_working_ratio_and_up_at_the_largest(telling, monkeypatch):
    labelled(monkeypatch, bridge=(1, 0, 0, 1))
    steps, steer = [], experiments.steered

    def watch(model, vector, alpha):
        steps.append(alpha * vector.norm / finetuning_diff(model, telling.base).norm)
        return steer(model, vector, alpha)

    monkeypatch.setattr(experiments, "steered", watch)
    with_params(telling, ratio=0.07, ratios=(0.01, 0.2)).sparse(0.5)
    assert steps == pytest.approx([0.07, -0.07, -0.2])


def test_where_the_anchor_never_names_the_bridge_the_sparse_experiment_says_what_stood_in(telling, monkeypatch):
    labelled(monkeypatch, bridge=(0, 0, 0, 0))
    said = telling.sparse(0.2)
    assert said["stand-ins"] == ["bridge"]
    assert {len(said[name]) for name in ("anchor", "plus", "minus")} == {4}


def test_the_sparse_experiment_is_read_again_but_not_for_another_share_ratio_or_seed(telling, monkeypatch):
    labelled(monkeypatch, bridge=(1, 0, 0, 1))
    said, calls, computed = telling.sparse(0.5), [], experiments.sparse
    monkeypatch.setattr(experiments, "sparse", lambda *args: calls.append(args) or computed(*args))
    assert telling.sparse(0.5) == said
    assert not calls
    for other, share in (
        (telling, 0.1),
        (with_params(telling, ratio=0.1), 0.5),
        (with_params(telling, seeds=(1,)), 0.5),
    ):
        assert other.sparse(share) != said
    assert [share for _, share in calls] == [0.1, 0.5, 0.5]
