"""Making reference runs: chapters on a larger preset, in slices if need be, each kept once it is whole."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from helpers.artifacts import DEADLINE
from helpers.book.reference import keep
from helpers.building.plan import PROJECT, BuildError, mark, tree_of
from helpers.chapters import CHAPTERS
from helpers.params import nearest


def make_references(
    names: Sequence[str],
    preset: str,
    cores: str = "all",
    seconds: float | None = None,
    parameters: Mapping[str, str] | None = None,
) -> list[str]:
    """Run chapters, keep the runs that are whole as references, and say which are left.

    A chapter that was stopped, however, goes on with the stage that it had come to.

    Args:
        names: chapters, by their notebooks' names, with or without the number.
        preset: for most readers `full`.
        cores: how many processor cores to use, or "all".
        seconds: after which no stage is begun any more.
        parameters: those that are other than the preset's, as on a command line: `{"seeds": "[0, 1, 2]"}`.

    Raises:
        BuildError: if there is no such chapter, or a chapter could not be run though there was time.
        ReferenceRunError: if a run cannot be kept.
    """
    chapters = [_chapter(name) for name in names] or list(CHAPTERS)
    tree, until = tree_of(preset), None if seconds is None else time.time() + seconds
    marks = {chapter: mark(tree, chapter) for chapter in chapters}
    config = [f"preset={preset}", *([f"parameters={json.dumps(parameters)}"] if parameters else [])]
    snakemake = [sys.executable, "-m", "snakemake", "--cores", cores, "--keep-going", "--config", *config]
    variables = os.environ if until is None else {**os.environ, DEADLINE: str(until)}
    done = subprocess.run([*snakemake, "--", *marks.values()], cwd=PROJECT, env=variables)
    left = [chapter for chapter, path in marks.items() if not (PROJECT / path).exists()]
    for chapter in chapters:
        if chapter not in left:
            print(f"Kept: {keep(chapter, PROJECT / tree / 'notebooks' / chapter).relative_to(PROJECT)}")
    if done.returncode and (until is None or time.time() < until):
        raise BuildError(f"{len(left) or 'Some'} of {len(chapters)} chapters could not be run, as said above.")
    return left


def _chapter(name: str) -> str:
    found = [chapter for chapter in CHAPTERS if name in (chapter, chapter.partition("_")[2])]
    if not found:
        raise BuildError(f"There is no chapter {name!r}{nearest(name, [c.partition('_')[2] for c in CHAPTERS])}")
    return found[0]
