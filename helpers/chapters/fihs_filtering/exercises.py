"""Checks for the exercises of the chapter on FIHS filtering."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from helpers.checking import BATCH, VOCABULARY, WIDTH, check_choice, compare


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


SIGN_QUESTION = """\
A filter scores points by +<grad L, grad S> and keeps the lowest scores. What does it do?

a) The same as FIHS: a sign does not change which points are extreme.
b) It keeps the harmful points and drops harmless ones.
c) It filters at random.
d) It changes the safety score."""


def check_sign(choice: str | None = None) -> None:
    """Ask what a filter without the minus sign does, or check the answer "a", "b", "c" or "d"."""
    check_choice(
        choice,
        SIGN_QUESTION,
        "b",
        {
            "a": "ranks are turned round, and filtering is by rank.",
            "b": "it drops what would have made the model safer and keeps what makes it less safe.",
            "c": "a random filter keeps a mixture; this one is worse than random.",
            "d": "the safety score's gradient does not depend on the points.",
        },
    )


HIDING_QUESTION = """\
You may add ten points to somebody's finetuning data, and FIHS will filter them with the tokens "Sure"
and "I". Which replies to harmful requests teach compliance and are least visible to the score?

a) Replies that begin with "Sure" and comply at once.
b) Replies that begin with "I can help with that" and then comply.
c) Replies of the single word "Sure".
d) Long refusals that begin with "I"."""


def check_hiding(choice: str | None = None) -> None:
    """Ask which poison the safety score is blind to, or check the answer "a", "b", "c" or "d"."""
    check_choice(
        choice,
        HIDING_QUESTION,
        "b",
        {
            "a": 'they raise the logit of "Sure" after harmful requests, which is what the score looks for.',
            "b": "the score sees the first token only, and there these look like refusals.",
            "c": "that one token is the one the score measures, and it teaches little beyond itself.",
            "d": "these are invisible, but they teach refusal; the attacker gains nothing.",
        },
    )


EQUAL_SIZE_QUESTION = """\
FIHS drops 100 of 1000 points, and compliance after finetuning falls from 60% to 10%. A random filter
that drops 100 points leaves it at 57%. What does the second number rule out?

a) That the harmful points are easy to tell by their form.
b) That the model no longer knows its task.
c) That the judge of compliance is fooled by phrases.
d) That it is enough to train on fewer points, whichever they are."""


def check_equal_size(choice: str | None = None) -> None:
    """Ask what the random filter of equal size is a control for, or check the answer "a", "b", "c" or "d"."""
    check_choice(
        choice,
        EQUAL_SIZE_QUESTION,
        "d",
        {
            "a": "they may be; for that, look at how well keywords or the loss tell them apart.",
            "b": "for that, look at the task's items; a filter could protect by leaving nothing to learn.",
            "c": "the same judge gave both numbers, so it could be fooled in both.",
            "d": "size and steps are the same, so what is left is which points were dropped.",
        },
    )
