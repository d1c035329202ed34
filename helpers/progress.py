"""How far a long step is, and how much time is left: one way for training, attacks, answers and gradients.

    with progress(steps, "finetuning", "step") as bar:
        for batch in training_batches:
            ...
            bar.update()

In a notebook it is a line under the cell that is gone at the end, so no page keeps it; `python -m helpers execute`
shows it after the number of the cell. In a terminal it is tqdm's bar, and in a log file a line a minute. What takes
less than a second says nothing.
"""

import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINES = 60
"""Seconds between two lines in a log file."""
DISPLAY = "progress-"
"""What the display ids of progress begin with, by which `helpers execute` tells it from results."""


def progress(total: int | None, label: str, unit: str = "step") -> "tqdm[Any]":
    """A context manager whose `update` is called after each of `total` steps."""
    kind = _InNotebook if _shell() is not None else tqdm if sys.stderr.isatty() else _InLog
    return kind(total=total, desc=label, unit=unit, leave=False, delay=1, mininterval=0.5, dynamic_ncols=True)


def watched(items: Sequence[T], label: str, unit: str = "step") -> Iterator[T]:
    """The items one after another, showing how many are done."""
    with progress(len(items), label, unit) as bar:
        for item in items:
            yield item
            bar.update()


def _shell() -> Any:
    """The kernel's shell, if this is a notebook."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    shell = get_ipython()
    return shell if shell is not None and hasattr(shell, "kernel") else None


class _Silent:
    """A stream for what tqdm writes besides its line."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


class _Elsewhere(tqdm):
    """tqdm whose line goes to `show` and not to a terminal; an empty line ends it."""

    def __init__(self, **settings: Any) -> None:
        units = settings["unit"] + ("es" if settings["unit"].endswith("ch") else "s")
        far = f"{{n_fmt}} of {{total_fmt}} {units}, {{remaining}} left{{postfix}}" if settings["total"] else "{elapsed}"
        super().__init__(**{**settings, "file": _Silent(), "bar_format": f"{{desc}}: {far}"})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.show(str(self) if msg is None else msg)
        return True

    def show(self, line: str) -> None:
        raise NotImplementedError


class _InNotebook(_Elsewhere):
    """A line under the cell, published anew and at last empty."""

    name: str | None = None

    def show(self, line: str) -> None:
        if not line and self.name is None:
            return
        from IPython.display import publish_display_data

        began, self.name = self.name is not None, self.name or f"{DISPLAY}{uuid.uuid4().hex}"
        publish_display_data({"text/plain": line} if line else {}, transient={"display_id": self.name}, update=began)


class _InLog(_Elsewhere):
    """A line a minute."""

    said: float | None = None

    def show(self, line: str) -> None:
        self.said = self.said or self.start_t
        if line and time.time() - self.said >= LINES:
            self.said = time.time()
            print(line, file=sys.stderr, flush=True)
