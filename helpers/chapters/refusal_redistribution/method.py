"""Refusal redistribution: train the refusal signal to spread, so that removing a few directions does not remove it.

Mody, Vogelstein and Merchan (code: deepanshumody/increasing-refusal-intervention-robustness). An aligned model is
finetuned with

    L = L_LM + lambda L_match + kd L_KD,

where L_match pulls together the pooled hidden states of harmful and of harmless prompts at every block's output (their
means, or their covariances), and L_KD holds the next-token distribution after the prompt to that of the frozen start
model, so that it goes on refusing.

As published, a covariance is matched within micro-batches of two, which never hold two prompts of either kind: that
loss is 0 throughout. `Redistribution(as_published=True)` shows what this does; otherwise a class that is missing is
an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helpers.chat import Batch
from helpers.forward import unembed
from helpers.interventions import Hook, resid_post
from helpers.losses import kl_divergence, response_logits
from helpers.models import Model

Norm = Literal["L1", "L2"]
Match = Literal["none", "mean", "covariance", "mean and covariance"]


# Matching two classes


def mean_matching(
    z: Float[Tensor, "layer batch d_model"],
    harmful: Bool[Tensor, " batch"],
    norm: Norm = "L2",
    *,
    unbiased: bool = False,
    as_published: bool = False,
) -> Float[Tensor, " layer"]:
    """`mean_loss` of a batch's two classes, or `mean_gap` if `unbiased`.

    Raises `ValueError` if a class is missing, or `unbiased` has one prompt; `as_published` gives 0 there.
    """
    z = _precise(z)
    if not _enough(harmful, 1 + unbiased, "mean", as_published):
        return z.new_zeros(len(z))
    one, other = z[:, harmful], z[:, ~harmful]
    return mean_gap(one, other) if unbiased else mean_loss(one, other, norm)


def mean_loss(
    z_1: Float[Tensor, "layer harmful d_model"],
    z_0: Float[Tensor, "layer harmless d_model"],
    norm: Norm = "L2",
) -> Float[Tensor, " layer"]:
    """mean_d |mu_1 - mu_0| (L1) or mean_d (mu_1 - mu_0)^2 (L2) of every layer.

    The published code takes means over d, where its text writes sums.
    """
    gap = z_1.mean(1) - z_0.mean(1)  # mu_1 - mu_0: (layer, d_model)
    return gap.abs().mean(-1) if norm == "L1" else gap.square().mean(-1)


def mean_gap(
    z_1: Float[Tensor, "layer harmful d_model"],
    z_0: Float[Tensor, "layer harmless d_model"],
) -> Float[Tensor, " layer"]:
    """<g_a, g_b>, with g = mu_1 - mu_0 of each half of a batch, in units of the variance.

    Halves are independent, so that <g_a, g_b> is ||mu_1 - mu_0||^2 of the distributions on average, where the square of
    one difference adds what two samples differ by. The variance, of all prompts together, keeps training from winning
    by scale: the product of two noisy gaps may be negative, and of larger states it is more so.
    """
    first, second = (z_1[:, half::2].mean(1) - z_0[:, half::2].mean(1) for half in (0, 1))
    variance = torch.cat([z_1, z_0], 1).var(1).sum(-1)
    return (first * second).sum(-1) / variance


def covariance_matching(
    z: Float[Tensor, "layer batch d_model"],
    harmful: Bool[Tensor, " batch"],
    norm: Norm = "L2",
    *,
    unbiased: bool = False,
    as_published: bool = False,
) -> Float[Tensor, " layer"]:
    """`covariance_loss` of a batch's two classes, or `covariance_gap` if `unbiased`.

    Raises `ValueError` with fewer than two of a class, or four if `unbiased`; `as_published` gives 0 there.
    """
    z = _precise(z)
    if not _enough(harmful, 4 if unbiased else 2, "covariance", as_published):
        return z.new_zeros(len(z))
    one, other = z[:, harmful], z[:, ~harmful]
    return covariance_gap(one, other) if unbiased else covariance_loss(one, other, norm)


def covariance_loss(
    z_1: Float[Tensor, "layer harmful d_model"],
    z_0: Float[Tensor, "layer harmless d_model"],
    norm: Norm = "L2",
) -> Float[Tensor, " layer"]:
    """mean |S_1 - S_0| (L1) or ||S_1 - S_0||_F^2 / d_model^2 (L2) of every layer, with unbiased covariances S.

    L2 needs no covariance where the batch is smaller than d_model. With the centred rows of both classes stacked in A,
    each divided by sqrt(n_c - 1), and s = +1 or -1 by class, S_1 - S_0 = A^T diag(s) A and

        ||S_1 - S_0||_F^2 = ||S_1||^2 + ||S_0||^2 - 2 <S_1, S_0> = sum_ij s_i s_j (A A^T)_ij^2.
    """
    a, s = stacked(z_1, z_0)
    d = a.shape[2]
    if norm == "L2" and a.shape[1] < d:  # fewer prompts than dimensions: no S is needed
        gram = a @ a.mT  # (layer, batch, batch)
        return torch.einsum("lij,i,j->l", gram.square(), s, s) / d**2
    difference = (a * s[:, None]).mT @ a  # S_1 - S_0: (layer, d_model, d_model)
    each = difference.abs() if norm == "L1" else difference.square()
    return each.mean((1, 2))


def covariance_gap(
    z_1: Float[Tensor, "layer harmful d_model"],
    z_0: Float[Tensor, "layer harmless d_model"],
) -> Float[Tensor, " layer"]:
    """<D_a, D_b>_F, with D = S_1 - S_0 of each half of a batch, as a share of <S_1a, S_1b>_F + <S_0a, S_0b>_F.

    As in `mean_gap` products of independent halves have no bias: they are ||S_1 - S_0||_F^2 and ||S_1||_F^2 +
    ||S_0||_F^2 of the distributions on average. With A, s and B, t of the halves, <D_a, D_b>_F = sum_ij s_i t_j (A
    B^T)_ij^2, and without signs the sum is that of same and different classes: 2 <S_1a, S_1b>_F + ... - <D_a, D_b>_F.
    """
    (a, s), (b, t) = (stacked(z_1[:, half::2], z_0[:, half::2]) for half in (0, 1))
    products = (a @ b.mT).square()  # (layer, first half, second half)
    gap = torch.einsum("lij,i,j->l", products, s, t)  # same classes minus different ones
    return 2 * gap / (gap + products.sum((1, 2)))


def stacked(
    z_1: Float[Tensor, "layer harmful d_model"],
    z_0: Float[Tensor, "layer harmless d_model"],
) -> tuple[Float[Tensor, "layer batch d_model"], Float[Tensor, " batch"]]:
    """A, the centred rows of both classes, each divided by sqrt(n_c - 1), so that S_c = A_c^T A_c; and s, the signs."""
    rows = [(z - z.mean(1, keepdim=True)) / (z.shape[1] - 1) ** 0.5 for z in (z_1, z_0)]
    return torch.cat(rows, 1), torch.cat([z_1.new_ones(z_1.shape[1]), -z_1.new_ones(z_0.shape[1])])


def _precise(z: Tensor) -> Tensor:
    """At least float32: means and covariances of bfloat16 states would be mostly rounding."""
    return z if z.dtype == torch.float64 else z.float()


def _enough(harmful: Bool[Tensor, " batch"], least: int, what: str, as_published: bool) -> bool:
    counts = int(harmful.sum()), int((~harmful).sum())
    if min(counts) >= least:
        return True
    if as_published:
        return False
    raise ValueError(
        f"Matching a {what} needs at least {least} harmful and {least} harmless prompt{'s' * (least > 1)} in a batch, "
        f"and this one has {counts[0]} and {counts[1]}: use class-balanced batches."
    )


# Pooling hidden states


@dataclass(frozen=True)
class PoolShares:
    """How often each pool is drawn; the shares add up to one.

    By default a third each of the last token, a random half and the template: what the published commands come to,
    though they ask for the template alone. Raises `ValueError` for shares that are negative or do not add up to one.
    """

    last: float = 1 / 3
    random: float = 1 / 3
    template: float = 1 / 3
    mean: float = 0.0

    def __post_init__(self) -> None:
        if min(self.each) < 0 or abs(sum(self.each) - 1) > 1e-6:
            raise ValueError(f"The shares of the pools {self.each} must not be negative and must add up to one.")

    @property
    def each(self) -> tuple[float, float, float, float]:
        return self.last, self.random, self.template, self.mean


def draw_pools(
    shares: PoolShares, count: int, generator: torch.Generator, *, one: bool = False
) -> Int[Tensor, " batch"]:
    """For each of so many prompts the number of its pool, in the order of `PoolShares`; `one` for all of them if asked.

    With one pool a batch, what is compared is alike: else most of a covariance is that pools differ.
    """
    edges = torch.tensor(shares.each, dtype=torch.float64).cumsum(0)[:-1]
    draws = torch.rand(1 if one else count, generator=generator, dtype=torch.float64)
    return torch.bucketize(draws, edges, right=True).expand(count)


def pool_weights(
    batch: Batch, pools: Int[Tensor, " batch"], generator: torch.Generator, template_length: int = 5
) -> Float[Tensor, "batch pos"]:
    """The weight of every token in its prompt's pool, which `draw_pools` drew; each row adds up to one.

    `last` is the last token, `random` the mean over a random half of the tokens, `template` the mean over the last
    `template_length` tokens (the generation header), `mean` the mean over all of them. The tokens are those that carry
    a loss (`Batch.response`): what all prompts begin with does not count. It would be the same for both kinds, and its
    first token is an attention sink, whose state is many times as long as others. (In the source's code it counts.)

    `generator` is one of the CPU. Raises `ValueError` for a `template_length` below 1.
    """
    if template_length < 1:
        raise ValueError(f"The template's length is {template_length}; it must be at least 1 token.")
    read = batch.response.cpu()
    lengths = read.sum(1, keepdim=True)
    left = lengths - read.cumsum(1)  # tokens that follow
    # the Gumbel top-k of equal weights: the k largest of any independent draws
    keys = torch.rand(read.shape, generator=generator).masked_fill(~read, -1.0)
    rank = keys.argsort(1, descending=True).argsort(1)
    masks = torch.stack([left < 1, rank < (lengths + 1) // 2, left < template_length, torch.ones_like(read)])
    chosen = (masks[pools, torch.arange(len(read))] & read).float()
    return chosen / chosen.sum(1, keepdim=True)


def distillation(
    student: Float[Tensor, "batch vocabulary"],
    teacher: Float[Tensor, "batch vocabulary"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """T^2 KL(p_teacher || p_student) of logits at temperature T, in nats, mean over the batch."""
    p, q = (_precise(z) / temperature for z in (teacher, student))
    return temperature**2 * kl_divergence(p, q).mean()


# The extra loss of finetuning


@dataclass(frozen=True)
class KeepStream:
    """Keep every block's output in the graph, into `kept`: layer -> (batch, pos, d_model).

    Where a batch's common beginning is read apart (`losses.response_logits`), rows are put together again.
    """

    kept: dict[int, Float[Tensor, "batch pos d_model"]]

    def hooks(self, model: Model) -> list[Hook]:
        def keeper(layer: int) -> Any:
            def keep(h: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
                if model.current is not None and h.shape[1] < model.current.ids.shape[1]:  # what follows the beginning
                    h = torch.cat([self.kept[layer].expand(len(h), -1, -1), h], 1)
                self.kept[layer] = h

            keep.reads_parts = True  # type: ignore[attr-defined]
            return keep

        return [(resid_post(model, layer), keeper(layer)) for layer in range(model.layers)]


@dataclass(frozen=True)
class Redistribution:
    """Settings of the extra loss lambda L_match + kd L_KD; the defaults are the source's.

    `micro_batch`, if given, computes the matching within consecutive parts of that many prompts and averages over
    the parts. `as_published` takes parts of two, and 0 wherever a part lacks what it needs. Raises `ValueError`
    for a micro-batch below 1 or a temperature that is not positive.
    """

    match: Match = "covariance"
    norm: Norm = "L2"
    weight: float = 100.0
    kd_weight: float = 1.0
    temperature: float = 1.0
    shares: PoolShares = PoolShares()
    template_length: int = 5
    as_published: bool = False
    micro_batch: int | None = None
    relative: bool = False
    """Divide each layer's term by its value at the first batch that has the same pools, so that a weight means the same
    for any model, and no layer counts more for being wider."""
    unbiased: bool = False
    """Match gaps without the distance that sampling alone makes (`mean_gap`, `covariance_gap`), at any scale of states:
    they are not divided once more."""
    one_pool: bool = False
    """One kind of pool a batch, and not one a prompt."""

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"A micro-batch of {self.micro_batch} is too small; it needs at least 1 prompt.")
        if not self.temperature > 0:
            raise ValueError(f"The temperature is {self.temperature:g}; it must be positive.")

    def terms(
        self,
        z: Float[Tensor, "layer batch d_model"],
        harmful: Bool[Tensor, " batch"],
        *,
        unbiased: bool = False,
    ) -> Float[Tensor, "term layer"]:
        """What is matched, for every layer: means, covariances, or both."""
        losses: list[Any] = {
            "none": [],
            "mean": [mean_matching],
            "covariance": [covariance_matching],
            "mean and covariance": [mean_matching, covariance_matching],
        }[self.match]
        how: dict[str, Any] = {"norm": self.norm, "unbiased": unbiased}
        how["as_published"] = self.as_published
        size = self.micro_batch or (2 if self.as_published else len(harmful))
        parts = zip(z.split(size, dim=1), harmful.split(size), strict=True)
        found = [[loss(part, who, **how) for loss in losses] for part, who in parts]
        return torch.stack([torch.stack(each) for each in found]).mean(0)

    def weighted(
        self,
        terms: Float[Tensor, "term layer"],
        scales: Float[Tensor, "term layer"],
        divergence: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """lambda L_match + kd L_KD, where L_match is the mean over layers of each term as a multiple of its scale."""
        matching = (terms / scales).mean(1).sum()
        return self.weight * matching + self.kd_weight * divergence

    def extra_loss(self, harmful: Callable[[int], bool], *, teacher: Model | None, seed: int) -> RedistributionLoss:
        """The loss for `training.finetune`; `harmful` says of a row (`Batch.rows`) which kind it is.

        `teacher` is the frozen start model, and may be None without distillation. Pools are drawn with `seed`.
        Raises `ValueError` for distillation without a teacher.
        """
        if self.kd_weight and teacher is None:
            raise ValueError("Distillation needs a teacher: pass the frozen start model, or set kd_weight to 0.")
        return RedistributionLoss(self, harmful, teacher, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class RedistributionLoss:
    """lambda L_match + kd L_KD of the batch that the model has just read.

    Use: `finetune(model, batches, interventions=loss.interventions, extra_loss=loss, ...)`.
    """

    settings: Redistribution
    harmful: Callable[[int], bool]
    teacher: Model | None
    generator: torch.Generator
    kept: dict[int, Tensor] = field(default_factory=dict)
    scales: dict[int, Float[Tensor, "term layer"]] = field(default_factory=dict)
    """By kind of pool, what terms are divided by; -1 where prompts of a batch have several."""
    records: list[dict[str, float]] = field(default_factory=list)
    """The two terms at each call, without their weights: "matching" and "distillation" (nats)."""

    @property
    def interventions(self) -> tuple[KeepStream]:
        return (KeepStream(self.kept),)

    def __call__(self, model: Model, batch: Batch) -> Float[Tensor, ""]:
        """Raises `ValueError` if the model has not read the batch with `interventions` on, or lacks a class."""
        if len(self.kept) != model.layers:
            raise ValueError("No hidden states were kept: pass this loss's `interventions` to `finetune` as well.")
        settings, last = self.settings, self.kept[model.layers - 1]
        divergence = torch.zeros((), device=model.device)
        terms = scales = torch.ones(0, model.layers, device=model.device)
        if settings.match != "none":
            pools = draw_pools(settings.shares, len(batch.rows), self.generator, one=settings.one_pool)
            weights = pool_weights(batch, pools, self.generator, settings.template_length).to(_precise(last))
            # layer by layer, so that the streams are not copied into one tensor
            z = torch.stack([torch.einsum("bpd,bp->bd", _precise(self.kept[i]), weights) for i in range(model.layers)])
            harmful = torch.tensor([bool(self.harmful(row)) for row in batch.rows], device=z.device)
            terms = settings.terms(z, harmful, unbiased=settings.unbiased)
            scales = self._scales(int(pools[0]) if settings.one_pool else -1, z.detach(), harmful)
        if settings.kd_weight:
            assert self.teacher is not None
            ends = batch.attention.sum(1).to(last.device) - 1
            student = head(model, last[torch.arange(len(ends), device=last.device), ends])
            divergence = distillation(student, prompt_logits(self.teacher, batch), settings.temperature)
        self.kept.clear()  # the graph goes with the backward pass
        self.records.append({"matching": (terms / scales).mean(1).sum().item(), "distillation": divergence.item()})
        return settings.weighted(terms, scales, divergence)

    def _scales(
        self, pools: int, z: Float[Tensor, "layer batch d_model"], harmful: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "term layer"]:
        """The terms at the first batch with these pools; 1 where they are 0 or shares, or weights are not relative."""
        if pools not in self.scales:
            first = self.settings.terms(z, harmful)
            divided = self.settings.relative and not self.settings.unbiased
            self.scales[pools] = torch.where(first > 0, first, 1.0) if divided else torch.ones_like(first)
        return self.scales[pools]


def head(model: Model, hidden: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocabulary"]:
    """Logits of the last block's output: final norm, unembedding and, where the model has one, the cap."""
    with model.autocast():
        return unembed(model, model.bridge.ln_final(hidden))


@torch.no_grad()
def prompt_logits(model: Model, batch: Batch) -> Float[Tensor, "batch vocabulary"]:
    """Float32 next-token logits after prompts that are read to their ends."""
    after = batch.attention.sum(1, keepdim=True)
    ids, attention = (torch.nn.functional.pad(x, (0, 1)) for x in (batch.ids, batch.attention))
    answer = torch.zeros_like(attention).scatter(1, after, True)
    return response_logits(model, Batch(ids, attention, answer, batch.rows), share_prefix=True)
