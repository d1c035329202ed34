"""One aligned start model, finetuned on a task whose data hold harmful points, filtered in several ways (chapter 5).

Scores, and what every finetuned model answers, are kept in the artifact store.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import corpora
from helpers.activations import mean_activations
from helpers.artifacts import Compute
from helpers.chapters.fihs_filtering.method import SafetyScore, anchor_similarity, fihs
from helpers.chapters.fihs_filtering.params import FilteringParams
from helpers.chat import Example
from helpers.generation import generate
from helpers.gradients import block_layers, directional_derivatives, gradient_norms, pile_gradient
from helpers.judges.refusal import is_compliance, is_refusal
from helpers.losses import evaluate_losses, sequence_losses, sequence_sums
from helpers.models import Model
from helpers.progress import watched
from helpers.studies.card import CardedStudy
from helpers.studies.study import Finetuning

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
        """Which attacks succeed (a proxy: `judges.refusal.is_compliance`)."""
        return is_compliance(self.answers)

    @property
    def refused(self) -> Bool[Array, " request"]:
        """Which of these requests are refused (a proxy: `judges.refusal.is_refusal`)."""
        return is_refusal(self.answers)

    @property
    def check(self) -> tuple[float, float]:
        """Harm and utility on what a threshold may be chosen by."""
        return float(is_compliance(self.checked).mean()), float(self.checked_right.mean())


class FilteringStudy(CardedStudy[FilteringParams]):
    """The chapter's points and requests beside its start model, by its parameters."""

    def __init__(self, params: FilteringParams) -> None:
        super().__init__(params)
        self.attacks = [row.request for row in corpora.load_refusal("harmful", "test")][: params.requests]
        harmful = corpora.load_points("explicit", "validate")
        self.checks = [row.request for row in harmful[ANCHORS:]][: params.checks]
        self.anchors = [Point("explicit", row.request, row.reply) for row in harmful[:ANCHORS]]
        self.probes = [row.request for row in corpora.load_refusal("harmful", "validate")][: params.probes]

    def model(self, at: Checkpoint = "aligned") -> Model:
        """The start model or the base model, with all weights trainable."""
        return self.load(self.start if at == "aligned" else ())

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
        return self.encoded([point.request for point in points], [point.reply for point in points])

    # Scores: the higher, the more suspicious

    def safety_score(
        self, probes: int | None = None, unsafe: str | None = None, safe: str | None = None
    ) -> SafetyScore:
        """S on the first probes, with the chapter's first tokens or others."""
        p, asked = self.params, self.encoded(self.probes[:probes])
        return SafetyScore.of(self.base.tokenizer, asked, unsafe or p.unsafe_token, safe or p.safe_token)

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

        stored = self._of_points("filtering-fihs", points, compute, **asdict(score), at=at, mean=mean)
        return stored["scores"].double().numpy()

    def baselines(self, points: Sequence[Point]) -> dict[str, Float[Array, " point"]]:
        """Other measures of suspicion, by name."""

        stored = self._of_points(
            "filtering-baselines",
            points,
            lambda: (baselines(self, points), {}),
            anchors=[vars(a) for a in self.anchors],
        )
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

    def _of_points(self, name: str, points: Sequence[Point], compute: Compute, **decisive: Any) -> dict[str, Tensor]:
        """A stage whose result is numbers for each point, at the start model."""
        parameters = {"points": [vars(point) for point in points], **self._start_keys, **decisive}
        return dict(self.stage(name, compute, parameters).tensors)

    @property
    def _start_keys(self) -> dict[str, Any]:
        return {"start": [run.key for run in self.start]}

    # What a step does

    def one_step(self, points: Sequence[Point], size: float) -> Float[Array, " point"]:
        """S after a gradient step of length `size` times the gradient on each point alone, minus S before it."""
        stored = self._of_points(
            "filtering-step",
            points,
            lambda: ({"scores": one_steps(self, points, size)}, {}),
            **asdict(self.safety_score()),
            size=size,
        )
        return stored["scores"].double().numpy()

    # Finetuning

    def outcome(self, task: corpora.Task, points: Sequence[Point], seed: int | None = None) -> Outcome:
        """What the start model, finetuned on these points, does; without points, the start model itself."""
        p = self.params
        recipe = Finetuning(p.steps, p.batch_size, p.learning_rate, p.seed if seed is None else seed, p.lora_rank)
        test, check = corpora.load_task(task, "test")[: p.items], self.items(task)
        artifact = self.stage(
            "filtering-outcome",
            lambda: outcome(self, recipe, points, [*test, *check]),
            {
                "points": [vars(point) for point in points],
                "attacks": self.attacks,
                "checks": self.checks,
                "items": [row.id for row in (*test, *check)],
                "safety": asdict(self.safety_score()),
                "recipe": asdict(recipe),
                "max_new_tokens": p.max_new_tokens,
                **self._start_keys,
            },
            data=["tasks"],
        )
        facts = artifact.facts
        right = np.array([said == row.answer for said, row in zip(facts["done"], (*test, *check), strict=True)])
        return Outcome(
            facts["said"][: len(self.attacks)],
            facts["said"][len(self.attacks) :],
            right[: len(test)],
            right[len(test) :],
            artifact.tensors["safety"].numpy(),
            tuple(facts["losses"]),
        )


def baselines(study: FilteringStudy, points: Sequence[Point]) -> dict[str, Float[Tensor, " point"]]:
    """Stage "filtering-baselines": other measures of suspicion that the start model gives, by name."""
    model, examples, anchors = study.model(), study.examples(points), study.examples(study.anchors)
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
    }


def one_steps(study: FilteringStudy, points: Sequence[Point], size: float) -> Float[Tensor, " point"]:
    """Stage "filtering-step": for each point, what one step on it alone adds to S; the model is put back each time."""
    score, model = study.safety_score(), study.model()
    weights = {n: p for n, p in model.hf.named_parameters() if p.requires_grad}
    before, start = score.values(model).mean(), {n: p.detach().clone() for n, p in weights.items()}
    changes = []
    for example in watched(study.examples(points), "taking steps", "point"):
        gradients = pile_gradient(model, [example], loss=sequence_sums).values()
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.data.sub_(size * gradient.to(weight))
        changes.append(score.values(model).mean() - before)
        for name, weight in weights.items():
            weight.data.copy_(start[name])
    return torch.stack(changes)


def outcome(
    study: FilteringStudy, recipe: Finetuning, points: Sequence[Point], items: Sequence[corpora.TaskRow]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "filtering-outcome": finetune on the points, if there are any; then ask all requests and all items."""
    pad, losses = study.base.tokenizer.pad_token_id, tuple[float, ...]()
    if points:
        batches = recipe.batches(study.examples(points), pad)
        model, log = study.finetune(recipe, batches, start=study.start, share_prefix=True)
        losses = log.losses
    else:
        model = study.load(study.start)
    asked = study.encoded([*study.attacks, *study.checks])
    tasks = study.encoded([row.request for row in items])
    longest = max(len(model.tokenizer.encode(row.answer)) for row in items)
    said = generate(model, asked, max_new_tokens=study.params.max_new_tokens, batch_size=len(asked))
    done = generate(model, tasks, max_new_tokens=longest + 1, batch_size=len(tasks))
    safety = study.safety_score().values(model)
    return {"safety": safety}, {"said": said, "done": done, "losses": losses}


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))
