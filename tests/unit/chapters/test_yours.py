"""A learner's function on a model: the right one draws the book's curve, and a wrong one another."""

import numpy as np
import pytest
import torch

from helpers.chapters.ip_loss_reduction import exercises as of_prompts
from helpers.chapters.pps_gradient_reversal import exercises as of_vectors
from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.studies.traits import TraitStudy
from helpers.studies.turning import GRID


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TraitStudy, "fit_judge", lambda self, split: None)
        yield TraitStudy(PreventativeSteeringParams(preset="tiny", dtype="float32"))


def means(h, mask):
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def test_a_right_vector_draws_the_books_curve_and_a_longer_one_another(study):
    def right(trait, trait_mask, normal, normal_mask):
        return means(trait, trait_mask).mean(0) - means(normal, normal_mask).mean(0)

    curves = of_vectors.pressure_along(right, study)
    assert curves["yours"].shape[0] == len(GRID)
    np.testing.assert_allclose(curves["yours"], curves["the book's"], rtol=1e-3, atol=1e-6)
    doubled = of_vectors.pressure_along(lambda *given: 2 * right(*given), study)
    assert not np.allclose(doubled["yours"], doubled["the book's"], rtol=1e-2)


def test_right_differences_are_the_books_and_unmasked_ones_are_not(study):
    prompt = study.prompts.inoculation[0]

    def right(with_prompt, without, mask):
        return ((with_prompt - without) * mask).sum(1) / mask.sum(1)

    found = of_prompts.differences_on_the_model(right, study, prompt)
    losses = study.losses(system=prompt) - study.losses()
    np.testing.assert_allclose(found["the book's"], losses, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["yours"], found["the book's"], rtol=1e-5)
    wrong = of_prompts.differences_on_the_model(lambda w, o, m: (w - o).mean(1), study, prompt)
    assert not np.allclose(wrong["yours"], wrong["the book's"], rtol=1e-3)


@pytest.mark.parametrize("answer", [None, torch.ones(3), torch.tensor(1.0)])
def test_what_is_no_vector_draws_nothing_and_says_why(study, answer, capsys):
    assert of_vectors.pressure_along(lambda *_: answer, study) == {}
    assert of_prompts.differences_on_the_model(lambda *_: answer, study, "Be kind.") == {}
    assert (answer is not None and answer.ndim == 0) or "Not yet" in capsys.readouterr().out
