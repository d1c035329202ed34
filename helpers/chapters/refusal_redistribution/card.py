"""The card of a start model: what it refuses, how far it is from its base model, and what one direction does to it.

An attack on refusal means something only where the model refuses what is harmful and little else, where its harmless
answers are still those of the base model, and where removing one direction undoes refusal without breaking it. The card
has all three in one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from helpers.chat import Example
from helpers.models import Model
from helpers.studies.ablation_scores import Candidate, Scores, candidate_table, score_exhaustively
from helpers.studies.alignment import Behaviour, Row, behaviour, rows
from helpers.studies.directions import attacked_layers, by_behaviour, candidate_directions, header_positions, site_means

Mode = Literal["zero", "affine"]
"""Where ablation moves a component: to zero, or to the mean of harmless prompts."""


@dataclass(frozen=True)
class Card:
    """What is known of a start model."""

    behaviour: Mapping[str, Behaviour]
    """By kind of request."""
    scores: Mapping[Mode, Scores]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    refused: int
    """Of the attacker's harmful prompts: those on which candidates are made and scored."""
    answered: int
    """The same of the harmless ones."""

    @property
    def rows(self) -> list[Row]:
        """Rates, log-odds and divergence, a row for each kind of request."""
        return rows(self.behaviour)

    def candidates(self, mode: Mode) -> list[Candidate]:
        """The table of candidates, block after block."""
        return candidate_table(self.scores[mode], self.layers, self.positions)


def card(
    model: Model,
    base: Model,
    openers: Sequence[int],
    requests: Mapping[str, Sequence[str]],
    harmful: Sequence[Example],
    harmless: Sequence[Example],
    *,
    layers: Sequence[int] | None = None,
    scored_on: int | None = None,
    max_new_tokens: int = 24,
) -> Card:
    """The card of `model`, which was made from `base` and refuses with one of the tokens `openers`.

    `requests`, by kind, are what it is judged on; `harmful` and `harmless` prompts are the attacker's, of which those
    that the model treats as they are meant are used: directions come from all of these, scores from the first
    `scored_on` of a kind. Candidates come from every position of the template's header, and from `layers` (None: the
    first four fifths). Raises `ValueError` if there are no prompts of a kind or no openers.
    """
    found = behaviour(model, base, requests, openers, max_new_tokens=max_new_tokens)
    kept = by_behaviour(model, harmful, harmless, openers)
    blocks = attacked_layers(model) if layers is None else tuple(layers)
    positions = header_positions(model.tokenizer)
    raw = candidate_directions(model, kept.harmful, kept.harmless, blocks, positions)
    centres = {"zero": None, "affine": site_means(model, kept.harmless, positions)}
    scores: dict[Mode, Scores] = {
        mode: score_exhaustively(
            model,
            raw,
            kept.harmful[:scored_on],
            kept.harmless[:scored_on],
            refusal_ids=openers,
            layers=blocks,
            centres=centres[mode],
        )
        for mode in ("zero", "affine")
    }
    return Card(found, scores, blocks, positions, kept.refused, kept.answered)
