"""Claims, and the rule by which an estimate and its controls decide one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from helpers.statistics import Estimate

Verdict = Literal["reproduced", "direction only", "contradicted", "undecided", "invalid", "not judged"]

_OTHER: Mapping[str, Literal["above", "below"]] = {"above": "below", "below": "above"}


class Claim(BaseModel):
    """One statement of a source, and the number that decides whether it holds here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Short name such as `pps.reversal`."""
    chapter: str
    """File name of the notebook that measures it, without `.ipynb`."""
    statement: str
    """What is claimed, in one sentence."""
    source: str
    """The paper or post that claims it."""
    where: str
    """Figure, table or section of the source."""
    source_value: float | None = None
    """The source's own number for the same metric, if it gives one."""
    metric: str
    """What is measured here."""
    unit: str
    """Unit of value, threshold and no_effect."""
    direction: Literal["above", "below"]
    """On which side of `no_effect` the claim puts the value."""
    threshold: float
    """The value that counts as reproduced: at least this (above) or at most this (below)."""
    no_effect: float
    """The value that would be measured if the claimed effect did not exist."""
    note: str = ""
    """Anything a reader must know about the source's number."""
    figure: str = ""
    """Name of the chapter's figure in which the number can be seen, such as `fig-reversal`; empty if none shows it."""
    central: bool = False
    """Whether it is one of the two or three claims that the chapter is about."""

    def met_by(self, value: float) -> bool:
        """Whether `value` reaches the threshold on the claimed side."""
        return bool(value >= self.threshold if self.direction == "above" else value <= self.threshold)

    def excludes_no_effect(self, estimate: Estimate, side: Literal["above", "below"] | None = None) -> bool:
        """Whether the whole interval lies on one side of `no_effect`, by default the claimed one."""
        if (side or self.direction) == "above":
            return bool(estimate.low > self.no_effect)
        return bool(estimate.high < self.no_effect)


@dataclass(frozen=True)
class Control:
    """A measurement that must come out a certain way for a claim to count as reproduced."""

    name: str
    """What was held against the claim, such as "random vector of equal norm"."""
    estimate: Estimate | float
    """What the control measured; NaN if it was not measured."""
    passed: bool | np.bool_ | None
    """Whether it came out as it must if the claim is right for the right reason; None if it was not measured."""
    kind: Literal["validity", "strength"] = "strength"
    """Validity: if it fails, the measurement says nothing of the claim (gibberish, a manipulation that did not take).
    Strength: if it fails, the effect may be there, but for another reason or not strongly enough."""

    @property
    def state(self) -> Literal["passed", "failed", "not measured"]:
        """What a reader is told."""
        return "not measured" if self.passed is None else "passed" if self.passed else "failed"


@dataclass(frozen=True)
class Measurement:
    """What was measured for one claim, before it is judged; made by the functions of a chapter's `measurements`."""

    claim: str
    """Its id in `book/claims.yml`."""
    estimate: Estimate
    controls: Sequence[Control] = ()
    reason: str = ""
    """What a reader must know beyond the reason that the rule gives."""


NOT_MEASURED = Estimate(math.nan, math.nan, math.nan, 0)
"""In place of an estimate where a run leaves a measurement out; such a claim is not judged."""


def verdict(claim: Claim, estimate: Estimate, controls: Sequence[Control] = (), *, preset: str) -> tuple[Verdict, str]:
    """The verdict on a claim and the reason for it.

    *invalid*: a validity control failed, so the number says nothing of the claim. *contradicted*: the interval lies
    beyond no effect on the other side, or holds no effect and stops short of the threshold. *undecided*: the interval
    holds no effect and the threshold. Else it excludes no effect on the claimed side: *reproduced* if the value meets
    the threshold and every control passed (one that was not measured did not), *direction only* if not. *not judged*:
    the model is random (preset `tiny`), or there is no finite number.
    """
    if preset == "tiny":
        return "not judged", "The tiny preset runs a random model, which can only show that the code works."
    if not all(map(math.isfinite, (estimate.value, estimate.low, estimate.high))):
        return "not judged", "The measurement gave no finite number or interval."
    broken = [c.name for c in controls if c.kind == "validity" and c.state == "failed"]
    if broken:
        return "invalid", f"The measurement says nothing of the claim, since this failed: {', '.join(broken)}."
    nothing, other = claim.no_effect, _OTHER[claim.direction]
    if claim.excludes_no_effect(estimate, other):
        return "contradicted", f"The interval lies {other} {format_number(nothing)}, which is no effect."
    limit = "at least" if claim.direction == "above" else "at most"
    if not claim.excludes_no_effect(estimate):
        if not (claim.met_by(estimate.low) or claim.met_by(estimate.high)):
            return (
                "contradicted",
                f"The interval holds no effect ({format_number(nothing)}) and no value that is {limit} "
                f"{format_number(claim.threshold)}.",
            )
        trained = f" and {len(estimate.seeds)} seed{'s' * (len(estimate.seeds) > 1)}" if estimate.seeds else ""
        return (
            "undecided",
            f"The interval holds no effect ({format_number(nothing)}) and the threshold "
            f"({format_number(claim.threshold)}); "
            f"n = {estimate.n}{trained} could have shown a difference of {format_number(estimate.detectable)} or more.",
        )
    if not claim.met_by(estimate.value):
        return "direction only", f"The value is not {limit} {format_number(claim.threshold)}."
    for state, words in (("failed", "did not come out as it must"), ("not measured", "was not measured")):
        missing = [control.name for control in controls if control.state == state]
        if missing:
            return "direction only", f"This control {words}: {', '.join(missing)}."
    passed = "and all controls passed" if controls else "and there is no control"
    return "reproduced", f"The value meets the threshold, the interval excludes no effect, {passed}."


def format_number(value: float) -> str:
    return f"{value:.3g}"
