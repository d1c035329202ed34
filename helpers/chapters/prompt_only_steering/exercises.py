"""Checks for the exercises of the chapter on prompt-only steering vectors."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.checking import WIDTH, compare, questions

question = questions(__file__)


def check_ends(fn: Callable[[int, int, int], Bool[Tensor, " pos"]]) -> None:
    """Check `fn(length, first, last)`: the mask of a prompt's first and last tokens, each once."""
    cases = [(6, 2, 2), (6, 0, 1), (6, 3, 0), (3, 2, 2), (4, 9, 1)]

    def marked(length: int, first: int, last: int) -> Tensor:
        place = torch.arange(length)
        return ((place < first) | (place >= length - last)).float()

    def shown(masks: list[Tensor]) -> Tensor:
        return torch.cat(masks)

    compare(
        lambda: shown([torch.as_tensor(fn(*case)).float() for case in cases]),
        shown([marked(*case) for case in cases]),
        "true for the first `first` and the last `last` of `length` positions",
        {
            "the middle is marked, and the ends are not": shown([1 - marked(*case) for case in cases]),
            "only the first tokens are marked": shown([marked(n, p, 0) for n, p, _ in cases]),
            "only the last tokens are marked": shown([marked(n, 0, s) for n, _, s in cases]),
            "one token too many at the end: the last position is length - 1": shown(
                [marked(n, p, s + 1) for n, p, s in cases]
            ),
        },
    )


def check_feature_step(
    fn: Callable[[float, Float[Tensor, " d_model"], float, float, float, Float[Tensor, " d_model"]], Tensor],
) -> None:
    """Check `fn(alpha, v, factor_rate, vector_rate, sign_alpha, sign_v)`: how far alpha v moves in one step."""
    random = torch.Generator().manual_seed(0)
    v = torch.randn(WIDTH, generator=random)
    sign = torch.randn(WIDTH, generator=random).sign()
    alpha, factor_rate, vector_rate, turn = 3.0, 0.5, 0.1, -1.0
    want = (alpha + factor_rate * turn) * (v + vector_rate * sign) - alpha * v
    compare(
        lambda: fn(alpha, v.clone(), factor_rate, vector_rate, turn, sign.clone()),
        want,
        "(alpha + eta_alpha s') (v + eta_v s) - alpha v",
        {
            "the term of both rates is missing: the two move at once": want - factor_rate * turn * vector_rate * sign,
            "this is where the feature ends; subtract where it began": want + alpha * v,
            "only the vector has moved": alpha * vector_rate * sign,
        },
    )


def check_overall(fn: Callable[[Any, Any, Any], Any]) -> None:
    """Check `fn(concept, relevance, fluency)`: the harmonic mean of ratings from 0 to 2, 0 where one is 0."""
    grades = torch.tensor([0.0, 1.0, 2.0])
    parts = torch.cartesian_prod(grades, grades, grades).T
    want = torch.where(parts.amin(0) > 0, 3 / (1 / parts.clamp(min=1e-9)).sum(0), 0.0)
    compare(
        lambda: torch.as_tensor(fn(*(part.numpy() for part in parts))),
        want,
        "3 / (1/c + 1/r + 1/f), and 0 where one of them is 0",
        {
            "this is the ordinary mean, which a single 0 hardly lowers": parts.mean(0),
            "this is the geometric mean": parts.prod(0) ** (1 / 3),
            "this is the lowest of the three": parts.amin(0),
        },
    )
