"""The planted truths of chapter 0 are true: closed forms agree with large samples."""

import numpy as np
import pytest
import torch

from helpers.activations import PersonaVectorFitter
from helpers.chapters.looking_inside.method import (
    CROSSED,
    Crossed,
    PlantedStream,
    coverage,
    planted_directions,
    sampled_participation,
    verdict_shares,
)
from helpers.gradients import uncentred_pca
from helpers.statistics import Estimate, auroc, mean_estimate
from helpers.verdicts import Claim

STREAM = PlantedStream()
CLAIM = Claim(
    id="toy.effect", chapter="toy", statement="", source="", where="", metric="", unit="",
    direction="above", threshold=0.5, no_effect=0,
)  # fmt: skip


def test_direction_and_reader_have_unit_length_and_the_planted_cosine():
    assert STREAM.direction.norm() == pytest.approx(1, abs=1e-6)
    assert STREAM.reader.norm() == pytest.approx(1, abs=1e-6)
    assert float(STREAM.direction @ STREAM.reader) == pytest.approx(STREAM.reader_cosine, abs=1e-6)


def test_the_closed_forms_of_separation_are_those_of_a_large_sample():
    trait, other = (STREAM.activations(20_000, shows_trait=t, seed=int(t)) @ STREAM.direction for t in (True, False))
    found = auroc(torch.cat([other, trait]).numpy(), [0] * 20_000 + [1] * 20_000)
    assert found.value == pytest.approx(STREAM.auroc, abs=0.005)
    right = ((trait > STREAM.gap / 2).float().mean() + (other < STREAM.gap / 2).float().mean()) / 2
    assert float(right) == pytest.approx(STREAM.bayes_accuracy, abs=0.005)


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_gradients_have_the_planted_cosine_with_the_direction(noise):
    found = STREAM.gradients(500, 20, noise=noise, seed=0).sequence_cosines(0, STREAM.direction)
    assert float(found.mean()) == pytest.approx(STREAM.gradient_cosine(noise), abs=0.005)
    if noise == 0:
        assert float(found.std()) < 1e-5


def test_a_fitted_vector_is_as_near_to_the_direction_as_its_closed_form_says():
    cosines = []
    for seed in range(100):
        fitter = PersonaVectorFitter("planted")
        for trait in (False, True):
            fitter.update(STREAM.activations(24, shows_trait=trait, seed=2 * seed + trait)[None], shows_trait=trait)
        cosines.append(torch.cosine_similarity(fitter.fit().at(0), STREAM.direction, dim=0))
    assert float(torch.stack(cosines).mean()) == pytest.approx(STREAM.fitted_cosine(24), abs=0.02)


@pytest.mark.parametrize("rows", [32, 1000])
def test_planted_directions_are_counted_up_to_what_the_number_of_rows_takes_away(rows):
    found = [uncentred_pca(planted_directions(5, rows, seed=seed)).participation_ratio for seed in range(50)]
    assert np.mean(found) == pytest.approx(sampled_participation(5, rows), rel=0.03)


def test_coverage_counts_the_intervals_that_hold_the_truth():
    def measure(rng):
        value = rng.random()
        return Estimate(value, value - 0.25, value + 0.25, 1)

    assert coverage(measure, 0.5, draws=2000, seed=0).value == pytest.approx(0.5, abs=0.03)
    assert coverage(measure, 2.0, draws=20, seed=0).value == 0


def test_verdicts_follow_the_planted_effect():
    def found(effect):
        shares = verdict_shares(CLAIM, effect, Crossed(3, 0.1, 1.0), questions=32, draws=200, seed=0)
        return {name: e.value for name, e in shares.items()}

    none, small, large = (found(effect) for effect in (0.0, 0.3, 2.0))
    assert all(sum(shares.values()) == pytest.approx(1) for shares in (none, small, large))
    assert none["contradicted"] + none["undecided"] > 0.9
    assert small["direction only"] + small["undecided"] > 0.5 and small["reproduced"] > none["reproduced"]
    assert large["reproduced"] == 1.0 and large["undecided"] == large["contradicted"] == 0.0


@pytest.mark.parametrize("name", CROSSED)
def test_the_two_way_interval_covers_crossed_data_about_as_often_as_it_says(name):
    covered = coverage(lambda rng: mean_estimate(CROSSED[name].draw(rng, 32, 0.5)), 0.5, draws=1000, seed=0)
    assert covered.value > 0.92 and (covered.value < 0.97 or "neither" in name)


def test_crossed_outcomes_vary_as_planted():
    table = Crossed(400, 2.0, 0.5, 1.0).draw(np.random.default_rng(0), 300, 3.0)
    assert table.shape == (400, 300)
    assert table.mean(1).std() == pytest.approx(2.0, rel=0.1)
    assert table.mean(0).std() == pytest.approx(0.5, rel=0.15)
