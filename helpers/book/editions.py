"""Editions of the notebooks for a course: for students without the answers, for instructors with notes.

Both are made from the notebooks as they are committed, by the tags of their cells (CONTRIBUTING.md says how an
exercise is written). What an edition leaves out is not in its files.

    write_edition("student", Path("build/student"))
    write_edition("instructor", Path("build/instructor"))
"""

import copy
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from helpers.book.tables import markdown_table
from helpers.files import file_digest

PROJECT = Path(__file__).resolve().parents[2]
OVERVIEW = "overview.ipynb"
RECORD = ".edition.json"
"""In an edition's folder: what was written, so that work done in it later is not overwritten."""

PARTS = ("exercise", "question", "hint", "expected", "solution", "yours", "discussion")
HEADER = re.compile(
    r"### Exercise (?P<number>\d+): (?P<title>[^\n]+)\n\n"
    r"\*(?P<difficulty>easy|medium|hard), (?P<kind>code|interpretation), (?P<minutes>[1-9]\d*) minutes\*\n\n"
    r"(?P<task>\S.*)",
    re.DOTALL,
)


class EditionError(Exception):
    """An edition that cannot be made; the message is one sentence."""


@dataclass(frozen=True)
class Exercise:
    """One exercise of a chapter, as its cells say."""

    number: int
    title: str
    difficulty: str
    """easy, medium or hard"""
    kind: str
    """code or interpretation"""
    minutes: int
    cells: Mapping[str, Sequence[NotebookNode]]
    """By part: exercise, question, hint, expected, solution, yours, discussion."""


def part_of(cell: NotebookNode) -> str | None:
    """Which part of an exercise a cell is, by its tags."""
    return next((part for part in PARTS if part in cell.metadata.get("tags", [])), None)


def exercises_of(notebook: NotebookNode, name: str) -> list[Exercise]:
    """The exercises of a chapter called `name`, in order.

    Raises:
        EditionError: if an exercise lacks a part, or has it in another place or form than CONTRIBUTING.md says.
    """
    groups: list[list[tuple[str, NotebookNode]]] = []
    for cell in notebook.cells:
        part = part_of(cell)
        if part == "exercise":
            groups.append([])
        elif part is not None and not groups:
            raise EditionError(f"{name}: a cell is tagged {part!r}, but no cell tagged 'exercise' comes before it.")
        if part is not None:
            groups[-1].append((part, cell))
    return [_exercise(group, number, name) for number, group in enumerate(groups, 1)]


def _exercise(group: Sequence[tuple[str, NotebookNode]], number: int, name: str) -> Exercise:
    header = HEADER.fullmatch(group[0][1].source)
    if header is None or int(header["number"]) != number:
        raise EditionError(
            f"{name}: exercise {number} must begin with '### Exercise {number}: TITLE', an empty line, "
            "'*DIFFICULTY, KIND, N minutes*', an empty line and the task, as CONTRIBUTING.md says."
        )
    asks = ["question"] if header["kind"] == "interpretation" else []
    once = list(dict.fromkeys(part for part, _ in group))
    yours = ["yours"] if "yours" in once else []
    wanted = ["exercise", *asks, "hint", "expected", "solution", *yours, "discussion"]
    order = [part for part, _ in group]
    if once != wanted or order != sorted(order, key=PARTS.index):
        raise EditionError(
            f"{name}: exercise {number} must have cells tagged {', '.join(wanted)}, in this order, but it has "
            f"{', '.join(order)}."
        )
    return Exercise(
        number=number,
        title=header["title"],
        difficulty=header["difficulty"],
        kind=header["kind"],
        minutes=int(header["minutes"]),
        cells={part: [cell for this, cell in group if this == part] for part in once},
    )


def student(notebook: NotebookNode) -> NotebookNode:
    """A copy with an empty cell in place of each exercise's solution, and without the instructor's notes."""
    edition = copy.deepcopy(notebook)
    before = None
    for cell in edition.cells:
        part = part_of(cell)
        if part == "solution" and before != "solution":
            cell.update(nbformat.v4.new_code_cell(id=cell.id, metadata={"tags": ["answer"]}))
        before = part
    return _without(edition, "solution", "discussion")


def instructor(notebook: NotebookNode) -> NotebookNode:
    """A copy in which solutions and the instructor's notes are in plain sight."""
    edition = _without(notebook)
    for cell in edition.cells:
        if part_of(cell) in ("solution", "discussion"):
            cell.metadata.tags = [tag for tag in cell.metadata.tags if tag not in ("hide-cell", "remove-cell")]
            if cell.cell_type == "markdown":
                cell.source = cell.source.replace("<details>", "<details open>")
    return edition


EDITIONS: Mapping[str, Callable[[NotebookNode], NotebookNode]] = {"student": student, "instructor": instructor}


def overview(chapters: Mapping[str, NotebookNode]) -> NotebookNode:
    """For the instructor: every chapter's exercises with kind, difficulty and minutes, by file name."""
    text = "# Exercises and minutes\n\nThe minutes are for a learner who has read the chapter."
    cells = [nbformat.v4.new_markdown_cell(text, id="heading")]
    for name, notebook in chapters.items():
        exercises = exercises_of(notebook, name)
        rows = [[str(e.number), e.title, e.difficulty, e.kind, str(e.minutes)] for e in exercises]
        rows.append(["", "all", "", "", str(sum(exercise.minutes for exercise in exercises))])
        table = markdown_table(["", "exercise", "difficulty", "kind", "minutes"], rows)
        heading = re.search(r"^# (.+)$", notebook.cells[0].source, flags=re.MULTILINE)
        text = f"## {heading[1] if heading else name}\n\n[{name}]({name})\n\n{table}"
        cells.append(nbformat.v4.new_markdown_cell(text, id=Path(name).stem[:64]))
    first = next(iter(chapters.values()))
    return nbformat.v4.new_notebook(cells=cells, metadata=copy.deepcopy(first.metadata))


def write_edition(edition: str, output: Path, notebooks: Path = PROJECT / "notebooks") -> None:
    """Write an edition of all chapters into a folder of their own, which appears whole or not at all.

    An edition that is there already is replaced, unless somebody has worked in it.

    Raises:
        EditionError: if there is no such edition, a notebook cannot be read or an exercise is not complete, or
            if the folder holds anything but an untouched edition.
    """
    if edition not in EDITIONS:
        raise EditionError(f"There is no edition {edition!r}: choose {' or '.join(map(repr, EDITIONS))}.")
    _refuse_to_overwrite(output)
    chapters = {path.name: _read(path) for path in sorted(notebooks.glob("*.ipynb"))}
    if not chapters:
        raise EditionError(f"There are no notebooks in {notebooks}: name the folder that holds the chapters.")
    for name, notebook in chapters.items():
        exercises_of(notebook, name)
    made = {name: EDITIONS[edition](notebook) for name, notebook in chapters.items()}
    if edition == "instructor":
        made[OVERVIEW] = overview(chapters)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as work:
        part, old = Path(work, "new"), Path(work, "old")
        part.mkdir()
        for name, notebook in made.items():
            nbformat.write(notebook, part / name)
        digests = {name: file_digest(part / name) for name in made}
        (part / RECORD).write_text(json.dumps(digests, indent=1) + "\n", "utf-8")
        if output.exists():
            output.rename(old)
        part.rename(output)


def _read(path: Path) -> NotebookNode:
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat has many ways of saying that a file is not a notebook
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise EditionError(f"{path} cannot be read as a notebook ({reason}): restore the file.") from error
    return notebook


def _without(notebook: NotebookNode, *tags: str) -> NotebookNode:
    """A copy without cells of these tags, and without outputs: a solution's text could be among them."""
    from nbconvert.preprocessors import ClearOutputPreprocessor, TagRemovePreprocessor  # here, as they load slowly

    cleared, _ = ClearOutputPreprocessor().preprocess(copy.deepcopy(notebook), {})
    kept, _ = TagRemovePreprocessor(remove_cell_tags={*tags}).preprocess(cleared, {})
    return kept


def _refuse_to_overwrite(output: Path) -> None:
    """Raise EditionError if the folder holds anything but an edition as it was written."""
    if not output.exists():
        return
    kept = f"move {output} away, or give another folder with --output"
    if not output.is_dir():
        raise EditionError(f"{output} is a file, not a folder: {kept}.")
    there = {path.name: path for path in output.iterdir() if path.name not in (RECORD, ".ipynb_checkpoints")}
    if not there:
        return
    try:
        written = json.loads((output / RECORD).read_text("utf-8"))
    except (OSError, ValueError):
        raise EditionError(f"{output} holds files that are not an edition of the notebooks: {kept}.") from None
    for name, path in there.items():
        if written.get(name) != (file_digest(path) if path.is_file() else None):
            raise EditionError(f"{path} was added or changed since the edition was made: {kept}.")
