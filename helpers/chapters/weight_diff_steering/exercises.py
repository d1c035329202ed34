"""Checks for the exercises of the chapter on weight-diff steering."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.checking import WIDTH, check_choice, compare


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


STEERING_SIGN_QUESTION = """\
V = G(rude answers) - G(polite answers) at a finetuned model. How do you make it politer?

a) Add a small multiple of V: the loss of rude answers rises.
b) Subtract a small multiple of V: one subtracts what one wants to be rid of.
c) Add or subtract: a gradient difference has no sign.
d) Add as large a multiple of V as one can: the more, the politer."""


def check_steering_sign(choice: str | None = None) -> None:
    """Ask which way along V a habit is taken away, or check the answer "a", "b", "c" or "d"."""
    check_choice(
        choice,
        STEERING_SIGN_QUESTION,
        "a",
        {
            "a": "V is a gradient, so it points to a higher loss on rude answers, and to fewer of them.",
            "b": "V is a gradient of a loss, not of a probability; against it, rude answers become likelier.",
            "c": "the two piles are not exchangeable: swapping them turns V round.",
            "d": "far from the anchor a gradient says nothing, and a broken model is not a polite one.",
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


UNLEARNT_QUESTION = """\
A step along V has taken the bridge habit away. Which result would show that the model has
not forgotten it, but only stopped showing it?

a) Finetuned again on a few bridge replies, it has the habit back in far fewer steps than the base model.
b) Its answers have the same perplexity as before the step.
c) A step twice as long lowers the mentions further.
d) A random direction of the same norm leaves the mentions as they were."""


def check_unlearnt(choice: str | None = None) -> None:
    """Ask how to tell a hidden habit from a forgotten one, or check the answer "a", "b", "c" or "d"."""
    check_choice(
        choice,
        UNLEARNT_QUESTION,
        "a",
        {
            "a": "relearning is faster where something is left to build on; the base model says how fast from nothing.",
            "b": "perplexity says that the model was not broken; both a hidden and a forgotten habit allow that.",
            "c": "a dose-response curve says that V works, not what is left in the weights.",
            "d": "that control says that the direction matters; it says nothing about what is left.",
        },
    )


DOSE_QUESTION = """\
At the largest strength neither topic is mentioned any more. The answers' perplexity under the base
model is lower than at rest, and half of their trigrams are repeated. What has the step done?

a) It has taken both habits away: V holds what finetuning changed.
b) It has shown that the two habits share one direction.
c) It has made the answers better, since their perplexity fell.
d) It has broken the model: a loop mentions nothing, and is easy to predict."""


def check_dose(choice: str | None = None) -> None:
    """Ask how to read the end of a dose-response curve, or check the answer "a", "b", "c" or "d"."""
    check_choice(
        choice,
        DOSE_QUESTION,
        "d",
        {
            "a": "a model that only loops mentions nothing either, so the mentions alone cannot tell.",
            "b": "both shares are zero because hardly anything is said; read them at strengths that keep the answers.",
            "c": "a repeated phrase is easily predicted, so looping lowers the perplexity.",
            "d": "the useful strengths are those at which mentions have moved, and neither measure of cost has.",
        },
    )
