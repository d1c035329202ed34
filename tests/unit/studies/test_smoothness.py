"""Runs that jump or end apart from their arm make a claim invalid."""

import numpy as np

from helpers.studies.smoothness import smooth, smooth_each

FALLING = tuple(np.linspace(3.0, 1.0, 20).tolist())
HIGHER = tuple(loss + 0.5 for loss in FALLING)
JUMPING = (*FALLING[:10], 4.0, 4.2, 4.1, *FALLING[13:])


def test_runs_that_fall_and_end_together_are_smooth():
    near = tuple(loss + 0.1 for loss in FALLING)
    control = smooth({"undefended": [FALLING, near], "PPS": [HIGHER]})
    assert control.passed and control.kind == "validity"


def test_a_jump_and_a_run_apart_from_its_arm_fail_and_are_named():
    jumped = smooth({"undefended": [FALLING], "PPS": [JUMPING]})
    assert not jumped.passed and "PPS was not" in jumped.name
    assert not smooth({"undefended": [FALLING, FALLING, HIGHER]}).passed


def test_batches_that_are_hard_for_every_arm_alike_are_no_jump():
    hard = np.zeros(20)
    hard[8:12] = 1.5
    arms = {name: [tuple(np.add(losses, hard))] for name, losses in (("a", FALLING), ("b", HIGHER), ("c", FALLING))}
    assert smooth(arms).passed
    assert all(control.passed for control in smooth_each(arms).values())
    jumped = smooth(arms | {"d": [tuple(np.add(JUMPING, hard))]})
    assert not jumped.passed and "d was not" in jumped.name
    assert not smooth({name: arms[name] for name in "ab"}).passed  # two arms cannot tell the rows from an arm


def test_models_that_were_not_trained_say_nothing():
    assert smooth({"start": [()]}).passed


def test_each_arm_has_a_control_of_its_own():
    found = smooth_each({"Cov+KD": [FALLING], "LM+KD": [JUMPING]})
    assert {name: control.passed for name, control in found.items()} == {"Cov+KD": True, "LM+KD": False}
