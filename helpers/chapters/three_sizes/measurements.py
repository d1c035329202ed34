"""What is measured of each model, what the claims on all of them are judged by, and what size changes (chapter 8).

Everything is an estimate of one model, from its own slopes, gradients, margins, states and answers. A claim on several
models is decided by the weakest of them: where it holds there, it holds in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float

from helpers.chapters.three_sizes.method import at_equal_kl, common_level, difference
from helpers.chapters.three_sizes.params import family
from helpers.chapters.three_sizes.readings import Curves, Gradients, Margins, Means, Readings, States
from helpers.probes import linear_scores
from helpers.statistics import Estimate, auroc, auroc_difference, jackknife, mean_estimate, share
from helpers.studies.alignment import Behaviour
from helpers.studies.nulls import isotropic, rarely
from helpers.studies.turning import turning_estimate
from helpers.verdicts import Control, Measurement

KL_LIMIT = 0.1
"""Nats. Above it, an ablation changes what a model says to harmless requests (as in chapter 4)."""


@dataclass(frozen=True)
class Measure:
    """One number of each model."""

    label: str
    unit: str
    no_effect: float | None = None


MEASURES = {
    "a*": Measure("a*: where the pressure turns", "multiples of the vector", 0.0),
    "concentration": Measure("concentration, PPS minus IP", "share of the first component", 0.0),
    "prompts": Measure("eliciting prompts over placebos", "nats per token", 0.0),
    "fall": Measure("fall of refusal without a direction", "log-odds", 0.0),
    "log-odds": Measure("refusal left without it", "log-odds", 0.0),
    "KL": Measure("harmless requests without it", "KL, nats", 0.0),
    "probe": Measure("probe, harmful against paired", "AUROC", 0.5),
    "beyond length": Measure("probe beyond length", "difference of AUROC", 0.0),
    "prompt tokens": Measure("prompt tokens over all, equal KL", "nats per token", 0.0),
}


@dataclass(frozen=True)
class Found:
    """The estimates of one model, and the controls of each claim."""

    estimates: Mapping[str, Estimate]
    """By the names of `MEASURES`."""
    controls: Mapping[str, Sequence[Control]]
    """By claim."""


def first_share(rows: Means) -> float:
    """Second-moment share of the first principal component, without centring."""
    squares = np.linalg.svd(rows, compute_uv=False) ** 2
    return float(squares[0] / squares.sum())


def pressure(
    coefficients: Sequence[float], slopes: Float[np.ndarray, "coefficient sequence"]
) -> tuple[Estimate, list[Control]]:
    """a*, from slopes dL/da along the persona vector."""
    falling = share(int((slopes[0] < 0).sum()), slopes.shape[1])
    towards = Control("with nothing added the loss falls along it (share of sequences)", falling, falling.low > 0.5)
    return turning_estimate(coefficients, slopes), [towards]


def concentration(of: Gradients) -> tuple[Estimate, list[Control]]:
    """By how much more of what PPS changes in the mean gradients lies in one component than of what IP changes."""
    by_pps, by_ip = of.pps - of.plain, of.ip - of.plain
    first = np.linalg.svd(by_pps, full_matrices=False)[2][0]
    alignment = abs(float(first @ of.vector)) / float(np.linalg.norm(of.vector))
    directions = isotropic(len(first), seed=0).double().numpy()
    found = jackknife(lambda one, other: first_share(one) - first_share(other), by_pps, by_ip)
    null = rarely("random directions as near to PPS's first component", np.abs(directions @ first), alignment)
    return found, [null]


def prompting(
    none: Margins,
    eliciting: Margins,
    placebo: Margins,
) -> tuple[Estimate, list[Control]]:
    """Specific gains: a margin with a prompt less that without is the gain on trait answers less that on normal ones.

    Of the mean eliciting prompt over the mean placebo, to which the margin without a prompt is the same.
    """
    specific = (eliciting - none).mean(0), (placebo - none).mean(0)
    raises = mean_estimate(specific[0])
    name = "eliciting prompts raise the margin over no prompt (nats per token)"
    over_placebo = mean_estimate(specific[0] - specific[1])
    return over_placebo, [Control(name, raises, raises.low > 0)]


def one_direction(
    before: Mapping[str, Behaviour], after: Mapping[str, Behaviour]
) -> tuple[dict[str, Estimate], list[Control]]:
    """Test requests by kind, before and after the ablation of one direction."""
    fall = mean_estimate(before["harmful"].log_odds - after["harmful"].log_odds)
    left = mean_estimate(after["harmful"].log_odds)
    cost = mean_estimate(after["harmless"].kl)
    refused = share(int(before["harmful"].refused.sum()), len(before["harmful"].refused))
    controls = [
        Control("harmful requests refused before (share)", refused, refused.value >= 0.5, "validity"),
        Control("log-odds of refusing them afterwards", left, left.high < 0),
        Control("KL on harmless requests (nats)", cost, cost.value <= KL_LIMIT),
    ]
    return {"fall": fall, "log-odds": left, "KL": cost}, controls


def probing(of: States) -> dict[str, Estimate]:
    """A linear probe of the stream, held out, and by how much it beats the same probe of the length alone."""
    by_state = linear_scores(of.train, of.train_harmful, of.test, of.test_harmful)
    by_length = linear_scores(of.train_lengths, of.train_harmful, of.test_lengths, of.test_harmful)
    return {
        "probe": auroc(by_state, of.test_harmful),
        "beyond length": auroc_difference(by_state, by_length, of.test_harmful),
    }


def places(gain: Curves, kl: Curves, wish: float) -> tuple[Estimate, list[Control]]:
    """Gains in margin by steering the prompt's tokens (first place) less that by steering all, at equal divergence."""

    def gains(gained: np.ndarray, cost: np.ndarray) -> list[float]:
        """`gained` and `cost` are (pair, place, scale)."""
        means = gained.mean(0), cost.mean(0)
        level = common_level(means[1], wish)
        return [at_equal_kl(k, g, level) for g, k in zip(*means, strict=True)]

    def apart(gained: np.ndarray, cost: np.ndarray) -> float:
        prompt, everywhere = gains(gained, cost)
        return prompt - everywhere

    by_pair = np.moveaxis(gain, -1, 0), np.moveaxis(kl, -1, 0)
    everywhere = jackknife(lambda gained, cost: gains(gained, cost)[1], *by_pair)
    works = Control("steering all tokens raises the margin there", everywhere, everywhere.low > 0, "validity")
    return jackknife(apart, *by_pair), [works]


def estimates(of: Readings, coefficients: Sequence[float], wish: float) -> Found:
    """All estimates of one model; `wish` is the divergence at which places to steer are held side by side."""
    turn, turns = pressure(coefficients, of.slopes)
    concentrated, near = concentration(of.gradients)
    elicited, raised = prompting(*(of.margins[name] for name in ("none", "eliciting", "placebo")))
    refusal, attacked = one_direction(of.card, of.attacked)
    prompt_tokens, works = places(of.steering["gain"], of.steering["kl"], wish)
    found = {"a*": turn, "concentration": concentrated, "prompts": elicited, **refusal, **probing(of.states)}
    return Found(
        {**found, "prompt tokens": prompt_tokens},
        {
            "sizes.pressure-turns": turns,
            "sizes.concentrated": near,
            "sizes.prompts-elicit": raised,
            "sizes.one-direction": attacked,
            "sizes.prompt-tokens": works,
        },
    )


CLAIMS = {
    "sizes.pressure-turns": "a*",
    "sizes.concentrated": "concentration",
    "sizes.prompts-elicit": "prompts",
    "sizes.one-direction": "fall",
    "sizes.probe-beyond-length": "beyond length",
    "sizes.prompt-tokens": "prompt tokens",
}
"""Which measure each claim is about; all put it above something."""


def weakest(found: Mapping[str, Found]) -> tuple[Measurement, ...]:
    """Each claim by the model in which it is weakest, with the controls of every model."""
    measurements = []
    for claim, name in CLAIMS.items():
        of = {model: one.estimates[name] for model, one in found.items()}
        least = min(of, key=lambda model: (np.isfinite(of[model].value), of[model].value))
        controls = [
            Control(f"{c.name}{f', {model}' * (len(found) > 1)}", c.estimate, c.passed, c.kind)
            for model, one in found.items()
            for c in one.controls.get(claim, ())
        ]
        reason = f"Of {len(found)} models this is {least}, where it is weakest." if len(found) > 1 else ""
        measurements.append(Measurement(claim, of[least], controls, reason))
    return tuple(measurements)


# From model to model


@dataclass(frozen=True)
class Change:
    """A measure of a larger model less that of the next smaller one."""

    measure: str
    smaller: str
    larger: str
    by: Estimate

    @property
    def same_family(self) -> bool:
        """Whether the two were built and tuned alike, so that they differ in little but size."""
        return family(self.smaller) == family(self.larger)

    @property
    def decided(self) -> bool:
        """Whether the interval excludes that nothing changes."""
        return bool(self.by.low > 0 or self.by.high < 0)


def changes(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[Change]:
    """Of every measure from each model to the next, by model in the order of their size; one without a number is left
    out."""
    order = list(estimates)
    return [
        Change(measure, smaller, larger, difference(estimates[larger][measure], estimates[smaller][measure]))
        for smaller, larger in pairwise(order)
        for measure in estimates[larger]
        if all(np.isfinite(estimates[model][measure].value) for model in (smaller, larger))
    ]


def said(found: Sequence[Change]) -> str:
    """What is decided of the changes and what is not, in sentences that the intervals choose."""
    if not found:
        return "One model alone says nothing of size."
    sentences = []
    for same, opening in ((True, "Within one family"), (False, "Between two families")):
        for smaller, larger in dict.fromkeys((c.smaller, c.larger) for c in found if c.same_family == same):
            of = [c for c in found if (c.smaller, c.larger) == (smaller, larger)]
            moved = [f"{c.measure} ({c.by:+.2f})" for c in of if c.decided]
            left = [c.measure for c in of if not c.decided]
            sentences.append(
                f"{opening}: from {smaller} to {larger}, {len(moved)} of {len(of)} numbers differ, by an interval that "
                f"excludes zero: {_listed(moved)}. Undecided: {_listed(left)}."
            )
    return " ".join(sentences)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def openers(answers: Sequence[str], refused: Bool[np.ndarray, " request"]) -> dict[str, int]:
    """The first words of the answers that refuse, and how often each is one, the commonest first."""
    words = (answer.split()[0].strip(",.!:;") for answer, is_one in zip(answers, refused, strict=True) if is_one)
    return dict(Counter(words).most_common())
