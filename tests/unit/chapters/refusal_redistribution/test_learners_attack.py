"""A learner's ablation attacks the real start model, and its curve is the book's where it does what the book does."""

import matplotlib
import numpy as np
import pytest

from helpers.chapters.refusal_redistribution import exercises
from helpers.chapters.refusal_redistribution.damage import SCALES
from helpers.chapters.refusal_redistribution.params import RefusalParams
from helpers.chapters.refusal_redistribution.study import RefusalStudy

matplotlib.use("Agg")


def zero(a, direction, centre):
    return a - (a @ direction)[..., None] * direction


def affine(a, direction, centre):
    return a - ((a - centre) @ direction)[..., None] * direction


@pytest.fixture(scope="module")
def experiment(store):
    return RefusalStudy(RefusalParams(preset="tiny", dtype="float32"))


@pytest.mark.parametrize(("ablate", "attacker"), [(zero, "means, zero"), (affine, "means, affine")])
def test_the_books_own_ablation_gives_the_books_own_curve(experiment, ablate, attacker):
    mine, book = exercises.attack_start_model(ablate, experiment, attacker, requests=3)
    assert mine.log_odds.shape == (len(SCALES), 3)
    np.testing.assert_allclose(mine.log_odds, book.log_odds, atol=1e-4)
    np.testing.assert_allclose(mine.kl, book.kl, atol=1e-5)


def test_another_ablation_gives_another_curve_and_one_that_does_nothing_is_told(experiment, capsys):
    mine, book = exercises.attack_start_model(zero, experiment, "means, affine", requests=3)
    assert np.abs(mine.kl - book.kl).max() > 1e-6
    capsys.readouterr()
    exercises.attack_start_model(lambda a, direction, centre: 0 * a, experiment, "means, affine", requests=3)
    assert capsys.readouterr().out


def test_both_kinds_of_ablation_are_right_and_usual_mistakes_are_named(capsys):
    for ablate, said in (
        (zero, "Right: zero ablation"),
        (affine, "Right: affine ablation"),
        (lambda a, r, c: a + (c @ r) * r, "added to the centre's"),
        (lambda a, r, c: c.expand_as(a), "moved to the centre"),
        (lambda a, r, c: a, "Not yet"),
        (lambda a, r: a, "Not yet"),
    ):
        exercises.check_attack(ablate)
        assert said in capsys.readouterr().out.replace("\n", " ")
