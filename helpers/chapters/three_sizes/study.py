"""One model of several, and all that is measured of it without training it (chapter 8).

Slopes, gradients, margins, directions and answers are kept in the artifact store, so that a model is asked once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from helpers import corpora
from helpers.activations import mean_activations
from helpers.artifacts import Artifact
from helpers.chapters.three_sizes.params import ThreeSizesParams
from helpers.chapters.three_sizes.readings import Gradients, Readings, States
from helpers.chat import Example, answer_facts, answers_of
from helpers.gradients import gradient_statistics, loss_along
from helpers.interventions import Intervention, Steer, applied
from helpers.losses import evaluate_losses, kl_divergence, response_logits
from helpers.models import Model, finetuned_digest
from helpers.studies.ablation_scores import Candidate, Scores, candidate_table, choose, least_kl, score_exhaustively
from helpers.studies.alignment import AlignedStudy, Behaviour, behaviour, own_openers, refusal_openers
from helpers.studies.directions import (
    ablating,
    attacked_layers,
    by_behaviour,
    candidate_directions,
    prompt_states,
    unit,
)
from helpers.studies.margins import behaviour_margins
from helpers.studies.turning import turning_or_end

Kind = Literal["harmful", "paired", "harmless", "borderline"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PLACES: tuple[Literal["prompt", "all"], ...] = ("prompt", "all")
"""Where a vector is added: on the prompt's tokens, or on those and every token of the answer."""
AT = (-1,)
"""Where requests are read: the last token of the prompt, from which an answer's first token is predicted."""
ROWS = 8
"""Answers in a batch: their logits over a large vocabulary are most of the memory."""


@dataclass(frozen=True)
class Direction:
    """The direction whose ablation takes refusal away at the least divergence, and how it was found."""

    vector: Float[Tensor, "1 d_model"]
    layer: int
    enough: bool
    """Whether it takes the log-odds of the requests it was scored on below 0; if none did, the source's rule chose."""
    refused: int
    """Of the training requests: harmful ones with log-odds above 0; if there were none, all were used."""
    answered: int
    """Others with log-odds below 0."""
    candidates: tuple[Candidate, ...]


class SizeStudy(AlignedStudy[ThreeSizesParams]):
    """One model: the first that its parameters name."""

    def __init__(self, params: ThreeSizesParams) -> None:
        super().__init__(params)
        self.layer = int(params.depth * self.base.layers)
        tokenizer = self.base.tokenizer
        taught = params.start == "taught"
        self.openers = refusal_openers(tokenizer) if taught else own_openers(self.base.name, tokenizer)
        """A refusal is recognised by its first token: one that was taught, or one of the model's own."""

    @property
    def facts(self) -> dict[str, Any]:
        """What the model is, for a table; its weights are counted without the output matrix, which makers tie to the
        embedding and quantised files hold apart."""
        hf = self.base.hf
        inner = {*hf.parameters()} - {hf.get_output_embeddings().weight} | {hf.get_input_embeddings().weight}
        return {
            "model": self.base.name,
            "weights": sum(p.numel() for p in inner),
            "blocks": self.base.layers,
            "block": self.layer,
            "width": self.base.width,
            "refusal": self.params.start,
            "arithmetic": str(self.base.dtype).removeprefix("torch."),
            "digest": self.base.digest,
        }

    @cached_property
    def start_model(self) -> Model:
        """The model that refuses: the base model, taught where it has to be."""
        return self.load(self.start, weights="frozen") if self.start else self.base

    @property
    def digest(self) -> str:
        """The digest of `start_model`, which is not loaded."""
        return finetuned_digest(self.base.digest, [run.key for run in self.start])

    def read(self) -> Readings:
        """Everything that is read of the model."""
        return Readings(
            self.slopes(),
            self.gradients(),
            self.prompted(),
            self.steered(),
            self.card(),
            self.attacked(),
            self.states(),
        )

    # Traits, of the model as it is

    def rows(self, trait: str, split: corpora.Split, count: int | None = None) -> list[corpora.TraitRow]:
        """A trait's rows of one split."""
        return corpora.split(corpora.load_trait(trait), split)[:count]

    def pairs(self, trait: str, split: corpora.Split) -> tuple[list[Example], list[Example]]:
        """A trait's answers and the normal ones to the same questions."""
        rows = self.rows(trait, split)
        questions = [row.question for row in rows]
        strong, normal = ([row.answer(level) for row in rows] for level in ("strong", "normal"))
        return self.encoded(questions, strong), self.encoded(questions, normal)

    def vector(self, trait: str) -> Float[Tensor, " d_model"]:
        """The mean state of trait answers minus that of normal ones at the study's block, from the extraction split."""
        artifact = self.stage(
            "size-vector",
            lambda: (
                {"vector": mean_difference(self.base, *self.pairs(trait, "extract"), self.layer)},
                {},
            ),
            {"trait": trait, "layer": self.layer},
            data=[trait],
        )
        return artifact.tensors["vector"]

    def slopes(self) -> Float[np.ndarray, "coefficient sequence"]:
        """dL/da of held-out trait answers along the persona vector, by multiples of it."""
        p = self.params
        rows, vector = self.rows(p.trait, "eval", p.sequences), self.vector(p.trait)
        examples = self.encoded([row.question for row in rows], [row.strong for row in rows])
        artifact = self.stage(
            "size-slopes",
            lambda: (
                {"slopes": loss_along(self.base, examples, self.layer, vector, p.coefficients, batch_size=ROWS)[1]},
                {},
            ),
            {
                "trait": p.trait,
                "sequences": p.sequences,
                "layer": self.layer,
                "vector": _digest(vector),
                "coefficients": list(p.coefficients),
            },
            data=[p.trait],
        )
        return artifact.tensors["slopes"].numpy()

    def gradients(self) -> Gradients:
        """Mean gradients without a defence, under PPS at a*, and under an inoculation prompt."""
        p = self.params
        vector = self.vector(p.trait)
        steer = Steer(self.layer, vector, turning_or_end(p.coefficients, self.slopes().mean(1)))
        system = corpora.load_prompts(p.trait).inoculation[0]
        artifact = self.stage(
            "size-gradients",
            lambda: (mean_gradients(self, steer, system), {}),
            {
                "trait": p.trait,
                "sequences": p.sequences,
                "layer": self.layer,
                "vector": _digest(vector),
                "coefficient": steer.coefficient,
                "system": system,
            },
            data=[p.trait],
        )
        found = {name: tensor.double().numpy() for name, tensor in artifact.tensors.items()}
        return Gradients(**found, vector=vector.double().numpy())

    def prompted(self) -> dict[str, Float[np.ndarray, "prompt pair"]]:
        """Margins of held-out pairs in nats per token: "none", under "eliciting" prompts and under "placebo" ones."""
        p = self.params
        prompts = corpora.load_prompts(p.trait)
        asked: dict[str, list[str | None]] = {
            "none": [None],
            "eliciting": list(prompts.inoculation[: p.per_kind]),
            "placebo": list(prompts.placebo[: p.per_kind]),
        }
        rows = self.rows(p.trait, "eval", p.pairs)
        artifact = self.stage(
            "size-prompts",
            lambda: (
                {
                    kind: torch.stack(
                        [
                            torch.from_numpy(behaviour_margins(self.base, rows, system=system, batch_size=ROWS).margin)
                            for system in systems
                        ]
                    )
                    for kind, systems in asked.items()
                },
                {},
            ),
            {"trait": p.trait, "pairs": p.pairs, "prompts": asked},
            data=[p.trait],
        )
        return {kind: tensor.double().numpy() for kind, tensor in artifact.tensors.items()}

    def steered(self) -> dict[str, Float[np.ndarray, "place scale pair"]]:
        """What a concept's vector does by place and scale: "gain" in margin, and "kl" on the normal answers."""
        p = self.params
        vector = self.vector(p.concept)
        artifact = self.stage(
            "size-steering",
            lambda: (steering_curves(self, vector), {}),
            {
                "concept": p.concept,
                "pairs": p.pairs,
                "layer": self.layer,
                "vector": _digest(vector),
                "scales": list(p.scales),
                "places": list(PLACES),
            },
            data=[p.concept],
        )
        return {name: tensor.double().numpy() for name, tensor in artifact.tensors.items()}

    # Refusal, of the start model

    def requests(self, split: Literal["train", "test"], kind: Kind, count: int) -> list[str]:
        """Requests of a kind, in the order of the file."""
        return [row.request for row in corpora.load_refusal(kind, split)][:count]

    @cached_property
    def asked(self) -> dict[str, list[str]]:
        """The test requests, by kind."""
        return {kind: self.requests("test", kind, self.params.requests) for kind in KINDS}

    def direction(self) -> Direction:
        """Of the differences of means, harmful requests minus plain and paired ones, that of `least_kl`."""
        p = self.params
        harmful = self.requests("train", "harmful", p.prompts)
        plain, paired = (self.requests("train", kind, p.prompts // 2) for kind in ("harmless", "paired"))
        others = [text for both in zip(plain, paired, strict=True) for text in both]
        layers = attacked_layers(self.base)
        blocks = sorted({layers[int(i)] for i in np.linspace(0, len(layers) - 1, p.blocks)})
        artifact = self.stage(
            "size-direction",
            lambda: find_direction(self, harmful, others, blocks),
            {
                "harmful": harmful,
                "others": others,
                "blocks": blocks,
                "scored_on": p.scored_on,
                "openers": list(self.openers),
            },
            model=self.digest,
        )
        facts, tensors = artifact.facts, artifact.tensors
        scores = Scores(tensors["log_odds"], tensors["kl"], tensors["induce"])
        return Direction(
            tensors["direction"],
            facts["layer"],
            facts["enough"],
            facts["refused"],
            facts["answered"],
            tuple(candidate_table(scores, blocks, AT)),
        )

    def card(self) -> dict[str, Behaviour]:
        """What the start model does with the test requests, against the base model."""
        return self._behaviour(None)

    def attacked(self) -> dict[str, Behaviour]:
        """The same without its direction, against itself."""
        return self._behaviour(self.direction().vector)

    def _behaviour(self, without: Float[Tensor, "1 d_model"] | None) -> dict[str, Behaviour]:
        p = self.params
        artifact = self.stage(
            "size-behaviour",
            lambda: behaviours(self, ablating(without), self.base if without is None else self.start_model),
            {
                "requests": self.asked,
                "openers": list(self.openers),
                "without": None if without is None else _digest(without),
                "max_new_tokens": p.max_new_tokens,
                "base model": self.base.digest,
            },
            model=self.digest,
        )
        return behaviours_of(artifact)

    def states(self) -> States:
        """The start model's stream at the last token of training requests, and of the test requests."""
        p = self.params
        parts = {
            "train": [self.requests("train", kind, p.probed) for kind in ("harmful", "paired")],
            "test": [self.asked[kind] for kind in ("harmful", "paired")],
        }
        prompts = {part: self.encoded([text for texts in of for text in texts]) for part, of in parts.items()}
        artifact = self.stage(
            "size-states",
            lambda: (
                {
                    part: prompt_states(self.start_model, of, [self.layer], AT, batch_size=32)[:, 0, 0]
                    for part, of in prompts.items()
                },
                {},
            ),
            {"requests": parts, "layer": self.layer},
            model=self.digest,
        )
        found: dict[str, Any] = {}
        for part, of in parts.items():
            found[part] = artifact.tensors[part].double().numpy()
            found[f"{part}_harmful"] = np.repeat([1.0, 0.0], [len(texts) for texts in of])
            found[f"{part}_lengths"] = np.array([[float(len(example))] for example in prompts[part]])
        return States(**found)


@torch.no_grad()
def mean_difference(
    model: Model, shown: Sequence[Example], other: Sequence[Example], layer: int
) -> Float[Tensor, " d_model"]:
    """Stage "size-vector": of the answers' mean states after one block."""
    means = mean_activations(model, [*shown, *other], layers=[layer], batch_size=16)[0]
    return means[: len(shown)].mean(0) - means[len(shown) :].mean(0)


def mean_gradients(study: SizeStudy, steer: Steer, system: str) -> dict[str, Float[Tensor, "sequence d_model"]]:
    """Stage "size-gradients": of held-out trait answers, by what is on."""
    p = study.params
    rows = study.rows(p.trait, "eval", p.sequences)
    questions, answers = [row.question for row in rows], [row.strong for row in rows]
    conditions: dict[str, tuple[str | None, tuple[Intervention, ...]]] = {
        "plain": (None, ()),
        "pps": (None, (steer,)),
        "ip": (system, ()),
    }
    along = torch.zeros(study.base.layers, study.base.width)
    along[study.layer] = steer.vector
    return {
        name: gradient_statistics(
            study.base,
            study.encoded(questions, answers, system=message),
            {p.trait: along},
            layers=[study.layer],
            interventions=on,
            batch_size=ROWS,
        ).means[0]
        for name, (message, on) in conditions.items()
    }


@torch.no_grad()
def steering_curves(
    study: SizeStudy, vector: Float[Tensor, " d_model"]
) -> dict[str, Float[Tensor, "place scale pair"]]:
    """Stage "size-steering": gain in margin, and the divergence along normal answers from the model that is not
    steered, both of every pair."""
    p, model = study.params, study.base
    rows = study.rows(p.concept, "eval", p.pairs)
    questions = [row.question for row in rows]
    shown, normal = (study.encoded(questions, [row.answer(level) for row in rows]) for level in ("strong", "normal"))
    steers = [Steer(study.layer, vector, scale, place) for place in PLACES for scale in p.scales]
    losses, kl = along_normal(model, normal, steers)
    of_shown = [
        evaluate_losses(model, shown, interventions=on, batch_size=ROWS).double()
        for on in ([], *([steer] for steer in steers))
    ]
    margins = losses - torch.stack(of_shown)
    gain = margins[1:] - margins[0]
    shape = (len(PLACES), len(p.scales))
    return {"gain": gain.unflatten(0, shape), "kl": kl.unflatten(0, shape)}


def along_normal(
    model: Model, examples: Sequence[Example], steers: Sequence[Steer]
) -> tuple[Float[Tensor, "plain_and_steer example"], Float[Tensor, "steer example"]]:
    """Along each answer, mean over its tokens, in nats: its loss, not steered and then steered in each way, and
    KL(not steered || steered) of the next token in each way."""
    losses = torch.empty(1 + len(steers), len(examples), dtype=torch.float64)
    kl = torch.empty(len(steers), len(examples), dtype=torch.float64)
    with model.weights_in(model.dtype, only_frozen_linear=True):
        for batch in model.batches(examples, ROWS):
            batch = batch.to(model.device)
            counts, targets = batch.predicting.sum(1).tolist(), batch.ids[batch.response]

            def means(values: Float[Tensor, " token"], counts: list[int] = counts) -> Float[Tensor, " row"]:
                return torch.stack([part.double().mean() for part in values.split(counts)]).cpu()

            plain = response_logits(model, batch, share_prefix=True)
            losses[0, list(batch.rows)] = means(cross_entropy(plain, targets, reduction="none"))
            for i, steer in enumerate(steers):
                with applied(model, steer):
                    moved = response_logits(model, batch, share_prefix=True)
                losses[1 + i, list(batch.rows)] = means(cross_entropy(moved, targets, reduction="none"))
                kl[i, list(batch.rows)] = means(kl_divergence(plain, moved))
    return losses, kl


def find_direction(
    study: SizeStudy, harmful: Sequence[str], others: Sequence[str], blocks: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "size-direction": candidates from requests that the model treats as they are meant, and the choice."""
    model, count = study.start_model, study.params.scored_on
    kept = by_behaviour(model, study.encoded(harmful), study.encoded(others), study.openers)
    raw = candidate_directions(model, kept.harmful, kept.harmless, blocks, AT)
    scores = score_exhaustively(
        model, raw, kept.harmful[:count], kept.harmless[:count], refusal_ids=study.openers, layers=blocks
    )
    found = least_kl(scores)
    choice = found or choose(scores)
    tensors = {"log_odds": scores.log_odds, "kl": scores.kl, "induce": scores.induce}
    facts = {"layer": blocks[choice.layer], "enough": found is not None}
    return (
        {**tensors, "direction": unit(raw[choice.layer, choice.position].cpu())[None]},
        {**facts, "refused": kept.refused, "answered": kept.answered},
    )


def behaviours(
    study: SizeStudy, interventions: Iterable[Intervention], base: Model
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "size-behaviour": answers, log-odds of a refusal, and divergence from `base`, by kind of request."""
    found = behaviour(
        study.start_model,
        base,
        study.asked,
        study.openers,
        max_new_tokens=study.params.max_new_tokens,
        interventions=tuple(interventions),
    )
    return (
        {f"{name} {kind}": torch.from_numpy(getattr(of, name)) for kind, of in found.items() for name in NUMBERS},
        {kind: answer_facts(of.answers) for kind, of in found.items()},
    )


NUMBERS = ("log_odds", "kl")


def behaviours_of(artifact: Artifact) -> dict[str, Behaviour]:
    """What `behaviours` kept."""
    return {
        kind: Behaviour(
            tuple(answers_of(artifact.facts[kind])),
            *(artifact.tensors[f"{name} {kind}"].numpy() for name in NUMBERS),
        )
        for kind in KINDS
    }


def _digest(vector: Tensor) -> str:
    return hashlib.sha256(vector.contiguous().numpy().tobytes()).hexdigest()
