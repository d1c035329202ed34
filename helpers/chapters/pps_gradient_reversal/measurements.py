"""What the claims on preventative steering are judged by (chapter 1).

Cosines are one a held-out trait sequence, of activation gradient and persona vector. Scores, 0 to 100, and projections
are (seed, question).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from helpers.statistics import jackknife, mean_estimate, rank_correlation, share
from helpers.studies.nulls import rarely
from helpers.verdicts import NOT_MEASURED, Control, Measurement

Cosines = Float[np.ndarray, " sequence"]
Outcomes = Float[np.ndarray, "seed question"]
Null = Float[np.ndarray, " direction"]

ELSEWHERE = 0.2
"""Nats per token that PPS may cost on normal answers: as much as it has to take off the margin."""

FEWEST_POINTS = 12
"""Steering vectors that a rank correlation over them needs."""


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
            [
                Control(
                    f"{len(random)} random vectors of equal norm do not reverse (share of sequences)",
                    by_chance,
                    by_chance.high < 0.5,
                )
            ],
        ),
        Measurement("pps.random-no-reversal", by_chance),
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
) -> tuple[Measurement, Measurement, Measurement]:
    """Models by name: "undefended", "PPS", "random" and "untrained" (one row).

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


def cross_trait(cosines: Float[np.ndarray, " vector"], scores: Float[np.ndarray, " vector"]) -> Measurement:
    """Mean cosine under PPS before training, and mean trait score after it, one of each a steering vector."""
    if len(cosines) < FEWEST_POINTS:
        few = f"{len(cosines)} steering vectors cannot decide a rank correlation; {FEWEST_POINTS} are needed."
        return Measurement("pps.cosine-predicts-cross-trait", NOT_MEASURED, (), few)
    return Measurement("pps.cosine-predicts-cross-trait", rank_correlation(cosines, scores))


def existing_trait(
    start: Outcomes,
    untrained: Float[np.ndarray, "1 question"],
    after: Mapping[str, Outcomes],
    *,
    seeds: Sequence[int],
    sane: Control,
) -> tuple[Measurement, Measurement]:
    """Scores of a start model that was given the trait, of the untrained model (one row), and of the start model after
    training on trait data: "undefended", "PPS" and "IP"."""
    lowered = {name: mean_estimate(start - scores, seeds=seeds) for name, scores in after.items()}
    has_it = mean_estimate(start - untrained, seeds=seeds)
    beyond = mean_estimate(after["undefended"] - after["PPS"], seeds=seeds)
    took = Control(
        "the start model has the trait (points above the untrained one)", has_it, has_it.low > 20, "validity"
    )
    return (
        Measurement(
            "pps.lowers-existing-trait",
            lowered["PPS"],
            [sane, took, Control("further undefended training lowers it less (points)", beyond, beyond.low > 0)],
        ),
        Measurement("ip.does-not-lower-existing-trait", lowered["IP"], [sane, took]),
    )


def edits(
    undefended: Outcomes,
    edited: Mapping[str, Outcomes],
    untrained: Float[np.ndarray, "1 question"],
    *,
    seeds: Sequence[int],
    sane: Control,
) -> tuple[Measurement, ...]:
    """Scores after undefended training, with the gradient's component neutralised, attenuated or amplified, and of the
    untrained model (one row).

    That neutralising changes nothing says something only where another edit of the same component does.

    Room above the undefended score decides whether amplifying can show anything.
    """
    fall = {mode: mean_estimate(undefended - scores, seeds=seeds) for mode, scores in edited.items()}
    room = mean_estimate(100.0 - undefended, seeds=seeds)
    elsewhere = Control("the same edit along a random vector does nothing", float("nan"), None)
    above = Control("undefended training leaves room above (points)", room, room.value >= 5, "validity")
    learnt = mean_estimate(undefended - untrained, seeds=seeds)
    taught = Control(
        "undefended training gives the trait (points above the untrained model)", learnt, learnt.low > 20, "validity"
    )
    moved = Control(
        "an edit of this component can lower the score (points, attenuated)",
        fall["attenuate"],
        fall["attenuate"].low > 0,
        "validity",
    )
    return (
        Measurement("pps.neutralise-keeps-trait", fall["neutralise"], [sane, taught, moved]),
        Measurement("pps.attenuate-lowers-trait", fall["attenuate"], [sane, taught, elsewhere]),
        Measurement(
            "pps.amplify-raises-trait",
            mean_estimate(edited["amplify"] - undefended, seeds=seeds),
            [sane, taught, above, elsewhere],
        ),
    )
