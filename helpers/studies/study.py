"""What every chapter's study repeats: a base model, stored stages, finetuning, answers and losses.

A study holds a chapter's parameters, the model that nobody has finetuned, and the artifact store. Its methods say what
decides a result, and hand the work to functions that the store calls only where it lacks the result (`Study.stage`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers import corpora
from helpers.artifacts import Artifact, Compute, default_store
from helpers.chat import Answer, Batch, Example, answer_facts, answers_of, encode, training_batches
from helpers.generation import generate
from helpers.interventions import Intervention
from helpers.losses import evaluate_losses
from helpers.models import LoRA, Model, finetuned_digest, load
from helpers.params import Params
from helpers.stacks import run_tensors
from helpers.training import TrainingLog, finetune, finetune_stack

P = TypeVar("P", bound=Params)


@dataclass(frozen=True)
class Finetuning:
    """How a run trains: with its data, its interventions and its start, everything that decides what comes of it."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    lora_rank: int = 0
    """0 trains all weights."""

    def batches(
        self,
        examples: Sequence[Example] | Callable[[random.Random], Sequence[Example]],
        pad_id: int,
        lengths: Sequence[int] | None = None,
    ) -> Iterator[Batch]:
        """Batches of these examples, or of those that a function draws for each epoch (`chat.training_batches`)."""
        draw = examples if callable(examples) else lambda _: examples
        return training_batches(
            draw, steps=self.steps, batch_size=self.batch_size, seed=self.seed, pad_id=pad_id, lengths=lengths
        )


class Study(Generic[P]):
    """A chapter's parameters, its base model and the artifact store."""

    def __init__(
        self,
        params: P,
        *,
        model: str | None = None,
        weights: Literal["frozen", "cast"] = "frozen",
        layer: int | None = None,
    ) -> None:
        """Raises what `models.load` does: for a model, a device or a layer that is not there."""
        self.params = params
        self.store = default_store()
        self.base: Model = load(
            model or params.model, device=params.device, dtype=params.dtype, layer=layer, weights=weights
        )

    def load(
        self,
        finetuned: Sequence[Artifact] = (),
        *,
        lora_rank: int = 0,
        weights: Literal["trainable", "frozen", "cast"] = "trainable",
    ) -> Model:
        """The base model as these runs left it, under fresh adapters where a rank is given."""
        p, lora = self.params, LoRA(lora_rank) if lora_rank else None
        return load(self.base.name, device=p.device, dtype=p.dtype, finetuned=finetuned, lora=lora, weights=weights)

    def stage(
        self,
        name: str,
        compute: Compute,
        parameters: dict[str, Any],
        *,
        model: str | None = None,
        data: Iterable[str] = (),
    ) -> Artifact:
        """What the store holds of a stage, or else what `compute` gives.

        `parameters` decide the result, together with the base model or the one of this digest, the arithmetic, and
        bundled data by name.
        """
        return self.store.get(name, compute, **self._inputs(parameters, model, data))

    def key(
        self,
        name: str,
        compute: Compute,
        parameters: dict[str, Any],
        *,
        model: str | None = None,
        data: Iterable[str] = (),
    ) -> str:
        """The key of that stage; nothing is computed."""
        return self.store.key(name, compute, **self._inputs(parameters, model, data))

    def _inputs(self, parameters: dict[str, Any], model: str | None, data: Iterable[str]) -> dict[str, Any]:
        return {
            "parameters": {**parameters, **self.base.arithmetic},
            "model": self.base.digest if model is None else model,
            "data": {name: corpora.digest(name) for name in data},
        }

    def finetune(
        self,
        recipe: Finetuning,
        batches: Iterable[Batch],
        *,
        start: Sequence[Artifact] = (),
        interventions: Sequence[Intervention] | Callable[[int], Sequence[Intervention]] = (),
        extra_loss: Callable[[Model, Batch], Tensor] | None = None,
        share_prefix: bool = False,
        label: str = "finetuning",
    ) -> tuple[Model, TrainingLog]:
        """The base model, as the runs of `start` left it, trained on these batches.

        Its digest is its own, so that nothing stored of another model is taken for its: the stage that keeps what was
        trained gives later loads a lasting one.
        """
        torch.manual_seed(recipe.seed)  # adapters are drawn while loading
        model = self.load(start, lora_rank=recipe.lora_rank)
        model.digest = finetuned_digest(model.digest, [uuid4().hex])
        log = finetune(
            model,
            batches,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            seed=recipe.seed,
            interventions=interventions,
            extra_loss=extra_loss,
            share_prefix=share_prefix,
            label=label,
        )
        return model, log

    def finetune_together(
        self,
        recipes: Sequence[Finetuning],
        batches: Sequence[Iterable[Batch]],
        *,
        interventions: Sequence[Intervention] = (),
        label: str = "finetuning",
    ) -> list[tuple[dict[str, Tensor], TrainingLog]]:
        """What `finetune` makes of LoRA runs that start from the base model, trained in one pass (`finetune_stack`):
        each run's tensors and log. Interventions tell runs apart by a row's number."""
        starts = []
        for recipe in recipes:
            torch.manual_seed(recipe.seed)  # adapters are drawn while loading
            starts.append(self.load(lora_rank=recipe.lora_rank).trained_tensors())
        p = self.params
        model = load(self.base.name, device=p.device, dtype=p.dtype, stack=starts)
        model.digest = finetuned_digest(model.digest, [uuid4().hex])
        logs = finetune_stack(
            model,
            batches,
            steps=[recipe.steps for recipe in recipes],
            learning_rates=[recipe.learning_rate for recipe in recipes],
            interventions=interventions,
            label=f"{label} {len(recipes)} runs",
        )
        trained = model.trained_tensors()
        return [(run_tensors(trained, k), log) for k, log in enumerate(logs)]

    def encoded(
        self, questions: Sequence[str], answers: Sequence[str] | None = None, *, system: str | None = None
    ) -> list[Example]:
        """Questions in the chat template: with their answers, or up to where an answer begins."""
        said = [None] * len(questions) if answers is None else answers
        return [encode(self.base.tokenizer, q, a, system) for q, a in zip(questions, said, strict=True)]

    def greedy_answers(self, model: Model, questions: Sequence[str], max_new_tokens: int) -> list[Answer]:
        """Greedy answers to questions."""
        artifact = self.stage(
            "greedy-answers",
            lambda: ({}, answer_facts(generate(model, self.encoded(questions), max_new_tokens=max_new_tokens))),
            {"questions": list(questions), "max_new_tokens": max_new_tokens},
            model=model.digest,
        )
        return answers_of(artifact.facts)

    def response_losses(self, model: Model, examples: Sequence[Example]) -> Float[np.ndarray, " example"]:
        """Mean response loss of each example, in nats per token."""
        artifact = self.stage(
            "response-losses",
            lambda: ({"losses": evaluate_losses(model, list(examples), batch_size=64)}, {}),
            {"examples": examples_digest(examples)},
            model=model.digest,
        )
        return artifact.tensors["losses"].numpy()


def examples_digest(examples: Sequence[Example]) -> str:
    """What tells lists of examples apart."""
    ids = [[example.prompt_length, *example.ids] for example in examples]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
