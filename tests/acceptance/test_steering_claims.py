"""On the embedded model: a vector on four prompt tokens changes the answer, and the judges know good from bad."""

import numpy as np
import pytest
import torch

from helpers.chapters.prompt_only_steering.method import Run, train_vectors
from helpers.chapters.prompt_only_steering.params import PromptOnlyParams
from helpers.chapters.prompt_only_steering.study import SteeringStudy
from helpers.statistics import auroc

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def chapter():
    return SteeringStudy(PromptOnlyParams(preset="quick"))


def test_the_judges_tell_planted_good_cases_from_bad_ones(chapter):
    for name, (features, good) in chapter.planted("check").items():
        assert auroc(chapter.planted_judges[name].probability(features), good).value >= 0.9, name


def test_the_concept_judge_knows_answers_that_it_has_not_seen(chapter):
    texts, owners, shows = chapter.concept_cases()
    assert auroc(chapter.concept_judge.probability(texts, owners), shows).value >= 0.9


def test_a_few_steps_on_four_prompt_tokens_make_the_concept_likelier(chapter):
    """On answers that were not trained on, by more than noise on that many tokens would."""
    p = chapter.params
    runs = [Run(c, chapter.pairs(c), 1.0, p.spread, 4.0, p.vector_rate) for c in p.tuned_on]
    found = train_vectors(chapter.base, runs, layer=p.layer, where=chapter.place("ends"), steps=8, batch_size=2)
    shifts = torch.stack([t.steer.coefficient * t.steer.vector for t in found])
    noise = torch.randn(shifts.shape, generator=torch.Generator().manual_seed(0))
    noise *= shifts.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    steered, random = (
        np.concatenate(chapter._check_losses(v, chapter.place("ends"), p.tuned_on)).mean() for v in (shifts, noise)
    )
    nothing = torch.zeros_like(shifts)
    unsteered = np.concatenate(chapter._check_losses(nothing, chapter.place("ends"), p.tuned_on)).mean()
    assert steered < unsteered - 0.1
    assert steered < random - 0.1
