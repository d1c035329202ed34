"""Chapter 1's grid of vectors and data: every trait's vector, while training on every trait's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.studies.traits import Defence, TraitStudy


@dataclass(frozen=True)
class CrossTraits:
    """PPS with the vector of one trait (columns) in training on the answers of another (rows)."""

    traits: tuple[str, ...]
    cosines: Float[np.ndarray, "data vector"]
    """Under the steering, before training: mean cosine of gradient and the *data's* persona vector."""
    kept_out: Float[np.ndarray, "data vector"]
    """Share of what undefended training adds to the margin that training under the steering does not add."""


def cross_traits(params: PreventativeSteeringParams, traits: Sequence[str]) -> CrossTraits:
    """Train on each trait's answers without a defence and under each trait's vector, and read the margins.

    Every vector has the length of the data's own, and the working intensity in units of the data's own a*: only the
    direction differs. Means over held-out questions and seeds.
    """
    shape = len(traits), len(traits)
    cosines, kept_out = np.empty(shape), np.empty(shape)
    for row, data in enumerate(traits):
        study = TraitStudy(params.model_copy(update={"trait": data, "other_traits": []}))
        own = study.vector().at(params.layer).norm()
        strengths = {t: params.coefficient * float(own / study.vector(t).at(params.layer).norm()) for t in traits}
        arms = study.arms({"undefended": Defence()} | {t: Defence(t, a) for t, a in strengths.items()})
        margins = {n: np.mean([study.read(run).margins.mean() for run in runs]) for n, runs in arms.items()}
        learnt = margins["undefended"] - study.read().margins.mean()
        for column, name in enumerate(traits):
            found = study.gradients(study.steering(name, strengths[name])).cosines[data]
            cosines[row, column] = float(found.mean())
            kept_out[row, column] = (margins["undefended"] - margins[name]) / learnt
    return CrossTraits(tuple(traits), cosines, kept_out)
