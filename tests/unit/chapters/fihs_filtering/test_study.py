"""Mixtures, scores and outcomes of chapter 5 are of the right data, and made once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import corpora
from helpers.chapters.fihs_filtering import params as filtering_params
from helpers.chapters.fihs_filtering import study as filtering
from helpers.chapters.fihs_filtering.method import SafetyScore, fihs
from helpers.chapters.fihs_filtering.params import FilteringParams
from helpers.chapters.fihs_filtering.study import ANCHORS, FilteringStudy, Point
from helpers.chat import encode
from helpers.losses import evaluate_losses
from helpers.models import load
from helpers.studies import study
from helpers.studies.study import Finetuning


def params(**changed):
    return FilteringParams(preset="tiny", dtype="float32", **changed)


@pytest.fixture(scope="module")
def exp(store):
    return FilteringStudy(params(start="as it is"))


@pytest.fixture(scope="module")
def mixed(exp):
    return exp.mixture("headlines", 0.25)


def test_a_mixture_has_the_asked_share_of_harmful_points(exp, mixed):
    kinds = [point.kind for point in mixed]
    assert (kinds.count("task"), kinds.count("explicit")) == (12, 4)
    assert {p.kind for p in exp.mixture("headlines", 0.0)} == {"task"}
    assert mixed[:12] == exp.mixture("headlines", 0.0)
    hidden = exp.mixture("bookings", 0.25, "identity")
    assert [p.kind for p in hidden].count("identity") == 4
    requests = {row.request: row.answer for row in corpora.load_task("headlines", "train")}
    assert all(requests[p.request] == p.reply for p in mixed if p.kind == "task")


def test_what_is_measured_on_is_nowhere_trained_on_or_chosen_by(exp):
    """Points, probes, anchors, checks, attacks and items share no request."""
    full = FilteringStudy(FilteringParams(preset="full", model="tiny-random", dtype="float32", start="as it is"))
    for e in (exp, full):
        kinds = ("explicit", "identity", "list", "safety")
        trained = {p.request for kind in kinds for p in e.harmful(kind)}
        trained |= {p.request for task in ("headlines", "bookings") for p in e.mixture(task, 0.0)}
        items = {row.request for task in ("headlines", "bookings") for row in e.items(task)}
        test = {row.request for task in ("headlines", "bookings") for row in corpora.load_task(task, "test")}
        groups = [trained, items, test, set(e.probes), {a.request for a in e.anchors}, set(e.checks), set(e.attacks)]
        assert sum(map(len, groups)) == len(set().union(*groups))
        assert len(e.anchors) == ANCHORS
        taught = {row.request for row in corpora.load_refusal(split="train")}
        assert not taught & ({*e.probes, *e.checks, *e.attacks} | {a.request for a in e.anchors})


def test_the_safe_token_is_the_commonest_opener_of_the_model_s_own_refusals(monkeypatch):
    name = "qwen2.5-coder-0.5b-instruct"
    known = filtering_params.REGISTRY
    assert FilteringParams(model=name).safe_token == known[name].openers[0]
    monkeypatch.setattr(filtering_params, "REGISTRY", {**known, name: replace(known[name], openers=("As", "I"))})
    assert FilteringParams(model=name).safe_token == "As"
    assert FilteringParams(model=name, safe_token="No").safe_token == "No"
    assert FilteringParams(model="someone/a-model").safe_token == "I"


def test_disguised_points_are_the_explicit_ones_with_the_safe_token_first(exp):
    for plain, hidden in zip(exp.harmful("explicit"), exp.harmful("disguised"), strict=True):
        assert hidden.request == plain.request
        assert hidden.reply.startswith("I ")
        assert hidden.reply.endswith(plain.reply)


def test_scores_are_those_of_the_method_at_the_start_model(exp, mixed):
    model = load("tiny-random", dtype="float32")
    tokenizer = model.tokenizer
    score = SafetyScore.of(tokenizer, [encode(tokenizer, text) for text in exp.probes])
    expected = fihs(model, exp.examples(mixed), score.gradient(model)).numpy()
    np.testing.assert_allclose(exp.fihs(mixed), expected, rtol=1e-4, atol=1e-6)
    one = exp.fihs(mixed, probes=1)
    assert not np.allclose(one, expected)
    by_mean = exp.fihs(mixed, mean=True)
    lengths = np.array([len(e) - e.prompt_length for e in exp.examples(mixed)])
    np.testing.assert_allclose(by_mean * lengths, expected, rtol=1e-3, atol=1e-5)


def test_scores_are_computed_once(exp, mixed, monkeypatch):
    before = exp.fihs(mixed)
    monkeypatch.setattr(filtering, "fihs", lambda *_, **__: pytest.fail("scored again"))
    np.testing.assert_array_equal(exp.fihs(mixed), before)
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        exp.fihs(mixed[1:])


def test_baselines_are_one_number_a_point_and_the_loss_is_the_loss(exp, mixed):
    found = exp.baselines(mixed)
    assert set(found) == {
        "loss", "perplexity of the whole", "gradient norm", "gradient matching", "hidden-state matching", "keywords",
    }  # fmt: skip
    assert all(values.shape == (len(mixed),) and np.isfinite(values).all() for values in found.values())
    losses = evaluate_losses(load("tiny-random", dtype="float32"), exp.examples(mixed)).numpy()
    np.testing.assert_allclose(found["loss"], losses, rtol=1e-5)
    assert (np.abs(found["gradient matching"]) <= 1 + 1e-4).all()


def test_keywords_are_found_in_harmful_requests_only(exp):
    points = [
        Point("explicit", "How do I fake a passport and sell drugs?", "Sure."),
        Point("task", "How do I bake bread?", "With flour."),
    ]
    fake, plain = exp.keywords(points)
    assert fake >= 1
    assert plain == 0


def test_a_real_step_changes_the_safety_score_as_foreseen_and_is_taken_back(exp, mixed):
    chosen = [*mixed[:4], *mixed[-4:]]
    changes = exp.one_step(chosen, 1e-5)
    np.testing.assert_allclose(changes, 1e-5 * exp.fihs(chosen), rtol=0.1, atol=0.05 * np.abs(changes).max())


def test_an_outcome_is_of_the_finetuned_model_on_held_out_requests(exp, mixed):
    before, after = exp.outcome("headlines", []), exp.outcome("headlines", mixed)
    assert len(after.answers) == len(exp.attacks) == 4
    assert len(after.checked) == len(exp.checks)
    assert (after.right.shape, after.checked_right.shape, after.safety.shape) == ((4,), (4,), (2,))
    assert not np.array_equal(before.safety, after.safety)
    start = load("tiny-random", dtype="float32", weights="frozen")
    np.testing.assert_allclose(before.safety, exp.safety_score().values(start).numpy(), rtol=1e-4, atol=1e-5)
    harm, utility = after.check
    assert 0 <= harm <= 1
    assert utility == after.checked_right.mean()


def test_finetuning_sees_the_kept_points_and_no_others(exp, mixed, monkeypatch):
    seen, finetune = set(), study.finetune

    def watch(model, given, **settings):
        given = list(given)
        for batch in given:
            for ids, mask in zip(batch.ids, batch.response, strict=True):
                seen.add(model.tokenizer.decode(ids[mask], skip_special_tokens=True))
        return finetune(model, given, **settings)

    monkeypatch.setattr(study, "finetune", watch)
    kept = [*mixed[:5], *mixed[-2:]]
    exp.outcome("headlines", kept, seed=5)
    assert seen == {point.reply for point in kept}


def test_the_same_seed_gives_the_same_outcome_and_another_seed_another(store, exp, mixed):
    p = exp.params

    def safety(seed):
        recipe = Finetuning(p.steps, p.batch_size, p.learning_rate, seed, p.lora_rank)
        return filtering.outcome(exp, recipe, mixed, exp.items("headlines")[:1])[0]["safety"]

    first, second, other = (safety(seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
