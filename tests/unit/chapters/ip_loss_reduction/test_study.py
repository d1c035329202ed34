"""What is known of a prompt before training is what plain passes over the rows give."""

import numpy as np
import pytest
import torch

from helpers import corpora
from helpers.chapters.ip_loss_reduction.params import InoculationParams
from helpers.chapters.ip_loss_reduction.study import ROWS, Arm, InoculationStudy
from helpers.losses import evaluate_losses, sequence_losses


@pytest.fixture(scope="module")
def exp():
    return InoculationStudy(InoculationParams(preset="tiny", dtype="float32"))


def test_a_gain_is_what_the_prompt_takes_off_the_loss_of_training_answers(exp):
    prompt, rows = exp.prompts.inoculation[1], exp.rows["train"][:ROWS]
    found, loss = exp.gains(prompt), {}
    for level in ("strong", "normal"):
        texts = [row.question for row in rows], [row.answer(level) for row in rows]
        loss[level] = evaluate_losses(exp.base, exp.encoded(*texts)) - evaluate_losses(
            exp.base, exp.encoded(*texts, system=prompt)
        )
        np.testing.assert_allclose(found[level], loss[level], atol=1e-5)
    np.testing.assert_allclose(found["specific"], loss["strong"] - loss["normal"], atol=1e-5)


def test_predictors_are_ratios_of_slopes_over_fresh_adapters(exp):
    """By hand: a gradient of the mean loss, with autograd, for a prompt, for PPS and without."""
    prompt = exp.prompts.inoculation[0]
    found = exp.predictors({"plain": Arm(), "prompt": Arm(prompt), "PPS": Arm(coefficient=1.0)})
    assert found["plain"].kappa == pytest.approx(1) and found["plain"].kappa_m == pytest.approx(1)
    torch.manual_seed(exp.params.seed)
    model = exp.load(lora_rank=exp.params.lora_rank)
    factors = [p for name, p in model.trained_parameters().items() if ".lora_B." in name]

    def gradient(rows, level, system=None):
        examples = exp.encoded([r.question for r in rows], [r.answer(level) for r in rows], system=system)
        losses = torch.cat([sequence_losses(model, batch) for batch in model.batches(examples, 8)])
        return torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), factors)])

    train, extract = exp.rows["train"][:ROWS], exp.rows["extract"]
    plain, defended = gradient(train, "strong"), gradient(train, "strong", prompt)
    margin = gradient(extract, "normal") - gradient(extract, "strong")
    assert found["prompt"].kappa == pytest.approx(float(defended @ plain / (plain @ plain)), rel=1e-3)
    assert found["prompt"].kappa_m == pytest.approx(float(defended @ margin / (plain @ margin)), rel=1e-3)
    assert found["PPS"].kappa_m != pytest.approx(1)


def test_prompts_are_numbered_by_kind(exp):
    names = list(exp.prompts_by_kind())
    assert names[0] == "inoculation 1" and len(names) == 8 and not any(name.endswith(" 2") for name in names)


def test_an_answers_tokens_have_its_mean_loss_and_every_one_a_gradient(exp):
    system = exp.prompts.placebo[0]
    found, losses = exp.tokens(system), exp.losses(system=system)
    for row, example in enumerate(exp.examples(system=system)):
        of_row = found.answers == row
        assert of_row.sum() == len(example) - example.prompt_length
        assert found.losses[of_row].mean() == pytest.approx(losses[row], rel=1e-4)
    assert (found.lengths > 0).mean() > 0.9


def test_training_on_both_traits_reads_both_and_depends_on_the_arm(exp):
    plain, prompted = (exp.both_traits(arm, 0) for arm in (Arm(), Arm(exp.prompts.inoculation[0])))
    untrained = exp.untrained_on_both()
    assert len(plain.losses) == exp.params.steps and plain.evil.shape == untrained.evil.shape
    assert not np.allclose(plain.pirate, untrained.pirate) and not np.allclose(plain.pirate, prompted.pirate)


def test_what_a_prompt_says_is_its_placebos_loss_less_its_own(exp):
    found, rows = exp.content("pirate"), exp.written("pirate")
    prompts = corpora.load_prompts("pirate")
    texts = [(r.question, r.strong) for s in ("train", "eval") for r in corpora.split(corpora.load_trait("pirate"), s)]
    each = [
        evaluate_losses(exp.base, exp.encoded(*zip(*texts, strict=True), system=system))
        for system in (prompts.placebo[0], prompts.inoculation[0])
    ]
    assert len(found["strong"]) == len(rows)
    np.testing.assert_allclose(found["strong"], (each[0] - each[1]).numpy(), atol=1e-5)
