"""The aligned start model of chapters 4 and 5: a model taught to refuse harmful requests, and nothing else.

The embedded model refuses nothing, so chapters on refusal have to begin by making some. Harmful requests are trained
towards written refusals, harmless ones towards the model's own answers, so that the rest of its behaviour stays.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from helpers import corpora
from helpers.artifacts import Artifact, default_store
from helpers.chat import Example, balanced_batches, encode
from helpers.generation import generate
from helpers.judges.refusal import is_refusal
from helpers.models import LoRA, Model, load
from helpers.registry import REGISTRY
from helpers.studies.params import AlignedParams
from helpers.studies.study import Study
from helpers.training import finetune

A = TypeVar("A", bound=AlignedParams)


@dataclass(frozen=True)
class Recipe:
    """How the start model is made; chosen on the validation split of `data/refusal.jsonl`."""

    steps: int = 84
    batch_size: int = 16
    learning_rate: float = 7e-4
    rank: int = 32
    answer_tokens: int = 24
    """Length of the model's own answers, which harmless requests are trained towards."""
    refusal_tokens: int = 8
    """Length of refusals: whether one follows is decided at its beginning."""
    seed: int = 0


def align(base: Model, recipe: Recipe) -> Artifact:
    """The LoRA factors that teach `base` to refuse: pass them to `load(..., finetuned=[...])`.

    Kept in the artifact store. Answers that were cut carry no end-of-turn token, so that their length is not learnt.
    Answers of its own that refuse (`is_refusal`) are left out; those that only begin like a refusal stay.
    """
    harmful = corpora.load_refusal("harmful", "train")
    harmless = [row.request for kind in ("harmless", "paired") for row in corpora.load_refusal(kind, "train")]
    tokenizer = base.tokenizer

    def compute() -> tuple[dict[str, Tensor], dict[str, float]]:
        asked = [encode(tokenizer, request) for request in harmless]
        said = generate(base, asked, max_new_tokens=recipe.answer_tokens)
        refusing = [_cut(encode(tokenizer, row.request, row.reply), recipe.refusal_tokens) for row in harmful]
        answering = [
            encode(tokenizer, request, text)
            for request, text, refuses in zip(harmless, said, is_refusal(said), strict=True)
            if not refuses
        ]
        torch.manual_seed(recipe.seed)
        model = load(base.name, device=str(base.device), dtype=_name(base.dtype), lora=LoRA(recipe.rank))
        log = finetune(
            model,
            balanced_batches(refusing, answering, recipe.steps, recipe.batch_size, recipe.seed, tokenizer.pad_token_id),
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            seed=recipe.seed,
            share_prefix=True,
            label="teaching refusal",
        )
        return model.trained_tensors(), {"loss": log.losses[-1], "seconds": log.seconds}

    return default_store().get(
        "aligned",
        compute,
        parameters={**asdict(recipe), **base.arithmetic},
        model=base.digest,
        data={"refusal": corpora.digest("refusal")},
    )


class AlignedStudy(Study[A]):
    """A study of a start model that refuses: one that is taught to, or that does as it is."""

    @cached_property
    def recipe(self) -> Recipe:
        """How the start model is taught to refuse."""
        return Recipe(steps=self.params.align_steps)

    @cached_property
    def start(self) -> list[Artifact]:
        """What makes the base model the start model: nothing, where it is aligned already."""
        return [align(self.base, self.recipe)] if self.params.start == "taught" else []


def refusal_openers(tokenizer: Any) -> tuple[int, ...]:
    """The first tokens of the refusals that the start model is taught, each once: those that a refusal is known by."""
    rows = corpora.load_refusal("harmful", "train")
    examples = (encode(tokenizer, row.request, row.reply) for row in rows)
    return tuple(dict.fromkeys(example.ids[example.prompt_length] for example in examples))


def own_openers(name: str, tokenizer: Any) -> tuple[int, ...]:
    """The first tokens of a model's refusals that nobody taught it: measured, if the registry has it, or else "I"."""
    words = REGISTRY[name].openers if name in REGISTRY else ("I",)
    return tuple(tokenizer.encode(word, add_special_tokens=False)[0] for word in words)


def _cut(example: Example, limit: int) -> Example:
    """At most `limit` tokens of a written response: one that is cut loses its end-of-turn token."""
    return replace(example, ids=example.ids[: example.prompt_length + limit])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
