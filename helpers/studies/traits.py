"""Training a trait into a model, and defending against it (chapters 1 and 2).

Persona vectors, activation gradients, finetuning under a defence, evaluation.

Each stage is kept in the artifact store under everything that decides it, so a chapter that is run again, or another
chapter that needs the same run, reads it instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers import corpora
from helpers.activations import PersonaVector, PersonaVectorFitter, mean_activations
from helpers.artifacts import Artifact
from helpers.chat import Answer, Example, answer_facts, answers_of, encode
from helpers.generation import generate
from helpers.gradients import GradientStatistics, RecordCosines, gradient_statistics
from helpers.interventions import EditGradient, EditMode, Intervention
from helpers.judges.classifier import TraitJudge, diverse_negatives
from helpers.judges.repetition import repetition_rate
from helpers.losses import evaluate_losses
from helpers.models import Model
from helpers.studies.defences import inoculated, preventative_steering
from helpers.studies.margins import behaviour_margins
from helpers.studies.params import TraitParams
from helpers.studies.study import Finetuning, Study

RANDOM_SEED = 2024
"""Seed of the random control vectors; they are the same in every run."""


@dataclass(frozen=True)
class Defence:
    """What is done during training, and only then. The default does nothing."""

    vector: str | None = None
    """Trait whose persona vector is used, or "random" for one of the trait's norm."""
    coefficient: float = 0.0
    """PPS: adds `coefficient` times the vector."""
    edit: EditMode | None = None
    """Edits the gradient's component along the vector instead."""
    prompts: tuple[str, ...] = ()
    """IP: system messages to draw from."""


@dataclass(frozen=True)
class Run:
    """A finished finetuning run."""

    key: str
    finetuned: tuple[Artifact, ...]
    """What this run trained, after what the runs did that it started from."""
    losses: tuple[float, ...]
    """Mean response loss at each step, in nats per token."""
    cosines: tuple[float, ...]
    """cos(gradient, persona vector) of the training batch at each step."""


@dataclass(frozen=True)
class Evaluation:
    """How a model behaves on the evaluation questions, with no defence on."""

    margins: Float[np.ndarray, " question"]
    """NLL(normal answer) - NLL(trait answer) of the written answers, in nats per token: higher is more of the trait."""
    normal_losses: Float[np.ndarray, " question"]
    """NLL of the normal answers, in nats per token: what training cost elsewhere."""
    answers: tuple[Answer, ...]
    scores: Float[np.ndarray, " question"]
    """Trait score, 0 to 100; an answer without a word shows no trait and counts as 0."""
    perplexities: Float[np.ndarray, " question"]
    """Perplexity of each answer under the untrained model: how odd it finds the text."""
    repetition: Float[np.ndarray, " question"]
    """Share of repeated word trigrams."""
    projections: Float[np.ndarray, " question"]
    """Projection on the trait's persona vector of this model's activations, while it reads the held-out trait
    answers."""


class TraitStudy(Study[TraitParams]):
    """A chapter's data, vectors and judge beside its base model, by its parameters."""

    def __init__(self, params: TraitParams) -> None:
        super().__init__(params, layer=params.layer)
        self.rows = {
            name: corpora.split(corpora.load_trait(params.trait), name) for name in ("train", "extract", "eval")
        }
        self.prompts = corpora.load_prompts(params.trait)
        self._vectors: dict[str, PersonaVector] = {}
        self._runs: dict[str, Run] = {}
        self.judge = self.fit_judge("train")

    @property
    def heldout(self) -> list[corpora.TraitRow]:
        """The evaluation rows in use: seen neither by training, nor by the vector, nor by the judge."""
        return self.rows["eval"][: self.params.sequences]

    def examples(self, level: Literal["normal", "strong"] = "strong", system: str | None = None) -> list[Example]:
        """The held-out questions with their written answers of one level."""
        rows = self.heldout
        return self.encoded([row.question for row in rows], [row.answer(level) for row in rows], system=system)

    def trait_pairs(self, split: Literal["train", "extract"]) -> list[Example]:
        """A split's questions with their trait answers and their normal ones, by turns."""
        pairs = [(row.question, row.answer(level)) for row in self.rows[split] for level in ("strong", "normal")]
        return self.encoded(*zip(*pairs, strict=True))

    def fit_judge(self, split: Literal["train", "extract"]) -> TraitJudge:
        """A judge that learnt from a split's written answers, the untrained model's own answers to its questions, and
        answers in other voices."""
        rows = self.rows[split]
        own = self.greedy_answers(self.base, [row.question for row in rows], self.params.max_new_tokens)
        return TraitJudge.fit(rows, own, diverse_negatives(self.params.trait, split))

    def vector(self, trait: str | None = None) -> PersonaVector:
        """A trait's persona vector (default: the chapter's).

        "random" is Gaussian, of the same norm at every layer, and so are "random 1", "random 2" and so on.

        Written answers of the extraction split are read by the untrained model; the source lets the model write them
        under trait-eliciting prompts, which a model this small does not follow. So this is a reconstruction.
        """
        trait = trait or self.params.trait
        if trait.split()[0] == "random":
            return self.vector().random_like(RANDOM_SEED + int("0" + trait.removeprefix("random").strip()))
        if trait not in self._vectors:
            artifact = self.stage(
                "persona-vector", lambda: fit_vector(self.base, trait), {"trait": trait}, data=[trait]
            )
            self._vectors[trait] = PersonaVector(trait, artifact.tensors["vectors"])
        return self._vectors[trait]

    def steering(
        self, trait: str | None = None, coefficient: float | None = None, layer: int | None = None
    ) -> Intervention:
        """PPS with a trait's vector (default: the chapter's own), intensity and layer."""
        return preventative_steering(
            self.vector(trait),
            self.params.layer if layer is None else layer,
            self.params.coefficient if coefficient is None else coefficient,
        )

    def gradients(
        self,
        *interventions: Intervention,
        system: str | None = None,
        layers: Sequence[int] | None = None,
        model: Model | None = None,
        tokens: Literal["response", "all"] = "response",
    ) -> GradientStatistics:
        """Activation gradients on the held-out trait answers, and their cosines with every vector of the chapter."""
        names = (self.params.trait, *self.params.other_traits, "random")
        return gradient_statistics(
            model or self.base,
            self.examples(system=system),
            {name: self.vector(name).vectors for name in names},
            layers=layers or (self.params.layer,),
            tokens=tokens,
            interventions=interventions,
            batch_size=self.params.batch_size,
        )

    def train(
        self,
        defence: Defence | None = None,
        *,
        level: str = "strong",
        start: Run | None = None,
        seed: int | None = None,
    ) -> Run:
        """Finetune on the training split's answers of one level, from the untrained model or from where
        `start` ended."""
        p, defence = self.params, defence or Defence()
        seed = p.seed if seed is None else seed
        recipe = Finetuning(p.steps, p.batch_size, p.learning_rate, seed, p.lora_rank)
        artifact = self.stage(
            "finetuning",
            lambda: train(self, recipe, defence, level, start.finetuned if start else ()),
            {
                "recipe": asdict(recipe),
                "defence": {**asdict(defence), "prompts": list(defence.prompts)},
                "trait": p.trait,
                "level": level,
                "start": start.key if start else None,
                "layer": p.layer,
            },
            data={t for t in {p.trait, defence.vector or p.trait} if t.split()[0] != "random"},
        )
        if artifact.key not in self._runs:  # one copy of its tensors, however often a chapter asks for the run
            before = start.finetuned if start else ()
            losses, cosines = tuple(artifact.facts["losses"]), tuple(artifact.facts["cosines"])
            self._runs[artifact.key] = Run(artifact.key, (*before, artifact), losses, cosines)
        return self._runs[artifact.key]

    def evaluate(self, run: Run | None = None, *, system: str | None = None) -> Evaluation:
        """Answers to the held-out questions (greedy), judged; `run=None` is the untrained model, `system` a
        prompt at test."""
        p = self.params
        artifact = self.stage(
            "evaluation",
            lambda: evaluate(self, self.trained(run) if run else self.base, system),
            {
                "run": run.key if run else None,
                "system": system,
                "trait": p.trait,
                "sequences": p.sequences,
                "max_new_tokens": p.max_new_tokens,
                "layer": p.layer,
            },
            data=[p.trait],
        )
        answers = answers_of(artifact.facts)
        activations = artifact.tensors["activations"]
        return Evaluation(
            artifact.tensors["margins"].numpy(),
            artifact.tensors["normal_losses"].numpy(),
            tuple(answers),
            np.nan_to_num(self.judge.score([r.question for r in self.heldout], answers)),
            np.array(artifact.facts["perplexities"]),
            repetition_rate(answers),
            self.vector().projection(activations, self.params.layer).numpy(),
        )

    def trained(self, run: Run) -> Model:
        """The model that a run ended with, its adapters merged."""
        return self.load(run.finetuned)

    def losses(
        self,
        *interventions: Intervention,
        system: str | None = None,
        level: Literal["normal", "strong"] = "strong",
    ) -> Float[np.ndarray, " sequence"]:
        """The untrained model's loss on each held-out answer, in nats per token."""
        return evaluate_losses(self.base, self.examples(level, system), interventions=interventions).numpy()


def fit_vector(model: Model, trait: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "persona-vector": from the written answers of the extraction split."""
    fitter, rows = PersonaVectorFitter(trait), corpora.split(corpora.load_trait(trait), "extract")
    for level in ("normal", "strong"):
        examples = [encode(model.tokenizer, row.question, row.answer(level)) for row in rows]
        fitter.update(mean_activations(model, examples), shows_trait=level == "strong")
    return {"vectors": fitter.fit().vectors}, {"answers": 2 * len(rows)}


def train(
    study: TraitStudy, recipe: Finetuning, defence: Defence, level: str, start: Sequence[Artifact]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "finetuning": trained tensors, and each step's loss and cosine of the gradient with the persona vector."""
    p, tokenizer = study.params, study.base.tokenizer
    interventions: list[Intervention] = []
    if defence.edit:
        interventions.append(EditGradient(p.layer, study.vector(defence.vector).at(p.layer), defence.edit))
    elif defence.vector:
        interventions.append(study.steering(defence.vector, defence.coefficient))
    recorder = RecordCosines(p.layer, {p.trait: study.vector().at(p.layer)})
    pairs = [(row.question, row.answer(level)) for row in study.rows["train"]]
    model, log = study.finetune(
        recipe,
        recipe.batches(
            lambda rng: inoculated(tokenizer, pairs, defence.prompts, rng),
            tokenizer.pad_token_id,
            # whatever the system message: arms of one seed are paired batch by batch
            lengths=[len(encode(tokenizer, question, answer)) for question, answer in pairs],
        ),
        start=start,
        interventions=[*interventions, recorder],
    )
    cosines = [record[p.trait] for record in recorder.records]
    return model.trained_tensors(), {"losses": log.losses, "cosines": cosines, "tokens": log.tokens}


def evaluate(study: TraitStudy, model: Model, system: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "evaluation": margins and states on written answers; greedy answers, and how odd the untrained model finds
    them."""
    p, questions = study.params, [row.question for row in study.heldout]
    answers = generate(model, study.encoded(questions, system=system), max_new_tokens=p.max_new_tokens)
    perplexities = evaluate_losses(study.base, study.encoded(questions, answers)).exp()
    activations = mean_activations(model, study.examples(), layers=[p.layer])[0]
    found = behaviour_margins(model, study.heldout, system=system)
    tensors = {
        "activations": activations,
        "margins": torch.from_numpy(found.margin),
        "normal_losses": torch.from_numpy(found.other),
    }
    return tensors, {**answer_facts(answers), "perplexities": perplexities.tolist()}
