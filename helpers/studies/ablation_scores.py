"""What ablating or adding each candidate direction does to refusal, and which candidate a rule takes.

The best candidate is the one whose ablation lowers the log-odds of refusing harmful prompts most, among those that
leave harmless prompts alone (a small KL divergence) and that bring refusal about when added (Arditi et al. 2024).

Ablation is to zero, as in the source, or to the harmless mean (affine): a direction's zero need not be where harmless
prompts lie, and then zero ablation does damage that says nothing of refusal.

Context. Scoring every candidate costs two or three passes over all prompts each, and there are over a hundred.

Intuition. One or two prompts tell most candidates from the good ones, so each is read by few candidates more than the
last: all candidates are scored on a few prompts, the promising ones on more, only the best few on all. What all prompts
share at their start (the template's system message) is read once a candidate, not once a prompt, and several candidates
are read in one pass.

Layer l is the output of block l. The source measures there and adds at the block's input; here a difference is added
where it was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.chat import Example
from helpers.forward import PromptSet
from helpers.interventions import AblateRows, SteerRows
from helpers.losses import kl_divergence
from helpers.models import Model
from helpers.studies.directions import NO_PROMPTS, ablating, unit
from helpers.studies.margins import refusal_log_odds

KL_LIMIT = 0.1
"""Nats. Above it, a candidate's ablation changes what the model says to harmless prompts."""


@dataclass(frozen=True)
class Scores:
    """What ablating or adding each candidate does; NaN where a candidate was not scored."""

    log_odds: Float[Tensor, "layer position"]
    """Mean refusal log-odds of harmful prompts with the candidate ablated as well; the lower, the better."""
    kl: Float[Tensor, "layer position"]
    """KL(without it || with it ablated) of the next token after harmless prompts, in nats, mean over prompts."""
    induce: Float[Tensor, "layer position"]
    """Mean refusal log-odds of harmless prompts with the raw difference added after its layer.

    NaN also where the KL exceeds the limit and successive halving did not need it.
    """

    @property
    def scored(self) -> Bool[Tensor, "layer position"]:
        return ~self.log_odds.isnan()

    def passing(self, kl_limit: float = KL_LIMIT) -> Bool[Tensor, "layer position"]:
        """Candidates that leave harmless prompts alone and bring refusal about when added."""
        return (self.kl <= kl_limit) & (self.induce >= 0)


@dataclass(frozen=True)
class Choice:
    """The candidate chosen: indices of its layer and position among those scored."""

    layer: int
    position: int
    fallback: bool
    """No candidate passed the filters, so the best sum of log-odds and KL was taken."""


def choose(scores: Scores, kl_limit: float = KL_LIMIT) -> Choice:
    """The lowest log-odds among candidates with kl <= `kl_limit` and induce >= 0; if there are none, the lowest
    log-odds + kl of all, marked as the fallback. Raises `ValueError` if nothing was scored."""
    if not bool(scores.scored.any()):
        raise ValueError("No candidate was scored, so none can be chosen.")
    passing = scores.passing(kl_limit)
    fallback = not bool(passing.any())
    value = scores.log_odds + scores.kl if fallback else scores.log_odds
    value = torch.where(scores.scored if fallback else passing, value, torch.inf)
    layer, position = divmod(int(value.argmin()), value.shape[1])
    return Choice(layer, position, fallback)


def least_kl(scores: Scores, at_most: float = 0.0) -> Choice | None:
    """The candidate that leaves harmless prompts alone best among those whose ablation takes the mean refusal log-odds
    of harmful prompts to `at_most` or below; None if there is none.

    The source's rule goes on to lower log-odds that were low enough, at any damage below its limit, and without a
    candidate below the limit at any damage at all. Raises `ValueError` if nothing was scored.
    """
    if not bool(scores.scored.any()):
        raise ValueError("No candidate was scored, so none can be chosen.")
    enough = scores.log_odds <= at_most
    if not bool(enough.any()):
        return None
    value = torch.where(enough, scores.kl, torch.inf)
    return Choice(*divmod(int(value.argmin()), value.shape[1]), fallback=False)


@dataclass(frozen=True)
class Candidate:
    """A row of the table of candidates: one place, and what its direction does."""

    layer: int
    position: int
    log_odds: float
    """Of harmful prompts, with it ablated."""
    kl: float
    """On harmless prompts, with it ablated, in nats."""
    induce: float
    """Log-odds of harmless prompts, with it added."""


def candidate_table(scores: Scores, layers: Sequence[int], positions: Sequence[int]) -> list[Candidate]:
    """The candidates that were scored, block after block. Raises `ValueError` where the scores are of other places."""
    if scores.log_odds.shape != (len(layers), len(positions)):
        raise ValueError(
            f"The scores are of {tuple(scores.log_odds.shape)} blocks and positions, and {len(layers)} blocks and "
            f"{len(positions)} positions were named."
        )
    return [
        Candidate(layer, p, *(float(values[i, j]) for values in (scores.log_odds, scores.kl, scores.induce)))
        for i, layer in enumerate(layers)
        for j, p in enumerate(positions)
        if bool(scores.scored[i, j])
    ]


class _Scorer:
    """Exact scores of candidates in the model with `ablated` projected out, on more prompts from round to round.

    Each of `rounds` is the least number of prompts of a kind and the share of them that it reads, in an order drawn
    once. No candidate reads a prompt twice.
    """

    def __init__(
        self,
        model: Model,
        candidates: Float[Tensor, "layer position d_model"],
        harmful: Sequence[Example],
        harmless: Sequence[Example],
        *,
        refusal_ids: Sequence[int],
        layers: Sequence[int],
        ablated: Float[Tensor, "k d_model"] | None = None,
        centres: Float[Tensor, "position block site d_model"] | None = None,
        rounds: Sequence[tuple[int, float]] = ((1, 1.0),),
        batch_size: int = 64,
    ) -> None:
        if not harmful or not harmless:
            raise ValueError(NO_PROMPTS)
        if centres is not None and ablated is not None and len(ablated):
            raise ValueError("Affine ablation is scored one direction at a time: leave out `ablated` or `centres`.")
        self.model, self.refusal_ids, self.batch_size, self.centres = model, refusal_ids, batch_size, centres
        self.harmful, self.harmless = _shuffled(harmful), _shuffled(harmless)
        self.shape = candidates.shape[:2]
        self.raw = candidates.float().cpu().flatten(0, 1)
        self.layers = torch.tensor(layers).repeat_interleave(candidates.shape[1])
        self.ablated = torch.zeros(0, model.width) if ablated is None else ablated.float().cpu()
        self.ends = [(_count(self.harmful, *this), _count(self.harmless, *this)) for this in rounds]
        reads = PromptSet.of(model, self.harmless, batch_size=batch_size)
        self.before = reads.last_logits(model, ablating(self.ablated))
        nothing = torch.full((len(self.raw), len(harmful) + 2 * len(harmless)), float("nan"), dtype=torch.float64)
        self.log_odds, self.kl, self.induce = nothing.split([len(harmful), len(harmless), len(harmless)], 1)
        self.read_ablated, self.read_added = ([0] * len(self.raw) for _ in range(2))

    def scores(self, which: Sequence[int], rounds: int = 1, up_to: float = inf) -> Scores:
        """Means over the prompts of the first `rounds` rounds, for these candidates by their number.

        `induce` stays NaN where the KL exceeds `up_to`, since it decides nothing there.
        """
        which = list(which)
        self._catch_up(self._ablate, self.read_ablated, which, rounds)
        harmful, harmless = self.ends[rounds - 1]
        kl = self.kl[:, :harmless].mean(1)
        below_kl_limit = [c for c in which if kl[c] <= up_to]
        self._catch_up(self._add, self.read_added, below_kl_limit, rounds)
        rows = torch.full((3, len(self.raw)), float("nan"), dtype=torch.float64)
        rows[:2, which] = torch.stack([self.log_odds[:, :harmful].mean(1), kl])[:, which]
        rows[2, below_kl_limit] = self.induce[below_kl_limit, :harmless].mean(1)
        return Scores(*rows.view(3, *self.shape))

    def _catch_up(
        self, read: Callable[[Sequence[int], slice, slice], None], done: list[int], which: Sequence[int], rounds: int
    ) -> None:
        """Let candidates read what they have not yet of the first `rounds` rounds' prompts, many in a pass."""
        for part, (begin, end) in enumerate(pairwise([(0, 0), *self.ends[:rounds]])):
            harmful, harmless = (slice(*bounds) for bounds in zip(begin, end, strict=True))
            todo = [c for c in which if done[c] == part]
            rows = len(self.harmful[harmful]) + len(self.harmless[harmless])
            for some in chunks(todo, max(1, ROWS_AT_ONCE // rows)) if rows else ():
                read(some, harmful, harmless)
            for c in todo:
                done[c] = part + 1

    @torch.no_grad()
    def _ablate(self, which: Sequence[int], harmful: slice, harmless: slice) -> None:
        """Log-odds and KL with each direction projected out as well; all are read in one pass."""
        prompts = [*self.harmful[harmful], *self.harmless[harmless]]
        reads = PromptSet.of(self.model, prompts, batch_size=self.batch_size, copies=len(which))
        bases = tuple(torch.cat([self.ablated, unit(self.raw[c])[None]]) for c in which)
        at = None if self.centres is None else tuple(self.centres[c % len(self.centres)] for c in which)
        each = AblateRows(bases, tuple(copy for copy in range(len(which)) for _ in prompts), centres=at)
        for c, logits in zip(which, reads.last_logits(self.model, (each,)).split(len(prompts)), strict=True):
            of_harmful, of_harmless = logits.tensor_split([len(self.harmful[harmful])])
            self.log_odds[c, harmful] = refusal_log_odds(of_harmful, self.refusal_ids)
            kl = kl_divergence(self.before[harmless], of_harmless)
            self.kl[c, harmless] = kl.cpu().double()

    @torch.no_grad()
    def _add(self, which: Sequence[int], harmful: slice, harmless: slice) -> None:
        """Log-odds of refusing harmless prompts with each difference added after its layer."""
        prompts = self.harmless[harmless]
        if not prompts:
            return
        reads = PromptSet.of(self.model, prompts, batch_size=self.batch_size, copies=len(which))
        raw, at = self.raw[list(which)], self.layers[list(which)]
        each = torch.arange(len(which)).repeat_interleave(len(prompts))
        steers = [SteerRows(layer, (raw * (at == layer)[:, None])[each]) for layer in at.unique().tolist()]
        logits = reads.last_logits(self.model, (*ablating(self.ablated), *steers))
        odds = refusal_log_odds(logits, self.refusal_ids)
        self.induce[list(which), harmless] = odds.view(len(which), len(prompts))


def _shuffled(prompts: Sequence[Example]) -> list[Example]:
    """In an order that is always the same, so that a share is of all kinds of prompts."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    return [prompts[i] for i in order.tolist()]


def _count(prompts: Sequence[Example], least: int, share: float) -> int:
    return min(len(prompts), max(least, round(share * len(prompts))))


ROWS_AT_ONCE = 256
"""Prompts, counted once a candidate, that are read in one go: what the logits of all take is memory."""


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[k : k + size] for k in range(0, len(items), size)]


def score_exhaustively(
    model: Model,
    candidates: Float[Tensor, "layer position d_model"],
    harmful: Sequence[Example],
    harmless: Sequence[Example],
    *,
    refusal_ids: Sequence[int],
    layers: Sequence[int],
    ablated: Float[Tensor, "k d_model"] | None = None,
    centres: Float[Tensor, "position block site d_model"] | None = None,
    batch_size: int = 64,
) -> Scores:
    """Every candidate's scores, each from all prompts. `layers[i]` is the block whose output `candidates[i]` is from.

    With `centres` (`site_means` of the same positions) ablation is affine: towards the mean of harmless prompts at the
    candidate's position. Raises `ValueError` if there are no prompts of a kind or no refusal tokens, and for `centres`
    beside directions that are ablated already.
    """
    scorer = _Scorer(
        model,
        candidates,
        harmful,
        harmless,
        refusal_ids=refusal_ids,
        layers=layers,
        ablated=ablated,
        centres=centres,
        batch_size=batch_size,
    )
    return scorer.scores(range(len(scorer.raw)))


@dataclass(frozen=True)
class SuccessiveHalving:
    """Score all candidates on a few prompts of a kind, the best of them on more, and the best of these on all."""

    keep: tuple[int, ...] = (36, 12)
    """Candidates left after each round but the last."""
    prompts: tuple[tuple[int, float], ...] = ((2, 1 / 16), (6, 3 / 16), (1, 1.0))
    """The prompts of a kind that each round reads: at least so many, or this share of them. Chosen on exhaustive scores
    of two of chapter 4's models, over five steps of the attack, and checked on two others."""


def score_by_halving(
    model: Model,
    candidates: Float[Tensor, "layer position d_model"],
    harmful: Sequence[Example],
    harmless: Sequence[Example],
    *,
    refusal_ids: Sequence[int],
    layers: Sequence[int],
    ablated: Float[Tensor, "k d_model"] | None = None,
    centres: Float[Tensor, "position block site d_model"] | None = None,
    halving: SuccessiveHalving | None = None,
    kl_limit: float = KL_LIMIT,
    batch_size: int = 64,
) -> Scores:
    """Scores of the most promising candidates only, those of `score_exhaustively` but for rounding; NaN for the others.

    Successive halving (Jamieson and Talwalkar 2016) with exact scores: each round reads more prompts for fewer
    candidates. A few prompts may mislead it, so the best of all need not be left. `induce` is not looked at in the
    first round, and is NaN where the KL exceeds the limit. Raises as `score_exhaustively`.
    """
    halving = halving or SuccessiveHalving()
    scorer = _Scorer(
        model,
        candidates,
        harmful,
        harmless,
        refusal_ids=refusal_ids,
        layers=layers,
        ablated=ablated,
        centres=centres,
        rounds=halving.prompts,
        batch_size=batch_size,
    )
    left = list(range(len(scorer.raw)))
    for rounds, keep in enumerate(halving.keep, 1):
        up_to = -inf if rounds == 1 else kl_limit
        if len(left) > keep:
            left = ranking(scorer.scores(left, rounds, up_to), kl_limit)[:keep]
    return scorer.scores(left, len(halving.prompts), kl_limit)


def spread(prompts: Sequence[Example], count: int | None) -> list[Example]:
    """So many of the prompts, spread evenly over them; all for None."""
    count = len(prompts) if count is None else min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def ranking(scores: Scores, kl_limit: float = KL_LIMIT) -> list[int]:
    """Scored candidates by their number, row after row of the table, the most promising first.

    Two orders take turns: that of `choose`, where what was not measured may pass, and the plain one of log-odds + kl,
    since a rough score may be on the wrong side of a limit.
    """
    odds, sums = scores.log_odds.flatten(), (scores.log_odds + scores.kl).flatten()
    may_pass = ((scores.kl <= kl_limit) & ~(scores.induce < 0)).flatten()
    numbers = scores.scored.flatten().nonzero()[:, 0].tolist()
    by_sum = sorted(numbers, key=lambda n: float(sums[n]))
    by_rule = sorted(by_sum, key=lambda n: (not may_pass[n], float(odds[n]) if may_pass[n] else 0.0))
    return list(dict.fromkeys(number for turn in zip(by_rule, by_sum, strict=True) for number in turn))
