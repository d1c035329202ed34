"""The embedded model shows the directions of the two chapters' central claims, at the quick preset's settings.

Sixteen held-out answers rather than the chapter's thirty-two; the two finetuning runs are as in the chapter.
"""

import numpy as np
import pytest
import torch

from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.studies.traits import Defence, TraitStudy

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def chapter():
    return TraitStudy(PreventativeSteeringParams(preset="quick"))


@pytest.fixture(scope="module")
def sixteen():
    """The same chapter on its first sixteen held-out answers."""
    return TraitStudy(PreventativeSteeringParams(preset="quick", sequences=16))


@pytest.fixture(scope="module")
def undefended(sixteen):
    return sixteen.gradients()


def cosines(gradients, name):
    """One cosine per sequence, at the working layer."""
    return gradients.cosines[name][0]


def share(truth):
    return float(torch.as_tensor(truth).float().mean())


def test_undefended_the_gradient_presses_the_activations_up_along_the_persona_vector(undefended):
    assert len(cosines(undefended, "evil")) == 16
    assert share(cosines(undefended, "evil") < 0) >= 0.9
    assert cosines(undefended, "random").mean().abs() < cosines(undefended, "evil").mean().abs() / 3


def test_preventative_steering_reverses_that_pressure(sixteen):
    """At twice the turning point; at the working intensity, half-way to it, most sequences have turned."""
    assert share(cosines(sixteen.gradients(sixteen.steering()), "evil") > 0) >= 0.7
    assert share(cosines(sixteen.gradients(sixteen.steering(coefficient=2.0)), "evil") > 0) >= 0.9


def test_the_loss_is_least_where_the_pressure_turns(sixteen):
    around = [a * sixteen.unit() for a in (0.0, 1.0, 3.0)]
    losses, slopes = sixteen.along("evil", sixteen.examples(), coefficients=around)
    assert losses[1].mean() < losses[0].mean() and losses[1].mean() < losses[2].mean()
    assert slopes[0].mean() < 0 < slopes[2].mean() and abs(slopes[1].mean()) < abs(slopes[0].mean()) / 2


def test_a_random_vector_of_equal_length_does_not(sixteen):
    assert share(cosines(sixteen.gradients(sixteen.steering("random")), "evil") > 0) <= 0.25


def test_an_inoculation_prompt_lowers_the_loss_and_further_than_a_placebo_of_its_length(sixteen):
    """A placebo lowers it too: the template's own system message fits a trait answer worse than any other text does."""
    prompts = {"none": [None], "IP": sixteen.prompts.inoculation[:2], "placebo": sixteen.prompts.placebo[:2]}
    loss = {name: np.mean([sixteen.losses(system=text) for text in texts], axis=0) for name, texts in prompts.items()}
    assert share(loss["IP"] < loss["none"]) >= 0.9
    assert share(loss["IP"] < loss["placebo"]) >= 0.75
    assert (loss["placebo"] - loss["IP"]).mean() > 0.05


def test_preventative_steering_far_beyond_the_turning_point_raises_the_loss(sixteen):
    assert (sixteen.losses(sixteen.steering(coefficient=3.0)) - sixteen.losses()).mean() > 0


def test_training_undefended_ends_in_a_far_higher_trait_score_than_training_with_preventative_steering(chapter):
    p = chapter.params
    scores = {
        name: chapter.evaluate(chapter.train(defence)).scores.mean()
        for name, defence in (("undefended", None), ("PPS", Defence(vector=p.trait, coefficient=p.coefficient)))
    }
    assert scores["undefended"] >= scores["PPS"] + 30
