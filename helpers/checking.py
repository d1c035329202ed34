"""What the checks of all chapters share: comparing an answer, asking a question, saying what came out."""

import textwrap
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from helpers.params import nearest

Words = Annotated[str, StringConstraints(min_length=1)]

BATCH, POSITIONS, WIDTH, VOCABULARY = 4, 7, 16, 11
COLUMNS = 66
"""What a page of the book shows of a printed line without scrolling."""


class QuestionError(ValueError):
    """A question that cannot be asked; the message is one sentence saying what was wrong and what to do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook instead of a traceback."""
        return [f"QuestionError: {self}"]


class Question(BaseModel):
    """A multiple-choice question; options and replies have the letters a, b, c and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: Words
    options: dict[str, Words]
    right: str
    """The letter of the one right option."""
    replies: dict[str, Words]
    """For each option, what speaks for or against it."""

    @model_validator(mode="after")
    def _lettered(self) -> "Question":
        letters = ascii_lowercase[: max(2, len(self.options))]
        if "".join(sorted(self.options)) != letters:
            raise ValueError(f"options must be {', '.join(letters)}, at least two, but are {', '.join(self.options)}")
        if self.options.keys() != self.replies.keys():
            raise ValueError(f"replies must be {', '.join(letters)} as the options are")
        if self.right not in self.options:
            raise ValueError(f"right is {self.right!r}, which is no option")
        return self

    def ask(self) -> None:
        """Print the question and its options."""
        print(textwrap.fill(self.question, COLUMNS), end="\n\n")
        for letter, option in sorted(self.options.items()):
            print(textwrap.fill(f"{letter}) {option}", COLUMNS, subsequent_indent="   "))

    def check(self, choice: str) -> None:
        """Say what speaks for or against the letter chosen."""
        answer = choice.strip().lower().rstrip(").")
        if answer not in self.replies:
            *letters, last = (f'"{letter}"' for letter in sorted(self.replies))
            say_not_yet(f"answer {', '.join(letters)} or {last}.")
        elif answer == self.right:
            say_right(self.replies[answer])
        else:
            say_not_yet(self.replies[answer])


def read_questions(file: Path) -> dict[str, Question]:
    """Questions by name from a TOML file.

    Raises:
        QuestionError: if the file cannot be read, or a question in it is not complete.
    """
    try:
        return TypeAdapter(dict[str, Question]).validate_python(tomllib.loads(file.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg'].removeprefix('Value error, ')}"
    except OSError as error:
        reason = str(error.strerror)
    except ValueError as error:  # no TOML, or no UTF-8
        reason = str(error)
    where = "/".join(file.parts[-2:])
    raise QuestionError(f"The questions in {where} cannot be asked ({reason}): correct the file.")


def questions(exercises: str) -> Callable[..., None]:
    """What asks and checks the questions in `questions.toml`, beside the module of exercises with this `__file__`."""
    known = read_questions(Path(exercises).with_name("questions.toml"))

    def question(name: str, choice: str | None = None) -> None:
        """Ask the question called `name`, or say what speaks for or against the letter chosen.

        Raises:
            QuestionError: if the chapter has no such question.
        """
        if name not in known:
            raise QuestionError(f"There is no question {name!r} in this chapter{nearest(name, known)}")
        if choice is None:
            known[name].ask()
        else:
            known[name].check(choice)

    return question


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
