"""Margins: by how much a model finds an answer that shows a behaviour likelier than one that does not.

Context. A generated answer is one noisy bit, which a judge then reads. A margin is a number, comes from one pass over
written answers, and needs no judge. The answers are the same in every arm, so differences between arms are paired.

Higher is more of the behaviour. What the answer that does not show it costs (`Margins.other`) stands beside every
margin: a model that got worse at everything loses there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.chat import Example, encode
from helpers.corpora import QuizRow, StyleRow, TopicRow, TraitRow
from helpers.forward import PromptSet
from helpers.interventions import Intervention
from helpers.losses import evaluate_losses
from helpers.models import Model
from helpers.statistics import Estimate, rank_correlation
from helpers.verdicts import NOT_MEASURED

NO_TOKENS = "Refusal needs at least one token to be recognised by, such as the first of 'I cannot'."


WrittenPair = TraitRow | TopicRow | StyleRow
"""A row with two answers to a question: one that shows the behaviour (strong), and one that does not (normal)."""


@dataclass(frozen=True)
class Margins:
    """Of a model, on pairs of answers, in nats per token."""

    margin: Float[np.ndarray, " pair"]
    """NLL(answer that does not show the behaviour) - NLL(answer that shows it)."""
    other: Float[np.ndarray, " pair"]
    """NLL of the answer that does not show it."""


def margins(
    model: Model,
    shown: Sequence[Example],
    other: Sequence[Example],
    *,
    interventions: Iterable[Intervention] = (),
    batch_size: int = 32,
) -> Margins:
    """M = NLL(other) - NLL(shown) of every pair, each the mean over its response's tokens.

    What all rows begin with is read once a batch. Raises `ValueError` if the two lists are not pairs.
    """
    if len(shown) != len(other) or not shown:
        raise ValueError(
            f"Margins need pairs of answers, and got {len(shown)} that show the behaviour beside {len(other)}."
        )
    losses = evaluate_losses(model, [*shown, *other], interventions=tuple(interventions), batch_size=batch_size).numpy()
    of_shown, of_other = losses[: len(shown)], losses[len(shown) :]
    return Margins(of_other - of_shown, of_other)


def behaviour_margins(
    model: Model,
    rows: Sequence[WrittenPair],
    *,
    system: str | None = None,
    interventions: Iterable[Intervention] = (),
    batch_size: int = 32,
) -> Margins:
    """The margin of a trait, a topic or a concept: NLL(normal answer) - NLL(strong answer) to each row's question."""
    shown, other = (
        [encode(model.tokenizer, row.question, getattr(row, level), system) for row in rows]
        for level in ("strong", "normal")
    )
    return margins(model, shown, other, interventions=interventions, batch_size=batch_size)


def refusal_margins(
    model: Model,
    requests: Sequence[str],
    refusals: Sequence[str],
    compliances: Sequence[str],
    *,
    interventions: Iterable[Intervention] = (),
    batch_size: int = 32,
) -> Margins:
    """The margin of refusal over whole replies, NLL(compliance) - NLL(refusal): it reads on where a model that only
    begins like a refusal has stopped refusing."""
    shown, other = (
        [encode(model.tokenizer, request, reply) for request, reply in zip(requests, replies, strict=True)]
        for replies in (refusals, compliances)
    )
    return margins(model, shown, other, interventions=interventions, batch_size=batch_size)


def opening_log_odds(
    model: Model,
    prompts: Sequence[Example],
    opener_ids: Sequence[int],
    *,
    interventions: Sequence[Intervention] = (),
    batch_size: int = 64,
) -> Float[np.ndarray, " prompt"]:
    """`refusal_log_odds` of the first token of an answer to every prompt, in the order given."""
    logits = PromptSet.of(model, prompts, batch_size=batch_size).last_logits(model, interventions)
    return refusal_log_odds(logits, opener_ids).numpy()


def refusal_log_odds(
    logits: Float[Tensor, "batch vocabulary"], refusal_ids: Sequence[int], eps: float = 1e-8
) -> Float[Tensor, " batch"]:
    """log P_R - log(1 - P_R), P_R being the probability of all refusal tokens together (Arditi et al. 2024).

    In float64 (on the CPU: not every device has it), since 1 - P_R may be tiny; `eps` is added to both. Raises
    `ValueError` without refusal tokens.
    """
    if not refusal_ids:
        raise ValueError(NO_TOKENS)
    p = logits.cpu().double().softmax(-1)
    refuses = p[:, list(dict.fromkeys(refusal_ids))].sum(-1)  # P_R
    return (refuses + eps).log() - (1 - refuses + eps).log()


def agreement(
    margins_of: Mapping[str, Float[np.ndarray, "*row"]], judged: Mapping[str, Float[np.ndarray, "*row"]]
) -> Estimate:
    """Spearman's rank correlation, over arms, of mean margin and mean judged rate: do the two rank arms alike?

    `NOT_MEASURED` for fewer than four arms, or where all arms are alike in one of the two.
    """
    means = [[float(of[arm].mean()) for arm in margins_of] for of in (margins_of, judged)]
    if len(means[0]) < 4 or any(len(set(column)) == 1 for column in means):
        return NOT_MEASURED
    return rank_correlation(*means)


@dataclass(frozen=True)
class Utility:
    """What a model still knows, on questions with one right answer among several."""

    margin: Float[np.ndarray, " question"]
    """Mean NLL of the wrong answers minus NLL of the right one, in nats per token."""
    exact: Float[np.ndarray, " question"]
    """1 where the right answer is the likeliest of all, else 0."""


def quiz_utility(
    model: Model,
    rows: Sequence[QuizRow],
    *,
    system: str | None = None,
    interventions: Iterable[Intervention] = (),
    batch_size: int = 32,
) -> Utility:
    """The task margin on a quiz: the first of a row's right answers against its wrong ones."""
    examples = [
        encode(model.tokenizer, row.question, answer, system) for row in rows for answer in (row.answers[0], *row.wrong)
    ]
    losses = evaluate_losses(model, examples, interventions=tuple(interventions), batch_size=batch_size)
    each = [part.numpy() for part in torch.split(losses, [1 + len(row.wrong) for row in rows])]
    margin = np.array([part[1:].mean() - part[0] for part in each])
    return Utility(margin, np.array([float(part[0] < part[1:].min()) for part in each]))
