"""Every exercise is complete, and its solution is right and prints what the chapter says it prints."""

import ast
import contextlib
import doctest
import io
import re
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

from helpers.book.editions import EditionError, exercises_of, part_of
from helpers.checking import read_questions

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
CHAPTERS = {path.stem: exercises_of(nbformat.read(path, as_version=4), path.stem) for path in NOTEBOOKS}
EXERCISES = [(stem, exercise) for stem, chapter in CHAPTERS.items() for exercise in chapter]
of_each_exercise = pytest.mark.parametrize(
    ("stem", "exercise"), EXERCISES, ids=[f"{stem}-{exercise.number}" for stem, exercise in EXERCISES]
)
CHECKS = {stem: import_module(f"helpers.chapters.{stem[3:]}.exercises") for stem in CHAPTERS}
CHECK = re.compile(r'exercises\.(check_\w+|question\("\w+")')
"""A check of the chapter, or the call that asks a question."""
FOLDED = re.compile(r"<details><summary>(.+)</summary>\n\n(.+)\n\n</details>", re.DOTALL)


def code_of(cells):
    return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def ran(code, namespace):
    """What the code prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def names_bound_by(tree):
    """The names that a cell binds for the whole notebook."""
    bound = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        else:
            bound |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return bound


def test_a_chapter_has_at_least_five_exercises_two_of_them_on_interpretation(stem):
    chapter = CHAPTERS[stem]
    assert len(chapter) >= 5
    assert sum(exercise.kind == "interpretation" for exercise in chapter) >= 2


def test_the_exercises_are_the_last_section_and_hold_no_other_cell(committed):
    heading = next(i for i, cell in enumerate(committed.cells) if cell.source.startswith("## Exercises\n"))
    assert all(part_of(cell) is None for cell in committed.cells[: heading + 1])
    assert all(part_of(cell) is not None for cell in committed.cells[heading + 1 :])


@of_each_exercise
def test_cells_are_tagged_and_folded_as_their_part_asks(stem, exercise):
    for part, summary in (("hint", "Hint"), ("expected", "Expected output"), ("solution", "More on the solution")):
        for cell in exercise.cells[part]:
            if cell.cell_type == "markdown":
                folded = FOLDED.fullmatch(cell.source)
                assert folded and folded[1] == summary and len(folded[2]) > 20
    assert all("hide-cell" in cell.metadata.tags for cell in exercise.cells["solution"] if cell.cell_type == "code")
    (note,) = exercise.cells["discussion"]
    assert "remove-cell" in note.metadata.tags and note.cell_type == "markdown"
    assert note.source.startswith("**For the instructor.** ")
    assert len(re.findall(r"[.?!:](?=\s|$)", note.source)) >= 2


@of_each_exercise
def test_a_solution_is_right_by_its_check_and_prints_what_is_expected(stem, exercise, imports):
    solution = code_of(exercise.cells["solution"])
    printed = ran(solution, imports)
    checks = CHECK.findall(solution)
    assert checks and len(re.findall(r"^Right: ", printed, flags=re.MULTILINE)) == len(checks)
    assert "Not yet" not in printed
    (expected,) = exercise.cells["expected"]
    (block,) = re.findall(r"```text\n(.*?)```", expected.source, flags=re.DOTALL)
    assert doctest.OutputChecker().check_output(block, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), (
        printed
    )


@of_each_exercise
def test_a_question_is_asked_by_the_check_that_judges_the_answer(stem, exercise):
    (check,) = set(CHECK.findall(code_of(exercise.cells["solution"])))
    assert check in exercise.cells["exercise"][0].source
    if exercise.kind == "interpretation":
        (question,) = exercise.cells["question"]
        assert question.source == f"exercises.{check})"
        assert ran(question.source, {"exercises": CHECKS[stem]}).count("\n") > 4
        assert re.fullmatch(rf'exercises\.{re.escape(check)}, "[a-d]"\)', code_of(exercise.cells["solution"]))


def test_the_rest_of_a_chapter_shares_no_name_with_the_solutions(stem, committed):
    """Or else a learner's answer would change the chapter, and the student edition would not run."""
    rest = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "code" and part_of(cell) is None)
    used = {node.id for node in ast.walk(ast.parse(rest)) if isinstance(node, ast.Name)}
    bound = [names_bound_by(ast.parse(code_of(exercise.cells["solution"]))) for exercise in CHAPTERS[stem]]
    assert not set().union(*bound) & used
    assert sum(len(names) for names in bound) == len(set().union(*bound))


def test_every_check_and_every_question_has_an_exercise(stem):
    used = {check for exercise in CHAPTERS[stem] for check in CHECK.findall(code_of(exercise.cells["solution"]))}
    own = vars(CHECKS[stem]).items()
    checks = {n for n, value in own if n.startswith("check_") and value.__module__ == CHECKS[stem].__name__}
    questions = read_questions(Path(CHECKS[stem].__file__).with_name("questions.toml"))
    assert used == checks | {f'question("{name}"' for name in questions}


def cell(part, source):
    return nbformat.v4.new_markdown_cell(source, metadata={"tags": [part]})


@pytest.mark.parametrize(
    ("header", "left_out", "sentence"),
    [
        ("Exercise 1: A title\n\n*easy, code, 10 minutes*", "hint", "it has exercise, expected, solution, discussion."),
        ("Exercise 2: A title\n\n*easy, code, 10 minutes*", None, "must begin with '### Exercise 1: TITLE'"),
        ("Exercise 1: A title\n\n*simple, code, 10 minutes*", None, "must begin with '### Exercise 1: TITLE'"),
        ("Exercise 1: A title\n\n*easy, interpretation, 9 minutes*", None, "tagged exercise, question, hint"),
    ],
)
def test_an_incomplete_exercise_is_refused_in_one_sentence(header, left_out, sentence):
    parts = ("hint", "expected", "solution", "discussion")
    cells = [cell("exercise", f"### {header}\n\nA task."), *(cell(part, "text") for part in parts if part != left_out)]
    with pytest.raises(EditionError) as refused:
        exercises_of(nbformat.v4.new_notebook(cells=cells), "a chapter")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
