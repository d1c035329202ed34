"""Training a trait into a model, and defending against it (chapters 1 and 2).

Persona vectors, activation gradients, finetuning under a defence, evaluation.

Each stage is kept in the artifact store under everything that decides it, so a chapter that is run again, or another
chapter that needs the same run, reads it instead.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers import corpora
from helpers.activations import PersonaVector, PersonaVectorFitter, mean_activations
from helpers.artifacts import Artifact, Compute
from helpers.chat import Answer, Batch, Example, answer_facts, answers_of, encode
from helpers.generation import generate
from helpers.gradients import GradientStatistics, RecordStream, gradient_statistics, loss_along
from helpers.interventions import EditGradient, EditMode, Intervention, SteerRows
from helpers.judges.classifier import TraitJudge, diverse_negatives
from helpers.judges.repetition import repetition_rate
from helpers.losses import evaluate_losses
from helpers.models import Model
from helpers.stacks import runs_at_once
from helpers.statistics import Estimate
from helpers.studies.defences import inoculated, preventative_steering
from helpers.studies.margins import behaviour_margins
from helpers.studies.params import TraitParams
from helpers.studies.study import Finetuning, Study, examples_digest
from helpers.studies.turning import GRID, turning_estimate
from helpers.training import TrainingLog

RANDOM_SEED = 2024
"""Seed of the random control vectors; they are the same in every run."""


@dataclass(frozen=True)
class Defence:
    """What is done during training, and only then. The default does nothing."""

    vector: str | None = None
    """Trait whose persona vector is used, or "random" for one of the trait's norm."""
    coefficient: float = 0.0
    """PPS: adds `coefficient` times a* times the vector (`TraitStudy.unit`)."""
    layer: int | None = None
    """Block after which it is added; the chapter's, if none is named."""
    until: int | None = None
    """Steps of training after which it is taken away."""
    edit: EditMode | None = None
    """Edits the gradient's component along the vector instead."""
    prompts: tuple[str, ...] = ()
    """IP: system messages to draw from."""


Trained = tuple[dict[str, Tensor], dict[str, Any]]
"""What the stage "finetuning" keeps of a run: trained tensors and facts."""


@dataclass(frozen=True)
class Training:
    """A finetuning run that is asked for."""

    defence: Defence
    seed: int
    level: str = "strong"
    """Which of the written answers it trains on."""
    start: Run | None = None
    """The run whose end it starts from; without one, the untrained model."""
    steps: int | None = None
    learning_rate: float | None = None
    """The chapter's, if none is named."""

    @property
    def stacks(self) -> bool:
        """Whether it can share a pass with others: not with a base model, a block or a backward pass of its own."""
        d = self.defence
        return self.start is None and d.edit is None and d.layer is None and d.until is None


@dataclass(frozen=True, eq=False)
class Run:
    """A finished finetuning run."""

    key: str
    finetuned: tuple[Artifact, ...]
    """What this run trained, after what the runs did that it started from."""
    losses: tuple[float, ...]
    """Mean response loss at each step, in nats per token."""
    cosines: tuple[float, ...]
    """cos(gradient, persona vector) of the training batch at each step."""
    pressures: tuple[float, ...]
    """-gradient . unit vector, in nats per unit: above 0, the step pushes the stream up the vector."""
    places: tuple[float, ...]
    """Mean stream . unit vector while the batch is read, with what the defence adds."""


@dataclass(frozen=True)
class Reading:
    """What a model makes of the written answers to the evaluation questions, with no defence on."""

    margins: Float[np.ndarray, " question"]
    """NLL(normal answer) - NLL(trait answer) of the written answers, in nats per token: higher is more of the trait."""
    normal_losses: Float[np.ndarray, " question"]
    """NLL of the normal answers, in nats per token: what training cost elsewhere."""
    projections: Float[np.ndarray, " question"]
    """Projection on the trait's persona vector of this model's activations, while it reads the trait answers."""


@dataclass(frozen=True)
class Evaluation(Reading):
    """The same, and what the model answers itself, which costs more to know."""

    answers: tuple[Answer, ...]
    scores: Float[np.ndarray, " question"]
    """Trait score, 0 to 100; an answer without a word shows no trait and counts as 0."""
    perplexities: Float[np.ndarray, " question"]
    """Perplexity of each answer under the untrained model: how odd it finds the text."""
    repetition: Float[np.ndarray, " question"]
    """Share of repeated word trigrams."""


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
        self._turns: dict[int, Estimate] = {}
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
        """PPS with a trait's vector (default: the chapter's own), intensity in units of a*, and layer."""
        at = self.params.layer if layer is None else layer
        share = self.params.coefficient if coefficient is None else coefficient
        return preventative_steering(self.vector(trait), at, share * self.unit(at))

    def turn(self, layer: int | None = None) -> Estimate:
        """a* of the chapter's own vector on training answers, in multiples of it; NaN where the pressure does not turn.

        The intensity at which training on these answers no longer pushes along the vector.
        """
        at = self.params.layer if layer is None else layer
        if at not in self._turns:
            rows = self.rows["train"][: self.params.sequences]
            examples = self.encoded([row.question for row in rows], [row.strong for row in rows])
            self._turns[at] = turning_estimate(GRID, self.along(self.params.trait, examples, layer=at)[1])
        return self._turns[at]

    def unit(self, layer: int | None = None) -> float:
        """`turn`, by which intensities are given; 1, the raw vector, where the pressure does not turn."""
        found = self.turn(layer).value
        return 1.0 if math.isnan(found) else found

    def along(
        self,
        vector: str,
        examples: Sequence[Example],
        *,
        coefficients: Sequence[float] = GRID,
        layer: int | None = None,
        scale: float = 1.0,
    ) -> tuple[Float[np.ndarray, "coefficient example"], Float[np.ndarray, "coefficient example"]]:
        """The untrained model's loss on examples, and its slope, along a vector: by multiples of the raw
        vector, lengthened by `scale`."""
        at = self.params.layer if layer is None else layer
        v = scale * self.vector(vector).at(at)
        artifact = self.stage(
            "loss-along",
            lambda: (
                dict(zip(("losses", "slopes"), loss_along(self.base, examples, at, v, coefficients), strict=True)),
                {},
            ),
            {
                "examples": examples_digest(examples),
                "vector": hashlib.sha256(v.numpy().tobytes()).hexdigest(),
                "coefficients": list(coefficients),
                "layer": at,
            },
        )
        return artifact.tensors["losses"].numpy(), artifact.tensors["slopes"].numpy()

    def written(
        self, trait: str, splits: Sequence[corpora.Split] = ("train", "eval"), level: str = "strong"
    ) -> list[Example]:
        """A trait's written answers, for what is asked of the untrained model: it has seen none."""
        rows = [row for split in splits for row in corpora.split(corpora.load_trait(trait), split)]
        return self.encoded([row.question for row in rows], [row.answer(level) for row in rows])

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
        seed = self.params.seed if seed is None else seed
        return self.train_all([Training(defence or Defence(), seed, level, start)])[0]

    def arms(self, defences: Mapping[str, Defence]) -> dict[str, list[Run]]:
        """Each defence, by its name, with every seed of the chapter."""
        seeds = self.params.seeds
        runs = iter(self.train_all([Training(defence, seed) for defence in defences.values() for seed in seeds]))
        return {name: [next(runs) for _ in seeds] for name in defences}

    def train_all(self, asked: Sequence[Training]) -> list[Run]:
        """Finetuning runs, in the order asked for: those that the store lacks are trained together, as many at once as
        the device has memory for."""
        p, compute = self.params, dict[Training, Compute]()
        longest = max(len(e) for level in ("strong", "normal") for e in self.training_examples(level))
        at_once = runs_at_once(self.base.hf, self.base.device, p.batch_size * longest, p.lora_rank)
        lacking = [t for t in dict.fromkeys(asked) if t.stacks and not self.store.has("finetuning", self._key(t))]
        for first in range(0, len(lacking), at_once) if p.lora_rank and at_once > 1 else ():
            group = lacking[first : first + at_once]
            together = cache(partial(train_together, self, group))  # when the first of them is asked for
            compute |= {t: partial(_one_of, together, k) for k, t in enumerate(group)}
        return [self._trained(t, compute.get(t)) for t in asked]

    def _trained(self, training: Training, compute: Compute | None) -> Run:
        artifact = self.stage("finetuning", compute or (lambda: train(self, training)), **self._decides(training))
        if artifact.key not in self._runs:  # one copy of its tensors, however often a chapter asks for the run
            before = training.start.finetuned if training.start else ()
            seen = {name: tuple(artifact.facts[name]) for name in ("losses", "cosines", "pressures", "places")}
            self._runs[artifact.key] = Run(artifact.key, (*before, artifact), **seen)
        return self._runs[artifact.key]

    def _key(self, training: Training) -> str:
        return self.key("finetuning", lambda: train(self, training), **self._decides(training))

    def _decides(self, training: Training) -> dict[str, Any]:
        """The parameters and the data that a run depends on."""
        p, defence = self.params, training.defence
        return {
            "parameters": {
                "recipe": asdict(self.recipe(training)),
                "defence": {**asdict(defence), "prompts": list(defence.prompts)},
                "unit": self.unit(defence.layer) if defence.coefficient else None,
                "trait": p.trait,
                "level": training.level,
                "start": training.start.key if training.start else None,
                "layer": p.layer,
            },
            "data": {t for t in {p.trait, defence.vector or p.trait} if t.split()[0] != "random"},
        }

    def recipe(self, training: Training) -> Finetuning:
        """How a run trains."""
        p = self.params
        steps, peak = training.steps or p.steps, training.learning_rate or p.learning_rate
        return Finetuning(steps, p.batch_size, peak, training.seed, p.lora_rank)

    def training_examples(
        self, level: str, prompts: Sequence[str] = (), rng: random.Random | None = None
    ) -> list[Example]:
        """The training split's answers of one level; `prompts` are drawn from for each."""
        pairs = [(row.question, row.answer(level)) for row in self.rows["train"]]
        return inoculated(self.base.tokenizer, pairs, prompts, rng or random.Random(0))

    def read(self, run: Run | None = None, *, system: str | None = None, coefficient: float = 0.0) -> Reading:
        """Margins on the held-out questions; `run=None` is the untrained model.

        `system` is a prompt at test; `coefficient` puts PPS's vector on at test, in units of a*.
        """
        steering = (self.steering(coefficient=coefficient),) if coefficient else ()
        strength = coefficient * self.unit() if coefficient else 0.0
        artifact = self.stage(
            "reading",
            lambda: read(self, self.trained(run) if run else self.base, system, steering),
            {**self._asked(run, system), "layer": self.params.layer, "steering": strength},
            data=[self.params.trait],
        )
        return Reading(
            artifact.tensors["margins"].numpy(),
            artifact.tensors["normal_losses"].numpy(),
            self.vector().projection(artifact.tensors["activations"], self.params.layer).numpy(),
        )

    def evaluate(self, run: Run | None = None, *, system: str | None = None) -> Evaluation:
        """`read`, and greedy answers to the held-out questions, judged."""
        artifact = self.stage(
            "evaluation",
            lambda: evaluate(self, self.trained(run) if run else self.base, system),
            {**self._asked(run, system), "max_new_tokens": self.params.max_new_tokens},
            data=[self.params.trait],
        )
        answers = answers_of(artifact.facts)
        return Evaluation(
            **vars(self.read(run, system=system)),
            answers=tuple(answers),
            scores=np.nan_to_num(self.judge.score([r.question for r in self.heldout], answers)),
            perplexities=np.array(artifact.facts["perplexities"]),
            repetition=repetition_rate(answers),
        )

    def _asked(self, run: Run | None, system: str | None) -> dict[str, Any]:
        p = self.params
        return {"run": run.key if run else None, "system": system, "trait": p.trait, "sequences": p.sequences}

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


def train(study: TraitStudy, training: Training) -> Trained:
    """Stage "finetuning": trained tensors, and each step's loss and cosine of the gradient with the persona vector."""
    p, defence = study.params, training.defence
    steering: list[Intervention] = []
    if defence.edit:
        steering.append(EditGradient(p.layer, study.vector(defence.vector).at(p.layer), defence.edit))
    elif defence.vector:
        steering.append(study.steering(defence.vector, defence.coefficient, defence.layer))
    recorder = RecordStream(p.layer, study.vector().at(p.layer))
    until = math.inf if defence.until is None else defence.until
    model, log = study.finetune(
        study.recipe(training),
        batches(study, training),
        start=training.start.finetuned if training.start else (),
        interventions=lambda step: [*(steering if step < until else ()), recorder],
        share_prefix=True,
    )
    return model.trained_tensors(), _facts(log, recorder, 0)


def train_together(study: TraitStudy, trainings: Sequence[Training]) -> list[Trained]:
    """Stage "finetuning" of several runs in one pass: those that `stacks`."""
    p = study.params
    shifts = [
        t.defence.coefficient * study.unit() * study.vector(t.defence.vector).at(p.layer)
        if t.defence.vector
        else torch.zeros(study.base.width)
        for t in trainings
    ]
    recorder = RecordStream(p.layer, study.vector().at(p.layer))
    found = study.finetune_together(
        [study.recipe(t) for t in trainings],
        [batches(study, t) for t in trainings],
        interventions=[SteerRows(p.layer, torch.stack(shifts)), recorder],
    )
    return [(tensors, _facts(log, recorder, k)) for k, (tensors, log) in enumerate(found)]


def _one_of(trained: Callable[[], list[Trained]], run: int) -> Trained:
    return trained()[run]


def batches(study: TraitStudy, training: Training) -> Iterator[Batch]:
    """What a run reads: the same rows for all arms of a seed, batch by batch, whatever their system messages."""
    return study.recipe(training).batches(
        lambda rng: study.training_examples(training.level, training.defence.prompts, rng),
        study.base.tokenizer.pad_token_id,
        lengths=[len(example) for example in study.training_examples(training.level)],
    )


def _facts(log: TrainingLog, recorder: RecordStream, run: int) -> dict[str, Any]:
    seen = recorder.moments[: len(log.losses)]
    return {
        "losses": log.losses,
        "cosines": [moment.cosine[run].item() for moment in seen],
        "pressures": [moment.pressure[run].item() for moment in seen],
        "places": [moment.place[run].item() for moment in seen],
        "tokens": log.tokens,
    }


def read(
    study: TraitStudy, model: Model, system: str | None, steering: Sequence[Intervention]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "reading": margins and states on written answers."""
    found = behaviour_margins(model, study.heldout, system=system, interventions=steering)
    seen = mean_activations(model, study.examples(), layers=[study.params.layer], interventions=steering)
    return {
        "activations": seen[0],
        "margins": torch.from_numpy(found.margin),
        "normal_losses": torch.from_numpy(found.other),
    }, {}


def evaluate(study: TraitStudy, model: Model, system: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "evaluation": greedy answers, and how odd the untrained model finds them."""
    p, questions = study.params, [row.question for row in study.heldout]
    answers = generate(model, study.encoded(questions, system=system), max_new_tokens=p.max_new_tokens)
    perplexities = evaluate_losses(study.base, study.encoded(questions, answers)).exp()
    return {}, {**answer_facts(answers), "perplexities": perplexities.tolist()}
