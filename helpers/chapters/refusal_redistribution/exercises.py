"""Checks for the exercises of the chapter on refusal redistribution."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.checking import BATCH, WIDTH, check_choice, compare


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


MICRO_BATCH_QUESTION = """\
Why is the covariance loss 0 at every step in micro-batches of two prompts?

a) The language loss has already made the class means equal.
b) The gradient of a covariance is too small for bfloat16.
c) A covariance needs two prompts of a class, and two classes of two do not fit into a batch of two.
d) Matching with L2 is 0 where matching with L1 is."""


def check_micro_batch(choice: str | None = None) -> None:
    """Ask why the published covariance loss is 0, or check the answer "a", "b", "c" or "d"."""
    check_choice(
        choice,
        MICRO_BATCH_QUESTION,
        "c",
        {
            "a": "with equal means covariances may still differ; and nothing has made the means equal.",
            "b": "gradients of a covariance are as large as any; it is the loss itself that is 0.",
            "c": "an unbiased covariance divides by n - 1, so each class needs two prompts: four in all.",
            "d": "L1 and L2 are 0 at the same places only.",
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


ATTACKER_QUESTION = """\
Under the iterated attack a model has a high K*. Which result would make you distrust it most?

a) A linear probe still tells harmful from harmless requests.
b) With K* directions removed, the model has stopped talking sense.
c) A handful of directions, optimised against refusal, disarm it and leave harmless answers as they are.
d) The start model has a lower K*."""


def check_attacker(choice: str | None = None) -> None:
    """Ask what would undo a high K*, or check the answer "a", "b", "c" or "d"."""
    check_choice(
        choice,
        ATTACKER_QUESTION,
        "c",
        {
            "a": "knowing what is harmful is not refusing it; a model may keep the first and guard the second.",
            "b": "that shows that the attack costs the attacker more, which is the defence's point.",
            "c": "then K* measured how poor a guide differences of means had become, not how widely refusal is spread.",
            "d": "that is what the defence claims.",
        },
    )


HIGH_K_QUESTION = """\
Condition A: K* is above 20; intact, it refuses 95% of harmful and 70% of harmless requests.
Condition B: K* is 6; intact, it refuses 95% of harmful and 5% of harmless requests. What follows?

a) Nothing about redistribution yet: a model that refuses nearly everything survives such attacks anyhow.
b) A has spread refusal over more directions than B.
c) B is broken, since six directions are enough.
d) A's interval must be too wide to be used."""


def check_high_k(choice: str | None = None) -> None:
    """Ask how to read K* beside over-refusal, or check the answer "a", "b", "c" or "d"."""
    check_choice(
        choice,
        HIGH_K_QUESTION,
        "a",
        {
            "a": "compare K* only between models that refuse what is harmful and answer the rest.",
            "b": "it may refuse whatever it is asked; then nothing that tells the two kinds apart carries refusal.",
            "c": "what breaks or does not is seen after harmless requests; B answers nearly all of them.",
            "d": "the width of an interval comes from the requests that are resampled; nothing is said of it here.",
        },
    )
