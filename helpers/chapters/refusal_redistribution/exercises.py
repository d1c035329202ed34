"""Checks for the exercises of the chapter on refusal redistribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.chapters.refusal_redistribution.attackers import Attacker, searched
from helpers.chapters.refusal_redistribution.damage import DamageCurve
from helpers.chapters.refusal_redistribution.study import RefusalStudy
from helpers.checking import BATCH, POSITIONS, WIDTH, compare, questions, say_not_yet, say_right
from helpers.forward import PromptSet
from helpers.interventions import READ_AND_WRITTEN, Hook, SiteMeans, project_out, project_towards
from helpers.losses import kl_divergence
from helpers.models import Model
from helpers.studies.directions import unit
from helpers.studies.margins import refusal_log_odds

question = questions(__file__)

Ablation = Callable[[Float[Tensor, "batch pos d_model"], Float[Tensor, " d_model"], Float[Tensor, " d_model"]], Tensor]
"""(activations, unit direction, their mean after harmless prompts) -> activations with the direction ablated."""


def check_ablation(fn: Callable[[Float[Tensor, "batch d_model"], Float[Tensor, "k d_model"]], Tensor]) -> None:
    """Check `fn(a, directions)`: activations with orthonormal directions projected out."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(BATCH, WIDTH, generator=random)
    directions = torch.linalg.qr(torch.randn(WIDTH, 3, generator=random))[0].T
    along = a @ directions.T @ directions
    compare(
        lambda: fn(a.clone(), directions.clone()),
        a - along,
        "a - D^T D a",
        {
            "this is the part that is to be removed": along,
            "only the first direction is removed": a - (a @ directions[:1].T) @ directions[:1],
            "the component is turned round, not removed": a - 2 * along,
        },
    )


def check_covariance_loss(fn: Callable[[Float[Tensor, "batch d_model"], Bool[Tensor, " batch"]], Tensor]) -> None:
    """Check `fn(z, harmful)`: ||S_1 - S_0||_F^2 / d^2 with unbiased covariances of the two classes."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(10, WIDTH, generator=random)
    harmful = torch.arange(10) < 4

    def loss(correction: int = 1, centred: bool = True) -> Tensor:
        found = []
        for part in (z[harmful], z[~harmful]):
            part = part - part.mean(0) if centred else part
            found.append(part.T @ part / (len(part) - correction))
        return (found[0] - found[1]).square().sum() / WIDTH**2

    compare(
        lambda: fn(z.clone(), harmful.clone()),
        loss(),
        "||S_1 - S_0||_F^2 / d^2",
        {
            "divide by n - 1, not by n": loss(correction=0),
            "the class means are not taken off": loss(centred=False),
            "divide by d squared, not by d": loss() * WIDTH,
            "this is the norm, not its square": (loss() * WIDTH**2).sqrt() / WIDTH**2,
        },
    )


def check_k_star(fn: Callable[[list[float]], int]) -> None:
    """Check `fn(rates)`: the smallest number of directions with a refusal rate below 0.3, or `len(rates)`."""
    compare(
        lambda: torch.tensor(
            [
                fn(rates)
                for rates in ([1.0, 0.2, 0.1], [1.0, 0.6, 0.3, 0.25], [0.9, 0.8, 0.7], [0.2, 0.1], [1.0, 0.2, 0.5])
            ],
            dtype=torch.float32,
        ),
        torch.tensor([1.0, 3.0, 3.0, 0.0, 1.0]),
        "the first K with a rate below 0.3",
        {
            "0.3 itself is not below 0.3": torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0]),
            "count from 0: row 0 is the model as it is": torch.tensor([2.0, 4.0, 4.0, 1.0, 2.0]),
            "the last such K, not the first, is given": torch.tensor([2.0, 3.0, 3.0, 1.0, 1.0]),
        },
    )


def check_attack(fn: Ablation) -> None:
    """Check `fn(a, direction, centre)`: activations with the direction's component moved to zero, or to that of the
    centre; either is right."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(BATCH, POSITIONS, WIDTH, generator=random)
    direction = unit(torch.randn(WIDTH, generator=random))
    centre = torch.randn(WIDTH, generator=random)
    zero = project_out(a, direction[:, None])
    affine = project_towards(a, direction[:, None], centre)
    try:
        found = fn(a.clone(), direction.clone(), centre.clone())
    except Exception:
        found = None
    if isinstance(found, Tensor) and found.shape == a.shape and torch.allclose(found.float(), zero, atol=1e-4):
        say_right("zero ablation, a - r (r . a).")
        return
    compare(
        lambda: fn(a.clone(), direction.clone(), centre.clone()),
        affine,
        "affine ablation, a - r (r . (a - c))",
        {
            "the component is added to the centre's, not replaced by it": a + (centre @ direction) * direction,
            "everything is moved to the centre, not the component alone": centre.expand_as(a).clone(),
            "the component is turned round, not moved": 2 * affine - a,
        },
    )


@dataclass(frozen=True)
class Own:
    """A learner's ablation at all that blocks read and write, by a share of what it does."""

    ablate: Ablation
    direction: Float[Tensor, " d_model"]
    centre: SiteMeans
    scale: float

    def hooks(self, model: Model) -> list[Hook]:
        """At the three sites of every block."""
        direction = self.direction.to(model.device)

        def at(layer: int, site: int) -> Any:
            centre = self.centre[layer, site].to(model.device)

            def move(a: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
                return a + self.scale * (self.ablate(a, direction.to(a.dtype), centre.to(a.dtype)) - a)

            return move

        places = [(layer, site) for layer in range(model.layers) for site in range(len(READ_AND_WRITTEN))]
        return [(f"blocks.{layer}.{READ_AND_WRITTEN[site]}", at(layer, site)) for layer, site in places]


def attack_start_model(
    fn: Ablation, experiment: RefusalStudy, attacker: Attacker = "means, affine", *, requests: int = 20
) -> tuple[DamageCurve, DamageCurve]:
    """Attack the chapter's start model with a learner's ablation, along the direction that a searched attacker took for
    log-odds of -1, and draw the curve over the book's, of the same first held-out requests: both, the learner's first.

    Raises `ValueError` for an attacker that the run leaves out.
    """
    book = experiment.damage("start").by(attacker, "-1").curve
    found = experiment.card()
    taken = searched(found, attacker, "-1")
    centre = found.centres[found.positions.index(taken.position)]
    model, ids = experiment.model("start"), experiment.refusal_ids
    harmful, harmless = (experiment.encoded(experiment.held_out[kind][:requests]) for kind in ("harmful", "harmless"))
    before = PromptSet.of(model, harmless).last_logits(model)
    log_odds, kl = [], []
    for scale in book.scales:
        own = Own(fn, taken.directions[0], centre, float(scale))
        log_odds.append(refusal_log_odds(PromptSet.of(model, harmful).last_logits(model, (own,)), ids).numpy())
        after = PromptSet.of(model, harmless).last_logits(model, (own,))
        kl.append(kl_divergence(before, after).double().cpu().numpy())
    mine = DamageCurve(book.scales, np.stack(log_odds), np.stack(kl))
    same = DamageCurve(book.scales, book.log_odds[:, :requests], book.kl[:, :requests])
    _draw(mine, same, attacker)
    spent, theirs = mine.damage_at(-1.0), same.damage_at(-1.0)
    if np.isfinite(spent):
        print(f"Your ablation takes log-odds to -1 for {spent:.3f} nats; the book's, for {theirs:.3f}.")
    else:
        say_not_yet("log-odds never fall to -1; look at the curve, and at what is moved.")
    return mine, same


def _draw(mine: DamageCurve, book: DamageCurve, attacker: str) -> None:
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=(5, 3.6))
    ax.plot(book.kl.mean(1), book.log_odds.mean(1), "o-", color="#0072B2", label=f"the book's: {attacker}")
    ax.plot(mine.kl.mean(1), mine.log_odds.mean(1), "^--", color="#D55E00", label="yours")
    ax.axhline(-1, color="0.35", linewidth=0.8, linestyle=":")
    ax.set_xlabel("KL after harmless requests (nats)")
    ax.set_ylabel("log-odds of refusing harmful ones")
    ax.legend()
    plt.show()
