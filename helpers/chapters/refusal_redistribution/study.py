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
from helpers.chapters.refusal_redistribution.attack import AttackSettings, coherent, iterated_ablation
from helpers.chapters.refusal_redistribution.attackers import (
    FINETUNED,
    SEARCHED,
    Attack,
    Optimisation,
    leace_directions,
    optimised_direction,
    probe_direction,
    searched,
)
from helpers.chapters.refusal_redistribution.damage import SCALES, Damage, DamageCurve, damage_curve
from helpers.chapters.refusal_redistribution.method import Redistribution
from helpers.chapters.refusal_redistribution.params import RefusalParams
from helpers.chat import Answer, Example, answer_facts, answers_of, balanced_batches
from helpers.forward import PromptSet, common_beginning
from helpers.generation import generate
from helpers.interventions import AblateAffine, AblateRows
from helpers.judges.refusal import is_refusal
from helpers.losses import kl_divergence
from helpers.models import Model, finetuned_digest, release_memory
from helpers.probes import orthonormal
from helpers.progress import progress
from helpers.studies.ablation_scores import SuccessiveHalving
from helpers.studies.card import CardedStudy, Contrast, Search
from helpers.studies.directions import (
    ByBehaviour,
    attacked_layers,
    by_behaviour,
    header_positions,
    prompt_states,
)
from helpers.studies.margins import opening_log_odds
from helpers.studies.study import Finetuning

Condition = Literal["start", "LM", "LM+KD", "L1", "Cov", "L1+KD", "Cov+KD", "Mean+Cov+KD", "Cov+KD as published"]
Kind = Literal["harmful", "harmless", "paired", "borderline"]
ATTACKED: tuple[Kind, Kind] = ("harmful", "harmless")

MATCHES: Mapping[str, dict[str, Any]] = {
    "LM": {"match": "none"},
    "L1": {"match": "mean", "norm": "L1"},
    "Cov": {"match": "covariance", "norm": "L2", "unbiased": True},
    "Mean+Cov": {"match": "mean and covariance", "norm": "L2", "unbiased": True},
}


def redistribution(condition: str, params: RefusalParams, template_length: int = 5) -> Redistribution:
    """The extra loss of a condition, such as "Cov+KD", for a header of so many tokens.

    As published, pools are drawn for each prompt, and gaps are squared as they are. Raises `ValueError` for a condition
    that does not exist.
    """
    if condition == "start" or condition not in get_args(Condition):
        raise ValueError(
            f"There is no condition {condition!r} to train; choose from {', '.join(get_args(Condition)[1:])}."
        )
    name, as_published = condition.removesuffix(" as published"), condition.endswith("as published")
    match = MATCHES[name.removesuffix("+KD")]
    if as_published:
        match = {**match, "unbiased": False}
    return Redistribution(
        **match,
        weight=params.weight,
        kd_weight=params.kd_weight if name.endswith("+KD") else 0.0,
        temperature=params.temperature,
        template_length=template_length,
        as_published=as_published,
        relative=True,
        one_pool=not as_published,
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
class Iterated:
    """Directions found one after another, and the model without the first k of them in row k."""

    directions: Float[Tensor, "k d_model"]
    steps: tuple[dict[str, Any], ...]
    """Of each direction: its layer, position and scores (`refusal_attack.Step`)."""
    judged: Judged


class RefusalStudy(CardedStudy[RefusalParams]):
    """The chapter's models and requests, by its parameters."""

    def __init__(self, params: RefusalParams) -> None:
        super().__init__(params, weights="cast")
        self.train, self.attackers, others = _requests(params)
        self.held_out = {kind: texts[: params.start_requests] for kind, texts in others.items()}
        """What models answer without an attack, and what damage is measured on."""
        self.test = {kind: texts[: params.requests] for kind, texts in others.items()}
        """What the attack direction by direction is judged on: every row of it is answered."""
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
        return finetuned_digest(self.base.digest, [run.key for run in self.made(condition, seed)])

    def made(self, condition: str, seed: int | None = None) -> list[Artifact]:
        """The runs that make `model(condition, seed)` of the base model."""
        return [*self.start, *([] if condition == "start" else [self.trained(condition, seed)])]

    def trained(self, condition: str, seed: int | None = None, steps: int | None = None) -> Artifact:
        """What `finetune` makes of the start model; by default at the parameters' first seed, for all their steps."""
        p, header = self.params, len(header_positions(self.base.tokenizer))
        loss = redistribution(condition, p, header)
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

    def candidates(self, condition: str, seed: int | None = None, contrasts: Sequence[Contrast] = ()) -> Search:
        """Candidate directions from the attacker's requests, scored; by default of the contrasts that the attackers
        need."""
        needed = dict.fromkeys(SEARCHED[a][0] for a in self.params.attackers if a in SEARCHED)
        return self.search(
            self.digest(condition, seed),
            partial(self.model, condition, seed),
            {str(kind): texts for kind, texts in self.attackers.items()},
            tuple(contrasts or needed),
            self.settings.layers or (),
            self.params.scored_on,
        )

    def card(self) -> Search:
        """The second half of the start model's card: plain and paired contrasts, beside those that attackers need."""
        needed = dict.fromkeys(SEARCHED[a][0] for a in self.params.attackers if a in SEARCHED)
        bundled: tuple[Contrast, ...] = ("harmless", "paired") if "paired" in self.attackers else ("harmless",)
        return self.candidates("start", contrasts=tuple({**dict.fromkeys(bundled), **needed}))

    def damage(self, condition: str, seed: int | None = None) -> Damage:
        """What each attacker's ablation does to the held-out requests, by its scale, and the answers at scale 1."""
        how = Optimisation()

        def found() -> Search:
            return self.card() if condition == "start" else self.candidates(condition, seed)

        artifact = self.stage(
            "attack-damage",
            lambda: damage(self, self.model(condition, seed), self.made(condition, seed), found(), how),
            {
                "attackers": list(self.params.attackers),
                "prompts": self.attackers,
                "requests": self.held_out,
                "layers": list(self.settings.layers or ()),
                "scored_on": self.params.scored_on,
                "openers": self.refusal_ids,
                "optimisation": asdict(how),
                "finetuned on": [asdict(row) for row in FINETUNED.rows()],
                "finetuning": asdict(FINETUNED),
                "scales": list(SCALES),
                "max_new_tokens": self.params.max_new_tokens,
            },
            model=self.digest(condition, seed),
        )
        return Damage.of(artifact.facts["attacks"])

    def attack(self, condition: str, seed: int | None = None) -> Iterated:
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
        return Iterated(directions, steps, self._judged(digest, model, bases))

    @property
    def settings(self) -> AttackSettings:
        """Where the attack looks for directions."""
        p = self.params
        layers = attacked_layers(self.base)[:: -p.stride][::-1]  # the last always, where refusal is read off most
        return AttackSettings(layers=layers, halving=SuccessiveHalving(p.keep), scored_on=p.scored_on)

    @property
    def probed_layer(self) -> int:
        """The block at 65% of the depth, where the source probes."""
        return int(0.65 * self.base.layers)

    def by_behaviour(self, model: Model, requests: Mapping[Kind, Sequence[str]]) -> ByBehaviour:
        """The prompts that an attack on `model` uses: harmful ones that it refuses, harmless ones that it answers."""
        harmful, harmless = (self.encoded(requests[kind]) for kind in ATTACKED)
        return by_behaviour(model, harmful, harmless, self.refusal_ids)

    def states(
        self, model: Model, layers: Sequence[int], parts: Sequence[str] = ("train", "test")
    ) -> dict[str, Float[Tensor, "prompt layer position d_model"]]:
        """Block outputs at the last positions of the training requests ("train") and of the held-out ones ("test"):
        harmful ones first, then harmless."""
        texts = {"train": self.train, "test": self.held_out}
        return {
            name: torch.cat([prompt_states(model, self.encoded(texts[name][kind]), layers) for kind in ATTACKED])
            for name in parts
        }


def redistribute(
    study: RefusalStudy, loss: Redistribution, recipe: Finetuning
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "redistribution": train the start model on prompts alone, as the source does.

    Trained tensors, and the loss's terms by step.
    """
    release_memory()
    encoded = [study.encoded(study.train[kind]) for kind in ATTACKED]
    begin = max(1, common_beginning([example for kind in encoded for example in kind]))  # the system message: no loss
    harmful, harmless = ([Example(example.ids, begin) for example in kind] for kind in encoded)
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


def damage(
    study: RefusalStudy, model: Model, made: Sequence[Artifact], found: Search, how: Optimisation
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "attack-damage": every attacker's directions, their curves on the held-out requests, and answers."""
    release_memory()
    asked = {kind: study.encoded(study.held_out[kind]) for kind in ATTACKED}
    facts = []
    measured: dict[tuple[str, int, int], DamageCurve] = {}  # rules often take one candidate
    for attack in attacks(study, model, found, how):
        place = attack.attacker, attack.layer, attack.position
        if place not in measured:
            measured[place] = damage_curve(
                model,
                attack.directions,
                asked["harmful"],
                asked["harmless"],
                refusal_ids=study.refusal_ids,
                centre=attack.centre,
            )
        curve = measured[place]
        said = []
        if attack.rule in ("-1", "fitted"):
            ablation = AblateAffine(attack.directions, attack.centre)
            limit = study.params.max_new_tokens
            said = generate(model, asked["harmful"], max_new_tokens=limit, interventions=(ablation,), batch_size=320)
        facts.append(
            {
                "attacker": attack.attacker,
                "rule": attack.rule,
                "layer": attack.layer,
                "position": attack.position,
                "fallback": attack.fallback,
                "scales": curve.scales.tolist(),
                "log_odds": curve.log_odds.tolist(),
                "kl": curve.kl.tolist(),
                "said": answer_facts(said),
            }
        )
    if "finetuned" in study.params.attackers:
        curve, answers = finetuned(study, model, made)
        facts.append(
            {
                "attacker": "finetuned",
                "rule": "fitted",
                "layer": None,
                "position": None,
                "fallback": False,
                "scales": curve.scales.tolist(),
                "log_odds": curve.log_odds.tolist(),
                "kl": curve.kl.tolist(),
                "said": answer_facts(answers),
            }
        )
    return {}, {"attacks": facts}


def finetuned(study: RefusalStudy, model: Model, made: Sequence[Artifact]) -> tuple[DamageCurve, list[Answer]]:
    """What finetuning on a few compliant answers does to refusal, by its steps, and the answers after the last.

    Every number of steps is a run of its own. `made` are the runs that made the model of the base model.
    """
    harmful, harmless = (study.encoded(study.held_out[kind]) for kind in ATTACKED)
    rows = FINETUNED.rows()
    examples = study.encoded([row.request for row in rows], [row.reply for row in rows])
    before, attacked = PromptSet.of(model, harmless).last_logits(model), model
    log_odds, kl = [], []
    for steps in FINETUNED.steps:
        if steps:
            recipe = Finetuning(steps, len(rows), FINETUNED.learning_rate, study.params.seed, FINETUNED.rank)
            batches = recipe.batches(examples, study.base.tokenizer.pad_token_id)
            attacked, _ = study.finetune(recipe, batches, start=made, label="finetuning attack")
        log_odds.append(opening_log_odds(attacked, harmful, study.refusal_ids))
        after = PromptSet.of(attacked, harmless).last_logits(attacked)
        kl.append(kl_divergence(before, after).double().cpu().numpy())
    answers = generate(attacked, harmful, max_new_tokens=study.params.max_new_tokens, batch_size=320)
    return DamageCurve(np.array(FINETUNED.steps, dtype=float), np.stack(log_odds), np.stack(kl)), answers


def attacks(study: RefusalStudy, model: Model, found: Search, how: Optimisation) -> list[Attack]:
    """What each of the chapter's attackers takes, from the attacker's own requests."""
    kept, layer = study.by_behaviour(model, study.attackers), study.probed_layer
    every: list[Attack] = []
    for name in study.params.attackers:
        if name == "finetuned":
            continue
        if name in SEARCHED:
            every += [searched(found, name, rule) for rule in ("source", "0", "-1")]
            continue
        if name == "optimised":
            first = searched(found, next(a for a in study.params.attackers if a in SEARCHED), "-1")
            centre = found.centres[found.positions.index(first.position)]
            direction = optimised_direction(
                model,
                first.directions[0],
                kept.harmful,
                kept.harmless,
                refusal_ids=study.refusal_ids,
                centre=centre,
                how=how,
            )
            every.append(Attack(name, "fitted", direction, centre, first.layer, first.position))
            continue
        if name == "random":
            draw = torch.randn(1, model.width, generator=torch.Generator().manual_seed(0))
            every.append(Attack(name, "fitted", orthonormal(draw), found.centres[-1], layer, -1))
            continue
        prompts = [kept.harmful, kept.harmless]
        x = torch.cat([prompt_states(model, part, [layer], (-1,))[:, 0, 0] for part in prompts])
        fit = leace_directions if name == "LEACE" else probe_direction
        directions = fit(x, torch.arange(len(x)) < len(prompts[0]))
        every.append(Attack(name, "fitted", directions, found.centres[-1], layer, -1))
    return every


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
        known = {k: [row.request for row in corpora.load_refusal(k, "train")] for k in kinds if k != "borderline"}
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
    return {k: known[k][params.prompts :] for k in ATTACKED}, attackers, test
