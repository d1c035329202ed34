"""Checks for the exercises of the chapter on FIHS filtering."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from helpers.checking import BATCH, VOCABULARY, WIDTH, compare, questions

question = questions(__file__)


def check_fihs(
    fn: Callable[[Float[Tensor, "point weight"], Float[Tensor, " weight"]], Float[Tensor, " point"]],
) -> None:
    """Check `fn(gradients, safety_gradient)`: minus the inner product of each point's loss gradient with grad S."""
    random = torch.Generator().manual_seed(0)
    gradients, safety = torch.randn(BATCH, WIDTH, generator=random), torch.randn(WIDTH, generator=random)
    product = gradients @ safety
    compare(
        lambda: fn(gradients.clone(), safety.clone()),
        -product,
        "minus the inner product of each point's loss gradient with the safety score's",
        {
            "the sign is turned: descent moves the weights along minus the loss's gradient": product,
            "this is the cosine; a longer gradient makes a longer step": -F.cosine_similarity(
                gradients, safety[None], dim=-1
            ),
            "the safety gradient has been scaled to unit length": -product / safety.norm(),
        },
    )


def check_safety_score(fn: Callable[[Float[Tensor, "probe vocabulary"], int, int], Tensor]) -> None:
    """Check `fn(logits, unsafe, safe)`: the mean over probes of the unsafe token's logit minus the safe one's."""
    logits = torch.randn(BATCH, VOCABULARY, generator=torch.Generator().manual_seed(0))
    unsafe, safe = 3, 7
    want = (logits[:, unsafe] - logits[:, safe]).mean()
    p = logits.softmax(-1)
    compare(
        lambda: fn(logits.clone(), unsafe, safe),
        want,
        "the mean over probes of z_unsafe - z_safe",
        {
            "this is safe minus unsafe; larger has to mean less safe": -want,
            "take the mean over the probes, not the sum": want * BATCH,
            "this is a difference of probabilities; take logits": (p[:, unsafe] - p[:, safe]).mean(),
        },
    )


def check_crossing(fn: Callable[[float, float, float, float, float], float]) -> None:
    """Check `fn(low, high, spread, low_weight, high_weight)`: where two Gaussians of one spread are equally likely."""
    cases = [(0.0, 4.0, 1.0, 0.5, 0.5), (0.0, 4.0, 1.0, 0.9, 0.1), (-1.0, 3.0, 2.0, 0.8, 0.2)]

    def at(low: float, high: float, spread: float, first: float, second: float) -> Tensor:
        return (low + high) / 2 + spread**2 / (high - low) * torch.tensor(first / second).log()

    compare(
        lambda: torch.tensor([float(fn(*case)) for case in cases]),
        torch.stack([at(*case) for case in cases]),
        "the midpoint, moved by spread^2 / (high - low) * log(low_weight / high_weight)",
        {
            "this is the midpoint; the rarer component's region is smaller": torch.tensor([2.0, 2.0, 1.0]),
            "the boundary moves towards the rarer component, not away from it": torch.stack(
                [at(a, b, s, second, first) for a, b, s, first, second in cases]
            ),
        },
    )
