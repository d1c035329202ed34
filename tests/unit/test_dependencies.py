"""Which helper files count as used."""

import nbformat
import pytest

import helpers.artifacts
from helpers.dependencies import DATA, PACKAGE, data_sources, helper_sources, notebook_sources


def names(paths):
    return [path.relative_to(PACKAGE).as_posix() for path in paths]


def test_a_module_counts_with_everything_it_imports():
    expected = ["__init__.py", "artifacts.py", "cost.py", "dependencies.py", "files.py", "progress.py"]
    assert names(helper_sources([helpers.artifacts])) == expected
    assert names(helper_sources(["artifacts"])) == names(helper_sources(["helpers.artifacts"])) == expected


def test_an_import_inside_a_function_counts():
    assert "book/scoreboard.py" in names(helper_sources(["def late():\n    from helpers.book import scoreboard\n"]))


@pytest.mark.parametrize(
    "code",
    [
        "import helpers.files",
        "from helpers import files as f",
        "from helpers.files import replace",
        "import os, helpers.files",
    ],
)
def test_every_way_to_import_a_module_is_seen(code):
    assert names(helper_sources([code])) == ["__init__.py", "files.py"]


def test_code_without_helpers_uses_none():
    assert helper_sources(["import json\n"]) == []


def test_a_name_that_is_no_module_of_helpers_is_an_error():
    with pytest.raises(ValueError, match="There is no module 'gradiants' in helpers"):
        helper_sources(["gradiants"])


def test_a_notebook_s_code_cells_are_read_and_its_magics_skipped(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("from helpers import cli"),
        nbformat.v4.new_code_cell("%matplotlib inline\nfrom helpers.files import replace"),
        nbformat.v4.new_code_cell("%%bash\nimport helpers.cli"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    assert names(notebook_sources(tmp_path / "n.ipynb")) == ["__init__.py", "files.py"]


def written(path, *codes):
    cells = [nbformat.v4.new_code_cell(code) for code in codes]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("from helpers import corpora\ncorpora.load_quiz('facts')", {"quiz.jsonl"}),
        ("from helpers.corpora import load_task as items\nitems('bookings', 'test')", {"tasks.jsonl"}),
        ("import helpers.corpora as c\nload = c.load_replies", {"replies.jsonl"}),
        ("from helpers.corpora import split", set()),
        ("from helpers.chapters.looking_inside.params import LookingInsideParams as P\nP.from_notebook()", set()),
        ("from helpers.judges import checks", set()),
    ],
)
def test_a_notebook_reads_the_data_of_the_loaders_that_it_names(tmp_path, code, files):
    assert {path.name for path in data_sources(written(tmp_path / "n.ipynb", code))} == files


def test_data_read_by_a_function_of_a_helper_count_if_that_is_named(tmp_path):
    code = "from helpers.judges.checks import off_target_texts\ntexts = off_target_texts('evil')"
    assert DATA / "topics.jsonl" in data_sources(written(tmp_path / "n.ipynb", code))


def test_each_data_file_decides_a_chapter_and_the_quiz_does_not_decide_all():
    notebooks = sorted((PACKAGE.parent / "notebooks").glob("*.ipynb"))
    read = {notebook.stem: data_sources(notebook) for notebook in notebooks}
    assert {path for paths in read.values() for path in paths} == set(DATA.rglob("*.jsonl")) - {
        DATA / name
        for name in ("everyday.jsonl",)  # no chapter reads them yet
    }
    assert DATA / "quiz.jsonl" in read["06_prompt_only_steering"]
    assert DATA / "quiz.jsonl" not in read["02_ip_loss_reduction"]
