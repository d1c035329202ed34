"""What the claims on weight-space steering are judged by (chapter 3).

Labels are true where an answer to a held-out question mentions a topic (or is rude); over runs, (seed, question).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float

from helpers.statistics import Estimate, mean_estimate
from helpers.verdicts import NOT_MEASURED, Control, Measurement

Labels = Bool[np.ndarray, "seed question"]
OneRun = Bool[np.ndarray, " question"]
Values = Float[np.ndarray, " question"]

DEALS = 10_000


def steering_effect(minus: np.ndarray, plus: np.ndarray) -> np.ndarray:
    """Per answer: labelled at -alpha V, minus labelled at +alpha V."""
    return minus.astype(float) - plus.astype(float)


def deal_effects(
    slopes: Float[np.ndarray, " answer"], of_topic: Bool[np.ndarray, " answer"], *, seed: int, deals: int = DEALS
) -> tuple[float, Float[np.ndarray, " deal"]]:
    """What the real piles, and piles dealt at random from the same answers, do to the held-out margin at first order.

    A pile difference is linear in the answers' gradients, so each deal's effect is a difference of means of `slopes`,
    the answers' directional derivatives along the margin's gradient.
    """

    def effect(chosen: Bool[np.ndarray, "*deal answer"]) -> Float[np.ndarray, "*deal"]:
        count = chosen.sum(-1)
        inside = chosen @ slopes
        return np.asarray(inside / count - (slopes.sum() - inside) / (len(slopes) - count))

    rng = np.random.default_rng(seed)
    dealt = rng.permuted(np.tile(of_topic, (deals, 1)), axis=1)
    return float(effect(of_topic)), effect(dealt)


def not_looping(looping: Mapping[str, Values]) -> Control:
    """That steered answers are answers: rises of their repeated trigrams over those of unsteered ones, by condition."""
    loops = mean_estimate(max(looping.values(), key=np.mean))
    return Control("no condition loops much more than unsteered (share)", loops, loops.value < 0.1, "validity")


def topic(
    name: str,
    at: Mapping[str, Labels],
    other: Mapping[str, Labels],
    random: Float[np.ndarray, "direction question"],
    shuffled: tuple[float, Float[np.ndarray, " deal"]],
    looping: Mapping[str, Values],
    *,
    answers: int,
    seeds: Sequence[int],
) -> tuple[Measurement, ...]:
    """The direction of one topic.

    Args:
        name: the topic.
        at: labels of the topic at "finetuned", "minus" and "plus".
        other: labels of the other topic at "minus" and "plus", along the same direction.
        random: effects of the topic along random directions of equal norm.
        shuffled: `deal_effects`.
        answers: how many were dealt.
        looping: of the answers at "minus" and "plus", as `not_looping` has them.
    """
    talks = {end: not_looping({end: loops}) for end, loops in looping.items()}
    own, of_other = (steering_effect(a["minus"], a["plus"]) for a in (at, other))
    by_chance = mean_estimate(random)
    meaningless = Control(
        f"{len(random)} random directions of equal norm move it less than half as far (share of answers)",
        by_chance,
        abs(by_chance.value) < own.mean() / 2,
    )
    effect, dealt = shuffled
    beyond, deals = (effect - dealt.mean()) / dealt.std(), (dealt - dealt.mean()) / dealt.std()
    low, high = beyond - np.quantile(deals, [0.975, 0.025])
    return (
        Measurement(
            f"weights.{name}-minus-raises",
            mean_estimate(steering_effect(at["minus"], at["finetuned"]), seeds=seeds),
            [talks["minus"], meaningless],
        ),
        Measurement(
            f"weights.{name}-plus-lowers",
            mean_estimate(steering_effect(at["finetuned"], at["plus"]), seeds=seeds),
            [talks["plus"], meaningless],
        ),
        Measurement(
            f"weights.{name}-specific", mean_estimate(own - of_other, seeds=seeds), [*talks.values(), meaningless]
        ),
        # The values that a test at 5% against the deals, moved by a constant, does not reject. The share of deals that
        # do as much would be anywhere between 0 and 1 where there is nothing.
        Measurement(f"weights.{name}-beats-shuffled", Estimate(float(beyond), float(low), float(high), answers)),
    )


def coherence(rises: Mapping[str, Values], looping: Mapping[str, Values]) -> Measurement:
    """Rises of the answers' log perplexity and of their repeated trigrams over the anchor's, by steered condition."""
    cost = mean_estimate(max(rises.values(), key=np.mean))
    return Measurement("weights.coherent", cost, [not_looping(looping)])


def neutral_pile(at_rest: OneRun, with_base: OneRun, with_anchor: OneRun) -> Measurement:
    """Labels of the *other* topic: at the anchor, and at +alpha V with the base model's or the anchor's answers as the
    neutral pile."""
    return Measurement(
        "weights.base-neutral-lowers-both",
        mean_estimate(steering_effect(at_rest, with_base) - steering_effect(at_rest, with_anchor)),
    )


def hadamard(plain: Values, weighted: Values) -> Measurement:
    """Rises of the held-out bridge answers' losses under V and under the |Delta|-weighted V, at the same alpha."""
    return Measurement("weights.hadamard-weaker", mean_estimate(plain - weighted))


def portability(steered: OneRun, base: OneRun, looping: Values) -> Measurement:
    """Labels of the base model's answers with -alpha V and without, and the rise of their repeated trigrams."""
    return Measurement(
        "weights.portable",
        mean_estimate(steering_effect(steered, base)),
        [
            not_looping({"base": looping}),
            Control("a random direction of equal norm does less than half as much", float("nan"), None),
        ],
    )


def sparseness(rarest: Mapping[str, OneRun] | None) -> Measurement:
    """Labels at "minus" and "plus" after finetuning on the smallest share of bridge replies; None if it was not run."""
    if rarest is None:
        return Measurement("weights.sparse", NOT_MEASURED, (), "This preset leaves the section out.")
    return Measurement("weights.sparse", mean_estimate(steering_effect(rarest["minus"], rarest["plus"])))


def harm(at: Mapping[str, OneRun], random: Float[np.ndarray, "direction question"]) -> tuple[Measurement, Measurement]:
    """Rude answers at "finetuned", "minus" and "plus", and effects along random directions of equal norm."""
    own, by_chance = steering_effect(at["minus"], at["plus"]), mean_estimate(random)
    meaningless = Control(
        f"{len(random)} random directions of equal norm move it less than half as far (share of answers)",
        by_chance,
        abs(by_chance.value) < own.mean() / 2,
    )
    return (
        Measurement(
            "weights.harm-minus-raises", mean_estimate(steering_effect(at["minus"], at["finetuned"])), [meaningless]
        ),
        Measurement(
            "weights.harm-plus-lowers", mean_estimate(steering_effect(at["finetuned"], at["plus"])), [meaningless]
        ),
    )
