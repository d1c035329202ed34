"""Checks for the exercises of the chapter on weight-diff steering."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.checking import WIDTH, compare, questions

question = questions(__file__)


def check_pile_mean(
    fn: Callable[[Float[Tensor, "token weight"], list[int]], Float[Tensor, " weight"]],
) -> None:
    """Check `fn(token_gradients, lengths)`, the pile-average gradient: mean over tokens, then over examples."""
    random = torch.Generator().manual_seed(0)
    lengths = [2, 7, 4]
    gradients = torch.randn(sum(lengths), WIDTH, generator=random)
    parts = gradients.split(lengths)
    compare(
        lambda: fn(gradients.clone(), lengths),
        torch.stack([part.mean(0) for part in parts]).mean(0),
        "the mean over each example's tokens, then over examples",
        {
            "this is the mean over all tokens, so long answers weigh more; average within each example first": (
                gradients.mean(0)
            ),
            "this adds up over tokens; take the mean within each example": torch.stack(
                [part.sum(0) for part in parts]
            ).mean(0),
            "this adds up over examples; take their mean": torch.stack([part.mean(0) for part in parts]).sum(0),
        },
    )


def check_alpha_for_ratio(
    fn: Callable[[Float[Tensor, " weight"], Float[Tensor, " weight"], float], float | Tensor],
) -> None:
    """Check `fn(v, delta, ratio)`: the alpha at which ||alpha v|| = ratio ||delta||."""
    random = torch.Generator().manual_seed(0)
    v, delta = 3 * torch.randn(WIDTH, generator=random), torch.randn(WIDTH, generator=random)
    want = 0.1 * delta.norm() / v.norm()
    compare(
        lambda: torch.as_tensor(fn(v.clone(), delta.clone(), 0.1), dtype=torch.float32),
        want,
        "||alpha v|| is the ratio times ||delta||",
        {
            "this is upside down; a longer v needs a smaller alpha": 0.1 * v.norm() / delta.norm(),
            "the ratio is missing": delta.norm() / v.norm(),
            "these are squared norms; take the root": 0.1 * delta.norm() ** 2 / v.norm() ** 2,
            "v's length is missing; divide by it": 0.1 * delta.norm(),
        },
    )


def check_project_on_diff(
    fn: Callable[[Float[Tensor, "m n"], Float[Tensor, "m n"], int], Float[Tensor, "m n"]],
) -> None:
    """Check `fn(v, delta, rank)`: v projected on the span of delta's leading singular pairs, on both sides."""
    random = torch.Generator().manual_seed(0)
    v, delta = torch.randn(WIDTH, 9, generator=random), torch.randn(WIDTH, 9, generator=random)
    u, _, wh = torch.linalg.svd(delta, full_matrices=False)
    left, right = u[:, :3] @ u[:, :3].T, wh[:3].T @ wh[:3]
    compare(
        lambda: fn(v.clone(), delta.clone(), 3),
        left @ v @ right,
        "U U^T v W W^T with delta's three leading singular pairs",
        {
            "the right side is not projected": left @ v,
            "the left side is not projected": v @ right,
            "this projects delta, not v": left @ delta @ right,
            "this cuts v to low rank; the subspace must be delta's": _truncated(v, 3),
        },
    )


def _truncated(matrix: Float[Tensor, "m n"], rank: int) -> Float[Tensor, "m n"]:
    u, s, wh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ wh[:rank]
