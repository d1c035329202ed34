"""The steps of a build, each whole or not at all: a chapter, the pages made from its runs, or the site.

    python -m helpers.building.steps 02_ip_loss_reduction \\
        --tree book/executed/tiny --given '{"preset": "tiny"}' --log x.log

The Snakefile runs them; a reader's own command for one chapter is `python -m helpers execute`.
"""

import argparse
import contextlib
import filecmp
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.building.console import STOPPED
from helpers.building.plan import PROJECT, BuildError, helper_files, mark, one_line, prose
from helpers.params import ParameterError


def make_chapter(chapter: str, tree: str, given: Mapping[str, Any]) -> None:
    """Execute a chapter; its notebook and its results take the place of the earlier ones together, or not at all.

    Args:
        chapter: the chapter, by the name of its notebook.
        tree: the executed book.
        given: preset and parameters.

    Raises:
        ExecutionError: if it could not be executed; what it got done is kept as `.failed.ipynb`.
    """
    from helpers.building.execution import ExecutionError, execute

    (PROJECT / tree / ".making").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PROJECT / tree / ".making", ignore_cleanup_errors=True) as folder:
        part = Path(folder).relative_to(PROJECT)
        notebook, results = part / "notebooks" / f"{chapter}.ipynb", part / "notebooks" / chapter
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
        place = PROJECT / tree / "notebooks"
        place.mkdir(exist_ok=True)
        failed = notebook.with_suffix(".failed.ipynb").name
        try:
            execute(Path("notebooks", notebook.name), notebook, {**texts, "results": str(results)}, lines=True)
        except ExecutionError as error:
            if notebook.with_name(failed).exists():
                _moved(notebook.with_name(failed), place / failed, part, tree)
            raise ExecutionError(str(error).replace(f"{part}/", f"{tree}/")) from None
        for path in results.rglob("*.json"):
            path.write_text(path.read_text("utf-8").replace(f"{part}/", f"{tree}/"), "utf-8")
        if (place / chapter).exists():
            (place / chapter).rename(part / "earlier")
        results.rename(place / chapter)
        _moved(notebook, place / notebook.name, part, tree)
        (place / failed).unlink(missing_ok=True)


def _moved(source: Path, target: Path, part: Path, tree: str) -> None:
    """Move a notebook to its place, where it names that place and not the folder that it was made in."""
    source.write_text(source.read_text("utf-8").replace(f"{part}/", f"{tree}/"), "utf-8")
    source.replace(target)


def make_pages(tree: str) -> None:
    """Write the pages that are made from the runs."""
    from helpers.book.pages import write_pages

    write_pages(PROJECT / tree)


def make_site(tree: str, log: Path) -> None:
    """Render the executed book; its pages take the place of the earlier ones together, or not at all.

    Raises:
        BuildError: for the first of its warnings, all of which are in the log.
    """
    from jupyter_book.cli.main import build

    folder = PROJECT / tree
    newest = max((PROJECT / path).stat().st_mtime for path in helper_files())
    for path in prose():
        copy = folder / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        due = newest if path.startswith("book/api/") else 0  # Sphinx does not see that it depends on docstrings
        if not copy.exists() or copy.stat().st_mtime < due or not filecmp.cmp(PROJECT / path, copy, shallow=False):
            shutil.copy(PROJECT / path, copy)
    # Pages are all written anew, so that every one there is of this build. Sources are read again where they
    # changed; after a build that failed all are, since warnings of those read before would not come again.
    work = folder / "_build" / "next"
    made, site, earlier = work / "_build" / "html", folder / "_build" / "html", folder / "_build" / "earlier"
    shutil.rmtree(made, ignore_errors=True)
    options = ["--path-output", str(work), "-W", "--keep-going"]
    try:
        build.main([str(folder), *options], prog_name="jupyter-book", standalone_mode=False)
    except (Exception, SystemExit) as error:
        shutil.rmtree(work, ignore_errors=True)
        said = [line for line in log.read_text("utf-8", "replace").splitlines() if "WARNING" in line or "ERROR" in line]
        first = said[0].removeprefix(f"{folder}/") if said else one_line(error)
        raise BuildError(f"The pages have {len(said)} warnings, of which the first is: {first}") from None
    shutil.rmtree(earlier, ignore_errors=True)
    if site.exists():
        site.rename(earlier)
    made.rename(site)
    shutil.rmtree(earlier, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make one step; a failure ends the process with status 1, and the last line of the log says why."""
    parser = argparse.ArgumentParser(prog="python -m helpers.building.steps", description="One step of a build.")
    parser.add_argument("step", help="a chapter, pages or site")
    parser.add_argument("--tree", required=True, help="the executed book, such as book/executed/quick")
    parser.add_argument("--given", default="{}", help="preset and parameters of the chapter, as JSON")
    parser.add_argument("--log", type=Path, required=True, help="where what is printed goes")
    parser.add_argument("--builder", type=int, default=os.getppid(), help="the process with which this one ends")
    step = parser.parse_args(arguments)
    threading.Thread(target=_end_with, args=(step.builder,), daemon=True).start()
    try:
        with contextlib.chdir(PROJECT):
            if step.step == "site":
                make_site(step.tree, step.log)
            elif step.step == "pages":
                make_pages(step.tree)
            else:
                make_chapter(step.step, step.tree, json.loads(step.given))
            done = Path(mark(step.tree, step.step))
            done.parent.mkdir(exist_ok=True)
            done.touch()
    except Exception as error:
        from helpers.building.execution import ExecutionError

        known = isinstance(error, BuildError | ExecutionError | ParameterError)
        if not known:
            traceback.print_exc()
        sys.exit(f"{STOPPED}{error if known else f'{type(error).__name__}: {one_line(error)}'}")


def _end_with(builder: int) -> None:
    """End this process when the build ends, since a build that is killed cannot end its steps."""
    while os.getppid() == builder:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
