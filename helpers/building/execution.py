"""Executing a chapter's notebook with parameters: checked before a kernel starts, and there whole or not at all.

papermill puts the parameters in and records how long each cell took. Around it: whatever can be known to be wrong is
said before anything is computed; the kernel is one of this Python, whichever others the machine names first; two runs
never write to one place; and what a run got done is kept when it is stopped, in memory until it ends.
"""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from helpers.chapters import params_of
from helpers.files import check_writable, replace_text
from helpers.machine import check_machine
from helpers.params import PROJECT, UNTAGGED, Params, shortened
from helpers.progress import LINES

PATIENCE = 600
"""Seconds that a busy machine may take to start a kernel, or to hand over what a cell printed."""


class ExecutionError(Exception):
    """A notebook that could not be executed; the message is one sentence."""


class _Stopped(BaseException):
    """A signal to end."""


def execute(notebook: Path, output: Path, texts: Mapping[str, str], *, lines: bool = False) -> None:
    """Execute a chapter's notebook with parameters given as text.

    Everything is checked before anything starts. The executed notebook appears whole or not at all; what a failed run
    got done is kept beside it, as `.failed.ipynb`.

    Args:
        notebook: a chapter's, by name.
        output: the executed notebook.
        texts: parameter -> its value, as on a command line.
        lines: progress in lines, although this is a terminal, for commands that run side by side.

    Raises:
        ParameterError: if a parameter cannot be used.
        ExecutionError: if the notebook cannot be executed or written, or one of its cells fails.
    """
    chapter, source = _read(notebook)
    params = chapter.from_strings(texts)
    _check_output(notebook, output)
    with contextlib.chdir(PROJECT):  # where the kernel will be
        check_machine(params)
    given = params.model_dump(mode="json", include=set(texts))
    # Paths in the executed notebook count from the project's folder: it says nothing of this machine.
    names = [os.path.relpath(path, PROJECT) for path in (notebook, output)]
    with _alone(output, params.folder):
        _run(source, output.resolve(), given, *names, lines=lines)


def _read(notebook: Path) -> tuple[type[Params], Any]:
    """The parameter class of a chapter, and its notebook as far as it was looked at here."""
    import nbformat

    shown = shortened(str(notebook), 200)
    if not notebook.is_file():
        raise ExecutionError(f"There is no notebook {shown}: name one of notebooks/*.ipynb.")
    chapter = params_of(notebook.stem)
    try:
        source = nbformat.read(notebook, as_version=4)
        nbformat.validate(source)
    except OSError as error:
        raise ExecutionError(f"{shown} cannot be read: {error.strerror}.") from None
    except Exception:  # whatever a file can hold that is no notebook
        raise ExecutionError(f"{shown} is no notebook that Jupyter could open: restore it.") from None
    cells = [cell for cell in source.cells if cell.cell_type == "code"]
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        raise ExecutionError(
            f"No code cell of {shown} is tagged `parameters`, so it would run as the preset: {UNTAGGED}"
        )
    if not any(".from_notebook(" in cell.source for cell in cells[tagged[0] :]):
        raise ExecutionError(
            f"No cell of {shown} after that with the parameters reads them: add one with "
            f"`params = {chapter.__name__}.from_notebook()`."
        )
    return chapter, source


def _check_output(notebook: Path, output: Path) -> None:
    """Whether the executed notebook can be written there, without harm to what is there."""
    shown = f"--output is {shortened(str(output), 200)}, but"
    if output.suffix != ".ipynb":
        raise ExecutionError(f"{shown} it should name a notebook, such as mine.ipynb.")
    try:
        if output.exists() and output.samefile(notebook):
            raise ExecutionError(f"{shown} that is the notebook itself, which would be overwritten: name another.")
        for path in (output, _failed(output)):
            if path.exists() and not path.is_file():
                raise ExecutionError(f"{shown} {shortened(str(path), 200)} is there and is no file: name another.")
        if output.exists() and not _was_executed(output):
            raise ExecutionError(f"{shown} what is there was not made by executing a notebook: name another.")
        check_writable(output.parent)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # what is left is a name that is too long
            os.lstat(output.parent / f".{_failed(output).name}.{'x' * 12}")
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ExecutionError(f"{shown} {reason}: name another.") from None


def _was_executed(path: Path) -> bool:
    import nbformat

    try:
        return "papermill" in nbformat.read(path, as_version=4).metadata
    except Exception:  # whatever a file can hold that is no notebook
        return False


def _failed(output: Path) -> Path:
    return output.with_suffix(".failed.ipynb")


@contextlib.contextmanager
def _alone(output: Path, results: Path) -> Iterator[None]:
    """While open, no other run writes to the same notebook or the same results."""
    with contextlib.ExitStack() as stack:
        for path in sorted({output.resolve(), results.resolve()}):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
                stack.enter_context(lock)
            except Timeout:
                raise ExecutionError(
                    f"Another run is writing to {os.path.relpath(path)}: wait until it is done, or give other "
                    "--output and --results."
                ) from None
            except OSError as error:
                raise ExecutionError(
                    f"Nothing can be written beside {os.path.relpath(path)} ({error.strerror or error})."
                ) from None
            stack.callback(Path(lock.lock_file).unlink, missing_ok=True)
        yield


def _run(source: Any, output: Path, given: Mapping[str, Any], name: str, target: str, *, lines: bool) -> None:
    from helpers.building import kernels

    watch = Watch(Path(name).stem, lines or not sys.stderr.isatty())
    try:
        with contextlib.chdir(PROJECT), _stoppable(watch), watch:
            kernels.run(source, given, watch)
        reason = kernels.failure(watch.notebook)
    except (KeyboardInterrupt, _Stopped):
        reason = "a signal to end"
    except kernels.FAILURES as error:
        reason = kernels.reason(error)
    executed = watch.notebook
    if executed is None:
        raise ExecutionError(f"{name} was not begun, because of {reason}.")
    executed.metadata.papermill.update(input_path=name, output_path=target)
    text = _clean(executed)
    if reason is None:
        place = _kept(output, text)
        if place != output:
            raise ExecutionError(f"{target} could not be written (is the disk full?), so it was kept as {place}.")
        with contextlib.suppress(OSError):
            _failed(output).unlink()
        watch.say(f"done in {watch.minutes:.1f} minutes, {target}")
    else:
        place = _kept(_failed(output), text)
        kept = f"see {os.path.relpath(place)}" if place else "what it did could not be kept, as no disk has room for it"
        raise ExecutionError(f"{name} stopped at [{watch.number}] with {reason.rstrip('.')}; {kept}.")


def _kept(path: Path, text: str) -> Path | None:
    """Where a notebook was written: to `path`, or else (that disk may be full) to the folder for temporary files."""
    for place in (path, Path(tempfile.gettempdir(), f"{os.getpid()}-{path.name}")):
        with contextlib.suppress(OSError):
            replace_text(place, text)
            return place
    return None


@contextlib.contextmanager
def _stoppable(watch: "Watch") -> Iterator[None]:
    """While open, a signal to end is an exception, so that the kernel is ended and what was done is kept."""

    def stop(*_: Any) -> None:
        if watch.client is not None:
            watch.client.shutdown_kernel = "immediate"  # asked to end by itself, it would print a traceback first
        raise _Stopped

    signals = (
        (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    )
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watch:
    """Shows how far a run is, and keeps the notebook as far as it was executed."""

    def __init__(self, name: str, lines: bool) -> None:
        self.name, self.lines = name, lines
        self.notebook: Any = None
        self.cell: Any = None
        self.client: Any = None
        self.began = self.said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    @property
    def number(self) -> int:
        """The number that Jupyter shows beside the cell that was begun last."""
        code = [cell for cell in self.notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        return next((i for i, cell in enumerate(code, 1) if cell is self.cell), 0)

    def begin(self, notebook: Any) -> None:
        self.notebook = notebook
        if not self.lines:
            from tqdm import tqdm

            form = "{desc}: cell {n_fmt} of {total_fmt}, {elapsed}{postfix}"
            self._bar = tqdm(
                total=len(notebook.cells), desc=self.name, leave=False, dynamic_ncols=True, bar_format=form
            )

    def start(self, cell: Any, index: int) -> None:
        """A cell begins."""
        self.cell = cell
        self.inside("")
        if self._bar is not None:
            self._bar.update(index + 1 - self._bar.n)

    def inside(self, line: str) -> None:
        """How far the cell is, in a line of its own making (`helpers.progress`)."""
        if self._bar is not None:
            self._bar.set_postfix_str(line)
        elif time.monotonic() - self.said >= LINES:
            self.said = time.monotonic()
            at = self.notebook.cells.index(self.cell) + 1
            self.say(f"cell {at} of {len(self.notebook.cells)}{', ' if line else ''}{line}")

    def say(self, line: str) -> None:
        print(f"{self.name}: {line}", file=sys.stderr, flush=True)


def _clean(notebook: Any) -> str:
    """An executed notebook's text, which says nothing of this machine and shows no widgets.

    Widgets, such as the progress of loading a model, would stay on the page, which would ask the network for the
    scripts that draw them. Nor does the page show the cell that papermill has put in, since the box with the provenance
    names the parameters.
    """
    import nbformat

    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")
        if cell.cell_type == "code":
            cell.outputs = [
                o for o in cell.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
            ]
    notebook.metadata.pop("widgets", None)
    text: str = nbformat.writes(notebook)
    return f"{text}\n".replace(f"{PROJECT}{os.sep}", "")
