"""What must be true of every notebook as it is committed, and of the editions made of it."""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from helpers.chapters import CHAPTERS, params_of

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["committed", "student", "instructor"])
def path(request, stem, folders):
    return folders[request.param] / f"{stem}.ipynb"


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python(cell):
    """The cell without IPython's own lines."""
    return "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))


def test_no_output_is_committed(path, notebook):
    assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))
    assert "papermill" not in notebook.metadata


def test_the_notebook_is_valid_and_names_the_python_kernel(path, notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.language == "python"


def test_the_first_code_cell_has_the_parameters_and_the_second_reads_them(path, notebook):
    first, second = code(notebook)[:2]
    assert "parameters" in first.metadata.get("tags", [])
    assert f"{params_of(path.stem).__name__}.from_notebook()" in second.source


def test_every_name_in_the_parameters_cell_is_a_parameter_of_the_chapter(path, notebook):
    assert path.stem in CHAPTERS
    names = {
        target.id
        for node in ast.parse(code(notebook)[0].source).body
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    assert names <= set(params_of(path.stem).model_fields)


def test_no_later_cell_assigns_a_parameter_s_name(path, notebook):
    """Or else running the second cell again would take that value for a parameter."""
    taken = {
        node.id
        for cell in code(notebook)[1:]
        for node in _global_nodes(ast.parse(python(cell)))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert not taken & set(params_of(path.stem).model_fields)


def test_every_figure_says_in_words_what_it_shows(path, notebook):
    """The alternative text of the page's image; a sentence, and not the numbers that only the run knows."""
    drawn = [cell for cell in code(notebook) if "plt.show()" in cell.source]
    assert drawn
    for cell in drawn:
        said = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(said.split()) >= 8 and said.endswith("."), cell.source[:200]


def test_ruff_has_nothing_to_say(path):
    settings = PROJECT / "notebooks" / "ruff.toml"
    answers = ["--extend-ignore", "F401"] if path.parent.name == "student" else []  # imports may wait for an answer
    for arguments in (["check", *answers], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *arguments, "--config", str(settings), str(path)]
        done = subprocess.run(ruff, cwd=settings.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def _global_nodes(tree):
    """The nodes outside functions, classes and comprehensions, whose names are their own."""
    own = (
        ast.FunctionDef,
        ast.ClassDef,
        ast.Lambda,
        ast.ListComp,
        ast.SetComp,
        ast.DictComp,
        ast.GeneratorExp,
    )
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, own):
            yield child
            yield from _global_nodes(child)
