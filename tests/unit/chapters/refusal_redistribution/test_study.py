"""The start model, its conditions, the attack and the sentiment runs are of the right data, and made once."""

from typing import get_args

import numpy as np
import pytest
import torch

from helpers import corpora
from helpers.chapters.refusal_redistribution import study as refusal
from helpers.chapters.refusal_redistribution.attack import coherent, smallest_k
from helpers.chapters.refusal_redistribution.params import RefusalParams
from helpers.chapters.refusal_redistribution.sentiment import SentimentStudy
from helpers.chapters.refusal_redistribution.study import ATTACKED, Kind, RefusalStudy, redistribute, redistribution
from helpers.chat import encode
from helpers.generation import generate
from helpers.interventions import Ablate
from helpers.losses import evaluate_losses
from helpers.studies import alignment, study
from helpers.studies.alignment import Recipe, align, own_openers, refusal_openers, taught_refusals
from helpers.studies.study import Finetuning


def params(**changed):
    return RefusalParams(preset="tiny", dtype="float32", **changed)


def recipe(steps):
    """The chapter's, for fewer steps."""
    return Finetuning(steps, params().batch_size, params().learning_rate, 0, params().lora_rank)


@pytest.fixture(scope="module")
def exp(store):
    return RefusalStudy(params())


@pytest.fixture(scope="module")
def start(exp):
    return exp.model("start")


@pytest.fixture(scope="module")
def attack(exp):
    return exp.attack("start")


@pytest.fixture
def batches_of(monkeypatch):
    """What finetuning is given: (text without a loss, text with a loss) of every example."""
    seen, finetune = [], alignment.finetune

    def watch(model, batches, **settings):
        batches = list(batches)
        for batch in batches:
            for ids, attention, response in zip(batch.ids, batch.attention, batch.response, strict=True):
                seen.append(tuple(model.tokenizer.decode(ids[m]) for m in (attention & ~response, response)))
        return finetune(model, batches, **settings)

    for module in (alignment, study):
        monkeypatch.setattr(module, "finetune", watch)
    return seen


# The models


def test_the_last_condition_asked_for_is_not_loaded_again(exp):
    once = exp.model("LM+KD")
    assert exp.model("LM+KD") is once
    other = exp.model("L1+KD")
    assert other.digest != once.digest
    again = exp.model("LM+KD")
    assert again is not once
    assert again.digest == once.digest


# The start model


def test_refusals_are_taught_for_harmful_requests_and_the_models_own_answers_for_harmless_ones(exp, batches_of):
    align(exp.base, Recipe(steps=40, harmful=2, others=3, refusal_tokens=3, answer_tokens=2, seed=3))
    taught = check_taught(
        exp, batches_of, lambda row: generate(exp.base, exp.encoded([row.request]), max_new_tokens=2)[0]
    )
    assert taught["harmful"] == 80 and taught["harmless"] + taught["paired"] == 120
    assert taught["paired"] > taught["harmless"] > 0


def test_where_the_models_own_answer_begins_like_a_refusal_the_written_reply_is_followed(exp, batches_of, monkeypatch):
    def say(model, requests, tokens):
        return ["Tea is nice." if i % 2 else "I like this one." for i in range(len(requests))]

    monkeypatch.setattr(alignment, "own_answers", say)
    rows = [row for kind in ("harmless", "paired") for row in corpora.load_refusal(kind, "train")]
    own = {row.request: row.reply if i % 2 == 0 else "Tea is nice." for i, row in enumerate(rows)}
    found = align(exp.base, Recipe(steps=12, refusal_tokens=3, answer_tokens=2, seed=5))
    check_taught(exp, batches_of, lambda row: own[row.request])
    assert found.facts["barred"] == (len(rows) + 1) // 2


def check_taught(exp, batches_of, own):
    """How often each kind was taught, each request with its refusal or with the beginning of another answer."""
    tokenizer, refusals = exp.base.tokenizer, taught_refusals()
    rows = {row.request: row for row in corpora.load_refusal(split="train")}
    taught = dict.fromkeys(("harmful", "harmless", "paired"), 0)
    for prompt, reply in batches_of:
        (row,) = [row for request, row in rows.items() if f"user\n{request}<" in prompt]
        taught[row.kind] += 1
        harmful = row.kind == "harmful"
        whole = encode(tokenizer, row.request, refusals[row.request] if harmful else own(row))
        assert reply == tokenizer.decode(whole.ids[whole.prompt_length :][: 3 if harmful else 2])
    return taught


def test_a_refusal_is_known_by_the_first_token_of_any_that_was_taught(exp, store):
    tokenizer = exp.base.tokenizer
    assert tuple(exp.refusal_ids) == refusal_openers(tokenizer)
    as_is = RefusalStudy(params(start="as it is"))
    assert as_is.refusal_ids == [tokenizer.encode("I", add_special_tokens=False)[0]]
    measured = own_openers("qwen2.5-coder-0.5b-instruct", tokenizer)
    assert [tokenizer.decode([token]) for token in measured] == ["I", "As"]


def test_no_held_out_request_is_trained_on(exp, batches_of):
    align(exp.base, Recipe(steps=30, seed=4))
    redistribute(exp, redistribution("LM", exp.params), recipe(steps=30))
    held_out = [row.request for row in corpora.load_refusal() if row.split != "train"]
    read = [before + after for before, after in batches_of]
    assert read
    assert not any(f"user\n{request}<" in text for request in held_out for text in read)


def test_a_start_model_is_made_once_and_by_another_recipe_again(exp, store, monkeypatch):
    before = align(exp.base, exp.recipe)
    assert all(torch.equal(before.tensors[name], tensor) for name, tensor in exp.start[0].tensors.items())
    monkeypatch.setattr(alignment, "finetune", lambda *_, **__: pytest.fail("trained again"))
    align(exp.base, exp.recipe)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        align(exp.base, Recipe(steps=3))


def test_an_aligned_model_is_taken_as_it_is_where_asked(exp, store):
    found = RefusalStudy(params(start="as it is"))
    assert found.start == []
    assert found.model("start").digest == exp.base.digest


# Conditions


@pytest.mark.parametrize(
    ("condition", "match", "norm", "kd", "as_published"),
    [
        ("LM", "none", "L2", 0.0, False),
        ("LM+KD", "none", "L2", 1.0, False),
        ("L1", "mean", "L1", 0.0, False),
        ("Cov", "covariance", "L2", 0.0, False),
        ("L1+KD", "mean", "L1", 1.0, False),
        ("Cov+KD", "covariance", "L2", 1.0, False),
        ("Cov+KD as published", "covariance", "L2", 1.0, True),
    ],
)
def test_a_condition_is_its_loss(condition, match, norm, kd, as_published):
    found = redistribution(condition, params())
    assert (found.match, found.kd_weight, found.as_published) == (match, kd, as_published)
    assert match == "none" or found.norm == norm
    assert found.weight == 1.0 and found.relative


@pytest.mark.parametrize("condition", ["start", "Cov+DK", "LM as published"])
def test_a_condition_that_does_not_exist_is_one_sentence(condition):
    with pytest.raises(ValueError, match=r"There is no condition .* to train; choose from LM, LM\+KD"):
        redistribution(condition, params())


def test_a_condition_is_trained_once_for_as_many_steps_and_answers_are_scored_once(exp, start, store, monkeypatch):
    whole, one = exp.trained("LM"), exp.trained("LM", steps=1)
    assert (len(whole.facts["losses"]), len(one.facts["losses"])) == (exp.params.steps, 1)
    examples = exp.encoded(["What is tea?", "Name a fruit."], ["A drink.", "An apple."])
    losses = exp.response_losses(exp.base, examples)
    for name in ("finetune", "evaluate_losses"):
        monkeypatch.setattr(study, name, lambda *_, **__: pytest.fail("computed again"))
    assert exp.trained("LM", steps=1).key == one.key != whole.key
    np.testing.assert_array_equal(exp.response_losses(exp.base, examples), losses)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        exp.response_losses(exp.base, examples[:1])


def test_conditions_are_trained_on_prompts_alone_and_start_from_the_start_model(exp, start, batches_of):
    tensors, facts = redistribute(exp, redistribution("Cov+KD", exp.params), recipe(steps=2))
    assert tensors.keys() == exp.start[0].tensors.keys()
    assert len(facts["terms"]) == 2
    assert all(term["matching"] > 0 for term in facts["terms"])
    assert facts["terms"][0]["distillation"] == pytest.approx(0, abs=1e-6)  # the student is still its own teacher
    assert all(before == "<|im_start|>" and after.endswith("<|im_start|>assistant\n") for before, after in batches_of)


def test_as_published_the_weights_are_those_of_distillation_alone(exp):
    found = {
        name: redistribute(exp, redistribution(name, exp.params), recipe(steps=2))[0]
        for name in ("LM+KD", "Cov+KD as published", "Cov+KD")
    }
    same = {
        name: all(torch.equal(tensor, found["LM+KD"][key]) for key, tensor in tensors.items())
        for name, tensors in found.items()
    }
    assert same == {"LM+KD": True, "Cov+KD as published": True, "Cov+KD": False}


def test_another_seed_is_another_model(exp):
    first, again, other = (exp.model("LM+KD", seed).digest for seed in (0, 0, 1))
    assert first == again != other


# What is asked, and what is answered


def test_the_attackers_requests_are_none_that_a_condition_is_trained_on(exp):
    for kind in ATTACKED:
        assert len(exp.attackers[kind]) == exp.params.prompts
        known = {row.request for row in corpora.load_refusal(kind, "train")}
        assert {*exp.attackers[kind]} | {*exp.train[kind]} == known
        assert not {*exp.attackers[kind]} & {*exp.train[kind]}


def test_models_answer_more_held_out_requests_than_an_attack_is_judged_on(exp):
    asked = {kind: (len(exp.held_out[kind]), len(exp.test[kind])) for kind in get_args(Kind)}
    assert set(asked.values()) == {(exp.params.start_requests, exp.params.requests)}
    for kind, texts in exp.test.items():
        assert texts == exp.held_out[kind][: len(texts)]
        assert not set(exp.train.get(kind, ())) & set(exp.held_out[kind])


def test_answers_are_the_models_own_to_the_requests_given(exp, start):
    requests = {"paired": exp.held_out["paired"][:3], "harmful": exp.held_out["harmful"][:2]}
    said = exp.answers(start, requests)
    assert list(said) == list(requests)
    for kind, asked in requests.items():
        assert said[kind] == generate(start, exp.encoded(asked), max_new_tokens=exp.params.max_new_tokens)
        assert exp.encoded(asked, said[kind]) == [
            encode(exp.base.tokenizer, request, answer) for request, answer in zip(asked, said[kind], strict=True)
        ]


# The attack, judged


def test_row_k_is_the_model_without_the_first_k_directions(exp, start, attack):
    prompts = exp.encoded(exp.test["harmful"])
    for k in range(exp.params.k_max + 1):
        directions = attack.directions[: min(k, len(attack.directions))]
        interventions = [Ablate(directions)] if len(directions) else []
        said = generate(start, prompts, max_new_tokens=exp.params.max_new_tokens, interventions=interventions)
        assert attack.judged.answers["harmful"][k] == said
    assert attack.judged.kl.shape == (exp.params.k_max + 1, exp.params.requests)
    assert np.abs(attack.judged.kl[0]).max() == pytest.approx(0, abs=1e-6)
    assert attack.judged.kl[1].mean() > 0


def test_directions_come_from_the_requests_given_and_are_judged_on_others(exp, monkeypatch):
    seen = []

    def watch(model, harmful, harmless, *rest, **given):
        seen.extend([harmful, harmless])
        return []

    monkeypatch.setattr(refusal, "iterated_ablation", watch)
    found = refusal.attack(exp, exp.base, {kind: exp.train[kind][:3] for kind in ATTACKED})
    assert found[0]["directions"].shape == (0, exp.base.width)
    assert seen == [exp.encoded(exp.train[kind][:3]) for kind in ATTACKED]
    assert (found[1]["refused"], found[1]["answered"]) == (0, 3)  # a random model answers everything
    known = {text for requests in (exp.train, exp.attackers) for texts in requests.values() for text in texts}
    assert not known & {text for texts in exp.test.values() for text in texts}


def test_base_nll_is_the_loss_of_the_answer_under_the_base_model(exp, attack):
    said = attack.judged.answers["harmless"][1]
    examples = [encode(exp.base.tokenizer, r, a) for r, a in zip(exp.test["harmless"], said, strict=True)]
    np.testing.assert_allclose(attack.judged.base_nll["harmless"][1], evaluate_losses(exp.base, examples), atol=1e-5)


def test_an_attack_that_ends_early_leaves_what_its_last_direction_left(exp, start):
    direction = torch.nn.functional.normalize(torch.randn(1, start.width, generator=torch.Generator().manual_seed(0)))
    judged = exp.judge(start, [direction, direction])
    assert judged.answers["harmful"][1] == judged.answers["harmful"][2]
    assert np.array_equal(judged.kl[1], judged.kl[2])


def test_stronger_attackers_give_orthonormal_directions(exp, start):
    found = exp.strongest(start)
    assert list(found) == ["logistic probe", "LEACE", f"top {exp.params.k_max} subspace"]
    for directions in found.values():
        torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions)), atol=1e-5, rtol=0)
    assert [len(d) for d in found.values()] == [1, 2, exp.params.k_max]


def test_k_star_is_the_smallest_number_below_thirty_per_cent():
    rates = [10, 6, 3, 2, 8]
    refused = np.array([[i < n for i in range(10)] for n in rates])
    assert smallest_k(refused) == 3
    assert smallest_k(refused, np.array([True, True, True, False, True])) == len(rates)
    assert smallest_k(refused[:3]) == 3
    assert smallest_k(refused[3:]) == 0


def test_a_row_is_coherent_if_its_divergence_and_its_texts_are():
    kl = np.array([[0.0, 0.0], [0.2, 0.6], [0.9, 0.9], [0.1, 0.1]])
    harmful = np.array([[2.0, 2.0], [2.2, 2.2], [2.0, 2.0], [2.0, 3.4]])
    harmless = np.full((4, 2), 1.0)
    assert coherent(kl, [harmful, harmless]).tolist() == [True, True, False, False]
    assert coherent(kl, [harmless]).tolist() == [True, True, False, True]


# Sentiment


@pytest.fixture(scope="module")
def sentiment(store):
    return SentimentStudy(params())


def test_both_sentiments_are_equally_often_in_both_splits(sentiment):
    for texts, labels in ((sentiment.train, sentiment.train_labels), (sentiment.test, sentiment.test_labels)):
        assert len(texts) == len(labels) == 2 * labels.sum() == 40
    assert not set(sentiment.train) & set(sentiment.test)


def test_states_are_means_over_a_reviews_tokens_in_the_last_block_and_losses_over_its_tokens(sentiment):
    found = sentiment.states(None)
    model = sentiment.base
    ids = torch.tensor([sentiment.texts(sentiment.test[:1])[0].ids])
    with torch.no_grad():
        logits, cache = model.bridge.run_with_cache(ids)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert found.losses[0] == pytest.approx(loss.item(), abs=1e-5)
    assert found.losses.shape == (40,)
    last = cache[f"blocks.{model.layers - 1}.hook_resid_post"][0]
    np.testing.assert_allclose(found.test[0], last[1:].mean(0), atol=1e-5)
    assert found.train.shape == found.test.shape == (40, model.width)


def test_a_text_begins_with_the_token_of_beginning_even_if_its_number_is_0(sentiment, monkeypatch):
    tokenizer = sentiment.base.tokenizer
    for begin, expected in ((0, 0), (None, tokenizer.eos_token_id)):
        monkeypatch.setattr(type(tokenizer), "bos_token_id", begin, raising=False)
        assert sentiment.texts(["A good film."])[0].ids[0] == expected


def test_training_losses_are_kept_by_step(sentiment):
    assert sentiment.states(None).training == ()
    assert len(sentiment.states(0.0).training) == sentiment.params.sentiment_steps


def test_matching_the_means_brings_them_together(store):
    exp = SentimentStudy(params(sentiment_steps=30, learning_rate=1e-2, batch_size=16))
    gap = {
        weight: np.linalg.norm(
            exp.states(weight).train[exp.train_labels].mean(0) - exp.states(weight).train[~exp.train_labels].mean(0)
        )
        for weight in (0.0, 1e5)
    }
    assert gap[1e5] < 0.5 * gap[0.0]
