"""What the claims on prompt-only steering are judged by (chapter 6).

Ratings are (seed, concept), 0 to 2, each a mean over a concept's questions; an arm that is not trained has one row.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from helpers.statistics import Estimate, mean_estimate
from helpers.verdicts import NOT_MEASURED, Control, Measurement

Ratings = Float[np.ndarray, "_ concept"]
Rights = Float[np.ndarray, "_ item"]

PROSV, FSSV = "PrOSV, lang", "FSSV, lang"

COMPARED = {
    "prompt.beats-full": (PROSV, FSSV),
    "prompt.joint": (FSSV, "FSSV, factor searched"),
    "prompt.beats-means": (PROSV, "difference in means, factor searched"),
    "prompt.beats-prompting": (PROSV, "prompting"),
    "prompt.simpo": ("PrOSV, simpo", PROSV),
    "prompt.ends-not-random": (PROSV, "random"),
    "prompt.ends-not-words": (PROSV, "user words"),
}
"""Which arm each claim puts above which other."""

MOVED = 0.1
"""By what share of its start a factor has to move, on average, to count as trained."""


def factor_rate(losses: Float[np.ndarray, "beta rate row"], rates: Sequence[float], vector_rate: float) -> Measurement:
    """Check losses over the grid of prompt-only training: the best cells with a slow factor and with a fast one."""
    slow, fast = ([j for j, rate in enumerate(rates) if (rate > vector_rate) == which] for which in (False, True))
    if not slow or not fast:
        return Measurement("prompt.factor-rate", NOT_MEASURED, (), "This grid has rates of one kind only.")
    of_slow, of_fast = (losses[:, part].reshape(-1, losses.shape[-1]) for part in (slow, fast))
    best_slow, best_fast = (part[np.argmin(part.mean(-1))] for part in (of_slow, of_fast))
    start = int(np.unravel_index(np.argmin(losses.mean(-1)), losses.shape[:2])[0])
    inside = Control("the best start of the factor is inside the grid", float(start), 0 < start < len(losses) - 1)
    return Measurement("prompt.factor-rate", mean_estimate(best_slow - best_fast), [inside])


def trusted(tested: Mapping[str, Estimate]) -> Control:
    """The control on the judges: their AUROCs on cases whose quality was planted."""
    least = min(tested.values(), key=lambda e: e.value)
    return Control(
        "every judge tells planted good from bad cases (least AUROC)",
        least,
        all(e.value > 0.8 for e in tested.values()),
        "validity",
    )


def factor_trains(starts: Sequence[float], factors: Float[np.ndarray, "seed concept"]) -> Control:
    """The control that training moves the factors; `starts` has that of each concept."""
    moved = float(np.abs(factors / np.asarray(starts) - 1).mean())
    return Control("training moves the factor (mean share of its start)", moved, moved >= MOVED, "validity")


def _minus(arms: Mapping[str, np.ndarray], one: str, other: str, seeds: Sequence[int]) -> Estimate:
    difference = arms[one] - arms[other]
    return mean_estimate(difference, seeds=seeds if len(difference) == len(seeds) else ())


def steers(arms: Mapping[str, Ratings], *, seeds: Sequence[int]) -> Control:
    """The control that PrOSV steers at all."""
    raised = _minus(arms, PROSV, "unsteered", seeds)
    return Control("PrOSV is rated above the unsteered model (by)", raised, raised.low > 0, "validity")


def comparisons(
    arms: Mapping[str, Ratings], *, seeds: Sequence[int], judges: Control, factor: Control
) -> tuple[Measurement, ...]:
    """Overall ratings by arm, as named in `COMPARED`; a claim whose arm was left out is not judged."""
    works = steers(arms, seeds=seeds)
    found = [Measurement("prompt.steers", _minus(arms, PROSV, "unsteered", seeds), [judges])]
    for claim, (one, other) in COMPARED.items():
        if one not in arms or other not in arms:
            found.append(Measurement(claim, NOT_MEASURED, (), "This run leaves it out."))
            continue
        controls = [judges, works, factor] if claim == "prompt.joint" else [judges, works]
        found.append(Measurement(claim, _minus(arms, one, other, seeds), controls))
    return tuple(found)


def utility(rights: Mapping[str, Rights], *, seeds: Sequence[int], works: Control) -> tuple[Measurement, Measurement]:
    """Shares of times that each quiz item is answered rightly: "unsteered", "PrOSV", and "FSSV" at equal strength."""
    able = mean_estimate(rights["unsteered"])
    can = Control("the unsteered model answers items (share)", able, able.low > 0.25, "validity")
    return (
        Measurement("prompt.utility", _minus(rights, "PrOSV", "FSSV", seeds), [can, works]),
        Measurement("prompt.keeps", _minus(rights, "unsteered", "PrOSV", seeds), [can, works]),
    )


def robustness(
    forbidden: Mapping[str, Ratings], *, seeds: Sequence[int], judges: Control, works: Control
) -> Measurement:
    """Ratings where the prompt forbids the concept: "unsteered", "prompting" and "PrOSV".

    Naming a concept, even to forbid it, can call it up: the unsteered model that is told not to is the control.
    """
    beyond = _minus(forbidden, "PrOSV", "unsteered", seeds)
    return Measurement(
        "prompt.robust",
        _minus(forbidden, "PrOSV", "prompting", seeds),
        [
            judges,
            works,
            Control("PrOSV is rated above the unsteered model that is told not to (by)", beyond, beyond.low > 0),
        ],
    )
