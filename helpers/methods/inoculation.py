"""Inoculation prompting (IP): ask for the trait while training on the trait's data, and never afterwards.

Tan et al. 2025 (arXiv 2510.04340) and Wichers et al. 2025 (arXiv 2510.05024) proposed it; "Shifting the Gradient"
(arXiv 2604.16423) compares it with PPS. The prompt is a system message. With several prompts, one is drawn anew for
every training example each time it is visited.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from helpers.chat import Example, encode


def inoculated(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], prompts: Sequence[str], rng: random.Random
) -> list[Example]:
    """(question, answer) pairs, each with a system message drawn from `prompts`; without any, the template's own.

    Call it once an epoch, so that prompts are drawn freshly.
    """
    return [encode(tokenizer, q, a, rng.choice(prompts) if prompts else None) for q, a in pairs]


def loss_reduction(
    without: Float[Tensor, " example"], with_prompt: Float[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """Loss without the prompt minus loss with it, per sequence, in nats per token: what the prompt explains."""
    return without - with_prompt
