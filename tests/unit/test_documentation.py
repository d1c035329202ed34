"""Docstrings become reStructuredText of the same meaning, and no module is left out of the reference pages."""

import inspect
import io
import re
from pathlib import Path

import pytest
from docutils.core import publish_doctree

from helpers import artifacts, findings, params
from helpers.documentation import as_restructured_text

PROJECT = Path(__file__).resolve().parents[2]
REFERENCE = {page: page.read_text("utf-8") for page in sorted((PROJECT / "book" / "api").glob("*.md"))}


def parsed(docstring):
    lines = inspect.cleandoc(docstring).splitlines()
    as_restructured_text(lines)
    complaints = io.StringIO()
    return publish_doctree("\n".join(lines), settings_overrides={"warning_stream": complaints}), complaints.getvalue()


@pytest.mark.parametrize("module", [params, findings])
def test_an_indented_paragraph_is_an_example(module):
    tree, complaints = parsed(module.__doc__)
    (example,) = (node for node in tree.findall() if node.tagname == "literal_block")
    assert example.astext() in inspect.cleandoc(module.__doc__).replace("\n    ", "\n")
    assert complaints == ""


def test_bars_are_bars_in_text_and_in_an_example():
    tree, complaints = parsed("The norm |g.v| of `a | b`, as in:\n\n    left | right\n\nand |h|.")
    assert complaints == ""
    assert [line for line in tree.astext().splitlines() if line] == [
        "The norm |g.v| of a | b, as in:",
        "left | right",
        "and |h|.",
    ]


def test_a_docstring_without_examples_stays_as_it_is():
    lines = inspect.cleandoc(artifacts.__doc__).splitlines()
    before = list(lines)
    as_restructured_text(lines)
    assert lines == before


def test_every_module_is_on_exactly_one_reference_page():
    files = (path for path in (PROJECT / "helpers").rglob("*.py") if not path.name.startswith("__"))
    modules = sorted(".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in files)
    documented = [name for text in REFERENCE.values() for name in re.findall(r"automodule:: (\S+)", text)]
    assert sorted(documented) == modules
