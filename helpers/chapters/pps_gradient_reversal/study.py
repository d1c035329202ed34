"""What chapter 1 computes beyond the trait study: other traits, other defences, and one real step of descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.activations import mean_activations
from helpers.chapters.pps_gradient_reversal.method import HoldComponent, descended
from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.gradients import gradient_statistics, pile_gradient
from helpers.interventions import Intervention, applied
from helpers.losses import sequence_divergences
from helpers.studies.margins import behaviour_margins
from helpers.studies.traits import Defence, Training, TraitStudy, batches

TRAITS = ("evil", "impolite", "pirate", "sycophantic")
"""The bundled traits."""

Comparator = Literal["KL to the base", "CAFT, zero", "CAFT, mean"]
"""Other defences on the same training: a divergence held down, or the trait's component held in place (CAFT)."""

FALL = 0.02
"""Nats per token by which one step of descent should lower the training loss, to first order: small enough for that."""


@dataclass(frozen=True)
class CrossTraits:
    """PPS with the vector of one trait (columns) in training on the answers of another (rows)."""

    traits: tuple[str, ...]
    cosines: Float[np.ndarray, "data vector"]
    """Under the steering, before training: mean cosine of gradient and the *data's* persona vector."""
    kept_out: Float[np.ndarray, "data vector"]
    """Share of what undefended training adds to the margin that training under the steering does not add."""
    own: dict[str, Float[np.ndarray, "seed question"]]
    """By trait, under its own vector: the same share, by seed and question."""


@dataclass(frozen=True)
class Compared:
    """What a model has of the trait after training under another defence, on the held-out questions."""

    margins: Float[np.ndarray, " question"]
    normal_losses: Float[np.ndarray, " question"]
    losses: tuple[float, ...]
    """Of its training, step by step."""


class PreventativeStudy(TraitStudy):
    """The trait study of chapter 1."""

    params: PreventativeSteeringParams

    def of(self, trait: str) -> PreventativeStudy:
        """The same study of another trait."""
        return PreventativeStudy(self.params.model_copy(update={"trait": trait, "other_traits": ()}))

    def reversal(self) -> dict[str, Float[np.ndarray, " answer"]]:
        """Mean cosine of gradient and persona vector on all answers that did not make the vector, untrained:
        "undefended", and under PPS at the working intensity with the trait's vector ("PPS") and a random one."""
        answers, arms = self.written(self.params.trait), ("undefended", "PPS", "random")
        artifact = self.stage(
            "reversal",
            lambda: (reversal(self), {}),
            {
                "trait": self.params.trait,
                "layer": self.params.layer,
                "intensity": self.params.coefficient * self.unit(),
            },
            data=[self.params.trait],
        )
        found = {name: artifact.tensors[name].numpy() for name in arms}
        assert all(len(cosines) == len(answers) for cosines in found.values())
        return found

    def one_step(self, *interventions: Intervention, name: str) -> Float[np.ndarray, "layer question"]:
        """How far one step of gradient descent on the training answers, all weights, moves the stream along the unit
        persona vector, at every block, while held-out trait answers are read with nothing on.

        The gradient is taken with `interventions` on; `name` says which, in the key.
        """
        p = self.params
        artifact = self.stage(
            "one-step",
            lambda: ({"moved": one_step(self, interventions)}, {}),
            {
                "trait": p.trait,
                "layer": p.layer,
                "sequences": p.sequences,
                "arm": [name, p.coefficient * self.unit()],
                "fall": FALL,
            },
            data=[p.trait],
        )
        unit = torch.nn.functional.normalize(self.vector().vectors, dim=-1)
        return torch.einsum("lqd,ld->lq", artifact.tensors["moved"], unit).numpy()

    def compared(self, comparator: Comparator, seed: int) -> Compared:
        """The model after the chapter's training under another defence, with the rows, batches and adapters of
        `seed`."""
        training = Training(Defence(), seed)
        artifact = self.stage(
            "comparator",
            lambda: compare(self, comparator, training),
            {
                "comparator": comparator,
                "recipe": asdict(self.recipe(training)),
                "trait": self.params.trait,
                "layer": self.params.layer,
                "sequences": self.params.sequences,
            },
            data=[self.params.trait],
        )
        margins, normal = (artifact.tensors[name].numpy() for name in ("margins", "normal_losses"))
        return Compared(margins, normal, tuple(artifact.facts["losses"]))


def reversal(study: PreventativeStudy) -> dict[str, Tensor]:
    """Stage "reversal"."""
    p, examples = study.params, study.written(study.params.trait)
    arms = {"undefended": (), "PPS": (study.steering(),), "random": (study.steering("random"),)}
    return {
        name: gradient_statistics(
            study.base,
            examples,
            {p.trait: study.vector().vectors},
            layers=(p.layer,),
            interventions=steering,
            batch_size=p.batch_size,
        ).cosines[p.trait][0]
        for name, steering in arms.items()
    }


def one_step(
    study: PreventativeStudy, interventions: Sequence[Intervention]
) -> Float[Tensor, "layer question d_model"]:
    """Stage "one-step": mean activations after the step minus before."""
    model, heldout = study.load(), study.examples()
    with applied(model, *interventions):
        gradient = pile_gradient(model, study.training_examples("strong"), batch_size=study.params.batch_size)
    before = mean_activations(model, heldout)
    with descended(model, gradient, FALL):
        return mean_activations(model, heldout) - before


def compare(
    study: PreventativeStudy, comparator: Comparator, training: Training
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "comparator"."""
    p, interventions, extra = study.params, [], None
    if comparator == "KL to the base":
        extra = lambda model, batch: sequence_divergences(model, batch, study.base).mean()  # noqa: E731
    else:
        v = study.vector().at(p.layer)
        centre = torch.zeros_like(v)
        if comparator == "CAFT, mean":
            rows = study.rows["train"]
            plain = study.encoded([row.question for row in rows], [row.normal for row in rows])
            centre = mean_activations(study.base, plain, layers=[p.layer])[0].mean(0)
        interventions = [HoldComponent(p.layer, v, centre)]
    model, log = study.finetune(
        study.recipe(training),
        batches(study, training),
        interventions=interventions,
        extra_loss=extra,
        share_prefix=True,
    )
    found = behaviour_margins(model, study.heldout)
    arrays = {"margins": torch.from_numpy(found.margin), "normal_losses": torch.from_numpy(found.other)}
    return arrays, {"losses": list(log.losses)}


def cross_traits(study: PreventativeStudy, traits: Sequence[str] = TRAITS) -> CrossTraits:
    """Train on each trait's answers without a defence and under each trait's vector, and read the margins.

    Every vector has the length of the data's own, and the working intensity in units of the data's own a*: only the
    direction differs. Means over held-out questions and seeds.
    """
    shape = len(traits), len(traits)
    cosines, kept_out, own = np.empty(shape), np.empty(shape), {}
    for row, data in enumerate(traits):
        of = study.of(data)
        p, length = of.params, of.vector().at(of.params.layer).norm()
        strengths = {t: p.coefficient * float(length / of.vector(t).at(p.layer).norm()) for t in traits}
        arms = of.arms({"undefended": Defence()} | {t: Defence(t, a) for t, a in strengths.items()})
        margins = {n: np.stack([of.read(run).margins for run in runs]) for n, runs in arms.items()}
        learnt = float((margins["undefended"] - of.read().margins).mean())
        for column, name in enumerate(traits):
            found = of.gradients(of.steering(name, strengths[name])).cosines[data]
            cosines[row, column] = float(found.mean())
            kept_out[row, column] = float((margins["undefended"] - margins[name]).mean()) / learnt
        own[data] = (margins["undefended"] - margins[data]) / learnt
    return CrossTraits(tuple(traits), cosines, kept_out, own)
