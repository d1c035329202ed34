"""What the claims on preventative steering are judged by (chapter 1).

Cosines are one a held-out trait sequence, of activation gradient and persona vector. Margins, in nats per token,
scores, 0 to 100, and projections are (seed, question).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import stats

from helpers.statistics import Estimate, jackknife, mean_estimate, rank_correlation, share
from helpers.studies.nulls import rarely
from helpers.studies.turning import turning_or_end
from helpers.verdicts import NOT_MEASURED, Control, Measurement

Cosines = Float[np.ndarray, " sequence"]
Outcomes = Float[np.ndarray, "seed question"]
Null = Float[np.ndarray, " direction"]

ELSEWHERE = 0.2
"""Nats per token that PPS may cost on normal answers: as much as it has to take off the margin."""

LEARNT = 0.2
"""Nats per token that undefended training has to add to the margin before a defence can take anything away."""

FEWEST_POINTS = 12
"""Pairs of data and vector that a rank correlation over them needs."""

DEALS = 4000
"""Random deals of vectors that it is held against."""


@dataclass(frozen=True)
class Scale:
    """What a trained model is judged by: a claim on judged answers has a twin on margins, which needs no judge."""

    name: str
    """How the ids of its claims end."""
    unit: str
    learnt: float
    """How much of it training has to teach before anything can be said of what a defence takes away."""
    top: float | None = None
    """Where the scale ends."""


MARGIN = Scale("margin", "nats per token", LEARNT)
SCORE = Scale("trait", "points", 20.0, 100.0)


def reversal(
    undefended: Cosines, pps: Cosines, random: Float[np.ndarray, "vector sequence"], nulls: Mapping[str, Null]
) -> tuple[Measurement, ...]:
    """Cosines without a defence, under PPS, and under several random vectors of equal norm.

    `nulls`: by kind of meaningless direction, the undefended gradients' mean cosines with thousands of them.
    """
    by_chance = mean_estimate(random > 0)
    return (
        Measurement(
            "pps.undefended-cosine-negative",
            share((undefended < 0).sum(), undefended.size),
            [rarely(name, null, float(undefended.mean())) for name, null in nulls.items()],
        ),
        Measurement(
            "pps.reversal",
            share((pps > 0).sum(), pps.size),
            [_not_by_chance(random, by_chance)],
        ),
        Measurement("pps.random-no-reversal", by_chance),
    )


def _not_by_chance(random: Float[np.ndarray, "vector sequence"], reversed_: Estimate) -> Control:
    name = f"{len(random)} random vectors of equal norm do not reverse (share of sequences)"
    return Control(name, reversed_, reversed_.high < 0.5)


def reversal_of_means(pps: Cosines, random: Float[np.ndarray, "vector sequence"]) -> Measurement:
    """Cosines of each sequence's *mean* gradient under PPS, and under several random vectors of equal norm.

    The other reading of the source's cosine: every token counts by the length of its gradient, as descent weights it.
    """
    by_chance = mean_estimate(random > 0)
    return Measurement(
        "pps.pressure-reverses",
        share((pps > 0).sum(), pps.size),
        [_not_by_chance(random, by_chance)],
    )


def reversal_elsewhere(found: Mapping[str, Mapping[str, Float[np.ndarray, " answer"]]]) -> Measurement:
    """By trait: mean cosines "undefended", under "PPS" with the trait's own vector, and with a "random" one."""

    def positive(arm: str, names: Sequence[str] = tuple(found)) -> Estimate:
        rows = np.concatenate([found[name][arm] for name in names])
        return share((rows > 0).sum(), rows.size)

    without, by_chance = positive("undefended"), positive("random")
    return Measurement(
        "pps.reversal-on-other-traits",
        positive("PPS"),
        [
            Control("undefended it is positive on few (share of sequences)", without, without.high < 0.5),
            Control(
                "a random vector of equal norm does not reverse (share of sequences)", by_chance, by_chance.high < 0.5
            ),
            *(
                Control(f"on {name} answers alone (share of sequences)", e, e.low > 0.5)
                for name, e in ((name, positive("PPS", [name])) for name in found)
            ),
        ],
    )


def first_share(rows: Float[np.ndarray, "row d_model"]) -> float:
    """Second-moment share of the first principal component, without centring."""
    squares = np.linalg.svd(rows, compute_uv=False) ** 2
    return float(squares[0] / squares.sum())


def concentration(
    pps: Float[np.ndarray, "sequence d_model"],
    ip: Float[np.ndarray, "sequence d_model"],
    vector: Float[np.ndarray, " d_model"],
    directions: Float[np.ndarray, "direction d_model"],
) -> Measurement:
    """What each defence changes in the mean gradients; `directions` are thousands of meaningless unit vectors."""
    first = np.linalg.svd(pps, full_matrices=False)[2][0]
    alignment = abs(float(first @ vector) / float(np.linalg.norm(vector)))
    return Measurement(
        "pps.concentrated-gradient-difference",
        jackknife(lambda one, other: first_share(one) - first_share(other), pps, ip),
        [rarely("meaningless directions as near to PPS's first component", np.abs(directions @ first), alignment)],
    )


def training(
    margins: Mapping[str, Outcomes],
    normal_losses: Mapping[str, Outcomes],
    scores: Mapping[str, Outcomes],
    projections: Mapping[str, Outcomes],
    repetition: Mapping[str, Outcomes],
    *,
    seeds: Sequence[int],
    sane: Control,
    steady: Control,
) -> tuple[Measurement, Measurement, Measurement]:
    """Models by name: "undefended", "PPS", "random" and "untrained" (one row). `steady` is that of `recipes`.

    `margins`, and the losses of normal answers ("PPS" and "untrained"), are in nats per token, `projections` in lengths
    of the persona vector, `repetition` in shares of repeated trigrams.
    """
    less, randomly = (mean_estimate(margins["undefended"] - margins[n], seeds=seeds) for n in ("PPS", "random"))
    elsewhere = mean_estimate(normal_losses["PPS"] - normal_losses["untrained"], seeds=seeds)
    learnt = mean_estimate(margins["undefended"] - margins["untrained"], seeds=seeds)
    fall, by_chance = (mean_estimate(scores["undefended"] - scores[n], seeds=seeds) for n in ("PPS", "random"))
    loops = mean_estimate(repetition["PPS"] - repetition["untrained"], seeds=seeds)
    lower = mean_estimate(projections["PPS"] - projections["undefended"], seeds=seeds)
    beyond = mean_estimate(projections["PPS"] - projections["random"], seeds=seeds)
    words = Control(
        "answers repeat little more than the untrained model's (share)", loops, loops.value < 0.1, "validity"
    )
    return (
        Measurement(
            "pps.trains-lower-margin",
            less,
            [
                sane,
                Control("undefended training raises the margin (nats per token)", learnt, learnt.low > 0, "validity"),
                Control(
                    "normal answers become little less likely (rise of their loss, nats per token)",
                    elsewhere,
                    elsewhere.value < ELSEWHERE,
                ),
                Control(
                    "a random vector of equal length defends less than half as well (nats per token)",
                    randomly,
                    randomly.value < less.value / 2,
                ),
                steady,
            ],
        ),
        Measurement(
            "pps.trains-lower-trait",
            fall,
            [
                sane,
                words,
                Control(
                    "a random vector of equal length defends less than half as well (points)",
                    by_chance,
                    by_chance.value < fall.value / 2,
                ),
            ],
        ),
        Measurement(
            "pps.projection-falls",
            lower,
            [
                sane,
                Control("it falls further than with a random vector (by)", beyond, beyond.high < 0),
            ],
        ),
    )


def recipes(falls: Mapping[str, Estimate]) -> Control:
    """By how much PPS lowers the margin, in nats per token, with each of some other recipes of training."""
    weakest = min(falls, key=lambda name: falls[name].low)
    return Control(
        f"with other steps and rates it lowers the margin too (least with {weakest}, nats per token)",
        falls[weakest],
        falls[weakest].low > 0,
    )


def data(margins: Mapping[str, Mapping[str, Outcomes]], *, seeds: Sequence[int], sane: Control) -> Measurement:
    """Margins after training on answers of a level ("strong", "normal"), "undefended" and with "PPS".

    Normal answers show no trait, so that there is nothing to defend against.
    """
    fall = {level: arms["undefended"] - arms["PPS"] for level, arms in margins.items()}
    protects = mean_estimate(fall["strong"], seeds=seeds)
    without = mean_estimate(fall["normal"], seeds=seeds)
    return Measurement(
        "pps.acts-on-trait-data",
        mean_estimate(fall["strong"] - fall["normal"], seeds=seeds),
        [
            sane,
            Control("PPS lowers the margin on trait data (nats per token)", protects, protects.low > 0, "validity"),
        ],
        f"On normal answers PPS takes {without:.2f} off the margin, on trait answers {protects:.2f}.",
    )


def trained_elsewhere(kept_out: Mapping[str, Float[np.ndarray, "seed _"]], *, seeds: Sequence[int]) -> Measurement:
    """By trait, under its own vector: the share of what undefended training adds to the margin that is kept out."""
    each = {name: mean_estimate(rows, seeds=seeds) for name, rows in kept_out.items()}
    return Measurement(
        "pps.keeps-out-other-traits",
        mean_estimate(np.concatenate(list(kept_out.values()), axis=1), seeds=seeds),
        [Control(f"of {name} alone (share)", e, e.low > 0) for name, e in each.items()],
    )


def step(moved: Mapping[str, Float[np.ndarray, " question"]]) -> Measurement:
    """How far one step of descent moves the stream along the vector at the steered block: "undefended", under "PPS",
    and under a "random" vector, in thousandths of the persona vector's length."""
    up, by_chance = mean_estimate(moved["undefended"]), mean_estimate(moved["random"])
    unit = "thousandths of the vector's length"
    return Measurement(
        "pps.step-moves-down",
        mean_estimate(moved["PPS"]),
        [
            Control(f"undefended, the step moves it up ({unit})", up, up.low > 0),
            Control(f"under a random vector, the step moves it up as well ({unit})", by_chance, by_chance.low > 0),
        ],
    )


def other_defences(
    margins: Mapping[str, Outcomes],
    untrained: Float[np.ndarray, "1 question"],
    *,
    seeds: Sequence[int],
    sane: Control,
) -> tuple[Measurement, Measurement]:
    """Margins after training "undefended", and under "PPS", "IP", "PPS + IP" and "CAFT, mean"."""
    learnt = mean_estimate(margins["undefended"] - untrained, seeds=seeds)
    taught = Control("undefended training raises the margin (nats per token)", learnt, learnt.low > LEARNT, "validity")
    to_ip = mean_estimate(margins["IP"] - margins["PPS + IP"], seeds=seeds)
    caft = mean_estimate(margins["undefended"] - margins["CAFT, mean"], seeds=seeds)
    return (
        Measurement(
            "pps.beats-concept-ablation",
            mean_estimate(margins["CAFT, mean"] - margins["PPS"], seeds=seeds),
            [sane, taught],
            f"Concept ablation takes {caft:.2f} off the margin of undefended training.",
        ),
        Measurement(
            "pps.adds-to-inoculation",
            mean_estimate(margins["PPS"] - margins["PPS + IP"], seeds=seeds),
            [sane, taught, Control("PPS adds to IP as well (nats per token)", to_ip, to_ip.low > 0)],
        ),
    )


def identity(
    slopes: Float[np.ndarray, "coefficient sequence"], sums: Float[np.ndarray, "coefficient sequence"]
) -> Measurement:
    """Slopes of the loss by central differences, and the sums of g_t . v over all positions, in float32."""
    size = np.abs(slopes).mean()
    return Measurement("pps.slope-is-pressure", mean_estimate((np.abs(sums - slopes) / size).mean(0)))


def turning(
    coefficients: Sequence[float],
    own: Float[np.ndarray, "coefficient sequence"],
    random: Float[np.ndarray, "vector coefficient sequence"],
    other: Mapping[str, Float[np.ndarray, "coefficient sequence"]],
) -> Measurement:
    """Slopes dL/da along the trait's own vector, and along random and other traits' vectors of its length.

    A vector whose slope does not turn counts at an end of the grid (`turning_or_end`).
    """

    def apart(first: np.ndarray, *others: np.ndarray) -> float:
        """a* of the own vector less the mean of the others'."""
        found = [turning_or_end(coefficients, rows.mean(0)) for rows in (first, *others)]
        return found[0] - float(np.mean(found[1:]))

    rows = own.T
    further = {name: jackknife(lambda one, two: apart(one, two), rows, slopes.T) for name, slopes in other.items()}
    return Measurement(
        "pps.own-vector-turns-later",
        jackknife(apart, rows, *(slopes.T for slopes in random)),
        [
            Control(f"further than with the {name} vector (multiples of the vector)", estimate, estimate.low > 0)
            for name, estimate in further.items()
        ],
    )


def per_dose(
    doses: Sequence[float], outcomes: Float[np.ndarray, "dose seed question"]
) -> Float[np.ndarray, "seed question"]:
    """The slope of an outcome over doses, by least squares, for every seed and question."""
    centred = np.asarray(doses) - np.mean(doses)
    return np.tensordot(centred, outcomes, 1) / (centred**2).sum()


def dose(
    doses: Sequence[float],
    margins: Float[np.ndarray, "dose seed question"],
    untrained: Float[np.ndarray, "1 question"],
    *,
    random: Float[np.ndarray, "dose seed question"],
    shifts: Float[np.ndarray, "dose seed question"],
    turn: Estimate,
    seeds: Sequence[int],
    sane: Control,
) -> tuple[Measurement, Measurement]:
    """What models have after training under PPS, by its intensity in units of a*, of which 0 is the first.

    `turn` is a* on the training answers, in multiples of the persona vector.

    `margins` in nats per token, after PPS with the persona vector and with a `random` one of its length; `shifts`:
    projections on the persona vector, after less before training.
    """
    learnt = mean_estimate(margins[0] - untrained, seeds=seeds)
    fall, by_chance = (mean_estimate(per_dose(doses, found), seeds=seeds) for found in (margins, random))
    took = Control(
        "undefended training raises the margin (nats per token)", learnt, learnt.low > LEARNT / 2, "validity"
    )
    turns = Control(
        "the pressure turns on training answers (multiples of the vector)", turn, np.isfinite(turn.value), "validity"
    )

    def zero(rows: Float[np.ndarray, "question dose"]) -> float:
        slope, level = np.polyfit(doses, rows.mean(0), 1)
        return float(-level / slope)

    place = jackknife(zero, shifts.mean(1).T)
    away = sorted(abs(end - 1) for end in (place.low, place.high))
    nearest = 0.0 if place.low <= 1 <= place.high else away[0]
    distance = replace(place, value=abs(place.value - 1), low=nearest, high=away[1], seeds=tuple(seeds))
    pushed = mean_estimate(shifts[0], seeds=seeds)
    return (
        Measurement(
            "pps.dose",
            fall,
            [
                sane,
                turns,
                took,
                Control(
                    "a random vector of equal length does less than half as much (nats per token and a*)",
                    by_chance,
                    by_chance.value > fall.value / 2,
                ),
            ],
        ),
        Measurement(
            "pps.shift-ends-at-turning-point",
            distance,
            [
                sane,
                turns,
                Control(
                    "undefended training moves the stream up the vector (units of the stream)",
                    pushed,
                    pushed.low > 0,
                    "validity",
                ),
            ],
            f"The shift is 0 at {place:.2f} a*.",
        ),
    )


def steered_block(
    margins: Mapping[int, Outcomes],
    chosen: int,
    undefended: Outcomes,
    *,
    seeds: Sequence[int],
    sane: Control,
) -> Measurement:
    """Margins after training with PPS, by the block after which it steered; `chosen` is the chapter's."""
    others = np.mean([found for block, found in margins.items() if block != chosen], axis=0)
    protects = mean_estimate(undefended - margins[chosen], seeds=seeds)
    best = min(margins, key=lambda block: float(margins[block].mean()))
    return Measurement(
        "pps.steered-block",
        mean_estimate(others - margins[chosen], seeds=seeds),
        [
            sane,
            Control("PPS lowers the margin at this block (nats per token)", protects, protects.low > 0, "validity"),
        ],
        f"The lowest margin of these blocks is left by block {best}.",
    )


def behind_the_vector(
    steered: Mapping[str, Outcomes], plain: Mapping[str, Outcomes], *, seeds: Sequence[int], sane: Control
) -> Measurement:
    """Margins of the models "PPS", "undefended" and "untrained" (one row), in nats per token: with PPS's vector on at
    test (`steered`), and without (`plain`).

    What PPS taught is read against the untrained model under the same vector, which raises the margin by itself.
    """
    behind = mean_estimate(steered["PPS"] - steered["untrained"], seeds=seeds)
    learnt = mean_estimate(plain["undefended"] - plain["untrained"], seeds=seeds)
    on = mean_estimate(steered["untrained"] - plain["untrained"])
    return Measurement(
        "pps.hides-nothing",
        behind,
        [
            sane,
            Control("undefended training raises the margin (nats per token)", learnt, learnt.low > LEARNT, "validity"),
            Control("the vector acts at test (nats per token, untrained model)", on, on.low > 0, "validity"),
        ],
    )


def relearning(before: Mapping[str, Outcomes], after: Mapping[str, Outcomes], *, seeds: Sequence[int]) -> Measurement:
    """Margins before and after a few gentle undefended steps on trait data, of models that were trained before.

    "PPS", "normal data, PPS" and "untrained"; and "IP", which has learnt the trait behind its prompt (chapter 2): where
    it learns no faster than the untrained model, these steps cannot tell a hidden trait from none. PPS on normal data
    leaves a model that lost the vector as much and never saw the trait.
    """
    gained = {name: after[name] - before[name] for name in ("PPS", "normal data, PPS", "untrained", "IP")}
    learns = mean_estimate(gained["untrained"], seeds=seeds)
    hidden = mean_estimate(gained["IP"] - gained["untrained"], seeds=seeds)
    beyond = mean_estimate(gained["PPS"] - gained["untrained"], seeds=seeds)
    return Measurement(
        "pps.relearns-no-faster",
        mean_estimate(gained["PPS"] - gained["normal data, PPS"], seeds=seeds),
        [
            Control("the untrained model learns in these steps (nats per token)", learns, learns.low > 0, "validity"),
            Control(
                "a trait that IP hid is relearnt faster than by the untrained model (nats per token)",
                hidden,
                hidden.low > 0,
                "validity",
            ),
        ],
        f"Against the untrained model it is {beyond:.2f}.",
    )


def rebound(
    kept: Outcomes, removed: Outcomes, undefended: Outcomes, *, seeds: Sequence[int], sane: Control
) -> Measurement:
    """Margins after training with PPS to the end, with PPS for the first half, and undefended, in nats per token."""
    room = mean_estimate(undefended - kept, seeds=seeds)
    return Measurement(
        "pps.rebound",
        mean_estimate(removed - kept, seeds=seeds),
        [
            sane,
            Control("PPS to the end keeps the margin down (nats per token)", room, room.low > LEARNT / 2, "validity"),
        ],
    )


def cross_trait(
    cosines: Float[np.ndarray, "data vector"], kept_out: Float[np.ndarray, "data vector"], *, seed: int
) -> Measurement:
    """Cosine under the steering before training, and the share of the trait that it keeps out of training, by the
    trait of the data and that of the vector; a trait's own vector (the diagonal) does not count.

    The null deals the vectors anew within each trait's data: what differs between data is not the vectors' doing.
    """
    crossed = ~np.eye(len(cosines), dtype=bool)
    if crossed.sum() < FEWEST_POINTS:
        few = f"{crossed.sum()} pairs of data and vector cannot decide a rank correlation; {FEWEST_POINTS} are needed."
        return Measurement("pps.cosine-predicts-cross-trait", NOT_MEASURED, (), few)
    found = rank_correlation(cosines[crossed], kept_out[crossed])
    rng, rows = np.random.default_rng(seed), kept_out[crossed].reshape(len(cosines), -1)
    ranks = stats.rankdata(cosines[crossed])
    deals = [np.corrcoef(ranks, stats.rankdata(rng.permuted(rows, axis=1)))[0, 1] for _ in range(DEALS)]
    return Measurement(
        "pps.cosine-predicts-cross-trait",
        found,
        [rarely("vectors dealt anew within each trait's data", np.array(deals), found.value)],
    )


def existing_trait(
    start: Outcomes,
    untrained: Float[np.ndarray, "1 question"],
    after: Mapping[str, Outcomes],
    scale: Scale,
    *,
    seeds: Sequence[int],
    sane: Control,
) -> tuple[Measurement, Measurement]:
    """A start model that was given the trait, the untrained model (one row), and the start model after training on
    trait data: "undefended", "PPS" and "IP"; by margins or by scores."""
    lowered = {name: mean_estimate(start - found, seeds=seeds) for name, found in after.items()}
    has_it = mean_estimate(start - untrained, seeds=seeds)
    beyond = mean_estimate(after["undefended"] - after["PPS"], seeds=seeds)
    took = Control(
        f"the start model has the trait ({scale.unit} above the untrained one)",
        has_it,
        has_it.low > scale.learnt,
        "validity",
    )
    less = Control(f"further undefended training lowers it less ({scale.unit})", beyond, beyond.low > 0)
    return (
        Measurement(f"pps.lowers-existing-{scale.name}", lowered["PPS"], [sane, took, less]),
        Measurement(f"ip.does-not-lower-existing-{scale.name}", lowered["IP"], [sane, took]),
    )


def edits(
    undefended: Outcomes,
    edited: Mapping[str, Outcomes],
    random: Mapping[str, Outcomes],
    untrained: Float[np.ndarray, "1 question"],
    scale: Scale,
    *,
    seeds: Sequence[int],
    sane: Control,
) -> tuple[Measurement, ...]:
    """Undefended training, with the gradient's component neutralised, attenuated or amplified, with the component along
    a `random` vector attenuated or amplified, and the untrained model (one row); by margins or by scores.

    That neutralising changes nothing says something only where another edit of the same component does. Where the scale
    has a top, room below it decides whether amplifying can show anything.
    """
    fall = {mode: mean_estimate(undefended - found, seeds=seeds) for mode, found in edited.items()}
    change = {
        mode: mean_estimate(sign * (undefended - random[mode]), seeds=seeds)
        for mode, sign in (("attenuate", 1), ("amplify", -1))
    }
    elsewhere = {
        mode: Control(
            f"the same edit along a random vector does less than half as much ({scale.unit})",
            found,
            found.value < most / 2 if most > 0 else None,  # nothing to halve where the edit itself did nothing
        )
        for (mode, found), most in zip(change.items(), (fall["attenuate"].value, -fall["amplify"].value), strict=True)
    }
    learnt = mean_estimate(undefended - untrained, seeds=seeds)
    taught = Control(
        f"undefended training gives the trait ({scale.unit} above the untrained model)",
        learnt,
        learnt.low > scale.learnt,
        "validity",
    )
    moved = Control(
        f"an edit of this component can lower it ({scale.unit}, attenuated)",
        fall["attenuate"],
        fall["attenuate"].low > 0,
        "validity",
    )
    above = []
    if scale.top is not None:
        room = mean_estimate(scale.top - undefended, seeds=seeds)
        above = [Control(f"undefended training leaves room above ({scale.unit})", room, room.value >= 5, "validity")]
    return (
        Measurement(f"pps.neutralise-keeps-{scale.name}", fall["neutralise"], [sane, taught, moved]),
        Measurement(f"pps.attenuate-lowers-{scale.name}", fall["attenuate"], [sane, taught, elsewhere["attenuate"]]),
        Measurement(
            f"pps.amplify-raises-{scale.name}",
            mean_estimate(edited["amplify"] - undefended, seeds=seeds),
            [sane, taught, *above, elsewhere["amplify"]],
        ),
    )
