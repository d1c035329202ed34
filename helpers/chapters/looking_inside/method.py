"""A residual stream whose truth is planted, and how often an instrument is right about it (chapter 0).

Every quantity that the book measures on a language model is here known in closed form, so that an instrument can be
held against it: a direction, its separation, a gradient's angle to it, a number of directions, an effect of given size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import norm
from torch import Tensor

from helpers.gradients import ActivationGradients
from helpers.statistics import Estimate, mean_estimate, share
from helpers.verdicts import Claim, Verdict, verdict


@dataclass(frozen=True)
class PlantedStream:
    """Activations with unit Gaussian noise; those of trait answers are moved by `gap` along one unit direction."""

    width: int = 64
    gap: float = 2.0
    """Distance of the two means, in standard deviations of the noise."""
    reader_cosine: float = 0.3
    """Cosine of the planted direction and of what the loss reads: its negative is the gradient's."""

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The planted direction, of unit length."""
        return self._axes()[0]

    @property
    def reader(self) -> Float[Tensor, " d_model"]:
        """What the loss reads, of unit length: the loss falls as the activation moves along it."""
        along, across = self._axes()
        return self.reader_cosine * along + (1 - self.reader_cosine**2) ** 0.5 * across

    def _axes(self) -> Float[Tensor, "2 d_model"]:
        random = torch.randn(self.width, 2, generator=torch.Generator().manual_seed(0))
        return torch.linalg.qr(random)[0].T

    def activations(self, count: int, *, shows_trait: bool, seed: int) -> Float[Tensor, "example d_model"]:
        """`count` activations of trait answers, or of others."""
        noise = torch.randn(count, self.width, generator=torch.Generator().manual_seed(seed))
        return noise + self.gap * self.direction if shows_trait else noise

    def gradients(self, count: int, positions: int, *, noise: float, seed: int) -> ActivationGradients:
        """Gradients of L = mean_t log(1 + exp(-(reader + noise_t) . h_t)) by autograd; every token counts.

        `noise` is the standard deviation of each component of what is added to the reader at every token.
        """
        random = torch.Generator().manual_seed(seed)
        shape = (count, positions, self.width)
        h = torch.randn(shape, generator=random).requires_grad_()
        readers = self.reader + noise * torch.randn(shape, generator=random)
        losses = torch.nn.functional.softplus(-(h * readers).sum(-1)).mean(1)
        (found,) = torch.autograd.grad(losses.sum(), h)
        return ActivationGradients({0: found}, torch.ones(shape[:2], dtype=torch.bool), losses.detach())

    @property
    def auroc(self) -> float:
        """Of the projection on the planted direction: P(trait > other) of two Gaussians `gap` apart."""
        return float(norm.cdf(self.gap / 2**0.5))

    @property
    def bayes_accuracy(self) -> float:
        """What the best possible classifier gets right."""
        return float(norm.cdf(self.gap / 2))

    def gradient_cosine(self, noise: float) -> float:
        """Mean cosine of gradient and direction; exact without noise, and up to a share of 1 / width with it."""
        return float(-self.reader_cosine / (1 + noise**2 * self.width) ** 0.5)

    def fitted_cosine(self, count: int) -> float:
        """Cosine of the direction with a difference of means over `count` answers of each kind, up to 1 / width."""
        return float(self.gap / (self.gap**2 + 2 * self.width / count) ** 0.5)


def planted_directions(count: int, rows: int, *, width: int = 64, seed: int = 0) -> Float[Tensor, "rows d_model"]:
    """Rows in the span of `count` orthogonal directions, with the same energy along each."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, count, generator=random))[0].T  # (count, width)
    return torch.randn(rows, count, generator=random) @ basis


def sampled_participation(count: int, rows: int) -> float:
    """The participation ratio that so many rows of `planted_directions` show on average, to first order."""
    return count * rows / (rows + count + 1)


def coverage(measure: Callable[[np.random.Generator], Estimate], truth: float, *, draws: int, seed: int) -> Estimate:
    """How often, over repeated draws of the data, the interval of `measure` holds the truth."""
    rng = np.random.default_rng(seed)
    found = [measure(rng) for _ in range(draws)]
    return share(sum(e.low <= truth <= e.high for e in found), draws)


@dataclass(frozen=True)
class Crossed:
    """Outcomes of the same questions under several training seeds: what varies, in standard deviations."""

    seeds: int
    of_seeds: float
    """Between seeds."""
    of_questions: float
    """Between questions."""
    left: float = 1.0
    """What neither a question nor a seed accounts for."""

    def draw(self, rng: np.random.Generator, questions: int, mean: float) -> Float[np.ndarray, "seed question"]:
        """One outcome for each seed and question, around `mean`."""
        of_seeds = self.of_seeds * rng.standard_normal((self.seeds, 1))
        of_questions = self.of_questions * rng.standard_normal((1, questions))
        return mean + of_seeds + of_questions + self.left * rng.standard_normal((self.seeds, questions))


CROSSED = {
    f"{seeds} seeds, {name}": Crossed(seeds, *spread)
    for seeds in (3, 5)
    for name, spread in {
        "seeds vary most": (1.0, 0.2),
        "questions vary most": (0.05, 1.0),
        "neither varies": (0.0, 0.0),
    }.items()
}
"""Trained arms whose truth is planted, by name."""


def verdict_shares(
    claim: Claim, effect: float, sample: Crossed, *, questions: int, draws: int, seed: int
) -> dict[Verdict, Estimate]:
    """How often each verdict comes out, where the outcomes of `sample` have a mean of `effect`."""
    rng = np.random.default_rng(seed)
    found: list[Verdict] = []
    for _ in range(draws):
        estimate = mean_estimate(sample.draw(rng, questions, effect))
        found.append(verdict(claim, estimate, preset="quick")[0])  # no preset's model is in this
    return {
        name: share(found.count(name), draws) for name in get_args(Verdict) if name not in ("invalid", "not judged")
    }
