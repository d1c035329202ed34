"""The card of a start model: what it refuses, how far it is from its base model, and what one direction does to it.

An attack on refusal means something only where the model refuses what is harmful and little else, where its harmless
answers are still those of the base model, and where removing one direction undoes refusal without breaking it.
Chapters that begin with a start model show its card; both halves of it are made once for all of them.

A direction is a contrast of harmful prompts with others. Plain harmless prompts are shorter and ask more questions, so
part of that contrast is form; *paired* ones are built like harmful ones, and *residualised* means have equal form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers import corpora
from helpers.chat import Example, answer_facts, answers_of
from helpers.cues import form
from helpers.judges.refusal import is_refusal
from helpers.models import Model
from helpers.studies.ablation_scores import Candidate, Scores, candidate_table, score_exhaustively
from helpers.studies.alignment import AlignedStudy, Behaviour, behaviour, own_openers, refusal_openers, rows
from helpers.studies.directions import (
    by_behaviour,
    difference_of_means,
    header_positions,
    prompt_states,
    site_means,
)
from helpers.studies.params import AlignedParams

A = TypeVar("A", bound=AlignedParams)

Mode = Literal["zero", "affine"]
"""Where ablation moves a component: to zero, or to the mean of harmless prompts."""

Contrast = Literal["harmless", "paired", "residualised"]
"""What harmful prompts are compared with."""

FORM = ("words", "sentences", "letters a word", "question")
"""What residualised means hold equal (`cues.form`)."""

KINDS: tuple[Literal["harmful", "harmless", "paired", "borderline"], ...] = (
    "harmful",
    "harmless",
    "paired",
    "borderline",
)

ANSWER_TOKENS = 24
"""Length of the answers on the card."""


@dataclass(frozen=True)
class Search:
    """Candidate directions of a model, and what ablating or adding each does."""

    raw: Mapping[Contrast, Float[Tensor, "layer position d_model"]]
    scores: Mapping[tuple[Contrast, Mode], Scores]
    centres: Float[Tensor, "position block site d_model"]
    """Where affine ablation moves to (`directions.site_means`)."""
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    kept: Mapping[str, int]
    """How many prompts of a kind the model treats as they are meant: refuses harmful ones, answers others."""

    def candidates(self, contrast: Contrast, mode: Mode) -> list[Candidate]:
        """The table of candidates, block after block."""
        return candidate_table(self.scores[contrast, mode], self.layers, self.positions)


class CardedStudy(AlignedStudy[A]):
    """A study of a start model whose card is known."""

    @cached_property
    def refusal_ids(self) -> list[int]:
        """The first tokens that a refusal is known by: those that were taught, or else the model's own, which are the
        source's "I" where nobody measured them."""
        tokenizer = self.base.tokenizer
        taught = self.params.start == "taught"
        return list(refusal_openers(tokenizer) if taught else own_openers(self.base.name, tokenizer))

    def start_behaviour(self) -> dict[str, Behaviour]:
        """What the start model does with all held-out bundled requests, by kind: the card's first half."""
        requests = {str(kind): [row.request for row in corpora.load_refusal(kind, "test")] for kind in KINDS}
        artifact = self.stage(
            "start-behaviour",
            lambda: start_behaviour(self, requests),
            {"start": [run.key for run in self.start], "openers": self.refusal_ids, "tokens": ANSWER_TOKENS},
            data=["refusal"],
        )
        return {
            kind: Behaviour(tuple(answers_of(facts["said"])), np.array(facts["log_odds"]), np.array(facts["kl"]))
            for kind, facts in ((kind, artifact.facts[kind]) for kind in requests)
        }

    def search(
        self,
        digest: str,
        model: Callable[[], Model],
        prompts: Mapping[str, Sequence[str]],
        contrasts: Sequence[Contrast],
        layers: Sequence[int],
        scored_on: int | None = None,
    ) -> Search:
        """Candidate directions of the model of this digest, from an attacker's prompts by kind, scored by both modes of
        ablation: of the start model, the card's second half. The model is loaded only if the store lacks them.

        Directions come from all prompts that the model treats as they are meant, scores from the first `scored_on`.
        """
        artifact = self.stage(
            "candidate-scores",
            lambda: search(self, model(), prompts, contrasts, layers, scored_on),
            {
                "prompts": {kind: list(texts) for kind, texts in prompts.items()},
                "contrasts": list(contrasts),
                "layers": list(layers),
                "scored_on": scored_on,
                "openers": self.refusal_ids,
            },
            model=digest,
        )
        tensors = artifact.tensors
        scores = {
            (contrast, mode): Scores(*tensors[f"{contrast} {mode}"])
            for contrast, mode in product(contrasts, get_args(Mode))
        }
        raw = {contrast: tensors[contrast] for contrast in contrasts}
        positions = header_positions(self.base.tokenizer)
        return Search(raw, scores, tensors["centres"], tuple(layers), positions, artifact.facts)


def start_behaviour(
    study: CardedStudy[Any], requests: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "start-behaviour": answers, log-odds and divergence from the base model, by kind of request."""
    base = study.load(weights="cast")
    model = study.load(study.start, weights="cast") if study.start else base
    found = behaviour(model, base, requests, study.refusal_ids, max_new_tokens=ANSWER_TOKENS)
    return {}, {
        kind: {"said": answer_facts(of.answers), "log_odds": of.log_odds.tolist(), "kl": of.kl.tolist()}
        for kind, of in found.items()
    }


def search(
    study: CardedStudy[Any],
    model: Model,
    prompts: Mapping[str, Sequence[str]],
    contrasts: Sequence[Contrast],
    layers: Sequence[int],
    scored_on: int | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "candidate-scores": every candidate of every contrast, and its scores by both modes of ablation."""
    ids, positions = study.refusal_ids, header_positions(model.tokenizer)
    encoded = {kind: study.encoded(texts) for kind, texts in prompts.items()}
    text_of = {e: text for kind, texts in prompts.items() for e, text in zip(encoded[kind], texts, strict=True)}
    plain = by_behaviour(model, encoded["harmful"], encoded["harmless"], ids)
    others: dict[str, list[Example]] = {"harmless": plain.harmless}
    counts = {"harmful": plain.refused, "harmless": plain.answered}
    if "paired" in contrasts:
        alike = by_behaviour(model, encoded["harmful"], encoded["paired"], ids)
        others["paired"], counts["paired"] = alike.harmless, alike.answered
    states = {kind: prompt_states(model, some, layers, positions) for kind, some in others.items()}
    harmful = prompt_states(model, plain.harmful, layers, positions)
    centres = site_means(model, plain.harmless, positions)
    found = {"centres": centres}
    for contrast in contrasts:
        if contrast == "residualised":
            texts = [[text_of[e] for e in some] for some in (plain.harmful, plain.harmless)]
            raw = difference_at_equal_form(harmful, states["harmless"], *texts)
        else:
            raw = difference_of_means(harmful.double(), states[contrast].double()).float()
        found[contrast] = raw
        for mode in get_args(Mode):
            scores = score_exhaustively(
                model,
                raw,
                plain.harmful[:scored_on],
                plain.harmless[:scored_on],
                refusal_ids=ids,
                layers=layers,
                centres=None if mode == "zero" else centres,
            )
            found[f"{contrast} {mode}"] = torch.stack([scores.log_odds, scores.kl, scores.induce])
    return found, counts


def difference_at_equal_form(
    harmful: Float[Tensor, "harmful layer position d_model"],
    harmless: Float[Tensor, "harmless layer position d_model"],
    harmful_texts: Sequence[str],
    harmless_texts: Sequence[str],
) -> Float[Tensor, "layer position d_model"]:
    """The difference of two means at equal form: the coefficient of being harmful in a least-squares fit of states that
    also has the four features of form, `FORM`, each standardised."""
    rows = torch.tensor([[form(text)[name] for name in FORM] for text in (*harmful_texts, *harmless_texts)]).double()
    rows = rows - rows.mean(0)
    rows = rows / rows.norm(dim=0).clamp_min(1e-9)
    kind = torch.arange(len(rows)) < len(harmful)
    design = torch.cat([torch.ones(len(rows), 1), kind[:, None], rows], 1).double()
    states = torch.cat([harmful, harmless]).double()
    fitted = torch.linalg.pinv(design) @ states.flatten(1)  # where features depend on each other, the smallest fit
    return fitted[1].view(states.shape[1:]).float()


def told(of: Mapping[str, Behaviour]) -> list[dict[str, str]]:
    """The card's first half as a page shows it: a row for each kind of request, with 95% intervals."""
    return [
        {
            "requests": row.kind,
            "refused": f"{row.refused:.0%}",
            "log-odds of refusal": f"{row.log_odds:.2f}",
            "above 0": f"{row.above:.0%}",
            "KL from the base model (nats)": f"{row.kl:.3f}",
            "median KL": f"{row.kl_median:.3f}",
            "refusals open with": ", ".join(f"{word} {count}" for word, count in openings(of[row.kind]).items()),
        }
        for row in rows(of)
    ]


def openings(of: Behaviour) -> dict[str, int]:
    """How many refusals begin with each word, the most frequent first."""
    said = [answer for answer, refused in zip(of.answers, is_refusal(of.answers), strict=True) if refused]
    return dict(Counter(answer.split()[0].strip(".,;:!'\"") for answer in said if answer.split()).most_common())
