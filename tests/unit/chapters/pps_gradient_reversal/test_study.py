"""Chapter 1's own stages and mathematics, on the tiny model."""

import numpy as np
import pytest
import torch

from helpers.activations import mean_activations
from helpers.chapters.pps_gradient_reversal.method import HoldComponent, descended, update_shares
from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.chapters.pps_gradient_reversal.study import PreventativeStudy, cross_traits
from helpers.gradients import pile_gradient
from helpers.losses import evaluate_losses
from helpers.studies.traits import Defence, Training, TraitStudy


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TraitStudy, "fit_judge", lambda self, split: None)
        yield PreventativeStudy(PreventativeSteeringParams(preset="tiny", dtype="float32"))


def test_a_held_component_is_that_of_the_centre_and_the_rest_stays(study):
    v, centre = study.vector().at(1), torch.randn(study.base.width, generator=torch.Generator().manual_seed(0))
    examples = study.examples()
    plain = mean_activations(study.base, examples, layers=[1])[0]
    held = mean_activations(study.base, examples, layers=[1], interventions=[HoldComponent(1, v, centre)])[0]
    unit = v / v.norm()
    torch.testing.assert_close(held @ unit, (centre @ unit).expand(len(examples)), rtol=1e-4, atol=1e-4)
    rest = plain - (plain @ unit)[:, None] * unit
    torch.testing.assert_close(held - (held @ unit)[:, None] * unit, rest, rtol=1e-3, atol=1e-4)


def test_one_step_lowers_the_loss_by_what_first_order_says_and_is_taken_back(study):
    model, examples = study.load(), study.training_examples("strong")[:4]
    gradient = pile_gradient(model, examples)
    before = evaluate_losses(model, examples).mean()
    with descended(model, gradient, 1e-3) as eta:
        fallen = before - evaluate_losses(model, examples).mean()
        assert eta > 0 and fallen == pytest.approx(1e-3, rel=0.1)
    assert evaluate_losses(model, examples).mean() == before
    with pytest.raises(ValueError, match="gradient is zero"), descended(model, {"a": torch.zeros(2)}, 1e-3):
        pass


def test_the_step_moves_the_stream_by_its_stage(study):
    moved = study.one_step(name="undefended")
    assert moved.shape == (study.base.layers, len(study.heldout)) and np.abs(moved).max() > 0
    steered = study.one_step(study.steering(), name="PPS")
    assert not np.allclose(moved, steered)


def test_an_updates_shares_are_those_of_the_matrices_written_out():
    rng = torch.Generator().manual_seed(0)
    factors, squares = {}, {}
    for name, out in (("0.self_attn.o_proj", 5), ("1.self_attn.o_proj", 5), ("0.mlp.down_proj", 7)):
        a, b = torch.randn(2, 6, generator=rng), torch.randn(out, 2, generator=rng)
        factors |= {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
        kind = name.split(".")[-1]
        squares[kind] = squares.get(kind, 0.0) + float((b @ a).square().sum())
    found = update_shares(factors)
    assert found == pytest.approx({k: v / sum(squares.values()) for k, v in squares.items()}, rel=1e-5)


def test_a_trained_run_has_shares_of_every_kind_of_matrix(study):
    run = study.train_all([Training(Defence(), 0)])[0]
    found = update_shares(run.finetuned[-1].tensors)
    assert set(found) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert sum(found.values()) == pytest.approx(1)


def test_comparators_train_and_differ_from_one_another(study):
    found = {n: study.compared(n, 0) for n in ("KL to the base", "CAFT, zero", "CAFT, mean")}
    assert all(f.margins.shape == (len(study.heldout),) and len(f.losses) == study.params.steps for f in found.values())
    assert len({round(float(f.margins.sum()), 9) for f in found.values()}) == 3


def test_vectors_and_data_are_crossed_and_the_diagonal_is_the_own_vector(study):
    crossed = cross_traits(study, ("evil", "pirate"))
    for row, name in enumerate(crossed.traits):
        assert crossed.own[name].mean() == pytest.approx(crossed.kept_out[row, row], rel=1e-6)
    found = study.of("pirate").reversal()
    assert found.keys() == {"undefended", "PPS", "random"} and len(found["PPS"]) == len(study.written("pirate"))
