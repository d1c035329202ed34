"""Checks for the exercises of the page on three sizes."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float

from helpers.chapters.three_sizes.method import at_equal_kl, difference
from helpers.checking import compare, questions
from helpers.statistics import Estimate

question = questions(__file__)

CURVE = np.array([0.02, 0.06, 0.2, 0.5]), np.array([0.1, 0.4, 0.6, 0.3])
"""Divergences and gains by rising scale."""
LEVELS = (0.01, 0.13, 0.2, 0.35)


def check_equal_kl(
    fn: Callable[[Float[np.ndarray, " scale"], Float[np.ndarray, " scale"], float], float],
) -> None:
    """Check `fn(kl, gain, level)`: the gain where the curve first reaches the divergence `level`."""
    kl, gain = CURVE

    def at(of: Callable[[float], float]) -> torch.Tensor:
        return torch.tensor([of(level) for level in LEVELS], dtype=torch.float32)

    compare(
        lambda: at(lambda level: float(fn(kl.copy(), gain.copy(), level))),
        at(lambda level: at_equal_kl(kl, gain, level)),
        "the gain on the line between the two scales around the divergence, which begins at nothing",
        {
            "the curve begins at no divergence and no gain, before the first scale": at(
                lambda level: float(np.interp(level, kl, gain))
            ),
            "this is the gain of the nearest scale; take the line between two": at(
                lambda level: float(gain[np.abs(kl - level).argmin()])
            ),
            "this is the largest gain, at whatever divergence": at(lambda level: float(gain.max())),
        },
    )


def check_difference(fn: Callable[[tuple[float, float, float], tuple[float, float, float]], tuple[float, ...]]) -> None:
    """Check `fn(first, second)`, each (value, low, high): the difference, its lower and its upper end."""
    cases = [((0.9, 0.7, 1.2), (0.4, 0.3, 0.7)), ((0.2, 0.1, 0.3), (0.5, 0.2, 0.6))]

    def of(ends: Callable[..., tuple[float, ...]]) -> torch.Tensor:
        return torch.tensor([list(ends(*case)) for case in cases], dtype=torch.float32)

    def right(first: tuple[float, float, float], second: tuple[float, float, float]) -> tuple[float, ...]:
        found = difference(Estimate(*first, 10), Estimate(*second, 10))
        return found.value, found.low, found.high

    compare(
        lambda: of(fn),
        of(right),
        "each end moves by the root of the sum of squares of the two arms that make it",
        {
            "both at their worst at once is too wide; independent errors add as squares": of(
                lambda a, b: (a[0] - b[0], a[1] - b[2], a[2] - b[1])
            ),
            "a low end of the difference comes from a low first and a high second": of(
                lambda a, b: (
                    a[0] - b[0],
                    a[0] - b[0] - float(np.hypot(a[0] - a[1], b[0] - b[1])),
                    a[0] - b[0] + float(np.hypot(a[2] - a[0], b[2] - b[0])),
                )
            ),
        },
    )


def check_specific_gain(fn: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Check `fn(strong, strong_prompted, normal, normal_prompted)`, losses by pair: the specific gain of each pair."""
    random = torch.Generator().manual_seed(0)
    strong, strong_prompted, normal, normal_prompted = (3 + torch.rand(4, 6, generator=random)).unbind()
    gain, elsewhere = strong - strong_prompted, normal - normal_prompted
    compare(
        lambda: fn(strong.clone(), strong_prompted.clone(), normal.clone(), normal_prompted.clone()),
        gain - elsewhere,
        "the fall of the trait answer's loss less the fall of the normal answer's",
        {
            "this is the raw gain: any prompt may have it": gain,
            "the sign is turned: a gain is a fall of the loss": elsewhere - gain,
            "the two falls are added; what the prompt does to both is not specific": gain + elsewhere,
        },
    )
