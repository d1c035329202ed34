"""The core works without what only the book needs, and a notebook in Colab says when it has to be restarted."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from helpers.book.findings import Findings

PROJECT = Path(__file__).resolve().parents[2]
OF_THE_BOOK = ("dependencies", "book", "building", "cli", "__main__")
"""What needs the extra `book`; `dependencies` does in the function that reads notebooks."""
SETTINGS = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]


def modules():
    return sorted((PROJECT / "helpers").rglob("*.py"))


def name(path):
    return path.relative_to(PROJECT / "helpers").with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def normal(distribution):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", distribution)[0]).lower()


CORE = {normal(d) for d in SETTINGS["dependencies"]}
BOOK = {normal(d) for d in SETTINGS["optional-dependencies"]["book"]}


def imported(path):
    """The packages that a module imports, at its top or inside functions, as what pip calls them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    distributions = packages_distributions()
    return {normal(distributions[f][0]) for f in found - set(sys.stdlib_module_names) - {"helpers"}}


@pytest.mark.parametrize("path", modules(), ids=name)
def test_what_a_module_imports_is_asked_for_by_name(path):
    if name(path).split(".")[0] in OF_THE_BOOK:
        allowed = CORE | BOOK | {"jupyter-client", "myst-nb", "nbclient", "sphinx", "sphinx-external-toc"}
    else:  # what only a notebook reaches may ask IPython about it
        allowed = CORE | ({"ipython"} if name(path) in ("params", "progress") else set())
    assert imported(path) <= allowed


def test_the_core_imports_without_what_only_the_book_needs():
    core = [f"helpers.{name(path)}" for path in modules() if path.parent.name != "helpers" or path.stem[0] != "_"]
    core = [module for module in core if module.split(".")[1] not in {*OF_THE_BOOK} - {"dependencies"}]
    refused = {*BOOK, "IPython", "jupyter_book", "myst_nb", "sphinx", "nbclient", "jupyter_client"}
    code = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"{{name}} is of the book alone", name=name)

sys.meta_path.insert(0, Refuse())
import importlib
for module in {core!r}:
    importlib.import_module(module)
importlib.import_module("helpers.dependencies").helper_sources(["helpers.models"])
print(len({core!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


def test_numbers_are_glued_without_jupyter_book(monkeypatch):
    """As in Colab, where no page is rendered; the number still goes into the findings."""
    monkeypatch.setitem(sys.modules, "myst_nb", None)
    findings = Findings.__new__(Findings)
    findings.glued = {}
    assert findings.glue("share", 0.25, ".0%") == "25%"
    assert findings.glued == {"share": {"value": 0.25, "text": "25%"}}


def colab_cells():
    text = (PROJECT / "book" / "how-to-rerun.md").read_text("utf-8")
    section = text.partition("## In Colab")[2].partition("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", section, re.DOTALL)


def checked(loaded, tmp_path):
    """What the second cell prints where version 1.0 of a package was `loaded` before version 2.0 was installed."""
    (tmp_path / "numpy-2.0.dist-info").mkdir()
    (tmp_path / "numpy-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 2.0\n")
    (tmp_path / "numpy.py").write_text(f"__version__ = {loaded!r}\n")
    (kind, _), (language, cell) = colab_cells()
    assert (kind, language) == ("console", "python")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport numpy\n{cell}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_colab_is_told_to_restart_where_a_loaded_package_was_replaced(tmp_path):
    assert checked("1.0", tmp_path) == "Restart the session: numpy"


def test_colab_is_told_that_it_is_ready_otherwise(tmp_path):
    assert checked("2.0", tmp_path) == "Ready"


def test_the_cells_for_colab_leave_no_name_that_a_chapter_would_take_for_a_parameter():
    from types import ModuleType

    namespace = {}
    exec(colab_cells()[1][1], namespace)
    names = {key for key, value in namespace.items() if not isinstance(value, ModuleType) and not callable(value)}
    assert all(key.startswith("_") for key in names)


def test_the_readme_names_the_systems():
    assert "Linux, macOS, or Windows with WSL" in (PROJECT / "README.md").read_text("utf-8")
