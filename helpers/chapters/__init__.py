"""The rooms of the chapters: one folder each, under its notebook's name without the number.

`params.py` and `presets.toml` (its parameters), `method.py` (its mathematics, pure functions on tensors), `study.py`
(the stages that take long, stored), `measurements.py` (from arrays to what is judged), `exercises.py` (checks of
answers) and `questions.toml` (multiple-choice questions, which these ask).
"""

from importlib import import_module
from pathlib import Path

from helpers.params import ParameterError, Params, nearest

ROOMS = sorted(path.parent.name for path in Path(__file__).parent.glob("*/params.py"))


CHAPTERS: dict[str, type[Params]] = {
    value.chapter: value
    for room in ROOMS
    for value in vars(import_module(f"helpers.chapters.{room}.params")).values()
    if isinstance(value, type) and issubclass(value, Params) and "chapter" in vars(value)
}
"""The parameter class of each chapter, by its notebook's name without suffix."""


def params_of(chapter: str) -> type[Params]:
    """The parameter class of a chapter, by its notebook's name without suffix, such as `01_pps_gradient_reversal`.

    Raises:
        ParameterError: if there is no such chapter.
    """
    if chapter not in CHAPTERS:
        raise ParameterError(f"There is no chapter {chapter!r} in helpers/chapters{nearest(chapter, CHAPTERS)}")
    return CHAPTERS[chapter]
