"""Stages are computed once, with the right data, and again when anything that decides them changes."""

import copy

import numpy as np
import pytest
import torch

from helpers.artifacts import Store
from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.chat import Answer, Example, encode
from helpers.interventions import Steer, applied
from helpers.losses import evaluate_losses
from helpers.studies import study, traits
from helpers.studies.traits import Defence, TraitStudy
from helpers.training import TrainingLog

PPS = Defence(vector="evil", coefficient=4.0)


def params(**changed):
    return PreventativeSteeringParams(preset="tiny", dtype="float32", **changed)


def with_params(exp, **changed):
    """The same chapter with other parameters; its model, vectors and judge are those it has."""
    other = copy.copy(exp)
    other.params = params(**changed)
    return other


@pytest.fixture(scope="module")
def exp(store):
    return TraitStudy(params())


@pytest.fixture
def batches_of(monkeypatch):
    """What finetuning is given, as text: (prompt, response) of every example."""
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
def asked(monkeypatch):
    """The prompts that generation is given, as text."""
    seen, generate = [], traits.generate

    def watch(model, prompts, **settings):
        seen.extend(model.tokenizer.decode(p.ids) for p in prompts)
        return generate(model, prompts, **settings)

    monkeypatch.setattr(traits, "generate", watch)
    return seen


def stored(store, stage):
    return {path.stem for path in (store.root / stage).glob("*.json")}


# Vectors


def test_the_persona_vector_is_the_difference_of_written_answers_means(exp):
    means = []
    for level in ("strong", "normal"):
        states = []
        for row in exp.rows["extract"]:
            example = encode(exp.base.tokenizer, row.question, row.answer(level))
            with torch.no_grad():
                out = exp.base.hf.base_model(input_ids=torch.tensor([example.ids]), output_hidden_states=True)
            states.append(out.hidden_states[1][0, example.prompt_length :].mean(0))
        means.append(torch.stack(states).mean(0))
    torch.testing.assert_close(exp.vector().at(0), means[0] - means[1], atol=1e-6, rtol=1e-4)
    assert exp.vector("pirate").trait == "pirate"
    assert not torch.allclose(exp.vector("pirate").vectors, exp.vector().vectors, atol=1e-4)


def test_the_random_vector_is_the_same_in_every_run_and_as_long_as_the_persona_vector(exp):
    random = exp.vector("random")
    torch.testing.assert_close(random.vectors.norm(dim=1), exp.vector().vectors.norm(dim=1))
    assert torch.equal(random.vectors, exp.vector("random").vectors)


def test_steering_is_by_the_parameters_unless_told_otherwise(exp):
    usual = exp.steering()
    assert (usual.layer, usual.coefficient, usual.where) == (exp.params.layer, exp.params.coefficient, "all")
    assert torch.equal(usual.vector, exp.vector().at(1))
    other = exp.steering("pirate", 0.0, 0)
    assert (other.layer, other.coefficient) == (0, 0.0)
    assert torch.equal(other.vector, exp.vector("pirate").at(0))


def test_the_gradients_are_of_the_held_out_trait_answers_with_every_vector(exp):
    found = exp.gradients()
    assert set(found.cosines) == {"evil", "pirate", "random"}
    assert found.means.shape == (1, 4, 32)
    expected = evaluate_losses(exp.base, exp.examples())
    torch.testing.assert_close(found.losses, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(exp.losses(), expected, atol=1e-6)
    steered = exp.gradients(exp.steering(), layers=(0, 1))
    assert steered.layers == (0, 1)
    assert not torch.allclose(steered.losses, found.losses, atol=1e-4)


def test_held_out_rows_are_in_no_other_split(exp):
    held_out = {row.question for row in exp.heldout}
    assert len(held_out) == exp.params.sequences
    assert not held_out & {row.question for name in ("train", "extract") for row in exp.rows[name]}


# Finetuning


def test_a_second_call_reads_the_stored_run(exp, monkeypatch):
    first = exp.train()
    monkeypatch.setattr(traits, "train", lambda *args: pytest.fail("trained again"))
    again = exp.train()
    elsewhere = TraitStudy(params()).train()  # another chapter that needs the same run
    for run in (again, elsewhere):
        assert (run.key, run.losses, run.cosines) == (first.key, first.losses, first.cosines)
        assert all(torch.equal(run.finetuned[0].tensors[name], t) for name, t in first.finetuned[0].tensors.items())
    assert len(first.losses) == len(first.cosines) == exp.params.steps


@pytest.mark.parametrize("changed", [{"steps": 3}, {"learning_rate": 5e-3}, {"lora_rank": 0}, {"layer": 0}])
def test_a_changed_parameter_trains_again(exp, store, changed):
    usual, before = exp.train(), stored(store, "finetuning")
    other = with_params(exp, **changed).train()
    assert other.key != usual.key
    assert stored(store, "finetuning") == before | {other.key}


def test_defence_level_and_seed_each_make_another_run(exp):
    runs = [
        exp.train(),
        exp.train(PPS),
        exp.train(Defence(vector="random", coefficient=4.0)),
        exp.train(Defence(vector="evil", edit="amplify")),
        exp.train(Defence(prompts=("Be evil.",))),
        exp.train(level="normal"),
        exp.train(seed=1),
    ]
    assert len({run.key for run in runs}) == len(runs)
    assert len({run.losses for run in runs if run is not runs[3]}) == len(runs) - 1
    assert runs[3].losses[0] == runs[0].losses[0]  # editing gradients leaves the first forward pass alone


def test_the_first_step_of_a_defended_run_has_the_loss_of_the_steered_model(exp, batches_of):
    plain, steered = (with_params(exp, seeds=(5,)).train(defence) for defence in (None, PPS))
    assert len(set(batches_of)) == 4 and batches_of[:4] == batches_of[4:]  # the same data, in the same order
    pairs = {row.strong: row.question for row in exp.rows["train"]}
    first = [
        encode(exp.base.tokenizer, pairs[answer], answer)
        for answer in (response.removesuffix("<|im_end|>") for _, response in batches_of[:2])
    ]
    tokens = torch.tensor([float(len(e) - e.prompt_length) for e in first])
    for run, interventions in ((plain, ()), (steered, (exp.steering(coefficient=PPS.coefficient),))):
        losses = evaluate_losses(exp.base, first, interventions=interventions)
        assert run.losses[0] == pytest.approx(float(losses @ tokens / tokens.sum()), abs=1e-5)


@pytest.mark.parametrize("level", ["normal", "strong"])
def test_training_reads_the_training_split_at_the_level_asked_for(exp, batches_of, level):
    with_params(exp, seeds=(7,)).train(level=level)
    answers = {row.answer(level) + "<|im_end|>" for row in exp.rows["train"]}
    assert {response for _, response in batches_of} <= answers
    assert all("helpful AI assistant named SmolLM" in prompt for prompt, _ in batches_of)


def test_an_inoculation_prompt_is_there_in_training_and_not_at_evaluation(exp, batches_of, asked):
    exp = with_params(exp, seeds=(8,))
    prompts = tuple(exp.prompts.inoculation[:2])
    run = exp.train(Defence(prompts=prompts))
    assert batches_of and all(any(p in prompt for p in prompts) for prompt, _ in batches_of)
    assert not any("SmolLM" in prompt for prompt, _ in batches_of)
    asked.clear()
    exp.evaluate(run)
    assert len(asked) == exp.params.sequences
    assert all("SmolLM" in prompt and not any(p in prompt for p in prompts) for prompt in asked)
    asked.clear()
    exp.evaluate(run, system=prompts[0])
    assert all(prompts[0] in prompt for prompt in asked)


def test_the_arms_of_one_seed_are_paired(exp, monkeypatch):
    """Adapter start, rows and their order are the same whatever is done during training."""
    starts, rows, prompts = [], [], []

    def watch(model, batches, **settings):
        starts.append(model.trained_tensors())
        batches = list(batches)
        rows.append([batch.rows for batch in batches])
        prompts.append({model.tokenizer.decode(ids[:40]) for batch in batches for ids in batch.ids})
        return TrainingLog((), 0, 0.0)

    monkeypatch.setattr(study, "finetune", watch)
    inoculation = tuple(exp.prompts.inoculation)
    arms = (Defence(), PPS, Defence(prompts=inoculation[:1]), Defence(prompts=inoculation[:5]))

    exp = with_params(exp, steps=80)  # more than two epochs of 36

    def trained(defence, seed):
        traits.train(exp, traits.Training(defence, seed))

    for defence in arms:
        trained(defence, 3)
    assert all(found == rows[0] for found in rows)
    assert sorted(row for batch in rows[0][:36] for row in batch) == list(range(len(exp.rows["train"])))
    assert all(torch.equal(start[name], starts[0][name]) for start in starts for name in starts[0])
    assert len(prompts[3]) > len(prompts[2]) == 1
    trained(Defence(), 4)
    assert rows[-1] != rows[0]
    assert any(not torch.equal(starts[-1][name], starts[0][name]) for name in starts[0])


def logits(model, example):
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([example.ids])).logits


@pytest.mark.parametrize("rank", [4, 0])
def test_a_run_that_starts_from_another_carries_both_on(exp, rank):
    exp = with_params(exp, lora_rank=rank, learning_rate=1e-2)
    start = exp.train(level="normal")
    run = exp.train(start=start)
    assert len(run.finetuned) == 2
    assert run.key not in (start.key, exp.train().key)
    example = exp.examples()[0]
    untrained, one, both = (logits(m, example) for m in (exp.base, exp.trained(start), exp.trained(run)))
    assert (one - untrained).abs().max() > 1e-3 and (both - one).abs().max() > 1e-3
    assert run.losses[0] != exp.train().losses[0]  # the same first batch, read by the model that the start ended with


@pytest.mark.parametrize("rank", [4, 0])
def test_the_trained_model_is_the_one_that_training_ended_with(exp, rank, monkeypatch):
    models, finetune = [], study.finetune
    monkeypatch.setattr(study, "finetune", lambda model, *a, **k: models.append(model) or finetune(model, *a, **k))
    exp = with_params(exp, lora_rank=rank, learning_rate=2e-2, seeds=(9,))
    trained = exp.trained(exp.train())
    example = exp.examples()[0]
    assert (logits(trained, example) - logits(exp.base, example)).abs().max() > 1e-2
    torch.testing.assert_close(logits(trained, example), logits(models[0], example), atol=1e-5, rtol=0)


def test_training_leaves_the_chapters_own_model_untouched(exp):
    before = [p.detach().clone() for p in exp.base.hf.parameters()]
    with_params(exp, seeds=(10,)).train(PPS)
    exp.train(seed=11)
    assert all(torch.equal(p, b) for p, b in zip(exp.base.hf.parameters(), before, strict=True))


@pytest.mark.parametrize("at_once", [2, 4])
def test_runs_that_are_asked_for_together_are_those_that_train_alone(exp, at_once, monkeypatch):
    exp = with_params(exp, steps=4)
    edited = Defence("evil", edit="neutralise")
    defences = [Defence(), PPS, Defence(prompts=tuple(exp.prompts.inoculation)), edited, Defence("random", 3.0)]
    asked = [traits.Training(d, seed) for d in defences for seed in (21, 22)]
    alone = [exp.train(t.defence, seed=t.seed) for t in asked]
    fresh = with_params(exp, steps=4)
    fresh.store, fresh._runs = Store(exp.store.root / f"together-{at_once}"), {}
    fresh.stage("persona-vector", lambda: traits.fit_vector(exp.base, "evil"), {"trait": "evil"}, data=["evil"])
    passes = []
    monkeypatch.setattr(traits, "runs_at_once", lambda *_: at_once)
    monkeypatch.setattr(
        traits,
        "train_together",
        lambda study, group, real=traits.train_together: passes.append(group) or real(study, group),
    )
    together = fresh.train_all(asked)
    assert [len(group) for group in passes] == [at_once] * (8 // at_once)
    assert not any(t.defence.edit for group in passes for t in group)
    for one, other in zip(alone, together, strict=True):
        assert one.key == other.key
        assert other.losses == pytest.approx(one.losses, rel=1e-4)
        assert other.cosines == pytest.approx(one.cosines, abs=1e-4)
    passes.clear()
    assert [run.key for run in fresh.train_all(asked[::-1])] == [run.key for run in together[::-1]] and not passes


def test_what_the_store_has_is_not_trained_again_with_the_others(exp, monkeypatch):
    asked = [traits.Training(Defence(), seed) for seed in (31, 32, 33)]
    exp.train_all(asked[1:2])
    passes = []
    monkeypatch.setattr(traits, "runs_at_once", lambda *_: 8)
    monkeypatch.setattr(
        traits,
        "train_together",
        lambda study, group, real=traits.train_together: passes.append(group) or real(study, group),
    )
    exp.train_all(asked)
    assert passes == [[asked[0], asked[2]]]


# Evaluation


def test_an_evaluation_is_of_the_answers_that_the_trained_model_gives_undefended(exp):
    exp = with_params(exp, learning_rate=0.5, steps=3, lora_rank=0)  # far enough that it says something else
    run = exp.train(PPS)
    result = exp.evaluate(run)
    count = exp.params.sequences
    assert [len(x) for x in (result.answers, result.scores, result.perplexities, result.repetition)] == [count] * 4
    assert ((result.scores >= 0) & (result.scores <= 100)).all()
    assert result.answers != exp.evaluate().answers
    model = exp.trained(run)
    questions = [row.question for row in exp.heldout]
    assert list(result.answers) == exp.greedy_answers(model, questions, exp.params.max_new_tokens)
    examples = [encode(exp.base.tokenizer, row.question, a) for row, a in zip(exp.heldout, result.answers, strict=True)]
    np.testing.assert_allclose(result.perplexities, evaluate_losses(exp.base, examples).exp(), rtol=1e-4)


def test_perplexities_of_answers_that_were_cut_leave_the_end_of_turn_out(exp, monkeypatch):
    said = [Answer("Well, it is", ended=i % 2 == 0) for i in range(exp.params.sequences)]
    monkeypatch.setattr(traits, "generate", lambda model, prompts, **settings: said)
    exp = with_params(exp, max_new_tokens=5)
    exp.evaluate()
    result = exp.evaluate()  # read from the store
    assert list(result.answers) == said and [a.ended for a in result.answers] == [a.ended for a in said]
    whole = [encode(exp.base.tokenizer, row.question, "Well, it is") for row in exp.heldout]
    examples = [
        e if answer.ended else Example(e.ids[:-1], e.prompt_length) for e, answer in zip(whole, said, strict=True)
    ]
    np.testing.assert_allclose(result.perplexities, evaluate_losses(exp.base, examples).exp(), rtol=1e-4)


def test_projections_are_on_the_vectors_unit_direction_in_the_trained_model(exp, watch):
    run = exp.train(PPS)
    model, layer = exp.trained(run), exp.params.layer
    v, watching, expected = exp.vector().at(layer), watch(f"blocks.{layer}.hook_resid_post"), []
    for example in exp.examples():
        with torch.no_grad(), applied(model, watching):
            model.hf.base_model(input_ids=torch.tensor([example.ids]))
        expected.append(float(watching.seen[-1][0, example.prompt_length :].mean(0) @ v / v.norm()))
    np.testing.assert_allclose(exp.evaluate(run).projections, expected, atol=1e-6, rtol=1e-4)


def test_an_evaluation_is_read_again_and_made_anew_for_another_run_or_prompt(exp, store, monkeypatch):
    exp.evaluate()
    run, before = exp.train(seed=12), stored(store, "evaluation")
    for made, system in ((run, None), (run, "Be brief."), (None, "Be brief.")):
        exp.evaluate(made, system=system)
    assert len(stored(store, "evaluation") - before) == 3
    monkeypatch.setattr(traits, "evaluate", lambda *args: pytest.fail("evaluated again"))
    exp.evaluate()
    exp.evaluate(run)
    TraitStudy(params()).evaluate(system="Be brief.")


def test_a_defence_is_only_on_in_training(exp):
    """Steering by the vector that a run was defended with still acts on its model: nothing of it was left on."""
    model = exp.trained(exp.train(PPS))
    example = exp.examples()[0]
    plain = logits(model, example)
    with applied(model, Steer(1, exp.vector().at(1), 4.0)):
        steered = logits(model, example)
    assert not torch.allclose(plain, steered, atol=1e-5)
    assert torch.equal(logits(model, example), plain)
