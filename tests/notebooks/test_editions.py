"""No answer is left in the student edition; the instructor's has them all; nobody's work is overwritten."""

import contextlib
import io
import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

from helpers import cli
from helpers.book.editions import OVERVIEW, EditionError, exercises_of, part_of, write_edition

PROJECT = Path(__file__).resolve().parents[2]
STEMS = sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb"))
TRIVIAL = re.compile(r"|</?details>.*|exercises\.check_\w+\(\w+(, \"attenuate\")?\)|import torch")
"""Lines that give no answer: folding, and the call by which a learner checks a function, which the task names."""


ANSWERED = re.compile(r'question\(\\"\w+\\", \\"[a-d]\\"\)')
"""The call that answers a question, as a notebook's file has it."""


def parts(notebook, *wanted):
    return [cell for cell in notebook.cells if part_of(cell) in wanted]


def telling_lines(cell):
    """What a cell says, line by line, and in prose sentence by sentence."""
    lines = [line.strip() for line in cell.source.splitlines()]
    if cell.cell_type == "markdown":
        lines = [sentence for line in lines for sentence in re.split(r"(?<=[.?!]) ", line)]
    return [line for line in lines if not TRIVIAL.fullmatch(line)]


def in_json(text):
    return json.dumps(text, ensure_ascii=False)[1:-1]


@pytest.fixture(scope="module")
def student_text(folders):
    """Everything that is in the student edition's files."""
    return "\n".join(path.read_text("utf-8") for path in sorted(folders["student"].rglob("*")) if path.is_file())


def test_an_edition_has_every_chapter_and_nothing_else(folders):
    names = {f"{stem}.ipynb" for stem in STEMS} | {".edition.json"}
    assert {path.name for path in folders["student"].iterdir()} == names
    assert {path.name for path in folders["instructor"].iterdir()} == names | {OVERVIEW}


def test_no_line_of_a_solution_or_of_a_note_is_left_in_the_student_edition(committed, student_text):
    lines = [line for cell in parts(committed, "solution", "discussion") for line in telling_lines(cell)]
    assert len(lines) > 10
    assert [line for line in lines if in_json(line) in student_text] == []


def test_no_question_is_answered_in_the_student_edition(committed, stem, student_text):
    assert not ANSWERED.search(student_text)
    for exercise in exercises_of(committed, stem):
        if exercise.kind == "interpretation":
            assert ANSWERED.search(in_json(exercise.cells["solution"][0].source))
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(
                    exercise.cells["solution"][0].source,
                    {"exercises": import_module(f"helpers.chapters.{stem[3:]}.exercises")},
                )
            first_line = printed.getvalue().removeprefix("Right: ").splitlines()[0]
            assert len(first_line) > 20 and first_line not in student_text


def test_students_keep_task_hint_and_expected_output_and_get_a_cell_for_each_answer(committed, stem, folders):
    edition = nbformat.read(folders["student"] / f"{stem}.ipynb", as_version=4)
    kept = [cell.source for cell in parts(committed, "exercise", "question", "hint", "expected")]
    assert [cell.source for cell in parts(edition, "exercise", "question", "hint", "expected")] == kept
    answers = [cell for cell in edition.cells if "answer" in cell.metadata.get("tags", [])]
    assert len(answers) == len(exercises_of(committed, stem))
    assert all(cell.cell_type == "code" and cell.source == "" for cell in answers)
    rest = [cell.source for cell in committed.cells if part_of(cell) is None]
    assert [cell.source for cell in edition.cells if part_of(cell) is None and cell not in answers] == rest


def test_instructors_see_every_solution_and_note(committed, stem, folders):
    edition = nbformat.read(folders["instructor"] / f"{stem}.ipynb", as_version=4)
    source, shown = parts(committed, "solution", "discussion"), parts(edition, "solution", "discussion")
    assert [cell.source.replace("<details open>", "<details>") for cell in shown] == [cell.source for cell in source]
    assert not any("<details>" in cell.source for cell in shown)
    assert not any({"hide-cell", "remove-cell"} & set(cell.metadata.tags) for cell in shown)
    assert len(edition.cells) == len(committed.cells)


def test_the_overview_has_the_minutes_of_every_exercise(committed, stem, folders):
    overview = nbformat.read(folders["instructor"] / OVERVIEW, as_version=4)
    nbformat.validate(overview)
    (cell,) = [cell for cell in overview.cells if f"({stem}.ipynb)" in cell.source]
    chapter = exercises_of(committed, stem)
    for exercise in chapter:
        assert f"| {exercise.title} | {exercise.difficulty} | {exercise.kind} | {exercise.minutes} |" in cell.source
    assert f"|  | all |  |  | {sum(exercise.minutes for exercise in chapter)} |" in cell.source


def test_a_solution_s_output_does_not_get_into_an_edition(tmp_path):
    source = tmp_path / "notebooks"
    source.mkdir()
    notebook = nbformat.read(PROJECT / "notebooks" / f"{STEMS[0]}.ipynb", as_version=4)
    (first, *_) = [cell for cell in notebook.cells if cell.cell_type == "code"]
    first.outputs = [nbformat.v4.new_output("stream", text="a secret")]
    nbformat.write(notebook, source / f"{STEMS[0]}.ipynb")
    write_edition("student", tmp_path / "out", source)
    assert "a secret" not in (tmp_path / "out" / f"{STEMS[0]}.ipynb").read_text("utf-8")


def test_an_untouched_edition_is_replaced_and_one_that_was_worked_in_is_kept(tmp_path):
    output = tmp_path / "build" / "student"
    write_edition("student", output)
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / ".ipynb_checkpoints").mkdir()
    write_edition("student", output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first
    assert [path.name for path in output.parent.iterdir()] == ["student"]

    worked_in = output / f"{STEMS[0]}.ipynb"
    worked_in.write_text(worked_in.read_text("utf-8").replace("Exercises", "My answers"), "utf-8")
    with pytest.raises(EditionError, match="was added or changed since the edition was made: move"):
        write_edition("student", output)
    assert "My answers" in worked_in.read_text("utf-8")


def test_a_folder_that_is_no_edition_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(EditionError, match="holds files that are not an edition"):
        write_edition("student", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("damage", ["{", "{}", "a cell removed"])
def test_a_damaged_notebook_gives_one_sentence_and_no_edition(tmp_path, damage):
    source, output = tmp_path / "notebooks", tmp_path / "out"
    shutil.copytree(PROJECT / "notebooks", source)
    path = source / f"{STEMS[-1]}.ipynb"
    if damage == "a cell removed":
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.remove(parts(notebook, "hint")[0])
        nbformat.write(notebook, path)
    else:
        path.write_text(damage)
    with pytest.raises(EditionError) as refused:
        write_edition("student", output, source)
    assert path.name in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["notebooks"]


def test_an_unknown_edition_gives_one_sentence(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["edition", "teacher", "--output", str(tmp_path / "out")])
    assert stopped.value.code == "There is no edition 'teacher': choose 'student' or 'instructor'."
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_an_edition(tmp_path):
    cli.main(["edition", "student", "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / f"{STEMS[0]}.ipynb").is_file()
