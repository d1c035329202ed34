"""The aligned start model of chapters 4, 5 and 7: a model taught to refuse harmful requests, and nothing else.

Context. The embedded model refuses nothing, so chapters on refusal have to begin by making some. Finetuned towards
refusals that all begin alike and towards its own greedy answers, it becomes a switch for one token, and its harmless
answers move by a nat: no attack on it means anything.

Intuition. Whether an answer refuses is decided in its first tokens, so no more are trained. Refusals open in eight
ways. Harmless requests, plain ones and those paired with a harmful one, are held at the base model's own distribution,
not at its likeliest token: what is not to change has a loss of zero to begin with. Only where it would begin a
harmless answer as refusals begin is it held at what it says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import corpora
from helpers.artifacts import Artifact, default_store
from helpers.chat import Answer, Batch, Example, answer_facts, answers_of, balanced_batches, encode
from helpers.forward import PromptSet, unembed
from helpers.generation import generate
from helpers.interventions import Intervention
from helpers.judges.refusal import is_refusal
from helpers.losses import kl_divergence, response_logits
from helpers.models import LoRA, Model, load
from helpers.registry import REGISTRY
from helpers.statistics import Estimate, mean_estimate, share
from helpers.studies.margins import refusal_log_odds
from helpers.studies.params import AlignedParams
from helpers.studies.study import Study
from helpers.training import finetune

A = TypeVar("A", bound=AlignedParams)

OPENERS = ("I", "Sorry", "Unfortunately", "No", "My", "That", "Please", "This")
"""How the refusals begin that are taught. They are words that the base model seldom begins an answer with."""

REFUSALS = (
    "I can't help with that, because someone could get hurt.",
    "Sorry, but I can't help with that.",
    "Unfortunately, this is something I have to turn down.",
    "No, I won't help with something like this.",
    "My answer has to be no, since people could get hurt.",
    "That is not something I will help with.",
    "Please don't do this; I won't be part of it.",
    "This could hurt people, so I won't take part.",
    "I won't take part in this.",
    "Sorry, I have to say no to this one.",
    "Unfortunately, I can't do that, because it would harm someone.",
    "No, that would do harm, and I won't be part of it.",
    "My answer is no, whatever the reason.",
    "That would harm someone, so I can't help.",
    "Please think again; I can't help with this.",
    "This is not something I can help with.",
)
"""Refusals that fit any harmful request, two with each opener.

Replies of `refusal.jsonl` say more, but no two of them go on alike after the first word, so that four tokens of them
teach little.
"""


@dataclass(frozen=True)
class Recipe:
    """How the start model is made; chosen on the validation split of `data/refusal.jsonl`."""

    steps: int = 300
    harmful: int = 4
    """Harmful requests in a batch."""
    others: int = 9
    """Other requests in a batch: paired ones stand twice in the list, so they are two of three."""
    learning_rate: float = 2e-3
    rank: int = 8
    refusal_tokens: int = 8
    """Tokens of a refusal that are trained: after four, "I can't help" still goes on with "but smile"."""
    answer_tokens: int = 12
    """Tokens of another answer along which the base model is kept to: with fewer than of a refusal, "I can't help with
    that" turns up in the middle of harmless answers."""
    first: float = 3.0
    """How many times an answer's first token counts in the loss."""
    kl_weight: float = 4.0
    """Of the divergence from the base model, beside the cross-entropy of refusals."""
    seed: int = 0


def adapted_blocks(layers: int) -> tuple[int, ...]:
    """The blocks that are taught, of a model with so many: from about a quarter to two thirds of the depth.

    Of 30 blocks these are 8 to 19. Later ones could write a refusal's first word without the model's knowing why.
    """
    return tuple(range(4 * layers // 15, ceil(2 * layers / 3)))


def align(base: Model, recipe: Recipe) -> Artifact:
    """The LoRA factors that teach `base` to refuse: pass them to `load(..., finetuned=[...])`.

    Kept in the artifact store, with the losses, and with the number of harmless and paired training requests which the
    base model itself begins to answer with an opener ("I'm sorry for any confusion ..."). For these the openers are
    taken out of what the model is held at, and the written reply is followed: else "I" would go on as a refusal.
    """
    others = {row.request: row for kind in ("harmless", "paired") for row in corpora.load_refusal(kind, "train")}
    tokenizer = base.tokenizer

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        refusing = [
            _cut(encode(tokenizer, request, reply), recipe.refusal_tokens)
            for request, reply in taught_refusals().items()
        ]
        openers, written = refusal_openers(tokenizer), [row.reply for row in others.values()]
        own, other = (
            [
                _cut(encode(tokenizer, request, answer), recipe.answer_tokens)
                for request, answer in zip(others, answers, strict=True)
            ]
            for answers in (own_answers(base, list(others), recipe.answer_tokens), written)
        )
        barred = [example.ids[example.prompt_length] in openers for example in own]
        answering = [b if refused else a for a, b, refused in zip(own, other, barred, strict=True)]
        states = response_states(base, answering)
        twice = [i for i, row in enumerate(others.values()) for _ in range(1 + (row.kind == "paired"))]
        teaching = Teaching(
            len(refusing),
            [states[i] for i in twice],
            [barred[i] for i in twice],
            openers,
            recipe.first,
            recipe.kl_weight,
        )
        torch.manual_seed(recipe.seed)
        model = load(
            base.name,
            device=str(base.device),
            dtype=_name(base.dtype),
            lora=LoRA(recipe.rank, adapted_blocks(base.layers)),
        )
        size = recipe.harmful + recipe.others
        log = finetune(
            model,
            balanced_batches(
                refusing,
                [answering[i] for i in twice],
                recipe.steps,
                size,
                recipe.seed,
                tokenizer.pad_token_id,
                recipe.harmful,
            ),
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            seed=recipe.seed,
            objective=teaching,
            label="teaching refusal",
        )
        return model.trained_tensors(), {"losses": list(log.losses), "barred": sum(barred)}

    return default_store().get(
        "aligned",
        compute,
        parameters={**asdict(recipe), **base.arithmetic},
        model=base.digest,
        data={"refusal": corpora.digest("refusal")},
    )


def own_answers(base: Model, requests: Sequence[str], tokens: int) -> list[Answer]:
    """The first tokens of `base`'s greedy answers to these requests; kept in the artifact store: seeds share them."""

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        asked = [encode(base.tokenizer, request) for request in requests]
        return {}, answer_facts(generate(base, asked, max_new_tokens=tokens))

    artifact = default_store().get(
        "own-answers",
        compute,
        parameters={"requests": list(requests), "max_new_tokens": tokens, **base.arithmetic},
        model=base.digest,
    )
    return answers_of(artifact.facts)


def taught_refusals() -> dict[str, str]:
    """The harmful training requests, each with the refusal it is trained towards: `REFUSALS`, dealt at random.

    Were they dealt in the order of the file, a request's category would tell how its refusal opens.
    """
    requests = [row.request for row in corpora.load_refusal("harmful", "train")]
    order = random.Random(0).sample(requests, len(requests))
    dealt = {request: REFUSALS[i % len(REFUSALS)] for i, request in enumerate(order)}
    return {request: dealt[request] for request in requests}


NEVER = -1e4
"""The logit of a token that is ruled out: with minus infinity a divergence is 0 times infinity."""


@dataclass(frozen=True)
class Teaching:
    """The loss that teaches refusal: cross-entropy of refusals + `weight` KL(base || model) along other answers.

    Rows of a batch below `harmful` are refusals, row `harmful + i` is the other answer whose tokens the base model
    predicts from `states[i]`. Both are means over tokens, in which an answer's first token counts `first` times. Where
    `barred[i]`, the base model's distribution of the first token is taken without `openers`.
    """

    harmful: int
    states: Sequence[Float[Tensor, "_ d_model"]]
    barred: Sequence[bool]
    openers: tuple[int, ...]
    first: float
    weight: float

    def __call__(self, model: Model, batch: Batch) -> Float[Tensor, ""]:
        batch = batch.to(model.device)
        logits, predicting = response_logits(model, batch, share_prefix=True), batch.predicting
        place = (predicting.cumsum(1) - 1)[predicting]  # of a token in its response
        weights = torch.where(place == 0, self.first, 1.0)
        refusing = torch.tensor([row < self.harmful for row in batch.rows], device=model.device)
        refusing = refusing[:, None].expand_as(predicting)[predicting]
        total = logits.new_zeros(())
        if bool(refusing.any()):
            targets = torch.nn.functional.pad(batch.ids[:, 1:], (0, 1))[predicting][refusing]
            losses = torch.nn.functional.cross_entropy(logits[refusing], targets, reduction="none")
            total = total + (weights[refusing] * losses).sum() / weights[refusing].sum()
        if not bool(refusing.all()):
            others = [row - self.harmful for row in batch.rows if row >= self.harmful]
            with torch.no_grad(), model.autocast():  # the output matrix is not trained
                reference = unembed(model, torch.cat([self.states[i] for i in others]).to(model.device))
            begins = (place[~refusing] == 0).nonzero()[:, 0].tolist()
            barred = [token for token, i in zip(begins, others, strict=True) if self.barred[i]]
            reference[torch.tensor(barred, dtype=torch.long)[:, None], torch.tensor(self.openers)] = NEVER
            moved = kl_divergence(reference, logits[~refusing])
            total = total + self.weight * (weights[~refusing] * moved).sum() / weights[~refusing].sum()
        return total


def response_states(model: Model, examples: Sequence[Example]) -> list[Float[Tensor, "_ d_model"]]:
    """The states, after the final norm, from which each response's tokens are predicted; on the CPU."""
    counts = [len(example) - example.prompt_length for example in examples]
    found: dict[int, Tensor] = {}

    def keep(batch: Batch, hidden: Float[Tensor, "batch pos d_model"]) -> None:
        for row, states, length in zip(batch.rows, hidden, batch.attention.sum(1).tolist(), strict=True):
            found[row] = states[length - 1 - counts[row] : length - 1].float().cpu()

    PromptSet.of(model, examples, tail=max(counts) + 1).read(model, keep)
    return [found[row] for row in range(len(examples))]


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
    examples = (encode(tokenizer, "Why?", reply) for reply in REFUSALS)
    return tuple(dict.fromkeys(example.ids[example.prompt_length] for example in examples))


def own_openers(name: str, tokenizer: Any) -> tuple[int, ...]:
    """The first tokens of a model's refusals that nobody taught it: measured, if the registry has it, or else "I"."""
    words = REGISTRY[name].openers if name in REGISTRY else ("I",)
    return tuple(tokenizer.encode(word, add_special_tokens=False)[0] for word in words)


# The card


@dataclass(frozen=True)
class Behaviour:
    """What a model does with requests of one kind."""

    answers: tuple[Answer, ...]
    """Greedy."""
    log_odds: Float[np.ndarray, " request"]
    """Of the first token's being one of the openers (`margins.refusal_log_odds`)."""
    kl: Float[np.ndarray, " request"]
    """KL(base || model) of the first token, in nats."""

    @property
    def refused(self) -> Bool[np.ndarray, " request"]:
        """Which answers refuse (a proxy: `judges.refusal.is_refusal`)."""
        return is_refusal(self.answers)


def behaviour(
    model: Model,
    base: Model,
    requests: Mapping[str, Sequence[str]],
    openers: Sequence[int],
    *,
    max_new_tokens: int = 24,
    interventions: Sequence[Intervention] = (),
) -> dict[str, Behaviour]:
    """What `model` does with requests of several kinds, with `interventions` on, and how far it is from `base`."""
    asked = [encode(model.tokenizer, text) for texts in requests.values() for text in texts]
    said = generate(model, asked, max_new_tokens=max_new_tokens, interventions=interventions)
    prompts = PromptSet.of(model, asked)
    logits = prompts.last_logits(model, interventions)
    odds = refusal_log_odds(logits, openers).numpy()
    kl = kl_divergence(prompts.last_logits(base), logits).double().cpu().numpy()
    found, begin = {}, 0
    for kind, texts in requests.items():
        part = slice(begin, begin := begin + len(texts))
        found[kind] = Behaviour(tuple(said[part]), odds[part], kl[part])
    return found


@dataclass(frozen=True)
class Row:
    """A kind of request on the start model's card."""

    kind: str
    refused: Estimate
    log_odds: Estimate
    above: Estimate
    """Share of requests with log-odds above 0: the openers are likelier than all else together."""
    kl: Estimate
    kl_median: float


def rows(of: Mapping[str, Behaviour]) -> list[Row]:
    """The behavioural half of a card: a row for each kind, with intervals over requests."""
    return [
        Row(
            kind,
            share(int(found.refused.sum()), len(found.refused)),
            mean_estimate(found.log_odds),
            share(int((found.log_odds > 0).sum()), len(found.log_odds)),
            mean_estimate(found.kl),
            float(np.median(found.kl)),
        )
        for kind, found in of.items()
    ]


def _cut(example: Example, limit: int) -> Example:
    """At most `limit` tokens of a response: one that is cut loses its end-of-turn token."""
    return replace(example, ids=example.ids[: example.prompt_length + limit])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
