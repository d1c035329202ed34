"""Reference runs: what a chapter found with more seeds and steps than building the book takes, kept with the book.

`book/reference/{chapter}/` holds the findings of such a run and the tables behind the chapter's headline figure.
Nothing in it depends on how often the run was stopped and resumed: what is stored counts as if it had been computed,
and no minutes are kept.
"""

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml

from helpers.artifacts import NO_CODE, code_digest
from helpers.book.captions import figures_of
from helpers.book.findings import REFERENCES
from helpers.cost import by_stage
from helpers.dependencies import PACKAGE, data_sources, notebook_sources
from helpers.files import file_digest, replace_text

PROJECT = Path(__file__).resolve().parents[2]
LIMIT = 200_000
"""Bytes that the tables of a chapter may take."""


OLDER = "The reference was made by other code or data than this page's."


class ReferenceRunError(Exception):
    """A run that cannot be kept as a reference; the message is one sentence."""


def references(folder: Path = REFERENCES) -> dict[str, dict[str, Any]]:
    """The reference runs that are kept: chapter -> what `Findings.save` wrote of it, with `commit` and `code`."""
    return {path.parent.name: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/findings.json"))}


def keep(chapter: str, results: Path, folder: Path = REFERENCES) -> Path:
    """Keep a run as the chapter's reference, in place of the one before; its folder.

    Args:
        chapter: by its notebook's name without suffix.
        results: where the run saved its findings and tables.
        folder: of all reference runs.

    Raises:
        ReferenceRunError: if the run lacks a table of the headline figure, or they are too large to be kept.
    """
    run = json.loads((results / "findings.json").read_text("utf-8"))
    run.pop("minutes")
    stages = by_stage(run["cost"])
    outside = stages.pop("outside")
    run |= {"cost": {"computed": stages, "stored": {}, "outside": outside}, "commit": _commit(), "code": code(chapter)}
    tables = [results / f"{name}.csv" for name in headline(chapter)]
    missing = [path.name for path in tables if not path.is_file()]
    if missing:
        raise ReferenceRunError(f"{results} lacks {missing[0]}, which the headline figure of {chapter} shows.")
    size = sum(path.stat().st_size for path in tables)
    if size > LIMIT:
        raise ReferenceRunError(
            f"The tables of {chapter}'s headline figure take {size / 1000:.0f} kB; show what fits into "
            f"{LIMIT / 1000:.0f} kB."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as made:
        part, old = Path(made, chapter), Path(made, "earlier")
        part.mkdir()
        replace_text(part / "findings.json", json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        for path in tables:
            shutil.copyfile(path, part / path.name)
        if (folder / chapter).exists():
            (folder / chapter).rename(old)
        part.rename(folder / chapter)
    return folder / chapter


def headline(chapter: str) -> list[str]:
    """The tables behind the chapter's headline figure, which `book/map.yml` names."""
    figure = yaml.safe_load((PROJECT / "book" / "map.yml").read_text("utf-8"))["chapters"][chapter]["figure"]
    notebook = nbformat.read(PROJECT / "notebooks" / f"{chapter}.ipynb", as_version=4)
    shown = next(cell.metadata.figure for cell, _ in figures_of(notebook) if cell.metadata.figure.name == figure)
    return list(shown.data)


def code(chapter: str) -> str:
    """A digest of the code and the data that decide a chapter's numbers: comments and the pages' looks do not count."""
    notebook = PROJECT / "notebooks" / f"{chapter}.ipynb"
    looks = ("book", "building")
    files = {
        path.relative_to(PACKAGE).as_posix(): code_digest(path)
        for path in notebook_sources(notebook)
        if path.name not in NO_CODE and path.relative_to(PACKAGE).parts[0] not in looks
    }
    files |= {path.name: file_digest(path) for path in data_sources(notebook)}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def is_older(run: Mapping[str, Any]) -> bool:
    """Whether a reference was made by other code or data than this copy of the book has."""
    return bool(run["code"] != code(run["chapter"]))


def _commit() -> str:
    """The commit of this copy of the book, with a plus sign where files differ from it; "unknown" outside git."""
    said = []
    for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        done = subprocess.run(["git", *command], cwd=PROJECT, capture_output=True, text=True)
        if done.returncode:
            return "unknown"
        said.append(done.stdout.strip())
    return said[0] + "+" * bool(said[1])
