"""Checks for the exercises of the chapter on refusal redistribution."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.checking import BATCH, WIDTH, compare, questions

question = questions(__file__)


def check_ablation(fn: Callable[[Float[Tensor, "batch d_model"], Float[Tensor, "k d_model"]], Tensor]) -> None:
    """Check `fn(a, directions)`: activations with orthonormal directions projected out."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(BATCH, WIDTH, generator=random)
    directions = torch.linalg.qr(torch.randn(WIDTH, 3, generator=random))[0].T
    along = a @ directions.T @ directions
    compare(
        lambda: fn(a.clone(), directions.clone()),
        a - along,
        "a - D^T D a",
        {
            "this is the part that is to be removed": along,
            "only the first direction is removed": a - (a @ directions[:1].T) @ directions[:1],
            "the component is turned round, not removed": a - 2 * along,
        },
    )


def check_covariance_loss(fn: Callable[[Float[Tensor, "batch d_model"], Bool[Tensor, " batch"]], Tensor]) -> None:
    """Check `fn(z, harmful)`: ||S_1 - S_0||_F^2 / d^2 with unbiased covariances of the two classes."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(10, WIDTH, generator=random)
    harmful = torch.arange(10) < 4

    def loss(correction: int = 1, centred: bool = True) -> Tensor:
        found = []
        for part in (z[harmful], z[~harmful]):
            part = part - part.mean(0) if centred else part
            found.append(part.T @ part / (len(part) - correction))
        return (found[0] - found[1]).square().sum() / WIDTH**2

    compare(
        lambda: fn(z.clone(), harmful.clone()),
        loss(),
        "||S_1 - S_0||_F^2 / d^2",
        {
            "divide by n - 1, not by n": loss(correction=0),
            "the class means are not taken off": loss(centred=False),
            "divide by d squared, not by d": loss() * WIDTH,
            "this is the norm, not its square": (loss() * WIDTH**2).sqrt() / WIDTH**2,
        },
    )


def check_k_star(fn: Callable[[list[float]], int]) -> None:
    """Check `fn(rates)`: the smallest number of directions with a refusal rate below 0.3, or `len(rates)`."""
    compare(
        lambda: torch.tensor(
            [
                fn(rates)
                for rates in ([1.0, 0.2, 0.1], [1.0, 0.6, 0.3, 0.25], [0.9, 0.8, 0.7], [0.2, 0.1], [1.0, 0.2, 0.5])
            ],
            dtype=torch.float32,
        ),
        torch.tensor([1.0, 3.0, 3.0, 0.0, 1.0]),
        "the first K with a rate below 0.3",
        {
            "0.3 itself is not below 0.3": torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0]),
            "count from 0: row 0 is the model as it is": torch.tensor([2.0, 4.0, 4.0, 1.0, 2.0]),
            "the last such K, not the first, is given": torch.tensor([2.0, 3.0, 3.0, 1.0, 1.0]),
        },
    )
