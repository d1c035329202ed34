"""What the Snakefile asks: is the configuration right, what does a chapter depend on, does no other build go on?

The Snakefile says what depends on what, `helpers.building.steps` makes it, and `helpers.building.console` says how far
it is. What a step made before stays until the new is whole; then the step leaves a mark, which is the file that
Snakemake looks at.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import nbformat
import yaml
from filelock import FileLock, Timeout

from helpers.chapters import params_of
from helpers.dependencies import data_sources, helper_sources, notebook_sources
from helpers.machine import check_machine
from helpers.params import Preset, nearest, shortened

PROJECT = Path(__file__).resolve().parents[2]
GENERATED = ("overview", "scoreboard", "status", "map", "parameters")


class BuildError(Exception):
    """A build that cannot be done; the message is one sentence."""


def pages() -> list[str]:
    """The pages of the book, in its order, as `_toc.yml` names them.

    Raises BuildError if that cannot be read.
    """
    from sphinx_external_toc.parsing import MalformedError, parse_toc_yaml  # here, as it imports Sphinx

    try:
        return [str(page) for page in parse_toc_yaml(PROJECT / "_toc.yml")]
    except (OSError, yaml.YAMLError, MalformedError) as error:
        raise BuildError(f"_toc.yml is no table of contents ({one_line(error)}): correct it.") from None


def chosen(
    config: Mapping[str, Any], chapters: Sequence[str], cores: int | None = None
) -> tuple[str, dict[str, dict[str, Any]]]:
    """The preset, and for each chapter the parameters given on the command line that it has.

    Args:
        config: what `snakemake --config` was given.
        chapters: the chapters of the book.
        cores: how many processor cores the build may use; None where it does not matter.

    Raises:
        BuildError: if something there is no configuration.
    """
    if cores is not None and cores < 1:
        raise BuildError(f"The number of cores is {cores}, with which nothing can run: give 1 or more, or all.")
    fields = {name: params_of(chapter).model_fields for chapter in chapters for name in params_of(chapter).model_fields}
    for name in config:
        if name in fields and name != "preset":
            raise BuildError(
                f"There is no configuration {shortened(name)}: write it as 'parameters={{\"{name}\": VALUE}}'."
            )
        if name not in ("preset", "parameters"):
            raise BuildError(f"There is no configuration {shortened(name)}{nearest(name, ('preset', 'parameters'))}")
    # a value left empty on the command line arrives as None
    preset, given = (
        "" if value is None else value for value in (config.get("preset", "quick"), config.get("parameters", {}))
    )
    presets = get_args(Preset)
    if preset not in presets:
        raise BuildError(f"There is no preset {shortened(preset)}{nearest(preset, presets)}")
    if not isinstance(given, Mapping):
        raise BuildError(
            f"The configuration 'parameters' is {shortened(given)}, but should name parameters with their values, as "
            "in 'parameters={\"layer\": 12}'."
        )
    for name in given:
        if name == "preset":
            raise BuildError("The preset is no parameter of a build: write preset=NAME beside 'parameters'.")
        if name == "results":
            raise BuildError(
                "A build chooses itself where its results go: leave 'results' out, or run one chapter with "
                "python -m helpers execute."
            )
        if name not in fields:
            near = get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "the page 'Parameters' of the book lists all of them."
            raise BuildError(f"There is no parameter {shortened(name)}: {hint}")
    # the command line gives everything as text, and null as well
    values = {name: value for name, value in sorted(given.items()) if value not in (None, "null", "None")}
    return preset, {
        chapter: {name: value for name, value in values.items() if name in params_of(chapter).model_fields}
        for chapter in chapters
    }


def tree_of(preset: str) -> str:
    """The folder of an executed book, a complete Jupyter Book source tree, seen from the project."""
    return f"book/executed/{preset}"


def resolved(chapter: str, preset: str, given: Mapping[str, Any]) -> str:
    """What decides a chapter's run besides files, as text: its parameters, and the claims that it judges.

    Raises ParameterError if the chapter cannot use its parameters.
    """
    params = params_of(chapter)(preset=preset, **given, results=f"{tree_of(preset)}/notebooks/{chapter}")
    check_machine(params)
    try:
        entries = yaml.safe_load((PROJECT / "book" / "claims.yml").read_text("utf-8"))
        claims = [entry for entry in entries if entry["chapter"] == chapter]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise BuildError(f"book/claims.yml is no list of claims ({one_line(error)}): correct it.") from None
    return json.dumps({"parameters": params.model_dump(mode="json"), "claims": claims}, default=str)


def inputs(chapter: str) -> list[str]:
    """The files that decide a chapter's run, seen from the project.

    `helpers/params.py` and `book/claims.yml` are none of them, since they say something of every chapter: what they
    say of this one is in `resolved`.

    Raises:
        BuildError: if the notebook cannot be read.
    """
    notebook = PROJECT / "notebooks" / f"{chapter}.ipynb"
    if not notebook.is_file():
        raise BuildError(f"There is no notebook notebooks/{chapter}.ipynb, which _toc.yml names: add or rename it.")
    try:
        files = [notebook, *notebook_sources(notebook), *data_sources(notebook)]
    except SyntaxError as error:
        where = error.filename if str(error.filename).endswith(".py") else f"notebooks/{chapter}.ipynb"
        raise BuildError(f"{where} holds code that is no Python ({error.msg}: {one_line(error.text)}).") from None
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, KeyError, AttributeError, UnicodeDecodeError):
        raise BuildError(f"notebooks/{chapter}.ipynb is no notebook that Jupyter could open: restore it.") from None
    beside = [path.with_name("questions.toml") for path in files if path.name == "exercises.py"]
    kept = sorted((PROJECT / "book" / "reference" / chapter).glob("*"))
    files += [path for path in (*beside, *kept) if path.exists()]
    return [str(path.relative_to(PROJECT)) for path in files if path.name != "params.py"]


def sources(modules: Sequence[str]) -> list[str]:
    """The files of modules of helpers, and of those that they use, seen from the project."""
    return [str(path.relative_to(PROJECT)) for path in helper_sources(modules)]


def prose() -> list[str]:
    """The pages that are written by hand, and what they are drawn with, seen from the project."""
    book = [path.relative_to(PROJECT) for path in sorted((PROJECT / "book").rglob("*")) if path.is_file()]
    made = ("executed", "reference")
    written = [str(path) for path in book if path.parts[1] not in made and path.suffix != ".yml"]
    return ["_config.yml", "_toc.yml", "CHANGELOG.md", *written]


def helper_files() -> list[str]:
    """The files of helpers, whose docstrings the reference pages show, seen from the project."""
    return sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "helpers").rglob("*.py"))


def begin(tree: str, pages: Sequence[str]) -> FileLock:
    """Take the executed book for this build, and forget steps whose files are gone.

    Returns the lock, which ends with the process, however that ends.

    Raises:
        BuildError: if another build is making that book, or it cannot be written.
    """
    folder = PROJECT / tree
    owner = folder / ".builder"
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        owner.write_text(f"process {os.getpid()}, since {time.strftime('%H:%M')}", "utf-8")
    except Timeout:
        raise BuildError(
            f"Another build is making {tree} ({owner.read_text('utf-8') if owner.exists() else 'just begun'}): wait "
            "until it is done, or stop it."
        ) from None
    except OSError as error:
        raise BuildError(f"Nothing can be written to {tree}: {error.strerror or error}.") from None
    shutil.rmtree(folder / ".making", ignore_errors=True)
    for step, files in _made(pages).items():
        if not all((folder / file).exists() for file in files):
            (PROJECT / mark(tree, step)).unlink(missing_ok=True)
    return lock


def mark(tree: str, step: str) -> str:
    """The file that says that a step is done."""
    return f"{tree}/.made/{step}"


def _made(pages: Sequence[str]) -> dict[str, list[str]]:
    """Step -> the files that it makes, seen from the executed book."""
    made = {
        "pages": ["book/figures", *(f"book/{name}.md" for name in GENERATED)],
        "site": [f"_build/html/{page}.html" for page in pages],
    }
    for page in pages:
        if page.startswith("notebooks/"):
            chapter = page.removeprefix("notebooks/")
            made[chapter] = [f"{page}.ipynb", f"{page}/findings.json", f"{page}/provenance.json"]
    return made


def one_line(text: object) -> str:
    """A text as it stands in a sentence."""
    return " ".join(str(text or "").split())
