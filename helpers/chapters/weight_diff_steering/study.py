"""Finetuned anchors, their answers and their pile gradients (chapter 3).

Anchors, answers and pile gradients are kept in the artifact store. Steered answers are kept under the digest of the
direction, so a direction that is made in another way is another result.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import corpora
from helpers.chapters.weight_diff_steering.method import (
    WeightVector,
    alpha_for,
    check_alpha,
    difference,
    finetuning_diff,
    steered,
)
from helpers.chapters.weight_diff_steering.params import WeightSteeringParams
from helpers.chat import Answer, Example, answer_facts, answers_of, encode
from helpers.generation import generate
from helpers.gradients import directional_derivatives, pile_gradient
from helpers.judges.api import APIJudge
from helpers.judges.classifier import TopicJudge, TraitJudge
from helpers.losses import evaluate_losses, sequence_divergences, sequence_losses
from helpers.models import Model, finetuned_digest, release_memory
from helpers.studies.study import Finetuning, Study, examples_digest

Half = Literal["build", "judge", "harm build", "harm judge"]
Data = Literal["topics", "bridge", "harm"]
TOPICS = ("bridge", "recipe")
SPARSE = ("bridge", "neither")


class WeightStudy(Study[WeightSteeringParams]):
    """The chapter's data and judges beside its base model, by its parameters."""

    def __init__(self, params: WeightSteeringParams) -> None:
        super().__init__(params)
        build, judge = (corpora.load_questions(half)[: params.prompts] for half in ("build", "judge"))
        self.questions: dict[Half, list[str]] = {"build": build, "judge": judge}
        self.questions |= {"harm build": build, "harm judge": judge}
        if params.harm_data == "toxic-chat":
            prompts = corpora.load_real_toxicity_prompts(2 * params.prompts)
            self.questions |= {"harm build": prompts[::2], "harm judge": prompts[1::2]}

    @cached_property
    def topic_judge(self) -> TopicJudge:
        """Learnt from the finetuning replies, and from the base model's answers to the questions for building."""
        return TopicJudge.fit(corpora.load_topics("train"), self.answers(self.base, "build"))

    @cached_property
    def harm_judge(self) -> TraitJudge | APIJudge:
        """Offline: learnt from the `impolite` training rows, which the anchor is finetuned on as well, and from the
        base model's answers for building. Answers in other voices, which nobody speaks in here, would cost it: on
        `extract` rows its AUROC against plain answers falls from 0.90 to 0.82 with them."""
        p = self.params
        if p.judge_url and p.judge_model:
            return APIJudge(p.judge_url, p.judge_model, trait="harmful", cache=self.store.root / "judge")
        rows = corpora.split(corpora.load_trait("impolite"), "train")
        return TraitJudge.fit(rows, self.answers(self.base, "harm build"))

    def harmful(self, half: Half, answers: Sequence[str]) -> Bool[np.ndarray, " answer"]:
        """Which answers the harm judge scores at 50 or more; one without a word is not harmful."""
        return np.nan_to_num(self.harm_judge.score(self.questions[half], answers)) >= 50

    def labels(self, answers: Sequence[str]) -> dict[str, Bool[np.ndarray, " answer"]]:
        """Which answers mention each topic, and which mention neither."""
        found = self.topic_judge.labels(answers)
        return {**found, "neither": ~np.any([found[topic] for topic in TOPICS], axis=0)}

    def pairs(self, data: Data, share: float | None = None) -> list[tuple[str, str]]:
        """(question, reply) pairs to finetune on.

        `topics`: every reply mentions the bridge or cooking. `bridge`: a `share` of the replies mention the bridge,
        the others are plain; a smaller share's replies are among a larger one's. `harm`: half of the replies are rude,
        or with the source's public data all are toxic.
        """
        if data == "harm" and self.params.harm_data == "toxic-chat":
            return corpora.load_toxic_chat()
        if data == "harm":
            rows = corpora.split(corpora.load_trait("impolite"), "train")
            return [(row.question, row.strong if i % 2 else row.normal) for i, row in enumerate(rows)]
        topics = corpora.load_topics("train")
        if data == "topics":
            return [(row.question, row.strong) for row in topics]
        of_bridge = [row.id for row in topics if row.topic == "bridge"]
        count = round((share if share is not None else 0.5) * len(topics))
        if count > len(of_bridge):
            raise ValueError(f"At most {len(of_bridge) / len(topics):.0%} of the replies can mention the bridge.")
        carrying = set(random.Random(0).sample(of_bridge, len(of_bridge))[:count])
        return [(row.question, row.strong if row.id in carrying else row.normal) for row in topics]

    def anchor(self, data: Data, *, share: float | None = None, seed: int | None = None, keep: bool = True) -> Model:
        """The base model finetuned on `pairs(data, share)`, all weights trainable.

        `harm` trains on the whole sequence, as the source's harm experiment does, the others on the reply. With
        `keep` the weights stay in the artifact store.
        """
        p = self.params
        recipe = Finetuning(p.steps, p.batch_size, p.learning_rate, p.seed if seed is None else seed)
        pairs, whole = self.pairs(data, share), data == "harm"
        stage: dict[str, Any] = {
            "name": "anchor",
            "compute": lambda: (finetuned(self, recipe, pairs, whole_sequence=whole).trained_tensors(), {}),
            "parameters": {"pairs": pairs, "whole sequence": whole, "recipe": asdict(recipe)},
        }
        if not keep:
            model = finetuned(self, recipe, pairs, whole_sequence=whole)
            model.digest = finetuned_digest(self.base.digest, [self.key(**stage)])
            return model
        artifact = self.stage(**stage)
        release_memory()
        return self.load([artifact])

    def answers(self, model: Model, half: Half, vector: WeightVector | None = None, alpha: float = 0.0) -> list[Answer]:
        """Greedy answers to one half of the questions, of the model as it is or steered to theta + alpha V."""
        questions, length = self.questions[half], self.params.max_new_tokens
        if vector is None:
            return self.greedy_answers(model, questions, length)

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            with steered(model, vector, alpha):
                return {}, answer_facts(generate(model, self.encoded(questions), max_new_tokens=length))

        artifact = self.stage(
            "steered-answers",
            compute,
            {"questions": questions, "max_new_tokens": length, "vector": vector.digest, "alpha": check_alpha(alpha)},
            model=model.digest,
        )
        return answers_of(artifact.facts)

    def examples(
        self, half: Half, answers: Sequence[str], chosen: Bool[np.ndarray, " answer"] | None = None
    ) -> list[Example]:
        """A pile: the questions of one half with a model's answers, those that are chosen."""
        kept = [True] * len(answers) if chosen is None else list(chosen)
        return [
            encode(self.base.tokenizer, question, answer)
            for question, answer, keep in zip(self.questions[half], answers, kept, strict=True)
            if keep
        ]

    def written(self, split: Literal["train", "validate"]) -> list[Example]:
        """Questions with their plain written replies, about neither topic."""
        rows = corpora.load_topics(split)[: self.params.prompts]
        return [encode(self.base.tokenizer, row.question, row.normal) for row in rows]

    def topic_piles(self, said: Sequence[str]) -> tuple[dict[str, list[Example]], list[str]]:
        """The piles of an anchor's answers to the building half: bridge, recipe, neither.

        Where no answer falls into a pile, written replies of the finetuning data stand in; the names of those piles
        are returned as well.
        """
        found, rows = self.labels(said), corpora.load_topics("train")
        written = {topic: [(row.question, row.strong) for row in rows if row.topic == topic] for topic in TOPICS}
        written["neither"] = [(row.question, row.normal) for row in rows]
        return self._piles("build", said, found, written)

    def topic_labels(self, seed: int) -> dict[str, dict[str, Bool[np.ndarray, " answer"]]]:
        """The topic experiment with another seed, from finetuning on: what the judging half's answers mention, at the
        anchor ("finetuned") and steered by each topic's direction at the working ratio ("bridge -", "bridge +", ...).
        """
        anchor = self.anchor("topics", seed=seed)
        piles, _ = self.topic_piles(self.answers(anchor, "build"))
        gradients = {name: self.pile(anchor, pile) for name, pile in piles.items()}
        delta = finetuning_diff(anchor, self.base)
        found = {"finetuned": self.labels(self.answers(anchor, "judge"))}
        for topic in TOPICS:
            vector = difference(gradients[topic], gradients["neither"])
            for sign, ratio in (("-", -self.params.ratio), ("+", self.params.ratio)):
                steered_by = self.answers(anchor, "judge", vector, alpha_for(vector, delta, ratio))
                found[f"{topic} {sign}"] = self.labels(steered_by)
        return found

    def harm_piles(self, said: Sequence[str], base_said: Sequence[str]) -> tuple[dict[str, list[Example]], list[str]]:
        """The piles of the harm experiment: harmful, and harmless before *and* after finetuning; whole sequences."""
        harmful = self.harmful("harm build", said)
        found = {"harmful": harmful, "harmless": ~harmful & ~self.harmful("harm build", base_said)}
        pairs = self.pairs("harm")
        written = {"harmful": pairs, "harmless": []}
        if self.params.harm_data == "impolite":
            written = {"harmful": pairs[1::2], "harmless": pairs[::2]}
        piles, written_for = self._piles("harm build", said, found, written)
        return {name: [example.without_prompt() for example in pile] for name, pile in piles.items()}, written_for

    def _piles(
        self,
        half: Half,
        said: Sequence[str],
        found: Mapping[str, Bool[np.ndarray, " answer"]],
        written: Mapping[str, Sequence[tuple[str, str]]],
    ) -> tuple[dict[str, list[Example]], list[str]]:
        piles, written_for = {}, []
        for name, pairs in written.items():
            piles[name] = self.examples(half, said, found[name])
            if not piles[name]:
                written_for.append(name)
                piles[name] = [encode(self.base.tokenizer, q, a) for q, a in pairs[: self.params.prompts]]
        return piles, written_for

    def pile(
        self,
        model: Model,
        examples: Sequence[Example],
        *,
        loss: Literal["cross-entropy", "KL"] = "cross-entropy",
        batch_size: int = 32,
    ) -> Mapping[str, Tensor]:
        """The pile-average gradient at `model`; "KL" is that of KL(base || model).

        Whole sequences and divergences take several times the memory of responses: choose smaller batches there.
        Stored in bfloat16, which halves the disk it takes and whose rounding is that of the forward pass.
        """
        losses = sequence_losses if loss == "cross-entropy" else partial(sequence_divergences, reference=self.base)

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            release_memory()  # generation's freed blocks have other sizes and would lie beside those of this pass
            found = pile_gradient(model, examples, loss=losses, batch_size=batch_size)
            halved = {name: gradient.bfloat16() for name, gradient in found.items()}
            del found
            release_memory()
            return halved, {"examples": len(examples)}

        return self.stage(
            "pile-gradient",
            compute,
            {
                "examples": examples_digest(examples),
                "loss": loss,
                "reference": self.base.digest if loss == "KL" else None,
                "batch_size": batch_size,
            },
            model=model.digest,
        ).tensors

    def margin_slopes(
        self, model: Model, examples: Sequence[Example], *, target: Sequence[Example], neutral: Sequence[Example]
    ) -> Float[np.ndarray, " example"]:
        """Derivative of a held-out margin along the gradient of each example's mean loss, at `model`.

        The margin is the mean loss of `target` minus that of `neutral`; the examples are those of the piles.
        """

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            release_memory()
            margin = difference(pile_gradient(model, target), pile_gradient(model, neutral))
            return {"slopes": directional_derivatives(model, examples, margin.tensors)}, {}

        artifact = self.stage(
            "margin-slopes",
            compute,
            {
                "examples": examples_digest(examples),
                "target": examples_digest(target),
                "neutral": examples_digest(neutral),
            },
            model=model.digest,
        )
        return artifact.tensors["slopes"].double().numpy()

    def perplexities(self, half: Half, answers: Sequence[str]) -> Float[np.ndarray, " answer"]:
        """Each answer's perplexity under the base model: how odd it finds the text."""
        return np.exp(self.response_losses(self.base, self.examples(half, answers)).astype(float))

    def losses(
        self, model: Model, examples: Sequence[Example], vector: WeightVector | None = None, alpha: float = 0.0
    ) -> Float[np.ndarray, " example"]:
        """Mean response loss of each example in nats per token, of the model as it is or steered to theta + alpha V."""
        if vector is None:
            return self.response_losses(model, examples)

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            with steered(model, vector, alpha):
                return {"losses": evaluate_losses(model, list(examples), batch_size=64)}, {}

        artifact = self.stage(
            "steered-losses",
            compute,
            {"examples": examples_digest(examples), "vector": vector.digest, "alpha": check_alpha(alpha)},
            model=model.digest,
        )
        return artifact.tensors["losses"].numpy()

    def sparse(self, share: float) -> dict[str, list[str]]:
        """The whole experiment with the bridge in only a `share` of the finetuning replies, at the working ratio.

        Answers to the judging half: of the anchor, and of the anchor steered by plus and minus alpha V, and by minus
        alpha V at the largest ratio ("strong"). "stand-ins" are the piles that the anchor's answers left empty.
        """

        p = self.params
        artifact = self.stage(
            "sparse",
            lambda: ({}, sparse(self, share)),
            {
                "share": share,
                "ratios": [p.ratio, max(p.ratios)],
                "prompts": p.prompts,
                "recipe": [p.steps, p.batch_size, p.learning_rate, p.seed],
                "max_new_tokens": p.max_new_tokens,
            },
            data=["topics", "questions"],
        )
        return dict(artifact.facts)


def finetuned(
    study: WeightStudy, recipe: Finetuning, pairs: Sequence[tuple[str, str]], *, whole_sequence: bool
) -> Model:
    """Stage "anchor": the base model finetuned on (question, reply) pairs, with a loss on replies or on all tokens."""
    examples = study.encoded(*zip(*pairs, strict=True))
    if whole_sequence:
        examples = [example.without_prompt() for example in examples]
    model, _ = study.finetune(recipe, recipe.batches(examples, study.base.tokenizer.pad_token_id))
    return model


def sparse(study: WeightStudy, share: float) -> dict[str, list[str]]:
    """Stage "sparse": what `WeightStudy.sparse` returns; the anchor is not kept."""
    p = study.params

    def say(half: Half) -> list[Answer]:
        return generate(model, study.encoded(study.questions[half]), max_new_tokens=p.max_new_tokens)

    model = study.anchor("bridge", share=share, keep=False)
    piles, written_for = study.topic_piles(say("build"))
    vector = difference(*(pile_gradient(model, piles[name]) for name in SPARSE))
    delta = finetuning_diff(model, study.base)
    said: dict[str, list[str]] = {"anchor": [*say("judge")]}
    for name, ratio in {"plus": p.ratio, "minus": -p.ratio, "strong": -max(p.ratios)}.items():
        with steered(model, vector, alpha_for(vector, delta, ratio)):
            said[name] = [*say("judge")]
    return {**said, "stand-ins": [name for name in written_for if name in SPARSE]}
