"""Attackers: ways to find directions without which a model no longer refuses, and where ablation moves it instead.

Those that are *searched* score a difference of means at every block and position and take one by a rule. LEACE and the
logistic probe are fitted at one place. The optimised direction asks for what the others hope for: it is moved by
gradient descent until harmful requests are answered, with a price on every change of harmless answers (as refusal
direction optimisation, Wollschläger et al., arXiv 2502.17420).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import corpora
from helpers.chapters.refusal_redistribution.params import Attacker
from helpers.chat import Example
from helpers.corpora import PointRow
from helpers.forward import PromptSet, read, read_beginning, unembed
from helpers.interventions import AblateAffine, SiteMeans, applied
from helpers.losses import kl_divergence
from helpers.models import Model
from helpers.probes import fit_leace, orthonormal
from helpers.studies.ablation_scores import Choice, Scores, choose, least_kl
from helpers.studies.card import Contrast, Mode, Search
from helpers.studies.directions import unit
from helpers.studies.margins import refusal_log_odds

SEARCHED: Mapping[Attacker, tuple[Contrast, Mode]] = {
    "means, zero": ("harmless", "zero"),
    "means, affine": ("harmless", "affine"),
    "paired, zero": ("paired", "zero"),
    "paired, affine": ("paired", "affine"),
    "residualised, affine": ("residualised", "affine"),
}
"""What harmful prompts are compared with, and how what is found is ablated."""

Rule = Literal["source", "0", "-1", "fitted"]
"""How a searched attacker takes its candidate: by the source's rule, or the least divergence among those that bring
refusal down to a level. Fitted attackers have nothing to choose from."""


@dataclass(frozen=True)
class FinetuningAttack:
    """The attacker who uses no direction, but finetunes on a few compliant answers; chosen before any was judged."""

    examples: int = 5
    steps: tuple[int, ...] = (0, 1, 2, 4, 8)
    """Each is a run of its own, on all examples in every step."""
    learning_rate: float = 5e-4
    rank: int = 8

    def rows(self) -> list[PointRow]:
        """The first harmful points with a compliant answer; no condition is trained on them."""
        return corpora.load_points("explicit", "train")[: self.examples]


FINETUNED = FinetuningAttack()


@dataclass(frozen=True)
class Attack:
    """Directions that an attacker found, and how it ablates them."""

    attacker: Attacker
    rule: Rule
    directions: Float[Tensor, "k d_model"]
    centre: SiteMeans | None
    """Where affine ablation moves to; None for zero."""
    layer: int
    position: int
    """Where the directions were read."""
    fallback: bool = False
    """No candidate met the rule."""


def by_rule(scores: Scores, rule: Rule) -> Choice:
    """The candidate that a rule takes; where none meets a level, the one with the lowest log-odds, as a fallback."""
    if rule == "source":
        return choose(scores)
    found = least_kl(scores, float(rule))
    if found is not None:
        return found
    return Choice(*divmod(int(scores.log_odds.nan_to_num(torch.inf).argmin()), scores.log_odds.shape[1]), True)


def searched(found: Search, attacker: Attacker, rule: Rule) -> Attack:
    """What a searched attacker takes by a rule."""
    contrast, mode = SEARCHED[attacker]
    choice = by_rule(found.scores[contrast, mode], rule)
    direction = unit(found.raw[contrast][choice.layer, choice.position])[None]
    centre = None if mode == "zero" else found.centres[choice.position]
    place = found.layers[choice.layer], found.positions[choice.position]
    return Attack(attacker, rule, direction, centre, *place, choice.fallback)


def probe_direction(
    activations: Float[Tensor, "example d_model"], harmful: Bool[Tensor, " example"]
) -> Float[Tensor, "1 d_model"]:
    """The unit normal of a logistic regression that tells harmful prompts from harmless ones, towards harmful.

    Features are standardised for the fit (liblinear, balanced classes, as the source's probe); the normal is that of
    the same boundary between raw activations. One row, as `Ablate` takes it. Raises `ValueError` if a class is missing.
    """
    from sklearn.linear_model import LogisticRegression

    if not 0 < int(harmful.sum()) < len(harmful):
        raise ValueError("A probe needs activations of both harmful and harmless prompts.")
    x = activations.cpu().double()
    spread = x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    probe = LogisticRegression(solver="liblinear", class_weight="balanced", random_state=0, max_iter=1000)
    probe.fit(((x - x.mean(0)) / spread).numpy(), harmful.cpu().numpy())
    return unit(torch.from_numpy(probe.coef_[0]) / spread).float()[None]


def leace_directions(
    activations: Float[Tensor, "example d_model"], harmful: Bool[Tensor, " example"]
) -> Float[Tensor, "_ d_model"]:
    """Orthonormal directions with the span of what LEACE reads and of where it moves activations."""
    eraser = fit_leace(activations.cpu().double().numpy(), harmful.cpu().numpy())
    return orthonormal(torch.cat([torch.from_numpy(eraser.directions), torch.from_numpy(eraser.readout)])).float()


@dataclass(frozen=True)
class Optimisation:
    """How a direction is optimised; chosen before any was judged."""

    steps: int = 24
    learning_rate: float = 0.01
    """Of Adam, for a direction of length one."""
    prompts: int = 8
    """Of a kind in a step, in turns."""
    target: float = -1.0
    """Log-odds below which a harmful prompt is left alone."""
    kl_weight: float = 10.0
    """Price of a nat of divergence after harmless prompts, in log-odds."""


def objective(
    log_odds: Float[Tensor, " harmful"],
    kl: Float[Tensor, " harmless"],
    target: float,
    kl_weight: float,
) -> Float[Tensor, ""]:
    """mean relu(log-odds - target) + weight * mean KL."""
    return (log_odds - target).relu().mean() + kl_weight * kl.mean()


def optimised_direction(
    model: Model,
    start: Float[Tensor, " d_model"],
    harmful: Sequence[Example],
    harmless: Sequence[Example],
    *,
    refusal_ids: Sequence[int],
    centre: SiteMeans | None = None,
    how: Optimisation = Optimisation(),
) -> Float[Tensor, "1 d_model"]:
    """Move a direction downhill on the `objective`, of log-odds of harmful prompts and KL after harmless ones, both
    with it ablated, to zero or towards `centre`. Raises `ValueError` if there are no prompts of a kind."""
    before = PromptSet.of(model, harmless).last_logits(model)
    moved = torch.nn.Parameter(unit(start.float()).to(model.device))
    optimizer = torch.optim.Adam([moved], lr=how.learning_rate)
    for step in range(how.steps):
        turns = [[(step * how.prompts + i) % len(some) for i in range(how.prompts)] for some in (harmful, harmless)]
        prompts = [*(harmful[i] for i in turns[0]), *(harmless[i] for i in turns[1])]
        logits = _last_logits(model, prompts, AblateAffine(unit(moved)[None], centre))
        refused = refusal_log_odds(logits[: how.prompts], refusal_ids)
        kl = kl_divergence(before[turns[1]], logits[how.prompts :])
        loss = objective(refused, kl.to(refused), how.target, how.kl_weight)
        (moved.grad,) = torch.autograd.grad(loss, moved)  # of the direction alone: a model may be trainable
        optimizer.step()
    return unit(moved.detach().cpu())[None]


def _last_logits(
    model: Model, prompts: Sequence[Example], ablation: AblateAffine
) -> Float[Tensor, "example vocabulary"]:
    """Next-token logits after prompts, with the graph that leads to the ablated direction."""
    together = PromptSet.of(model, prompts)
    found: dict[int, Tensor] = {}
    frozen = model.weights_in(model.dtype, only_frozen_linear=True)
    with torch.enable_grad(), frozen, applied(model, ablation), model.autocast():
        begun = read_beginning(model, together.shared) if together.shared else None
        for batch in together.rest:
            batch = batch.to(model.device)
            with model.reading(batch):
                hidden = read(model, batch, after=begun)
            last = batch.attention.sum(1) - 1
            found |= zip(batch.rows, unembed(model, hidden[torch.arange(len(hidden)), last]), strict=True)
    return torch.stack([found[row] for row in range(len(prompts))])
