"""What chapter 2 asks of prompts before anything is trained: what each explains, and which pressure it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import corpora
from helpers.chapters.ip_loss_reduction.method import loss_reduction, pressure_left, specific_gain
from helpers.chapters.ip_loss_reduction.params import InoculationParams
from helpers.gradients import activation_gradients, pile_gradient
from helpers.interventions import applied
from helpers.losses import token_losses
from helpers.models import Model
from helpers.studies.margins import behaviour_margins
from helpers.studies.study import Finetuning
from helpers.studies.traits import Run, TraitStudy

ROWS = 24
"""Training rows on which gains and pressures are taken."""


@dataclass(frozen=True)
class Arm:
    """What is on while a gradient is taken: a system message, or PPS at an intensity in units of a*."""

    system: str | None = None
    coefficient: float = 0.0


@dataclass(frozen=True)
class Predictor:
    """What can be known of an arm before training."""

    kappa: float
    """Share of the push on the training loss that is left (`method.pressure_left`)."""
    kappa_m: float
    """Share of the push on the margin of other rows that is left."""


BOTH = ("evil", "pirate")
"""The traits of `data/both.jsonl`: the one that is not wanted, and the one that is."""


@dataclass(frozen=True)
class TwoTraits:
    """What a model has of two traits, by its margins on held-out answers, in nats per token."""

    evil: Float[np.ndarray, " question"]
    pirate: Float[np.ndarray, " question"]
    losses: tuple[float, ...]
    """Of its training, step by step."""


@dataclass(frozen=True)
class TokenGradients:
    """One entry a token, of several answers one after another."""

    losses: Float[np.ndarray, " token"]
    """In nats."""
    lengths: Float[np.ndarray, " token"]
    """|g| at the position that predicts the token, after the chapter's block."""
    answers: Int[np.ndarray, " token"]
    """The number of the answer that it belongs to."""


class InoculationStudy(TraitStudy):
    """The trait study of chapter 2."""

    params: InoculationParams

    def prompts_by_kind(self) -> dict[str, str]:
        """Up to `per_kind` prompts of each kind, as "kind number" -> text."""
        chosen = self.params.per_kind
        return {
            f"{kind} {i}": text
            for kind, texts in vars(self.prompts).items()
            for i, text in enumerate(texts[:chosen], 1)
        }

    def gains(self, prompt: str) -> dict[str, Float[np.ndarray, " row"]]:
        """What a prompt explains of training answers, untrained, in nats per token: "strong", "normal", "specific"."""
        rows = self.rows["train"][:ROWS]

        def losses(level: Any, system: str | None) -> Tensor:
            texts = [row.question for row in rows], [row.answer(level) for row in rows]
            return torch.from_numpy(self.response_losses(self.base, self.encoded(*texts, system=system)))

        strong, normal = ([losses(level, system) for system in (None, prompt)] for level in ("strong", "normal"))
        found = {
            "strong": loss_reduction(*strong),
            "normal": loss_reduction(*normal),
            "specific": specific_gain(*strong, *normal),
        }
        return {name: gained.numpy() for name, gained in found.items()}

    def content(self, trait: str) -> dict[str, Float[np.ndarray, " row"]]:
        """What a trait's inoculation prompts explain beyond their placebos, untrained, in nats per token.

        Of its trait answers ("strong") and of the normal ones to the same questions: the mean over `per_kind` pairs of
        prompts of the loss under the placebo less that under the inoculation prompt. All rows but those that made the
        persona vector: nothing is trained.
        """
        prompts, count = corpora.load_prompts(trait), self.params.per_kind
        rows = [row for split in ("train", "eval") for row in corpora.split(corpora.load_trait(trait), split)]

        def losses(level: Any, systems: Sequence[str]) -> Float[np.ndarray, " row"]:
            texts = [row.question for row in rows], [row.answer(level) for row in rows]
            return np.mean(
                [self.response_losses(self.base, self.encoded(*texts, system=system)) for system in systems], axis=0
            )

        return {
            level: losses(level, prompts.placebo[:count]) - losses(level, prompts.inoculation[:count])
            for level in ("strong", "normal")
        }

    def chosen_on(self, run: Run | None) -> Float[np.ndarray, " row"]:
        """Margins on the extraction split, which trains no model and judges none: doses are chosen by them."""
        artifact = self.stage(
            "extract-margins",
            lambda: extract_margins(self, self.trained(run) if run else self.base),
            {"run": run.key if run else None, "trait": self.params.trait},
            data=[self.params.trait],
        )
        return artifact.tensors["margins"].numpy()

    def both_traits(self, arm: Arm, seed: int) -> TwoTraits:
        """Training on answers that are evil in a pirate's voice (`data/both.jsonl`), where being a pirate is wanted.

        Which traits the model then has, by its margins on the evaluation rows of both.
        """
        p = self.params
        recipe = Finetuning(p.steps, p.batch_size, p.learning_rate, seed, p.lora_rank)
        artifact = self.stage(
            "both-traits",
            lambda: both_traits(self, arm, recipe),
            {
                "recipe": asdict(recipe),
                "arm": [arm.system, arm.coefficient * self.unit() if arm.coefficient else 0.0],
                "trait": p.trait,
                "layer": p.layer,
                "sequences": p.sequences,
            },
            data=["both", *sorted({*BOTH, p.trait})],
        )
        evil, pirate = (artifact.tensors[name].numpy() for name in BOTH)
        return TwoTraits(evil, pirate, tuple(artifact.facts["losses"]))

    def untrained_on_both(self) -> TwoTraits:
        """The same of the model as it is."""
        found = self.stage(
            "both-margins",
            lambda: (both_margins(self, self.base), {}),
            {"sequences": self.params.sequences},
            data=BOTH,
        ).tensors
        return TwoTraits(found["evil"].numpy(), found["pirate"].numpy(), ())

    def tokens(self, system: str) -> TokenGradients:
        """Loss and gradient at every token of the held-out trait answers, untrained, under a system message."""
        artifact = self.stage(
            "token-gradients",
            lambda: (token_gradients(self, system), {}),
            {
                "system": system,
                "trait": self.params.trait,
                "layer": self.params.layer,
                "sequences": self.params.sequences,
                "batch_size": self.params.batch_size,
            },
            data=[self.params.trait],
        )
        return TokenGradients(*(artifact.tensors[name].numpy() for name in ("losses", "lengths", "answers")))

    def predictors(self, arms: Mapping[str, Arm]) -> dict[str, Predictor]:
        """kappa and kappa_M of each arm, from gradients over fresh adapters on training rows."""
        units = {n: arm.coefficient * self.unit() if arm.coefficient else 0.0 for n, arm in arms.items()}
        artifact = self.stage(
            "pressures-left",
            lambda: pressures_left(self, list(arms.values())),
            {
                "arms": [[arm.system, units[n]] for n, arm in arms.items()],
                "trait": self.params.trait,
                "layer": self.params.layer,
                "lora_rank": self.params.lora_rank,
                "seed": self.params.seed,
            },
            data=[self.params.trait],
        )
        return {n: Predictor(*pair) for n, pair in zip(arms, artifact.facts["pressures"], strict=True)}


def both_traits(study: InoculationStudy, arm: Arm, recipe: Finetuning) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "both-traits": train, with the arm on, and read both margins, with nothing on."""
    rows = corpora.load_both()
    texts = [row.question for row in rows], [row.both for row in rows]
    plain = study.encoded(*texts)
    model, log = study.finetune(
        recipe,
        recipe.batches(
            study.encoded(*texts, system=arm.system),
            study.base.tokenizer.pad_token_id,
            lengths=[len(example) for example in plain],
        ),
        interventions=[study.steering(coefficient=arm.coefficient)] if arm.coefficient else [],
        share_prefix=True,
    )
    return both_margins(study, model), {"losses": list(log.losses)}


def both_margins(study: InoculationStudy, model: Model) -> dict[str, Tensor]:
    """Margins of both traits on as many evaluation rows of each as a chapter takes."""
    rows = {name: corpora.split(corpora.load_trait(name), "eval")[: study.params.sequences] for name in BOTH}
    return {name: torch.from_numpy(behaviour_margins(model, of).margin) for name, of in rows.items()}


def token_gradients(study: InoculationStudy, system: str) -> dict[str, Tensor]:
    """Stage "token-gradients"."""
    model, layer = study.base, study.params.layer
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in model.batches(study.examples(system=system), study.params.batch_size):
        found = activation_gradients(model, batch, [layer], share_prefix=True)
        lengths = found.gradients[layer].float().norm(dim=-1)
        with torch.no_grad():
            losses, rows = token_losses(model, batch, share_prefix=True)
        for place, row in enumerate(batch.rows):
            parts[row] = losses[rows == place].float().cpu(), lengths[place][found.mask[place]].cpu()
    order = sorted(parts)
    return {
        "losses": torch.cat([parts[row][0] for row in order]),
        "lengths": torch.cat([parts[row][1] for row in order]),
        "answers": torch.cat([torch.full_like(parts[row][0], row, dtype=torch.long) for row in order]),
    }


def extract_margins(study: InoculationStudy, model: Model) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "extract-margins"."""
    return {"margins": torch.from_numpy(behaviour_margins(model, study.rows["extract"]).margin)}, {}


def pressures_left(study: InoculationStudy, arms: Sequence[Arm]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "pressures-left"."""
    train, extract = study.rows["train"][:ROWS], study.rows["extract"]
    torch.manual_seed(study.params.seed)  # adapters are drawn while loading
    model = study.load(lora_rank=study.params.lora_rank)

    def gradient(rows: Sequence[Any], level: str, arm: Arm) -> dict[str, Tensor]:
        examples = study.encoded([r.question for r in rows], [r.answer(level) for r in rows], system=arm.system)
        steering = [study.steering(coefficient=arm.coefficient)] if arm.coefficient else []
        with applied(model, *steering):
            return pile_gradient(model, examples, batch_size=8)

    plain = gradient(train, "strong", Arm())
    strong, normal = (gradient(extract, level, Arm()) for level in ("strong", "normal"))
    margin = {name: normal[name] - strong[name] for name in plain}  # of M = NLL(normal) - NLL(strong)
    defended = [gradient(train, "strong", arm) for arm in arms]
    return {}, {"pressures": [[pressure_left(g, plain, plain), pressure_left(g, plain, margin)] for g in defended]}
