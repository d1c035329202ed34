"""What all judges of answers share: their scores, their errors, and what they are given."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

Scores = Float[np.ndarray, " answers"]
"""0 to 100 for each answer, NaN where a judge gives none."""


class JudgeError(RuntimeError):
    """A judge that cannot do its work; the message is one sentence, says what to do and holds no key."""


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores answers from 0 to 100."""

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> Scores: ...


def check_lengths(questions: Sequence[str], answers: Sequence[str]) -> None:
    """Raise `JudgeError` unless there is one answer for each question."""
    if len(questions) != len(answers):
        raise JudgeError(f"A judge needs one answer per question; got {len(questions)} and {len(answers)}.")
