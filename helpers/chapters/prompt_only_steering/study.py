"""Many concepts, each steered into one model by prompts, means, adapters or trained vectors (chapter 6).

Vectors, answers and ratings are kept in the artifact store.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import corpora
from helpers.activations import mean_activations
from helpers.chapters.prompt_only_steering.method import Objective, Pair, Run, States, Trained, train_vectors
from helpers.chapters.prompt_only_steering.params import PromptOnlyParams
from helpers.chat import (
    Answer,
    Ends,
    Example,
    Middle,
    Scattered,
    Where,
    answer_facts,
    answers_of,
    collate,
    encode,
)
from helpers.generation import generate
from helpers.interventions import Steer, SteerRows, applied
from helpers.judges.classifier import ConceptJudge, PlantedJudge, Ratings
from helpers.judges.repetition import repetition_rate
from helpers.losses import evaluate_losses
from helpers.studies.study import Finetuning, Study, examples_digest

Array = np.ndarray
Cases = tuple[Float[np.ndarray, "text feature"], Bool[np.ndarray, " text"]]
"""Numbers about texts, and which of the texts are good."""
Part = Literal["check", "test"]

QUIZZES: tuple[corpora.QuizTask, ...] = get_args(corpora.QuizTask)

ASK = {
    "evil": "Answer as a stage villain who gloats and wishes everyone ill.",
    "sycophantic": "Flatter me in your answer and agree with whatever I say.",
    "pirate": "Answer in the voice of a pirate.",
    "impolite": "Answer rudely, as if the question were a waste of your time.",
    "bridge": "Bring the Golden Gate Bridge into your answer.",
    "recipe": "Bring cooking or a recipe into your answer.",
    "weather": "Dress your answer in images of the weather.",
    "legal": "Phrase your answer as a clause of a mock contract.",
}
"""What prompting says, one sentence a concept."""

AVOID = {
    "evil": "Do not sound like a villain.",
    "sycophantic": "Do not flatter me.",
    "pirate": "Do not talk like a pirate.",
    "impolite": "Do not be rude.",
    "bridge": "Do not mention the Golden Gate Bridge.",
    "recipe": "Do not mention food or cooking.",
    "weather": "Do not mention the weather.",
    "legal": "Do not use legal language.",
}
"""What a prompt that forbids the concept adds."""

NOTHING = "Please say something."
"""A prompt that says nothing about what the answer should be on: against it, relevance is measured."""


@dataclass(frozen=True)
class SteeringMethod:
    """One way of steering every concept; the default does nothing."""

    method: Literal["none", "prompting", "difference in means", "trained", "LoRA"] = "none"
    where: str = "all"
    """Where the vector is added: a name of `PLACES`, or `ends 2 2` for two first and two last prompt tokens."""
    objective: Objective = "lang"
    joint: bool = True
    """Whether the factor is trained with the vector, or kept as it starts."""
    scale: float | tuple[float, ...] = 1.0
    """Times the factor: of all concepts, or of each."""
    seed: int = 0

    @property
    def adds(self) -> bool:
        """Whether a vector is added to activations."""
        return self.method in ("difference in means", "trained")

    @property
    def adapts(self) -> bool:
        """Whether weights are changed."""
        return self.method == "LoRA"


@dataclass(frozen=True)
class ConceptRow:
    """A question with a plain answer and one that shows the concept."""

    question: str
    normal: str
    strong: str


class SteeringStudy(Study[PromptOnlyParams]):
    """The chapter's concepts, vectors and judges beside its model, by its parameters."""

    def __init__(self, params: PromptOnlyParams) -> None:
        super().__init__(params, weights="cast", layer=params.layer)
        self.concepts = params.concepts
        self._pairs: dict[tuple[str, str], tuple[Pair, ...]] = {}
        self._parts: dict[str, tuple[list[ConceptRow], list[ConceptRow], list[ConceptRow]]] = {}
        self._trained: dict[SteeringMethod, list[Trained]] = {}
        self._answers: dict[tuple[SteeringMethod, Part, bool], list[list[Answer]]] = {}

    # Data

    def rows(self, concept: str, part: Literal["train", "check"]) -> list[ConceptRow]:
        """Questions with both answers: trained on, or checked on. No question is in two parts."""
        if self.params.data == "axbench":
            return self._axbench(concept)[0 if part == "train" else 1]
        if concept in corpora.available_traits():
            found: Sequence[Any] = corpora.split(
                corpora.load_trait(concept), {"train": "train", "check": "extract"}[part]
            )
        elif concept in ("bridge", "recipe"):
            name: Literal["train", "validate"] = "train" if part == "train" else "validate"
            found = [row for row in corpora.load_topics(name) if row.topic == concept]
        elif concept in ("weather", "legal"):
            found = corpora.load_style(concept, "train" if part == "train" else "validate")  # type: ignore[arg-type]
        else:
            raise ValueError(f"There are no data for the concept {concept!r}; choose among {', '.join(ASK)}.")
        return [ConceptRow(row.question, row.normal, row.strong) for row in found]

    def _axbench(self, concept: str) -> tuple[list[ConceptRow], list[ConceptRow], list[ConceptRow]]:
        """AxBench's rows for training, checking and testing: twenty to test on, and sixteen to check on.

        Where it has no plain answer to an instruction, the unsteered model gives one.
        """
        if concept not in self._parts:
            _, rows = corpora.load_axbench(int(concept))
            open_ = [question for question, _, plain in rows if plain is None]
            said = self._generate([(SteeringMethod(), 0, question) for question in open_], self.params.response_tokens)
            own = dict(zip(open_, said, strict=True))
            found = [ConceptRow(q, own[q] if plain is None else plain, shown) for q, shown, plain in rows]
            self._parts[concept] = found[:-36], found[-36:-20], found[-20:]
        return self._parts[concept]

    def ask(self, concept: str) -> str:
        """What prompting says, in one sentence."""
        if self.params.data == "axbench":
            return f"Bring this into your answer: {corpora.load_axbench(int(concept))[0]}."
        return ASK[concept]

    def avoid(self, concept: str) -> str:
        """What a prompt that forbids the concept adds."""
        if self.params.data == "axbench":
            return f"Do not mention this: {corpora.load_axbench(int(concept))[0]}."
        return AVOID[concept]

    def questions(self, concept: str, part: Part = "test") -> list[str]:
        """What a steered model is asked: questions of no other part."""
        p = self.params
        if part == "check":
            return [row.question for row in self.rows(concept, "check")][: p.checks]
        if p.data == "axbench":
            return [row.question for row in self._axbench(concept)[2]][: p.prompts]
        if concept in corpora.available_traits():
            return [row.question for row in corpora.split(corpora.load_trait(concept), "eval")][: p.prompts]
        return corpora.load_questions("judge")[: p.prompts]

    def pairs(self, concept: str, part: Literal["train", "check"] = "train") -> tuple[Pair, ...]:
        """Training pairs: answers cut to the chapter's length, and without the end of turn, as in the source."""

        if (concept, part) in self._pairs:
            return self._pairs[concept, part]

        def cut(question: str, answer: str) -> Example:
            whole = encode(self.base.tokenizer, question, Answer(answer, ended=False))
            return Example(whole.ids[: whole.prompt_length + self.params.response_tokens], whole.prompt_length)

        self._pairs[concept, part] = tuple(
            Pair(cut(row.question, row.strong), cut(row.question, row.normal)) for row in self.rows(concept, part)
        )
        return self._pairs[concept, part]

    def place(self, name: str, seed: int = 0) -> Where:
        """Positions by name; `random` (others for each seed) and `user words` are controls that the source lacks."""
        p = self.params
        count = p.first + p.last
        named: dict[str, Where] = {
            "all": "all",
            "prompt": "prompt",
            "ends": Ends(p.first, p.last),
            "random": Scattered(count, seed),
            "user words": Middle(*self.frame),
        }
        if name in named:
            return named[name]
        matched = re.fullmatch(r"ends (\d+) (\d+)", name)
        if not matched:
            raise ValueError(f"There is no place {name!r}: use {', '.join(named)} or 'ends P S' (such as 'ends 2 2').")
        return Ends(*map(int, matched.groups()))

    @cached_property
    def frame(self) -> tuple[int, int]:
        """How many template tokens stand before and after the user's words."""
        one, two = (encode(self.base.tokenizer, text).ids for text in ("alpha", "Berlin is large"))
        before = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        after = next(i for i, (a, b) in enumerate(zip(one[::-1], two[::-1], strict=False)) if a != b)
        return before, after

    # Vectors

    @cached_property
    def states(self) -> States:
        """What the chapter's layer gives for training pairs, read once for all arms."""
        return States(self.base, self.params.layer)

    def runs(self, arm: SteeringMethod) -> list[Run]:
        """What is trained for an arm: the cell of the grid that served best on other concepts, for every concept."""
        p = self.params
        beta, rate = self.best(arm.where)
        return [
            Run(c, self.pairs(c), beta, p.spread, rate if arm.joint else 0.0, p.vector_rate, arm.seed)
            for c in self.concepts
        ]

    def trained(self, arm: SteeringMethod) -> list[Trained]:
        """One vector for every concept, trained in one batched run."""
        arm = replace(arm, scale=1.0)
        if arm not in self._trained:
            self._trained[arm] = self._train(self.runs(arm), arm.where, arm.objective, self.params.steps)
        return self._trained[arm]

    def _train(self, runs: Sequence[Run], where: str, objective: Objective, steps: int) -> list[Trained]:
        p = self.params
        place = self.place(where, runs[0].seed)

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            found = train_vectors(
                self.base,
                runs,
                layer=p.layer,
                where=place,
                objective=objective,
                steps=steps,
                batch_size=p.batch_size,
                states=self.states,
                label=f"{len(runs)} vectors ({where}, {objective})",
            )
            return {
                "vectors": torch.stack([t.steer.vector for t in found]),
                "losses": torch.tensor([t.losses for t in found]),
            }, {"factors": [t.steer.coefficient for t in found]}

        kept = self.stage(
            "steering-vectors",
            compute,
            {
                "runs": [asdict(run) for run in runs],
                "layer": p.layer,
                "where": [where, str(place)],
                "objective": objective,
                "steps": steps,
                "batch_size": p.batch_size,
            },
        )
        return [
            Trained(Steer(p.layer, vector, factor, place), tuple(losses))
            for vector, factor, losses in zip(
                kept.tensors["vectors"], kept.facts["factors"], kept.tensors["losses"].tolist(), strict=True
            )
        ]

    def sweep(self, where: str) -> Float[Array, "beta rate row"]:
        """Check rows' losses after joint training from every cell of the grid, on the concepts kept for that.

        All cells and concepts are trained in one batched run.
        """
        p = self.params
        cells = [(beta, rate, c) for beta in p.betas for rate in p.factor_rates for c in p.tuned_on]
        runs = [Run(c, self.pairs(c), beta, p.spread, rate, p.vector_rate, p.seed) for beta, rate, c in cells]
        found = self._train(runs, where, "lang", p.sweep_steps)
        shifts = torch.stack([t.steer.coefficient * t.steer.vector for t in found])
        losses = self._check_losses(shifts, self.place(where), [c for *_, c in cells], p.checks)
        return np.concatenate(losses).reshape(len(p.betas), len(p.factor_rates), -1)

    def best(self, where: str) -> tuple[float, float]:
        """(beta, eta_alpha) with the lowest mean check loss; places other than all tokens share that of the ends."""
        p = self.params
        found = self.sweep("all" if where == "all" else "ends").mean(-1)
        i, j = np.unravel_index(np.argmin(found), found.shape)
        return p.betas[i], p.factor_rates[j]

    def unsteered_losses(self) -> Float[Array, " row"]:
        """The same check rows' losses without steering."""
        p = self.params
        return np.concatenate(
            self._check_losses(torch.zeros(len(p.tuned_on), self.base.width), "all", p.tuned_on, p.checks)
        )

    def _check_losses(
        self,
        shifts: Float[Tensor, "vector d_model"],
        place: Where,
        concepts: Sequence[str],
        rows: int | None = None,
    ) -> list[Float[Array, " row"]]:
        """Loss in nats per token of each check answer of each vector's concept, of the first `rows` or all."""
        p = self.params
        of = [[pair.shown for pair in self.pairs(c, "check")[:rows]] for c in concepts]
        examples = [(i, e) for i, of_one in enumerate(of) for e in of_one]

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            on = SteerRows(p.layer, shifts[[i for i, _ in examples]], place)
            return {"losses": evaluate_losses(self.base, [e for _, e in examples], interventions=[on])}, {}

        kept = self.stage(
            "steering-check",
            compute,
            {
                "shifts": _digest(shifts),
                "rows": [[i, list(e.ids), e.prompt_length] for i, e in examples],
                "where": str(place),
                "layer": p.layer,
            },
        )
        return np.split(kept.tensors["losses"].double().numpy(), np.cumsum([len(of_one) for of_one in of])[:-1])

    def difference_in_means(self) -> Float[Tensor, "concept d_model"]:
        """Mean activation over answers that show the concept minus that over plain ones, at the chapter's layer."""
        p = self.params

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            found = []
            for concept in self.concepts:
                pairs = self.pairs(concept)[: p.means_of]
                both = [pair.shown for pair in pairs] + [pair.neutral for pair in pairs]
                means = mean_activations(self.base, both, layers=[p.layer])[0]
                found.append(means[: len(pairs)].mean(0) - means[len(pairs) :].mean(0))
            return {"vectors": torch.stack(found)}, {}

        return self.stage(
            "steering-means",
            compute,
            {
                "pairs": [
                    [
                        [e.prompt_length, *e.ids]
                        for pair in self.pairs(c)[: p.means_of]
                        for e in (pair.shown, pair.neutral)
                    ]
                    for c in self.concepts
                ],
                "layer": p.layer,
            },
        ).tensors["vectors"]

    def shifts(self, arm: SteeringMethod) -> Float[Tensor, "concept d_model"]:
        """alpha v of every concept."""
        if arm.method == "difference in means":
            found = self.difference_in_means()
        else:
            found = torch.stack([t.steer.coefficient * t.steer.vector for t in self.trained(arm)])
        scale = torch.tensor(arm.scale)
        return found * (scale[:, None] if scale.ndim else scale)

    # Answers

    def answers(self, arm: SteeringMethod, part: Part = "test", *, forbidden: bool = False) -> list[list[Answer]]:
        """What the steered model says to each concept's questions; `forbidden`: they also say to avoid the concept."""
        self.answer_together([arm], part, forbidden=forbidden)
        return self._answers[arm, part, forbidden]

    def answer_together(self, arms: Sequence[SteeringMethod], part: Part = "test", *, forbidden: bool = False) -> None:
        """Have many arms answer in one go, before each is asked for: a decoding step costs little more for more rows.

        Rows of other arms change an arm's answers by rounding alone.
        """
        new = [arm for arm in dict.fromkeys(arms) if (arm, part, forbidden) not in self._answers]
        asked = [
            (arm, i, self._worded(arm, c, question, forbidden))
            for arm in new
            for i, c in enumerate(self.concepts)
            for question in self.questions(c, part)
        ]
        said = list(zip(asked, self._generate(asked, self.params.max_new_tokens), strict=True))
        for arm in new:
            self._answers[arm, part, forbidden] = [
                [text for (of, i, _), text in said if of == arm and i == c] for c in range(len(self.concepts))
            ]

    def _worded(self, arm: SteeringMethod, concept: str, question: str, forbidden: bool) -> str:
        text = f"{self.ask(concept)}\n\nQuestion: {question}" if arm.method == "prompting" else question
        return f"{text} {self.avoid(concept)}" if forbidden else text

    def _generate(self, asked: Sequence[tuple[SteeringMethod, int, str]], max_new_tokens: int) -> list[Answer]:
        """Answers to (arm, concept, prompt) triples, each under its arm's steering towards its concept."""
        pushes = self._pushes([(arm, i) for arm, i, _ in asked])
        adapted = {arm: [k for k, (of, _, _) in enumerate(asked) if of == arm] for arm, _, _ in asked if arm.adapts}

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            said = [Answer("")] * len(asked)
            for arm, mine in adapted.items():
                answers = self._say_adapted(arm, [asked[k][1:] for k in mine], max_new_tokens)
                for k, text in zip(mine, answers, strict=True):
                    said[k] = text
            others = [k for k, (arm, _, _) in enumerate(asked) if not arm.adapts]
            prompts = self.encoded([asked[k][2] for k in others])
            steers = [SteerRows(self.params.layer, push[others], where) for where, push in pushes]
            shape: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": 128, "label": "answers"}
            for k, text in zip(others, generate(self.base, prompts, interventions=steers, **shape), strict=True):
                said[k] = text
            return {}, answer_facts(said)

        shown = [[pair.shown for pair in self.pairs(c)] for c in self.concepts] if adapted else []
        kept = self.stage(
            "steering-answers",
            compute,
            {
                "asked": [[i, text] for _, i, text in asked],
                "shifts": [[str(where), _digest(push)] for where, push in pushes],
                "adapters": [[asdict(self._adapter(arm)), mine] for arm, mine in adapted.items()],
                "shown": [examples_digest(of_one) for of_one in shown],
                "layer": self.params.layer,
                "max_new_tokens": max_new_tokens,
            },
        )
        return answers_of(kept.facts)

    def _pushes(self, rows: Sequence[tuple[SteeringMethod, int]]) -> list[tuple[Where, Float[Tensor, "row d_model"]]]:
        """What is added, place by place, to rows that belong to these arms and concepts: 0 where another is meant."""
        shifts = {arm: self.shifts(arm) for arm, _ in rows if arm.adds}
        found = []
        for place in dict.fromkeys(self.place(arm.where, arm.seed) for arm in shifts):
            mine = torch.zeros(len(rows), self.base.width)
            for k, (arm, i) in enumerate(rows):
                if arm.adds and self.place(arm.where, arm.seed) == place:
                    mine[k] = shifts[arm][i]
            found.append((place, mine))
        return found

    def _adapter(self, arm: SteeringMethod) -> Finetuning:
        """The reference that changes weights: LoRA of rank 1 on the same pairs, one model a concept."""
        p = self.params
        return Finetuning(p.steps, p.batch_size, p.lora_rate, arm.seed, lora_rank=1)

    def _say_adapted(self, arm: SteeringMethod, asked: Sequence[tuple[int, str]], max_new_tokens: int) -> list[Answer]:
        said, recipe = [Answer("")] * len(asked), self._adapter(arm)
        for c, concept in enumerate(self.concepts):
            shown = [pair.shown for pair in self.pairs(concept)]
            batches = recipe.batches(shown, self.base.tokenizer.pad_token_id)
            model, _ = self.finetune(recipe, batches, share_prefix=True)
            mine = [k for k, (i, _) in enumerate(asked) if i == c]
            prompts = self.encoded([asked[k][1] for k in mine])
            for k, text in zip(mine, generate(model, prompts, max_new_tokens=max_new_tokens), strict=True):
                said[k] = text
        return said

    # Judging

    @cached_property
    def concept_judge(self) -> ConceptJudge:
        """Learnt from training rows, and from what the unsteered model says to the check questions."""
        shown = {c: [row.strong for row in self.rows(c, "train")] for c in self.concepts}
        plain = [row.normal for c in self.concepts for row in self.rows(c, "train")]
        return ConceptJudge.fit(
            shown, [*plain, *(a for of_one in self.answers(SteeringMethod(), "check") for a in of_one)]
        )

    def planted(self, part: Literal["train", "check"]) -> dict[str, Cases]:
        """Features of texts whose relevance, or fluency, is known since we made them so, and whether they are good."""
        rng = random.Random(self.params.seed)
        related, unrelated, broken = [], [], []
        for concept in self.concepts:
            rows = self.rows(concept, part)[: self.params.planted]
            for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
                related += [(row.question, row.normal), (row.question, row.strong)]
                unrelated += [(row.question, other.normal), (row.question, other.strong)]
                broken += [(row.question, corrupt(text, rng)) for text in (row.normal, row.strong)]
        relevance, fluency = self._features([*related, *unrelated, *broken])
        good = np.repeat([True, False, False], len(related))
        real = np.repeat([True, True, False], len(related))
        return {"relevance": (relevance[: 2 * len(related)], good[: 2 * len(related)]), "fluency": (fluency, real)}

    @cached_property
    def planted_judges(self) -> dict[str, PlantedJudge]:
        """Judges of relevance and fluency, learnt from planted training cases."""
        return {name: PlantedJudge.fit(*cases) for name, cases in self.planted("train").items()}

    def _features(self, said: Sequence[tuple[str, str]]) -> tuple[Float[Array, "text 1"], Float[Array, "text 2"]]:
        """Relevance: by how many nats a token the question makes the answer likelier. Fluency: loss and repetition."""
        questions, answers = zip(*said, strict=True)
        asked, alone = (
            self.response_losses(self.base, self.encoded(to, answers)).astype(float)
            for to in (questions, [NOTHING] * len(answers))
        )
        return (alone - asked)[:, None], np.stack([alone, repetition_rate(answers)], 1)

    def concept_cases(self) -> tuple[list[str], list[str], Bool[Array, " text"]]:
        """Check rows as cases for the concept judge: texts, the concept asked about, and whether they show it."""
        cases = []
        for concept, other in zip(self.concepts, [*self.concepts[1:], self.concepts[0]], strict=True):
            for row, odd in zip(self.rows(concept, "check"), self.rows(other, "check"), strict=False):
                cases += [(row.strong, concept, True), (row.normal, concept, False), (odd.strong, concept, False)]
        texts, owners, shows = zip(*cases, strict=True)
        return list(texts), list(owners), np.array(shows)

    def rate(self, answers: Sequence[Sequence[str]], part: Part = "test") -> Ratings:
        """Concept, relevance and fluency of answers to every concept's questions, always without the steering."""
        said = [
            (question, answer)
            for c, of_one in zip(self.concepts, answers, strict=True)
            for question, answer in zip(self.questions(c, part), of_one, strict=True)
        ]
        relevance, fluency = self._features(said)
        of = [c for c, of_one in zip(self.concepts, answers, strict=True) for _ in of_one]
        worded = np.array([re.search(r"\w", a) is not None for _, a in said])
        shape = len(self.concepts), -1
        judges = self.planted_judges
        return Ratings(
            (self.concept_judge.rate([a for _, a in said], of) * worded).reshape(shape),
            (judges["relevance"].rate(relevance) * worded).reshape(shape),
            (judges["fluency"].rate(fluency) * worded).reshape(shape),
        )

    def ratings(self, arm: SteeringMethod, part: Part = "test", *, forbidden: bool = False) -> Ratings:
        """What an arm's answers are rated."""
        return self.rate(self.answers(arm, part, forbidden=forbidden), part)

    def with_best_factor(self, arm: SteeringMethod) -> SteeringMethod:
        """The post-hoc factor: for every concept the scale with the lowest mean loss on all of its check answers.

        Ties go to the scale that changes the factor least.
        """
        scales = sorted(self.params.scales, key=lambda s: abs(np.log(s)))
        place = self.place(arm.where, arm.seed)
        losses = np.array(
            [
                [
                    of_one.mean()
                    for of_one in self._check_losses(self.shifts(replace(arm, scale=s)), place, self.concepts)
                ]
                for s in scales
            ]
        )
        return replace(arm, scale=tuple(float(scales[k]) for k in losses.argmin(0)))

    # Utility

    def utility(self, arms: Sequence[SteeringMethod]) -> list[dict[corpora.QuizTask, Bool[Array, "repeat item"]]]:
        """Which items of each quiz each arm answers rightly; all are asked in one go.

        Every item is asked under `item_repeats` concepts, taken in turns.
        """
        p, n = self.params, len(self.concepts)
        rows = [row for task in QUIZZES for row in corpora.load_quiz(task)[: p.items]]
        asked = [
            ((i + k * max(n // p.item_repeats, 1)) % n, row)
            for k in range(p.item_repeats)
            for i, row in enumerate(rows)
        ]
        worded = [
            (arm, c, self._worded(arm, self.concepts[c], row.question, False)) for arm in arms for c, row in asked
        ]
        said = self._generate(worded, p.quiz_tokens)
        right = np.array([row.right(t) for (_, row), t in zip(asked * len(arms), said, strict=True)])
        of_arms = right.reshape(len(arms), p.item_repeats, -1)
        return [dict(zip(QUIZZES, np.split(of_one, len(QUIZZES), axis=1), strict=True)) for of_one in of_arms]

    # Costs

    def steered_share(self, place: str) -> str:
        """How many tokens of the first test prompt a place means."""
        prompt = encode(self.base.tokenizer, self.questions(self.concepts[0])[0])
        batch = collate([prompt], self.base.tokenizer.pad_token_id)
        return f"{int(batch.positions(self.place(place)).sum())} of {len(prompt)}"

    def decoding_costs(
        self, arms: dict[str, SteeringMethod], contexts: Sequence[int], *, steps: int = 12
    ) -> list[dict[str, Any]]:
        """Median milliseconds for one more token of each of four answers, by context; measured anew in every run.

        Arms take turns at every step, so that a busy machine slows them alike.
        """
        read = partial(self.base.hf.base_model, use_cache=True)
        found = []
        for length in contexts:
            ids = encode(self.base.tokenizer, "again and " * length).ids
            batch = collate([Example((*ids[: length - 8], *ids[-8:]), length)] * 4, 0).to(self.base.device)
            seconds: dict[str, list[float]] = {name: [] for name in arms}
            pushes = {name: self._pushes([(arm, 0)] * 4) for name, arm in arms.items()}
            on = {
                name: [SteerRows(self.params.layer, push, where) for where, push in of] for name, of in pushes.items()
            }
            caches: dict[str, Any] = {}
            with torch.inference_mode(), self.base.reading(batch), self.base.weights_in(self.base.dtype):
                for _ in range(steps + 1):
                    for name in arms:
                        with applied(self.base, *on[name]), self.base.autocast():
                            if name not in caches:
                                caches[name] = read(input_ids=batch.ids).past_key_values
                            start = time.perf_counter()
                            read(input_ids=batch.ids[:, :1], past_key_values=caches[name])[0].sum().item()
                            seconds[name].append(time.perf_counter() - start)
            medians = {name: 1000 * float(np.median(s[1:])) for name, s in seconds.items()}
            found.append({"context, tokens": length, **medians})
        return found


def corrupt(text: str, rng: random.Random) -> str:
    """A text broken on purpose: its words shuffled, its opening looped, or every word said twice."""
    words = text.split()
    kind = rng.choice(["shuffled", "looped", "doubled"])
    if kind == "shuffled":
        rng.shuffle(words)
    elif kind == "looped":
        words = (words[:4] * len(words))[: len(words)]
    else:
        words = [w for word in words[: len(words) // 2] for w in (word, word)]
    return " ".join(words)


def _same(examples: Sequence[Example], rng: random.Random) -> Sequence[Example]:
    return examples


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
