"""Inoculation prompting (IP): ask for the trait while training on the trait's data, and never afterwards.

Tan et al. 2025 (arXiv 2510.04340) and Wichers et al. 2025 (arXiv 2510.05024) proposed it; "Shifting the Gradient"
(arXiv 2604.16423) compares it with PPS. The prompt is a system message. With several prompts, one is drawn anew for
every training example each time it is visited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def loss_reduction(
    without: Float[Tensor, " example"], with_prompt: Float[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """Loss without the prompt minus loss with it, per sequence, in nats per token: what the prompt explains."""
    return without - with_prompt


def specific_gain(
    strong: Float[Tensor, " example"],
    strong_prompted: Float[Tensor, " example"],
    normal: Float[Tensor, " example"],
    normal_prompted: Float[Tensor, " example"],
) -> Float[Tensor, " example"]:
    """What a prompt explains of trait answers beyond what it explains of normal answers to the same questions.

    From mean response losses without and with the prompt, in nats per token. Any prompt makes such prose likelier than
    the template's own message does, so the raw gain has the wrong null.
    """
    return loss_reduction(strong, strong_prompted) - loss_reduction(normal, normal_prompted)


Gradient = Mapping[str, Tensor]
"""A gradient over weights, by parameter name."""


def pressure_left(defended: Gradient, plain: Gradient, along: Gradient) -> float:
    """<g_defended, u> / <g_plain, u>: how much of the push along u training with a defence keeps.

    With u the gradient of the margin on other rows this is kappa_M: 1 if the defence leaves the pressure on the trait
    as it is, 0 if it takes all of it away. With u = g_plain it is kappa, the push on everything.
    """

    def product(one: Gradient, other: Gradient) -> float:
        parts = [torch.sum(one[n].double() * other[n].double()) for n in along]
        return float(sum(parts))

    return product(defended, along) / product(plain, along)


def equal_dose(wanted: float, doses: Sequence[float], protection: Sequence[float]) -> float:
    """The least dose that protects as much as is wanted, by lines between the doses that were tried, from 0 on.

    The largest dose where none protects so much, and 0 where nothing is wanted.

    Args:
        wanted: protection, in nats per token.
        doses: rising, all above 0.
        protection: of each dose, in nats per token; dose 0 protects by 0.
    """
    a, p = [0.0, *doses], [0.0, *protection]
    for i in range(len(doses)):
        if p[i] >= wanted:
            return a[i]
        if p[i + 1] >= wanted:
            return a[i] + float((wanted - p[i]) / (p[i + 1] - p[i])) * (a[i + 1] - a[i])
    return a[-1]
