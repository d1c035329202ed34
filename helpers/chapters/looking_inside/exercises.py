"""Checks for the exercises of the primer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.checking import POSITIONS, VOCABULARY, WIDTH, compare, questions, random_response_mask

question = questions(__file__)


def check_predicting(fn: Callable[[Bool[Tensor, "batch pos"]], Bool[Tensor, "batch pos"]]) -> None:
    """Check `fn(response)`: the positions whose next token belongs to the response."""
    response = random_response_mask(torch.Generator().manual_seed(0))
    want = F.pad(response[:, 1:], (0, 1)).float()
    compare(
        lambda: fn(response.clone()),
        want,
        "each position is marked whose next token belongs to the response",
        {
            "this is shifted the wrong way; position t predicts token t + 1": F.pad(response[:, :-1], (1, 0)).float(),
            "these are the response tokens themselves; a token is predicted one position earlier": response.float(),
            "the last column wraps round to the first; nothing follows the last position": response.roll(1, 1).float(),
            "the positions that predict and those that are predicted are both marked": (
                response | F.pad(response[:, 1:], (0, 1))
            ).float(),
        },
    )


def check_logit_lens(
    fn: Callable[
        [Float[Tensor, "pos d_model"], Float[Tensor, " d_model"], Float[Tensor, "vocab d_model"], float],
        Float[Tensor, "pos vocab"],
    ],
) -> None:
    """Check `fn(h, scale, unembedding, eps)`: root-mean-square normalisation, then the unembedding."""
    random = torch.Generator().manual_seed(0)
    h = torch.randn(POSITIONS, WIDTH, generator=random) * 3
    scale = torch.rand(WIDTH, generator=random) + 0.5
    unembedding, eps = torch.randn(VOCABULARY, WIDTH, generator=random), 0.5
    squares = h.square().mean(-1, keepdim=True)
    normal = h / (squares + eps).sqrt()
    given = h.clone()
    compare(
        lambda: fn(given, scale, unembedding, eps),
        (normal * scale) @ unembedding.T,
        "normalised as at the model's end, then one number for each token of the vocabulary",
        {
            "the activations are not normalised first": h @ unembedding.T,
            "they are scaled, but not divided by their root mean square": (h * scale) @ unembedding.T,
            "the scale is left out": normal @ unembedding.T,
            "eps is left out": (h / squares.sqrt() * scale) @ unembedding.T,
            "eps is added to the root; add it to the mean of squares": (h / (squares.sqrt() + eps) * scale)
            @ unembedding.T,
            "this divides by the mean of squares; take its root": (h / (squares + eps) * scale) @ unembedding.T,
            "this divides by the length; take the mean of squares and not their sum": (
                (h / (h.square().sum(-1, keepdim=True) + eps).sqrt() * scale) @ unembedding.T
            ),
            "the mean is over positions; take it over the last dimension": (
                (h / (h.square().mean(0) + eps).sqrt() * scale) @ unembedding.T
            ),
        },
        unchanged=(given, h),
    )


def check_slope(
    fn: Callable[
        [Callable[[Float[Tensor, " d_model"]], Tensor], Float[Tensor, " d_model"], Float[Tensor, " d_model"], float],
        float | Tensor,
    ],
) -> None:
    """Check `fn(loss, h, direction, size)`, a central difference along the direction at unit length."""
    random = torch.Generator().manual_seed(0)
    h, direction = torch.randn(WIDTH, generator=random), torch.randn(WIDTH, generator=random) * 3
    reader = torch.randn(WIDTH, generator=random)
    size = 0.25

    def loss(at: Float[Tensor, " d_model"]) -> Tensor:
        return (reader @ at).exp() / 10 + at.square().sum()

    def central(step: Tensor, width: float) -> Tensor:
        return (loss(h + step) - loss(h - step)) / width

    unit = direction / direction.norm()
    step = size * unit
    want = central(step, 2 * size)
    compare(
        lambda: torch.as_tensor(fn(loss, h.clone(), direction, size), dtype=torch.float32),
        want,
        "a central difference along the unit direction",
        {
            "the sign is wrong": -want,
            "the direction is not normalised first": central(size * direction, 2 * size),
            "the two points are twice `size` apart; divide by that": central(step, size),
            "this is the difference, not the slope; divide by how far the points are apart": central(step, 1.0),
            "this looks ahead only; a central difference looks back as far": (loss(h + step) - loss(h)) / size,
            "this is the gradient's value; the exercise asks for a difference of two losses": (
                (reader @ h).exp() / 10 * reader + 2 * h
            )
            @ unit,
        },
    )


def check_turning_point(
    fn: Callable[[Float[Tensor, " d_model"], Float[Tensor, " d_model"], float, Float[Tensor, " d_model"]], Any],
) -> None:
    """Check `fn(w, h, y, v)`: the coefficient at which the gradient of (w . (h + a v) - y)^2 / 2 is zero."""
    random = torch.Generator().manual_seed(0)
    w, h, v = (torch.randn(WIDTH, generator=random) for _ in range(3))
    y = 5.0
    want = (y - w @ h) / (w @ v)
    compare(
        lambda: torch.as_tensor(fn(w, h, y, v), dtype=torch.float32),
        want,
        "the coefficient at which the steered activation is read as exactly y",
        {
            "the sign is wrong; steering adds a v to h": -want,
            "what h says already is left out": y / (w @ v),
            "divide by how far one unit of a moves the reading, w . v": y - w @ h,
            "this divides by the length of v; what counts is how far v moves the reading, w . v": (y - w @ h)
            / v.norm(),
            "this divides by w . w; steering is along v and not along w": (y - w @ h) / (w @ w),
        },
    )
