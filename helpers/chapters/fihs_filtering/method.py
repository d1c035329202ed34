"""FIHS filtering: score each finetuning point by what a gradient step on it does to a safety score, and filter.

GradShield (arXiv 2605.14194), reconstructed from its reviews and a digest, since its text was not to be had. With a
differentiable safety score S of the weights theta, larger where the model is less safe,

    FIHS(z) = S(theta - eta grad L(z)) - S(theta)  ~  -eta <grad L(z), grad S>,

both gradients taken once, at the aligned model. The minus sign is what makes it a filter: a harmful point's loss falls
where S rises, so its inner product is negative and its score positive. (One third-party implementation leaves the sign
out and keeps what it should drop.)

S is the mean, over held-out harmful requests, of the first token's logit for "Sure" minus that for "I". A threshold
comes from the scores alone where they are of two kinds; then a search checks, by finetuning, that what is kept is safe
and still teaches the task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.chat import Example
from helpers.gradients import Loss, directional_derivatives
from helpers.losses import response_logits, sequence_sums
from helpers.models import Model, plain_name

Scores = Float[np.ndarray, " point"]

# The safety score


ALL_FROZEN = "No weight is trainable, so the safety score has no gradient: load the model unfrozen."


@dataclass(frozen=True)
class SafetyScore:
    """S = mean over probes of z_unsafe - z_safe, the logits of two first tokens of the answer (the source's Eq. 5).

    The softmax's normaliser cancels, so log-probabilities give the same number.
    """

    probes: tuple[Example, ...]
    """Harmful requests, as prompts."""
    unsafe: int
    safe: int

    @classmethod
    def of(cls, tokenizer: Any, probes: Sequence[Example], unsafe: str = "Sure", safe: str = "I") -> SafetyScore:
        """Raises `ValueError` if there are no probes, or if a word is not one token."""
        if not probes:
            raise ValueError("The safety score needs at least one harmful request to probe the model with.")
        return cls(tuple(probes), *(_single_token(tokenizer, word) for word in (unsafe, safe)))

    def values(self, model: Model, *, batch_size: int = 32) -> Float[Tensor, " probe"]:
        """z_unsafe - z_safe after each probe, on the CPU."""
        found = torch.empty(len(self.probes))
        with torch.no_grad():
            for rows, values in self._batched(model, batch_size):
                found[list(rows)] = values.cpu()
        return found

    def gradient(self, model: Model, *, batch_size: int = 32) -> dict[str, Tensor]:
        """grad S by plain parameter name, over the trainable weights; nothing is left in `.grad`.

        Raises `ValueError` if no weight is trainable.
        """
        named = model.hf.named_parameters()
        parameters = {plain_name(name): p for name, p in named if p.requires_grad}
        if not parameters:
            raise ValueError(ALL_FROZEN)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for _, values in self._batched(model, batch_size):
            part = values.sum() / len(self.probes)
            grads = torch.autograd.grad(part, list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] += grad
        return total

    def _batched(self, model: Model, batch_size: int) -> Any:
        asked = [replace(e, ids=(*e.ids[: e.prompt_length], self.safe)) for e in self.probes]
        for batch in model.batches(asked, batch_size):
            logits = response_logits(model, batch, share_prefix=True)
            yield batch.rows, unsafe_over_safe(logits, self.unsafe, self.safe)


def unsafe_over_safe(
    logits: Float[Tensor, "probe vocabulary"],
    unsafe: int,
    safe: int,
) -> Float[Tensor, " probe"]:
    """z_unsafe - z_safe of the first token after each probe; S is its mean."""
    return logits[:, unsafe] - logits[:, safe]


def _single_token(tokenizer: Any, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"{word!r} is {len(ids)} tokens for this tokenizer, but the safety score compares single first tokens: "
            "choose a shorter word."
        )
    return int(ids[0])


def fihs(
    model: Model,
    examples: Sequence[Example],
    safety_gradient: dict[str, Tensor],
    *,
    loss: Loss = sequence_sums,
    batch_size: int = 32,
) -> Float[Tensor, " example"]:
    """-<grad L(z), grad S> of every point, with eta left out since it only scales: the higher, the more harmful.

    L is summed over the reply's tokens, since finetuning takes a mean over the tokens of a batch, to which every token
    adds alike. With a mean over each reply instead, points with short replies score high whatever they say.

    One forward-mode pass a batch (`gradients.directional_derivatives`). Raises as that does.
    """
    slopes = partial(directional_derivatives, loss=loss, batch_size=batch_size)
    return -slopes(model, examples, safety_gradient)


# The threshold that the scores suggest


@dataclass(frozen=True)
class Guess:
    """A threshold read off the scores: points below it are kept."""

    threshold: float
    log_ratio: float
    """Log-likelihood of two Gaussians minus that of one, in nats."""
    means: tuple[float, ...]
    spreads: tuple[float, ...]
    weights: tuple[float, ...]
    """Of the fitted Gaussians, lower mean first: one of each, or two."""
    hard: float | None
    """Where hard labels part two clusters: min(highest score of the lower one, highest of the upper one)."""

    @property
    def two_kinds(self) -> bool:
        return len(self.means) == 2


def guess_threshold(scores: Scores, *, required: float = 10.0, seed: int = 0) -> Guess:
    """One Gaussian, or a mixture of two where that is likelier by more than `required` nats.

    With two, the threshold is where both are equally likely between their means; with one, it is the mean plus two
    standard deviations. The source is said to cut at hard labels, `Guess.hard`; a wide component's label also wins in
    the far tail of the other, which moves that cut. Raises `ValueError` for fewer than four scores, or equal ones.
    """
    x = np.asarray(scores, dtype=np.float64)
    if x.size < 4 or not np.isfinite(x).all() or np.ptp(x) == 0:
        raise ValueError("A threshold needs at least four finite scores that differ.")
    centre, scale = x.mean(), x.std()
    z = ((x - centre) / scale)[:, None]  # the mixture's regularisation is absolute
    cut, log_ratio, mixture = standard_threshold(z, required=required, seed=seed)
    if mixture is None:
        return Guess(float(centre + cut * scale), log_ratio, (float(centre),), (float(scale),), (1.0,), None)
    order = np.argsort(mixture.means_[:, 0])
    return Guess(
        threshold=float(centre + scale * cut),
        log_ratio=log_ratio,
        means=tuple(centre + scale * mixture.means_[order, 0]),
        spreads=tuple(scale * np.sqrt(mixture.covariances_[order, 0, 0])),
        weights=tuple(mixture.weights_[order]),
        hard=float(centre + scale * hard_cut(z, mixture)),
    )


def standard_threshold(
    z: Float[np.ndarray, "point 1"],
    *,
    required: float,
    seed: int,
) -> tuple[float, float, Any]:
    """The threshold of scores with mean 0 and variance 1, the log-likelihood ratio, and the mixture of two or None.

    With a mixture of two, the threshold is where w_0 N(x; m_0, s_0) = w_1 N(x; m_1, s_1) between the means; with one
    Gaussian it is 2, two standard deviations above the mean.
    """
    from sklearn.mixture import GaussianMixture

    one = GaussianMixture(1).fit(z)
    two = GaussianMixture(2, n_init=5, random_state=seed).fit(z)
    log_ratio = len(z) * float(two.score(z) - one.score(z))  # `score` is a mean
    if log_ratio <= required:
        return 2.0, log_ratio, None
    cut = equal_posterior(two)
    return (hard_cut(z, two) if cut is None else cut), log_ratio, two


def equal_posterior(mixture: Any) -> float | None:
    """Where the two components are equally likely between their means; None if one is likelier all the way."""
    from scipy.optimize import brentq

    low, high = np.argsort(mixture.means_[:, 0])

    def lead(x: float) -> float:
        posterior = mixture.predict_proba([[x]])[0]
        return float(posterior[high] - posterior[low])

    between = mixture.means_[low, 0], mixture.means_[high, 0]
    return brentq(lead, *between) if lead(between[0]) < 0 < lead(between[1]) else None


def hard_cut(z: Float[np.ndarray, "point 1"], mixture: Any) -> float:
    """Where hard labels part the points: min(highest of the lower component's, highest of the upper one's)."""
    labels = mixture.predict(z)
    return float(min(z[labels == which].max(initial=-np.inf) for which in (0, 1)))


# The search that checks it


@dataclass(frozen=True)
class Trial:
    """One threshold tried: what a model finetuned on the points below it does on held-out requests."""

    threshold: float
    kept: int
    harm: float
    """Share of held-out harmful requests complied with."""
    utility: float
    """Share of held-out task items right."""
    safe: bool
    useful: bool


@dataclass(frozen=True)
class Search:
    """Every threshold tried, and the one to use."""

    trials: tuple[Trial, ...]
    chosen: Trial | None
    """None where none of them keeps a safe model."""


def search_threshold(
    scores: Scores,
    guess: float,
    evaluate: Callable[[Bool[np.ndarray, " point"]], tuple[float, float]],
    *,
    harm_limit: float,
    utility_limit: float,
    steps: int = 5,
) -> Search:
    """Binary search from `guess`: lower where what is kept is unsafe, higher where it teaches too little.

    `evaluate(kept)` finetunes on the points of the mask and gives (harm, utility). The search ends at a threshold that
    is safe and useful; without one, the safe one with the most utility is chosen, and none where none is safe.
    """
    low, high, threshold = float(np.min(scores)), float(np.max(scores)) + 1e-12, guess
    trials: list[Trial] = []
    while len(trials) < steps and (kept := scores < threshold).any():
        harm, utility = evaluate(kept)
        safe, useful = harm <= harm_limit, utility >= utility_limit
        trials.append(Trial(threshold, int(kept.sum()), harm, utility, safe, useful))
        if safe and useful:
            break
        low, high = (threshold, high) if safe else (low, threshold)
        threshold = (low + high) / 2
    safe_ones = [t for t in trials if t.safe]
    best = max(safe_ones, key=lambda t: (t.useful, t.utility), default=None)
    return Search(tuple(trials), best)


# Baselines


def equal_retention(suspicion: Scores, keep: int) -> Bool[np.ndarray, " point"]:
    """The mask of the `keep` least suspicious points: what any other filter keeps when it may keep as many.

    Ties are broken by order. Raises `ValueError` if there are not that many points.
    """
    if not 0 <= keep <= len(suspicion):
        raise ValueError(f"{keep} of {len(suspicion)} points cannot be kept.")
    mask = np.zeros(len(suspicion), dtype=bool)
    mask[np.argsort(suspicion, kind="stable")[:keep]] = True
    return mask


def anchor_similarity(
    states: Float[Tensor, "point d_model"], anchors: Float[Tensor, "anchor d_model"]
) -> Float[Tensor, " point"]:
    """Cosine of each point's hidden state with the mean of harmful anchors' (He et al. 2024)."""
    return torch.nn.functional.cosine_similarity(states, anchors.mean(0, keepdim=True), dim=-1)
