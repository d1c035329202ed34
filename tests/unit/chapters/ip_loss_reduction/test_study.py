"""What is known of a prompt before training is what plain passes over the rows give."""

import numpy as np
import pytest
import torch

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
