"""Which helper files count as used."""

import nbformat
import pytest

import helpers.artifacts
from helpers.dependencies import PACKAGE, helper_sources, notebook_sources


def names(paths):
    return [path.relative_to(PACKAGE).as_posix() for path in paths]


def test_a_module_counts_with_everything_it_imports():
    expected = ["__init__.py", "artifacts.py", "dependencies.py"]
    assert names(helper_sources([helpers.artifacts])) == expected
    assert names(helper_sources(["artifacts"])) == names(helper_sources(["helpers.artifacts"])) == expected


def test_an_import_inside_a_function_counts():
    assert "scoreboard.py" in names(helper_sources(["def late():\n    from helpers import scoreboard\n"]))


@pytest.mark.parametrize(
    "code",
    [
        "import helpers.params",
        "from helpers import params as p",
        "from helpers.params import Params",
        "import os, helpers.params",
    ],
)
def test_every_way_to_import_a_module_is_seen(code):
    assert names(helper_sources([code])) == ["__init__.py", "params.py"]


def test_code_without_helpers_uses_none():
    assert helper_sources(["import json\n"]) == []


def test_a_name_that_is_no_module_of_helpers_is_an_error():
    with pytest.raises(ValueError, match="There is no module 'gradiants' in helpers"):
        helper_sources(["gradiants"])


def test_a_notebook_s_code_cells_are_read_and_its_magics_skipped(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("from helpers import cli"),
        nbformat.v4.new_code_cell("%matplotlib inline\nfrom helpers.params import Params"),
        nbformat.v4.new_code_cell("%%bash\nimport helpers.cli"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    assert names(notebook_sources(tmp_path / "n.ipynb")) == ["__init__.py", "params.py"]
