"""Inoculation prompting (IP): ask for the trait while training on the trait's data, and never afterwards.

Tan et al. 2025 (arXiv 2510.04340) and Wichers et al. 2025 (arXiv 2510.05024) proposed it; "Shifting the Gradient"
(arXiv 2604.16423) compares it with PPS. The prompt is a system message. With several prompts, one is drawn anew for
every training example each time it is visited.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def loss_reduction(
    without: Float[Tensor, " example"], with_prompt: Float[Tensor, " example"]
) -> Float[Tensor, " example"]:
    """Loss without the prompt minus loss with it, per sequence, in nats per token: what the prompt explains."""
    return without - with_prompt
