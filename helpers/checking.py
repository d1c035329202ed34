"""What the checks of all chapters share: comparing an answer, asking a question, saying what came out."""

import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BATCH, POSITIONS, WIDTH, VOCABULARY = 4, 7, 16, 11
COLUMNS = 66
"""What a page of the book shows of a printed line without scrolling."""


def check_choice(choice: str | None, question: str, right: str, replies: Mapping[str, str]) -> None:
    """Ask a multiple-choice question (choice None), or say what speaks for or against the letter chosen."""
    if choice is None:
        for line in re.sub(r"(?<!\n)\n(?!\n|[a-z]\))", " ", question).splitlines():
            print(textwrap.fill(line, COLUMNS, subsequent_indent="   " if line[1:2] == ")" else ""))
        return
    answer = choice.strip().lower().rstrip(").")
    if answer not in replies:
        *letters, last = (f'"{letter}"' for letter in replies)
        say_not_yet(f"answer {', '.join(letters)} or {last}.")
    elif answer == right:
        say_right(replies[answer])
    else:
        say_not_yet(replies[answer])


def compare(
    answer: Callable[[], Any],
    want: Tensor,
    definition: str,
    mistakes: Mapping[str, Tensor],
    *,
    unchanged: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Say whether the answer is the wanted tensor and, if not, which usual mistake it is."""
    got = call(answer, want.shape)
    if got is None:
        return
    got = got.detach().float()
    if got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-5):
        if unchanged is not None and not torch.equal(*unchanged):
            say_not_yet("the result is right, but the tensor passed in was changed; make a new one.")
        else:
            say_right(f"{definition}.")
        return
    for explanation, mistake in mistakes.items():
        if got.shape == mistake.shape and torch.allclose(got, mistake, rtol=1e-4, atol=1e-5):
            say_not_yet(f"{explanation}.")
            return
    if got.shape != want.shape:
        say_not_yet(f"the shape must be {tuple(want.shape)}, but yours is a single number.")
    else:
        say_not_yet(f"the numbers differ from the definition: {definition}.")


def call(answer: Callable[[], Any], shape: torch.Size) -> Tensor | None:
    """The learner's tensor, or None after saying what is wrong with it."""
    try:
        got = answer()
    except Exception as error:  # whatever a learner's function does, the lesson goes on
        say_not_yet(f"your function stopped with {type(error).__name__}: {error}")
        return None
    if got is None:
        say_not_yet("your function returned nothing; does it end with `return`?")
    elif not isinstance(got, Tensor):
        say_not_yet(f"return a tensor; your function returned a {type(got).__name__}.")
    elif got.shape not in (shape, torch.Size([])):
        say_not_yet(f"the shape must be {tuple(shape)}, but yours is {tuple(got.shape)}.")
    elif not torch.isfinite(got).all():
        say_not_yet("the result has entries that are not finite; is there a division by zero?")
    else:
        return got
    return None


def random_activations(random: torch.Generator) -> Float[Tensor, "batch pos d_model"]:
    """Activations, or gradients of them, of a small batch."""
    return torch.randn(BATCH, POSITIONS, WIDTH, generator=random)


def random_response_mask(random: torch.Generator) -> Bool[Tensor, "batch pos"]:
    """Response masks of unequal length, with a prompt before and padding behind."""
    starts = torch.randint(2, 4, (BATCH, 1), generator=random)
    lengths = torch.tensor([[1], [2], [3], [2]])
    place = torch.arange(POSITIONS)
    return (place >= starts) & (place < starts + lengths)


def say_right(text: str) -> None:
    """For an answer that is right: what it is, in the book's words."""
    print(textwrap.fill(f"Right: {text}", COLUMNS))


def say_not_yet(text: str) -> None:
    """For an answer that is not right: why, and not what would be."""
    print(textwrap.fill(f"Not yet: {text}", COLUMNS))
