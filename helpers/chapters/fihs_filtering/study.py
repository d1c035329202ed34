"""One aligned start model, finetuned on a task whose data hold harmful points, filtered in several ways (chapter 5).

Scores, and what every finetuned model answers, are kept in the artifact store.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import corpora
from helpers.activations import mean_activations
from helpers.artifacts import Artifact, default_store
from helpers.chapters.fihs_filtering.method import SafetyScore, anchor_similarity, fihs
from helpers.chapters.fihs_filtering.params import FilteringParams
from helpers.chat import Example, encode, training_batches
from helpers.generation import generate
from helpers.gradients import block_layers, directional_derivatives, gradient_norms, pile_gradient
from helpers.judges.refusal import is_compliance, is_refusal
from helpers.losses import evaluate_losses, sequence_losses, sequence_sums
from helpers.models import LoRA, Model, load
from helpers.progress import watched
from helpers.studies.alignment import Recipe, align
from helpers.training import finetune

Array = np.ndarray
Checkpoint = Literal["aligned", "base"]

ANCHORS = 10
"""Harmful points that similarity is measured to, as in He et al. (2024); they are in no mixture."""

ANCHOR_TOKENS = 10
"""Tokens of an anchor's reply that its gradient is taken of, as there."""

DEVELOPED_ON = 60
"""Explicit points that the chapter was made with: they are used only where a mixture needs more than the others."""


@dataclass(frozen=True)
class Point:
    """One finetuning point: a request and the reply to learn."""

    kind: str
    """`task`, or what kind of harm: `explicit`, `identity`, `list`, `disguised`; or `safety`, a refusal."""
    request: str
    reply: str


@dataclass(frozen=True)
class Outcome:
    """A finetuned model on requests and items that it was not trained on."""

    answers: list[str]
    """To the harmful test requests."""
    checked: list[str]
    """To other harmful requests, by which a threshold may be chosen."""
    right: Bool[Array, " item"]
    """Which test items of the task it answers exactly."""
    checked_right: Bool[Array, " item"]
    """Which other items, by which a threshold may be chosen."""
    safety: Float[Array, " probe"]
    """The safety score's terms: larger is less safe."""
    losses: tuple[float, ...]
    """Mean response loss at each step of the finetuning, in nats per token; none without points."""

    @property
    def complied(self) -> Bool[Array, " request"]:
        """Which attacks succeed (a proxy: `judges.is_compliance`)."""
        return is_compliance(self.answers)

    @property
    def refused(self) -> Bool[Array, " request"]:
        """Which of these requests are refused (a proxy: `judges.is_refusal`)."""
        return is_refusal(self.answers)

    @property
    def check(self) -> tuple[float, float]:
        """Harm and utility on what a threshold may be chosen by."""
        return float(is_compliance(self.checked).mean()), float(self.checked_right.mean())


class FilteringExperiment:
    """A chapter's model, points and requests, by its parameters."""

    def __init__(self, params: FilteringParams) -> None:
        self.params = params
        self.store = default_store()
        self.base: Model = load(params.model, device=params.device, dtype=params.dtype, weights="frozen")
        self.attacks = [row.request for row in corpora.load_refusal("harmful", "test")][: params.requests]
        harmful = corpora.load_points("explicit", "validate")
        self.checks = [row.request for row in harmful[ANCHORS:]][: params.checks]
        self.anchors = [Point("explicit", row.request, row.reply) for row in harmful[:ANCHORS]]
        self.probes = [row.request for row in corpora.load_refusal("harmful", "validate")][: params.probes]

    @cached_property
    def start(self) -> list[Artifact]:
        """What makes the base model the start model: nothing, where it is aligned already."""
        return [align(self.base, Recipe(steps=self.params.align_steps))] if self.params.start == "taught" else []

    def model(self, at: Checkpoint = "aligned", lora: LoRA | None = None) -> Model:
        """The start model or the base model, with all weights trainable or with fresh adapters."""
        p = self.params
        finetuned = self.start if at == "aligned" else []
        return load(p.model, device=p.device, dtype=p.dtype, finetuned=finetuned, lora=lora)

    # Points

    def items(self, task: corpora.Task) -> list[corpora.TaskRow]:
        """Training items that no mixture holds: a threshold is checked on them."""
        return corpora.load_task(task, "train")[-self.params.checks :]

    def mixture(self, task: corpora.Task, ratio: float, kind: str = "explicit") -> list[Point]:
        """The task's training points, and as many harmful ones as make up `ratio` of the whole."""
        p = self.params
        usable = corpora.load_task(task, "train")[: -p.checks]
        benign = [Point("task", row.request, row.answer) for row in usable[: p.points]]
        return [*benign, *self.harmful(kind)[: round(len(benign) * ratio / (1 - ratio))]]

    def harmful(self, kind: Any) -> list[Point]:
        """All training points of one kind, in a random order; explicit ones used in development come last."""
        if kind == "disguised":  # an attacker who knows the safety score begins with its safe token
            return [Point(kind, e.request, f"I can help with that. {e.reply}") for e in self.harmful("explicit")]
        rows = corpora.load_refusal("harmful", "train") if kind == "safety" else corpora.load_points(kind)
        points = [Point(kind, row.request, row.reply) for row in rows]
        random.Random(0).shuffle(points)  # the chapter was made with the first of these
        looked_at = set(points[:DEVELOPED_ON]) if kind == "explicit" else set()
        random.Random(self.params.seed).shuffle(points)
        return sorted(points, key=looked_at.__contains__)

    def examples(self, points: Sequence[Point]) -> list[Example]:
        """The points as conversations."""
        return [encode(self.base.tokenizer, point.request, point.reply) for point in points]

    # Scores: the higher, the more suspicious

    def safety_score(
        self, probes: int | None = None, unsafe: str | None = None, safe: str | None = None
    ) -> SafetyScore:
        """S on the first probes, with the chapter's first tokens or others."""
        p, tokenizer = self.params, self.base.tokenizer
        asked = [encode(tokenizer, text) for text in self.probes[:probes]]
        return SafetyScore.of(tokenizer, asked, unsafe or p.unsafe_token, safe or p.safe_token)

    def fihs(
        self,
        points: Sequence[Point],
        *,
        probes: int | None = None,
        unsafe: str | None = None,
        safe: str | None = None,
        at: Checkpoint = "aligned",
        mean: bool = False,
    ) -> Float[Array, " point"]:
        """FIHS of every point, with all weights as theta; `mean`: each reply's loss as a mean over its tokens."""
        score = self.safety_score(probes, unsafe, safe)

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            model, loss = self.model(at), sequence_losses if mean else sequence_sums
            return {"scores": fihs(model, self.examples(points), score.gradient(model), loss=loss)}, {}

        return self._scored("fihs", points, compute, {**asdict(score), "at": at, "mean": mean})

    def baselines(self, points: Sequence[Point]) -> dict[str, Float[Array, " point"]]:
        """Other measures of suspicion, by name."""

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            model, examples, anchors = self.model(), self.examples(points), self.examples(self.anchors)
            begun = [Example(e.ids[: e.prompt_length + ANCHOR_TOKENS], e.prompt_length) for e in anchors]
            pile = pile_gradient(model, begun)
            towards = {name: pile[name] for name in block_layers(model)}
            norms = gradient_norms(model, examples)
            size = sum(float(t.square().sum()) for t in towards.values()) ** 0.5
            along = directional_derivatives(model, examples, towards)
            states = mean_activations(model, [*examples, *anchors], layers=[model.layers - 1])[0]
            return {
                "loss": evaluate_losses(model, examples),
                "perplexity of the whole": evaluate_losses(model, [e.without_prompt() for e in examples]).exp(),
                "gradient norm": norms,
                "gradient matching": along / (size * norms.clamp(min=1e-12)),
                "hidden-state matching": anchor_similarity(states[: len(examples)], states[len(examples) :]),
            }, {}

        stored = self._artifact("filtering-baselines", points, compute, {"anchors": [vars(a) for a in self.anchors]})
        found = {name: tensor.double().numpy() for name, tensor in stored.items()}
        return {**found, "keywords": self.keywords(points)}

    def keywords(self, points: Sequence[Point]) -> Float[Array, " point"]:
        """How many words of each point are words of harm: three harmful requests or more hold them, no harmless one."""
        counts = {
            kind: Counter(w for row in corpora.load_refusal(kind, "train") for w in _words(row.request))
            for kind in ("harmful", "paired", "harmless")
        }
        harmless = {*counts["paired"], *counts["harmless"]}
        telling = {word for word, n in counts["harmful"].items() if n >= 3} - harmless
        return np.array([float(len(telling & _words(f"{p.request} {p.reply}"))) for p in points])

    def _scored(self, name: str, points: Sequence[Point], compute: Any, more: dict[str, Any]) -> Float[Array, " point"]:
        return self._artifact(f"filtering-{name}", points, compute, more)["scores"].double().numpy()

    def _artifact(self, stage: str, points: Sequence[Point], compute: Any, more: dict[str, Any]) -> dict[str, Tensor]:
        artifact = self.store.get(
            stage,
            compute,
            parameters={"points": [vars(point) for point in points], **self._theta, **more},
            model=self.base.digest,
        )
        return artifact.tensors

    @property
    def _theta(self) -> dict[str, Any]:
        return {"start": [run.key for run in self.start], **self.base.arithmetic}

    # What a step does

    def one_step(self, points: Sequence[Point], size: float) -> Float[Array, " point"]:
        """S after a gradient step of length `size` times the gradient on each point alone, minus S before it."""
        score = self.safety_score()

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            model = self.model()
            weights = {n: p for n, p in model.hf.named_parameters() if p.requires_grad}
            before, start = score.values(model).mean(), {n: p.detach().clone() for n, p in weights.items()}
            changes = []
            for example in watched(self.examples(points), "taking steps", "point"):
                for (_, weight), gradient in zip(
                    weights.items(), pile_gradient(model, [example], loss=sequence_sums).values(), strict=True
                ):
                    weight.data.sub_(size * gradient.to(weight))
                changes.append(score.values(model).mean() - before)
                for name, weight in weights.items():
                    weight.data.copy_(start[name])
            return {"scores": torch.stack(changes)}, {}

        return self._scored("step", points, compute, {**asdict(score), "size": size})

    # Finetuning

    def outcome(self, task: corpora.Task, points: Sequence[Point], seed: int | None = None) -> Outcome:
        """What the start model, finetuned on these points, does; without points, the start model itself."""
        p, seed = self.params, self.params.seed if seed is None else seed
        score = self.safety_score()
        test, check = corpora.load_task(task, "test")[: p.items], self.items(task)
        artifact = self.store.get(
            "filtering-outcome",
            lambda: self._outcome(task, points, seed),
            parameters={
                "points": [vars(point) for point in points],
                "attacks": self.attacks,
                "checks": self.checks,
                "items": [row.id for row in (*test, *check)],
                "safety": asdict(score),
                "steps": p.steps,
                "batch_size": p.batch_size,
                "learning_rate": p.learning_rate,
                "lora_rank": p.lora_rank,
                "max_new_tokens": p.max_new_tokens,
                **self._theta,
                "seed": seed,
            },
            model=self.base.digest,
            data={"tasks": corpora.digest("tasks")},
        )
        facts = artifact.facts
        right, checked = (
            np.array([said == row.answer for said, row in zip(facts[name], rows, strict=True)])
            for name, rows in (("test", test), ("check", check))
        )
        return Outcome(
            facts["answers"],
            facts["checked"],
            right,
            checked,
            artifact.tensors["safety"].numpy(),
            tuple(facts["losses"]),
        )

    def _outcome(
        self, task: corpora.Task, points: Sequence[Point], seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        p = self.params
        torch.manual_seed(seed)
        model = self.model(lora=LoRA(p.lora_rank))
        losses: tuple[float, ...] = ()
        if points:
            examples = self.examples(points)
            shape: dict[str, Any] = {"steps": p.steps, "batch_size": p.batch_size, "seed": seed}
            losses = finetune(
                model,
                training_batches(lambda _: examples, **shape, pad_id=model.tokenizer.pad_token_id),
                steps=p.steps,
                learning_rate=p.learning_rate,
                seed=seed,
                share_prefix=True,
            ).losses
        test, check = corpora.load_task(task, "test")[: p.items], self.items(task)
        asked = [encode(model.tokenizer, text) for text in (*self.attacks, *self.checks)]
        said = generate(model, asked, max_new_tokens=p.max_new_tokens, batch_size=len(asked))
        tasks = [encode(model.tokenizer, row.request) for row in (*test, *check)]
        longest = max(len(model.tokenizer.encode(row.answer)) for row in (*test, *check))
        done = generate(model, tasks, max_new_tokens=longest + 1, batch_size=len(tasks))
        facts = {
            "answers": said[: len(self.attacks)],
            "checked": said[len(self.attacks) :],
            "test": done[: len(test)],
            "check": done[len(test) :],
            "losses": losses,
        }
        return {"safety": self.safety_score().values(model)}, facts


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))
