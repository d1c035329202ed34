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
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.chat import Example, batches
from helpers.gradients import Loss, directional_derivatives
from helpers.losses import response_logits, sequence_sums
from helpers.models import Model, plain_name

Scores = Float[np.ndarray, " point"]

# The safety score


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
        parameters = {plain_name(name): p for name, p in model.hf.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError("No weight is trainable, so the safety score has no gradient: load the model unfrozen.")
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for _, values in self._batched(model, batch_size):
            grads = torch.autograd.grad(values.sum() / len(self.probes), list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] += grad
        return total

    def _batched(self, model: Model, batch_size: int) -> Any:
        asked = [replace(e, ids=(*e.ids[: e.prompt_length], self.safe)) for e in self.probes]
        for batch in batches(asked, batch_size, model.tokenizer.pad_token_id):
            logits = response_logits(model, batch, share_prefix=True)
            yield batch.rows, logits[:, self.unsafe] - logits[:, self.safe]


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
    return -directional_derivatives(model, examples, safety_gradient, loss=loss, batch_size=batch_size)


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
    from scipy.optimize import brentq
    from sklearn.mixture import GaussianMixture

    x = np.asarray(scores, dtype=np.float64)
    if x.size < 4 or not np.isfinite(x).all() or np.ptp(x) == 0:
        raise ValueError("A threshold needs at least four finite scores that differ.")
    centre, scale = x.mean(), x.std()
    z = ((x - centre) / scale)[:, None]  # the mixture's regularisation is absolute
    mixture = GaussianMixture(2, n_init=5, random_state=seed).fit(z)
    log_ratio = float(x.size * (mixture.score(z) - GaussianMixture(1).fit(z).score(z)))
    if log_ratio <= required:
        return Guess(float(centre + 2 * scale), log_ratio, (float(centre),), (float(scale),), (1.0,), None)
    low, high = order = np.argsort(mixture.means_[:, 0])
    means, spreads = mixture.means_[order, 0], np.sqrt(mixture.covariances_[order, 0, 0])
    labels = mixture.predict(z)
    hard = min(z[labels == which].max(initial=-np.inf) for which in (low, high))

    def lead(at: float) -> float:
        return float(np.subtract(*mixture.predict_proba([[at]])[0, [high, low]]))

    between = tuple(means)
    cut = brentq(lead, *between) if lead(between[0]) < 0 < lead(between[1]) else hard
    return Guess(
        threshold=float(centre + scale * cut),
        log_ratio=log_ratio,
        means=tuple(centre + scale * means),
        spreads=tuple(scale * spreads),
        weights=tuple(mixture.weights_[order]),
        hard=float(centre + scale * hard),
    )


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
    low, high = float(np.min(scores)), float(np.max(scores)) + 1e-12
    trials: list[Trial] = []
    threshold = guess
    for _ in range(steps):
        kept = scores < threshold
        if not kept.any():
            break
        harm, utility = evaluate(kept)
        safe, useful = harm <= harm_limit, utility >= utility_limit
        trials.append(Trial(threshold, int(kept.sum()), harm, utility, safe, useful))
        if safe and useful:
            break
        low, high = (threshold, high) if safe else (low, threshold)
        threshold = (low + high) / 2
    safe_ones = [t for t in trials if t.safe]
    return Search(tuple(trials), max(safe_ones, key=lambda t: (t.useful, t.utility), default=None))


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
