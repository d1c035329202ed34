"""The pages of the book that are made when it is built: overview, scoreboard, status, map and parameters.

The overview is the part of the first page that the runs decide. All but the tables of parameters are read from
recorded runs: the `findings.json` that each notebook saved, papermill's metadata in the executed notebooks, and
reference runs in `book/reference/`. The tables of parameters come from the notebooks' parameters cells and from
`helpers/params.py`. Which chapters there are, and in which order, is said by `_toc.yml`; what the map says of each is
in `book/map.yml`.
"""

import ast
import json
import shlex
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import nbformat
import yaml
from pydantic.fields import FieldInfo

from helpers.book.captions import drawn, figures_of
from helpers.book.editions import exercises_of
from helpers.book.findings import load_claims
from helpers.book.overview import overview, pictures, write_pictures
from helpers.book.reference import REFERENCES, is_older, references
from helpers.book.scoreboard import Run, scoreboard, status
from helpers.book.tables import markdown_table
from helpers.chapters import params_of
from helpers.files import replace_text

PROJECT = Path(__file__).resolve().parents[2]
MAP = PROJECT / "book" / "map.yml"
NOTEBOOKS = PROJECT / "notebooks"


def write_pages(tree: Path, kept: Path = REFERENCES) -> None:
    """Write the pages of an executed book that are made from its runs and parameters.

    Args:
        tree: the executed book, such as `book/executed/quick`.
        kept: folder of the reference runs; it may be missing.
    """
    runs = _runs({path.parent.name: path for path in sorted(tree.glob("notebooks/*/findings.json"))})
    beside = {chapter: run for chapter, run in references(kept).items() if chapter in chapters()}
    executed = {chapter: nbformat.read(tree / "notebooks" / f"{chapter}.ipynb", as_version=4) for chapter in runs}
    notebooks = {chapter: nbformat.read(NOTEBOOKS / f"{chapter}.ipynb", as_version=4) for chapter in chapters()}
    described = yaml.safe_load(MAP.read_text("utf-8"))
    found = pictures(described, executed)
    shown = {cell.metadata.figure.name for book in executed.values() for cell, _ in figures_of(book) if drawn(cell)}
    titles = {chapter: title(notebook) for chapter, notebook in notebooks.items()}
    pages = {
        "overview": overview(described, load_claims(), runs, titles, {name: alt for name, (_, alt) in found.items()}),
        "scoreboard": scoreboard(
            load_claims(), runs, beside, shown, {name for name, run in beside.items() if is_older(run)}
        ),
        "status": status(runs, beside, executed),
        "map": chapter_map(described, notebooks, runs),
        "parameters": parameters(notebooks),
    }
    folder = tree / "book"
    write_pictures(folder / "figures", found)
    for name, text in pages.items():
        replace_text(folder / f"{name}.md", text)


def chapters(contents: Path = PROJECT / "_toc.yml") -> list[str]:
    """The chapters of the table of contents, in its order, by the notebook's name without suffix."""
    from sphinx_external_toc.parsing import parse_toc_yaml  # here, as it imports Sphinx

    pages = [str(page) for page in parse_toc_yaml(contents)]
    return [page.removeprefix("notebooks/") for page in pages if page.startswith("notebooks/")]


def exercise_minutes(notebook: Any) -> dict[int, int]:
    """The exercises of a chapter: number -> minutes that it may take."""
    return {exercise.number: exercise.minutes for exercise in exercises_of(notebook, "the chapter")}


def title(notebook: Any) -> str:
    """The heading that a notebook begins with."""
    return str(notebook.cells[0].source).splitlines()[0].removeprefix("#").strip()


def chapter_map(described: Mapping[str, Any], notebooks: Mapping[str, Any], runs: Mapping[str, Run]) -> str:
    """The map as Markdown: a table of the chapters, a command for each, and the reading paths.

    Args:
        described: what `book/map.yml` says.
        notebooks: chapter -> its notebook, in the order of the book.
        runs: chapter -> the run that made the book.
    """
    rows, commands = [], []
    for chapter, notebook in notebooks.items():
        said = described["chapters"][chapter]
        source = f" {{cite:t}}`{said['source']}`." if "source" in said else ""
        change = said.get("change")
        option = f"-p {change['parameter']} {shlex.quote(str(change['value']))}" if change else ""
        run = runs.get(chapter)
        rows.append(
            [
                f"{{doc}}`../notebooks/{chapter}`",
                said["finding"] + source,
                f"{run['minutes']:.1f}" if run else "not run",
                str(sum(exercise_minutes(notebook).values())),
                said["inspect"],
                f"`{option}`: {change['why']}" if change else "",
            ]
        )
        commands.append(f"$ {command(chapter, option)}")
    made = sorted({f"`{run['preset']}` on {run['device']}" for run in runs.values()})
    header = ["chapter", "the finding", "minutes to run", "minutes of exercises", "inspect first", "change first"]
    text = [
        "# Map",
        "What each chapter is about, what it takes, and where to begin. The minutes to run are those of the run that "
        f"made this page (preset {' and '.join(made)}), from nothing or with stages that were stored before; "
        "{doc}`status` has the slowest cell of each.",
        _wide(markdown_table(header, rows)),
        "To rerun a chapter with its first change, from the project's folder, after `source .venv/bin/activate`; then "
        "`python -m helpers compare` shows what differs ({doc}`how-to-rerun`). Everything that can be changed is in "
        "{doc}`parameters`.",
        "```console\n" + "\n".join(commands) + "\n```",
    ]
    for path in described["paths"]:
        text += [f"## {path['title']}", path.get("intro", ""), _sessions(path["sessions"], notebooks)]
    return "\n\n".join(filter(None, text)) + "\n"


def command(chapter: str, option: str) -> str:
    """The command that reruns a chapter with one parameter changed, on two lines: one would not fit a page's width."""
    number = chapter.split("_")[0]
    rest = f"--output {number}.ipynb --results results/{number} {option}".rstrip()
    return f"python -m helpers execute notebooks/{chapter}.ipynb \\\n    {rest}"


def parameters(notebooks: Mapping[str, Any]) -> str:
    """The tables of parameters as Markdown, one a chapter, in the order of its parameters cell."""
    text = [
        "# Parameters",
        "Each chapter's parameters, with the value that each preset gives them. A parameter left at `None` is as the "
        "preset says. A dash under *cost* means that a larger value costs next to nothing. The table is made from the "
        "notebooks and from `helpers/params.py` whenever the book is built.",
    ]
    for chapter, notebook in notebooks.items():
        model = params_of(chapter)
        presets = {preset: model(preset=preset) for preset in model.presets}
        rows = [
            [
                f"`{name}`",
                model.model_fields[name].description or "",
                readable_type(model.model_fields[name]),
                *(_shown(getattr(values, name)) for values in presets.values()),
                cost(model.model_fields[name]) or "-",
            ]
            for name in parameters_cell(notebook)
            if name != "preset"
        ]
        text += [
            f"## {title(notebook)}",
            f"The parameters cell of {{doc}}`../notebooks/{chapter}`.",
            _wide(markdown_table(["name", "meaning", "type", *(f"`{preset}`" for preset in presets), "cost"], rows)),
        ]
    return "\n\n".join(text) + "\n"


def parameters_cell(notebook: Any) -> list[str]:
    """The names that a notebook's parameters cell sets, in its order."""
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    targets = [node.target for node in ast.parse(cell.source).body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def readable_type(field: FieldInfo) -> str:
    """A parameter's type and range for a reader who need not know Python's annotations."""
    return _type(field.annotation, field.metadata)


def cost(field: FieldInfo) -> str:
    """What a larger value of a parameter costs; empty where it costs next to nothing."""
    extra = field.json_schema_extra
    return str(extra["cost"]) if isinstance(extra, dict) and "cost" in extra else ""


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of: {_type(arguments[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments if part is not type(None)) + ", or nothing"
    if hasattr(annotation, "__metadata__"):  # Annotated[int, Field(...)]
        inner = [part for extra in annotation.__metadata__ for part in getattr(extra, "metadata", [extra])]
        return _type(annotation.__origin__, inner)
    name = {bool: "true or false", int: "whole number", float: "number", str: "text"}[annotation]
    return f"{name}{_range(metadata)}"


def _range(metadata: Sequence[Any]) -> str:
    limits = {
        name: getattr(part, name) for part in metadata for name in ("ge", "gt", "le", "lt") if hasattr(part, name)
    }
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return "".join(f", {words[name]} {value:,}" for name, value in limits.items())


def _shown(value: Any) -> str:
    """A parameter's value, with a long run of whole numbers cut short."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        try:
            numbers = [int(item) for item in value]
        except ValueError:
            numbers = []
        if len(value) > 3 and numbers and numbers == list(range(numbers[0], numbers[0] + len(value))):
            return f"{numbers[0]} to {numbers[-1]}"
        return ", ".join(str(item) for item in value) or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _wide(table: str) -> str:
    """A table that may also take the margin's place."""
    return f":::{{div}} full-width\n{table}\n:::"


def _sessions(sessions: Iterable[Mapping[str, Any]], notebooks: Mapping[str, Any]) -> str:
    rows = []
    for session in sessions:
        named = [chapter for chapter in session.get("chapters", []) if chapter in notebooks]
        read = [f"{{doc}}`../notebooks/{chapter}`" for chapter in named]
        exercises = []
        for chapter, numbers in session.get("exercises", {}).items():
            if chapter not in notebooks:
                continue
            minutes = sum(exercise_minutes(notebooks[chapter]).get(number, 0) for number in numbers)
            listed = ", ".join(map(str, numbers))
            exercises.append(f"{chapter.split('_')[0].lstrip('0') or '0'}: {listed} ({minutes} minutes)")
        run = f"`{session['run']}`" if "run" in session else ""
        rows.append([session["when"], "; ".join([*read, session.get("text", "")]), run, "; ".join(exercises)])
    return markdown_table(["when", "read and do", "rerun with", "exercises, by chapter"], rows)


def _runs(paths: Mapping[str, Path]) -> dict[str, Run]:
    return {chapter: json.loads(path.read_text("utf-8")) for chapter, path in paths.items()}
