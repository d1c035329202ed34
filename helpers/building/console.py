"""What a build says while it runs: which chapter, of how many, and how much time is left."""

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from helpers.building.plan import PROJECT

STOPPED = "Stopped: "
"""What the last line of a step's log begins with if the step could say why it stopped."""


class Console(logging.StreamHandler):
    """Snakemake's log as a reader wants it: a line when a chapter begins, and one when it is done or failed.

    Args:
        tree: the executed book; how long its chapters took is the first estimate of what is left.
        plan: gives the chapters to run and how many of them side by side, once Snakemake knows it.
    """

    def __init__(self, tree: str, plan: Callable[[], tuple[list[str], int]]) -> None:
        super().__init__(sys.stderr)
        self.tree, self.plan, self.at_once = tree, plan, 1
        self.steps: dict[int, str] = {}
        self.chapters: list[str] = []
        self.began: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.known: dict[str, float] = {}
        self.failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line that an event of Snakemake is worth, if any."""
        try:
            for line in self._lines(record):
                self.stream.write(f"{line}\n")
            self.flush()
        except Exception:
            self.handleError(record)

    def _lines(self, record: logging.LogRecord) -> list[str]:
        event = getattr(record, "event", None)
        if event == "run_info":
            return self._all(*self.plan())
        if event == "job_info":
            return self._begun(record.jobid, record.wildcards.get("chapter") or record.rule_name)  # type: ignore[attr-defined]
        if event == "job_finished":
            return self._done(self.steps.get(record.job_id, ""))  # type: ignore[attr-defined]
        if event == "job_error":
            self.failed = True
            return self._failed(self.steps.get(record.jobid, ""), [Path(path) for path in record.log])  # type: ignore[attr-defined]
        if record.getMessage().startswith("Nothing to be done"):
            return ["Nothing has changed since the book was made."]
        # What comes of a step that failed says nothing that was not said
        follows = self.failed or record.getMessage().startswith("RuleException")
        return [] if record.levelno < logging.WARNING or follows else [record.getMessage()]

    def _all(self, chapters: list[str], at_once: int) -> list[str]:
        self.chapters, self.at_once = chapters, at_once
        self.known = {chapter: seconds for chapter in chapters if (seconds := _duration(self.tree, chapter))}
        if not chapters:
            return ["No chapter has to be run again."]
        number = f"{len(chapters)} chapter{'s' * (len(chapters) > 1)} to run"
        beside = f", {self.at_once} at a time" if self.at_once > 1 and len(chapters) > 1 else ""
        estimate = self._left()
        return [f"{self.tree}: {number}{beside}{f'; {estimate}, by an earlier build' if estimate else ''}."]

    def _begun(self, job: int, step: str) -> list[str]:
        self.steps[job] = step
        if step not in self.chapters:
            return {"pages": ["The pages from the runs: begun."], "site": ["The site: begun."]}.get(step, [])
        self.began[step] = time.monotonic()
        return [f"{step}: begun, {len(self.began)} of {len(self.chapters)}."]

    def _done(self, step: str) -> list[str]:
        if step not in self.chapters:
            return {"pages": ["The pages from the runs: done."], "site": ["The site: done."]}.get(step, [])
        self.took[step] = time.monotonic() - self.began[step]
        estimate = self._left()
        return [
            f"{step}: done in {self.took[step] / 60:.1f} minutes, {len(self.took)} of {len(self.chapters)} done"
            f"{f'; {estimate} left' if estimate else ''}."
        ]

    def _failed(self, step: str, logs: Sequence[Path]) -> list[str]:
        lines = [
            line for log in logs if log.exists() for line in log.read_text("utf-8", "replace").splitlines() if line
        ]
        if lines and lines[-1].startswith(STOPPED):
            why = lines[-1].removeprefix(STOPPED)
        else:
            why = "Its process was ended from outside, as a system does whose memory ran out."
        return [f"{step}: failed. {why} What it said: {', '.join(map(str, logs))}."]

    def _left(self) -> str:
        """The time that the chapters to come will take; nothing where no chapter's is known."""
        here = sum(self.took.values()) / len(self.took) if self.took else None
        left = []
        for chapter in self.chapters:
            if chapter in self.took:
                continue
            expected = self.known.get(chapter, here)
            if expected is None:
                expected = sum(self.known.values()) / len(self.known) if self.known else 0
            left.append(max(0.0, expected - (time.monotonic() - self.began.get(chapter, time.monotonic()))))
        if not left or not (self.took or self.known):
            return ""
        seconds = max(max(left), sum(left) / self.at_once)
        if seconds < 60:
            return "less than a minute"
        return f"about {seconds / 60:.0f} minutes" if seconds < 100 * 60 else f"about {seconds / 3600:.0f} hours"


def _duration(tree: str, chapter: str) -> float | None:
    """Seconds that a chapter took when it was executed last; nothing if it was not."""
    try:
        executed = json.loads((PROJECT / tree / "notebooks" / f"{chapter}.ipynb").read_text("utf-8"))
        return float(executed["metadata"]["papermill"]["duration"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
