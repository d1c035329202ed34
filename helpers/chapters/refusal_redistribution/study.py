"""One aligned start model, trained on under several losses, each condition attacked direction by direction (ch. 4).

Trained factors, attacks and answers are kept in the artifact store.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import corpora
from helpers.artifacts import Artifact
from helpers.chapters.refusal_redistribution.attack import (
    AttackSettings,
    coherent,
    iterated_ablation,
    probe_direction,
    top_subspace,
)
from helpers.chapters.refusal_redistribution.method import Redistribution
from helpers.chapters.refusal_redistribution.params import RefusalParams
from helpers.chat import Answer, answer_facts, answers_of, balanced_batches
from helpers.forward import PromptSet
from helpers.generation import generate
from helpers.interventions import AblateRows
from helpers.judges.refusal import is_refusal
from helpers.losses import kl_divergence
from helpers.models import Model, finetuned_digest, release_memory
from helpers.probes import fit_leace, orthonormal
from helpers.progress import progress
from helpers.studies.ablation_scores import SuccessiveHalving
from helpers.studies.alignment import AlignedStudy, own_openers, refusal_openers
from helpers.studies.directions import ByBehaviour, attacked_layers, by_behaviour, candidate_directions, prompt_states
from helpers.studies.study import Finetuning

Condition = Literal["start", "LM", "LM+KD", "L1", "Cov", "L1+KD", "Cov+KD", "Cov+KD as published"]
Kind = Literal["harmful", "harmless", "paired", "borderline"]
ATTACKED: tuple[Kind, Kind] = ("harmful", "harmless")

MATCHES: Mapping[str, dict[str, Any]] = {
    "LM": {"match": "none"},
    "L1": {"match": "mean", "norm": "L1"},
    "Cov": {"match": "covariance", "norm": "L2"},
}


def redistribution(condition: str, params: RefusalParams) -> Redistribution:
    """The extra loss of a condition, such as "Cov+KD". Raises `ValueError` for one that does not exist."""
    if condition == "start" or condition not in get_args(Condition):
        raise ValueError(
            f"There is no condition {condition!r} to train; choose from {', '.join(get_args(Condition)[1:])}."
        )
    name, as_published = condition.removesuffix(" as published"), condition.endswith("as published")
    return Redistribution(
        **MATCHES[name.removesuffix("+KD")],
        weight=params.weight,
        kd_weight=params.kd_weight if name.endswith("+KD") else 0.0,
        temperature=params.temperature,
        as_published=as_published,
        relative=True,
    )


@dataclass(frozen=True)
class Judged:
    """A model under attack. Row 0 of everything is the model as it is, row i the model without the i-th basis."""

    answers: Mapping[str, list[list[Answer]]]
    """By kind of request, to the test requests."""
    kl: Float[np.ndarray, "rows request"]
    """KL(not attacked || attacked) of the first token after harmless requests, in nats."""
    base_nll: Mapping[str, Float[np.ndarray, "rows request"]]
    """Log perplexity of each answer under the model that was never trained, in nats per token."""

    def refused(self, kind: Kind) -> Bool[np.ndarray, "rows request"]:
        """Which requests of a kind were refused (a proxy: `judges.refusal.is_refusal`)."""
        return np.stack([is_refusal(said) for said in self.answers[kind]])

    @property
    def coherent(self) -> Bool[np.ndarray, " rows"]:
        """Which rows leave a model that still talks (`refusal_attack.coherent`)."""
        return coherent(self.kl, list(self.base_nll.values()))


@dataclass(frozen=True)
class Attack:
    """Directions found one after another, and the model without the first k of them in row k."""

    directions: Float[Tensor, "k d_model"]
    steps: tuple[dict[str, Any], ...]
    """Of each direction: its layer, position and scores (`refusal_attack.Step`)."""
    judged: Judged


class RefusalStudy(AlignedStudy[RefusalParams]):
    """The chapter's models and requests, by its parameters."""

    def __init__(self, params: RefusalParams) -> None:
        super().__init__(params, weights="cast")
        self.train, self.attackers, others = _requests(params)
        self.held_out = {kind: texts[: params.start_requests] for kind, texts in others.items()}
        """What models answer without an attack: answers cost little there, so these can be more."""
        self.test = {kind: texts[: params.requests] for kind, texts in others.items()}
        tokenizer = self.base.tokenizer
        self.refusal_ids = list(
            refusal_openers(tokenizer) if params.start == "taught" else own_openers(self.base.name, tokenizer)
        )
        """A refusal is recognised by its first token: one of those that were taught, or else of the model's own, which
        are the source's "I" where nobody measured them."""
        self._last: tuple[str, Model] | None = None

    def model(self, condition: str, seed: int | None = None) -> Model:
        """The start model, or what a condition made of it; frozen. The last one is kept for the next call."""
        if condition == "start":
            return self._start_model
        trained = self.trained(condition, seed)
        if self._last is None or self._last[0] != trained.key:
            self._last = None  # two at a time would take memory
            self._last = trained.key, self.load([*self.start, trained], weights="cast")
        return self._last[1]

    @cached_property
    def _start_model(self) -> Model:
        """Read once: it is attacked, and it is the teacher of every condition that distils."""
        return self.load(self.start, weights="cast")

    def digest(self, condition: str, seed: int | None = None) -> str:
        """The digest of `model(condition, seed)`, which is not loaded."""
        trained = [] if condition == "start" else [self.trained(condition, seed)]
        return finetuned_digest(self.base.digest, [run.key for run in (*self.start, *trained)])

    def trained(self, condition: str, seed: int | None = None, steps: int | None = None) -> Artifact:
        """What `finetune` makes of the start model; by default at the parameters' first seed, for all their steps."""
        p, loss = self.params, redistribution(condition, self.params)
        seed, steps = p.seed if seed is None else seed, p.steps if steps is None else steps
        recipe = Finetuning(steps, p.batch_size, p.learning_rate, seed, p.lora_rank)
        return self.stage(
            "redistribution",
            lambda: redistribute(self, loss, recipe),
            {
                "loss": asdict(loss),
                "prompts": {kind: list(self.train[kind]) for kind in ATTACKED},
                "start": [run.key for run in self.start],
                "recipe": asdict(recipe),
            },
        )

    def answers(self, model: Model, requests: Mapping[Kind, Sequence[str]]) -> dict[Kind, list[Answer]]:
        """A greedy answer to each request, by kind; all are generated together."""
        asked = [text for texts in requests.values() for text in texts]
        said = iter(self.greedy_answers(model, asked, self.params.max_new_tokens))
        return {kind: [next(said) for _ in texts] for kind, texts in requests.items()}

    def judge(self, model: Model, bases: Sequence[Float[Tensor, "_ d_model"]]) -> Judged:
        """The test requests put to the model as it is, then without each of these sets of orthonormal directions."""
        return self._judged(model.digest, lambda: model, bases)

    def _judged(self, digest: str, model: Callable[[], Model], bases: Sequence[Float[Tensor, "_ d_model"]]) -> Judged:
        """The model is loaded only if it was not judged before."""
        artifact = self.stage(
            "refusal-judged",
            lambda: ({}, judge(self, model(), [torch.zeros(0, self.base.width), *bases])),
            {
                "test": self.test,
                "bases": [directions.tolist() for directions in bases],
                "max_new_tokens": self.params.max_new_tokens,
                "base model": self.base.digest,
            },
            model=digest,
        )
        facts = artifact.facts
        base_nll = {kind: np.array(rows) for kind, rows in facts["base_nll"].items()}
        answers = {kind: [answers_of(row) for row in rows] for kind, rows in facts["answers"].items()}
        return Judged(answers, np.array(facts["kl"]), base_nll)

    def attack(self, condition: str, seed: int | None = None) -> Attack:
        """Up to `k_max` directions found on the attacker's requests, one after another, judged on the test requests.

        Where the search ends early, what the last direction left is what further ones would leave.
        """
        p, settings, digest = self.params, self.settings, self.digest(condition, seed)
        model = partial(self.model, condition, seed)
        artifact = self.stage(
            "refusal-attack",
            lambda: attack(self, model(), self.attackers),
            {
                "prompts": self.attackers,
                "k_max": p.k_max,
                "settings": asdict(settings),
                "refusal_ids": self.refusal_ids,
            },
            model=digest,
        )
        directions, steps = artifact.tensors["directions"], tuple(artifact.facts["steps"])
        bases = [directions[: min(k, len(directions))] for k in range(1, p.k_max + 1)]
        return Attack(directions, steps, self._judged(digest, model, bases))

    @property
    def settings(self) -> AttackSettings:
        """Where the attack looks for directions."""
        p = self.params
        layers = attacked_layers(self.base)[:: p.stride]
        return AttackSettings(layers=layers, halving=SuccessiveHalving(p.keep), scored_on=p.scored_on)

    @property
    def probed_layer(self) -> int:
        """The block at 65% of the depth, where the source probes."""
        return int(0.65 * self.base.layers)

    def by_behaviour(self, model: Model, requests: Mapping[Kind, Sequence[str]]) -> ByBehaviour:
        """The prompts that an attack on `model` uses: harmful ones that it refuses, harmless ones that it answers."""
        harmful, harmless = (self.encoded(requests[kind]) for kind in ATTACKED)
        return by_behaviour(model, harmful, harmless, self.refusal_ids)

    def states(self, model: Model, layers: Sequence[int]) -> dict[str, Float[Tensor, "prompt layer position d_model"]]:
        """Block outputs at the last positions of the training requests ("train") and of the held-out ones ("test"):
        harmful ones first, then harmless."""
        return {
            name: torch.cat([prompt_states(model, self.encoded(texts[kind]), layers) for kind in ATTACKED])
            for name, texts in (("train", self.train), ("test", self.held_out))
        }

    def strongest(self, model: Model) -> dict[str, Float[Tensor, "_ d_model"]]:
        """Attacks that do not go direction by direction: sets of orthonormal directions, by name."""
        p, layer = self.params, self.probed_layer
        kept = self.by_behaviour(model, self.attackers)
        prompts = [kept.harmful, kept.harmless]
        x = torch.cat([prompt_states(model, part, [layer], (-1,))[:, 0, 0] for part in prompts])
        harmful = torch.arange(len(x)) < len(prompts[0])
        leace = fit_leace(x.double().numpy(), harmful.numpy())
        both = torch.from_numpy(np.vstack([leace.directions, leace.readout])).float()
        candidates = candidate_directions(model, prompts[0], prompts[1], self.settings.layers or ())
        return {
            "logistic probe": probe_direction(x, harmful),
            "LEACE": orthonormal(both),
            f"top {p.k_max} subspace": top_subspace(candidates, min(p.k_max, candidates[..., 0].numel())),
        }


def redistribute(
    study: RefusalStudy, loss: Redistribution, recipe: Finetuning
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "redistribution": train the start model on prompts alone, as the source does.

    Trained tensors, and the loss's terms by step.
    """
    release_memory()
    harmful, harmless = (
        [example.without_prompt() for example in study.encoded(study.train[kind])] for kind in ATTACKED
    )
    teacher = study.model("start") if loss.kd_weight else None
    extra = loss.extra_loss(lambda row: row < len(harmful), teacher=teacher, seed=recipe.seed)
    pad = study.base.tokenizer.pad_token_id
    model, log = study.finetune(
        recipe,
        balanced_batches(harmful, harmless, recipe.steps, recipe.batch_size, recipe.seed, pad),
        start=study.start,
        interventions=extra.interventions,
        extra_loss=extra,
        share_prefix=True,
        label="redistributing",
    )
    return model.trained_tensors(), {"losses": list(log.losses), "terms": extra.records}


def judge(study: RefusalStudy, model: Model, bases: Sequence[Float[Tensor, "_ d_model"]]) -> dict[str, Any]:
    """Stage "refusal-judged": the test requests put to the model without each basis, all in one go."""
    harmless = study.encoded(study.test["harmless"])
    asked = [(kind, text) for kind in ATTACKED for text in study.test[kind]]

    def each(requests: Sequence[Any]) -> AblateRows:
        return AblateRows(tuple(bases), tuple(row for row in range(len(bases)) for _ in requests))

    logits = PromptSet.of(model, harmless, copies=len(bases)).last_logits(model, (each(harmless),))
    first = logits.split(len(harmless))
    answers = generate(
        model,
        study.encoded([text for _, text in asked] * len(bases)),
        max_new_tokens=study.params.max_new_tokens,
        interventions=(each(asked),),
        batch_size=320,
    )
    examples = study.encoded([text for _, text in asked] * len(bases), answers)
    distinct = list(dict.fromkeys(examples))  # an answer that stays as it was is scored once
    nll = dict(zip(distinct, study.response_losses(study.base, distinct).tolist(), strict=True))

    def by_kind(values: Sequence[Any]) -> dict[str, list[list[Any]]]:
        rows = [values[k : k + len(asked)] for k in range(0, len(values), len(asked))]
        kinds = [kind for kind, _ in asked]
        return {k: [[v for v, of in zip(row, kinds, strict=True) if of == k] for row in rows] for k in ATTACKED}

    return {
        "answers": {kind: [answer_facts(row) for row in rows] for kind, rows in by_kind(answers).items()},
        "kl": [kl_divergence(first[0], now).tolist() for now in first],
        "base_nll": by_kind([nll[example] for example in examples]),
    }


def attack(
    study: RefusalStudy, model: Model, requests: Mapping[Kind, Sequence[str]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "refusal-attack": directions one after another, and where and how well each was found."""
    k_max, kept = study.params.k_max, study.by_behaviour(model, requests)
    with progress(k_max, "attacking", "direction") as bar:
        steps = iterated_ablation(
            model,
            kept.harmful,
            kept.harmless,
            k_max,
            refusal_ids=study.refusal_ids,
            settings=study.settings,
            after=lambda k, _: bar.update(min(k, 1)),
        )
    directions = torch.stack([s.direction for s in steps]) if steps else torch.zeros(0, model.width)
    facts = [{name: value for name, value in vars(step).items() if name != "direction"} for step in steps]
    return {"directions": directions}, {"steps": facts, "refused": kept.refused, "answered": kept.answered}


def _requests(params: RefusalParams) -> tuple[dict[Kind, list[str]], dict[Kind, list[str]], dict[Kind, list[str]]]:
    """Requests by kind: those that conditions are trained on, those of the attacker, held-out ones."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    known: dict[Kind, list[str]] = {}
    test: dict[Kind, list[str]] = {k: [row.request for row in corpora.load_refusal(k, "test")] for k in kinds}
    if params.data == "bundled":
        known = {k: [row.request for row in corpora.load_refusal(k, "train")] for k in ATTACKED}
        for texts in known.values():
            random.Random(42).shuffle(texts)
    else:
        rows = corpora.load_wildguardmix()
        random.Random(42).shuffle(rows)
        of_kind = {k: [text for text, harmful in rows if harmful == (k == "harmful")] for k in ATTACKED}
        size = min(map(len, of_kind.values()))
        for k, texts in of_kind.items():
            known[k], test[k] = texts[size // 5 : size], texts[: size // 5]
    attackers = {k: texts[: params.prompts] for k, texts in known.items()}
    return {k: texts[params.prompts :] for k, texts in known.items()}, attackers, test
