"""Damage against suppression: what it costs harmless answers to take refusal away, by each attack.

Any model stops refusing when enough of it is removed. So an attack is measured by a curve: the direction's component is
ablated by more and more, and each scale gives the log-odds of refusing harmful requests and the divergence after
harmless ones. The least divergence at which refusal has fallen to a level is the attack's damage at that level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.chat import Answer, Example, answers_of
from helpers.forward import PromptSet
from helpers.interventions import AblateRows, SiteMeans
from helpers.judges.refusal import is_refusal
from helpers.losses import kl_divergence
from helpers.models import Model
from helpers.studies.ablation_scores import ROWS_AT_ONCE, chunks
from helpers.studies.directions import NO_PROMPTS
from helpers.studies.margins import refusal_log_odds

SCALES = (0.0, 0.4, 0.7, 1.0, 1.25)
"""Shares of a direction's component that are ablated along a damage curve: 1 is the whole, above it the sign turns."""


@dataclass(frozen=True)
class DamageCurve:
    """What ablating a direction by more and more does."""

    scales: Float[np.ndarray, " scale"]
    """How far the attack goes: shares of a component that are ablated, or steps of finetuning."""
    log_odds: Float[np.ndarray, "scale harmful"]
    """Of refusing each harmful prompt."""
    kl: Float[np.ndarray, "scale harmless"]
    """KL(not attacked || attacked) of the first token after each harmless prompt, in nats."""

    def damage_at(self, level: float) -> float:
        """`damage_at` of the means over prompts."""
        return float(damage_at(self.log_odds.mean(1), self.kl.mean(1), level))


def damage_at(
    log_odds: Float[np.ndarray, " scale *draw"],
    kl: Float[np.ndarray, " scale *draw"],
    level: float,
) -> Float[np.ndarray, "*draw"]:
    """The least KL at which log-odds are at most `level`, in nats, read off a curve by linear interpolation between
    neighbouring scales; infinite where they never fall so far.

    Raises `ValueError` for a curve without points, or of unequal lengths.
    """
    if len(log_odds) != len(kl) or not len(kl):
        counts = f"{len(kl)} for {len(log_odds)}"
        raise ValueError(f"A curve needs a KL for each log-odds, and has {counts}.")
    costs = np.where(log_odds <= level, kl, inf).min(0)
    for s0, s1, k0, k1 in zip(log_odds, log_odds[1:], kl, kl[1:], strict=False):
        crosses = (s0 - level) * (s1 - level) < 0
        way = (s0 - level) / np.where(crosses, s0 - s1, 1.0)
        costs = np.minimum(costs, np.where(crosses, k0 + way * (k1 - k0), inf))
    return np.asarray(costs)


@dataclass(frozen=True)
class Attacked:
    """What one attack does to a model."""

    attacker: str
    rule: str
    layer: int | None
    """Where the direction was read; None for an attack that uses none."""
    position: int | None
    fallback: bool
    curve: DamageCurve
    answers: tuple[Answer, ...]
    """To the harmful requests, with the whole component ablated, or after the last step; none where none were asked
    for."""

    @property
    def refused(self) -> Bool[np.ndarray, " harmful"]:
        """Which of these answers refuse (a proxy: `judges.refusal.is_refusal`)."""
        return is_refusal(self.answers)


@dataclass(frozen=True)
class Damage:
    """What every attack does to a model."""

    attacks: tuple[Attacked, ...]

    @classmethod
    def of(cls, facts: Sequence[Mapping[str, Any]]) -> Damage:
        """From what the stage "attack-damage" keeps."""
        places = ("attacker", "rule", "layer", "position", "fallback")
        return cls(
            tuple(
                Attacked(
                    **{name: row[name] for name in places},
                    curve=DamageCurve(*(np.array(row[name]) for name in ("scales", "log_odds", "kl"))),
                    answers=tuple(answers_of(row["said"])),
                )
                for row in facts
            )
        )

    @property
    def attackers(self) -> list[str]:
        """Their names, each once."""
        return list(dict.fromkeys(attack.attacker for attack in self.attacks))

    def by(self, attacker: str, rule: str) -> Attacked:
        """An attacker's directions by this rule, or the only ones that a fitted attacker has.

        Raises `ValueError` for an attacker that this run leaves out.
        """
        for attack in self.attacks:
            if attack.attacker == attacker and attack.rule in (rule, "fitted"):
                return attack
        raise ValueError(f"There is no attacker {attacker!r} here; this run has {', '.join(self.attackers)}.")


@torch.no_grad()
def damage_curve(
    model: Model,
    directions: Float[Tensor, "k d_model"],
    harmful: Sequence[Example],
    harmless: Sequence[Example],
    *,
    refusal_ids: Sequence[int],
    centre: SiteMeans | None = None,
    scales: Sequence[float] = SCALES,
    batch_size: int = 64,
) -> DamageCurve:
    """Ablate these directions by each of `scales`: to zero, or towards `centre` (`site_means` at one position).

    Raises `ValueError` if there are no prompts of a kind, no refusal tokens, or no scales.
    """
    if not harmful or not harmless:
        raise ValueError(NO_PROMPTS)
    if not scales:
        raise ValueError("A damage curve needs at least one scale of ablation.")
    before = PromptSet.of(model, harmless, batch_size=batch_size).last_logits(model)
    log_odds, kl, prompts = [], [], [*harmful, *harmless]
    for some in chunks(scales, max(1, ROWS_AT_ONCE // len(prompts))):
        count = len(some)
        each = AblateRows(
            (directions,) * count,
            tuple(copy for copy in range(count) for _ in prompts),
            centres=(centre,) * count,
            scales=tuple(some),
        )
        reads = PromptSet.of(model, prompts, batch_size=batch_size, copies=count)
        for logits in reads.last_logits(model, (each,)).split(len(prompts)):
            of_harmful, of_harmless = logits.tensor_split([len(harmful)])
            log_odds.append(refusal_log_odds(of_harmful, refusal_ids).numpy())
            kl.append(kl_divergence(before, of_harmless).double().cpu().numpy())
    return DamageCurve(np.array(scales, dtype=float), np.stack(log_odds), np.stack(kl))
