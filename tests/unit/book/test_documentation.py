"""Docstrings become reStructuredText of the same meaning, and no module is left out of the reference pages."""

import doctest
import inspect
import io
import re
from pathlib import Path

import pytest
from docutils.core import publish_doctree
from sphinx.config import Config

from helpers import artifacts, params, statistics, verdicts
from helpers.book import findings
from helpers.book.documentation import as_restructured_text, published_at, summary
from helpers.models import load

PROJECT = Path(__file__).resolve().parents[3]
REFERENCE = {page: page.read_text("utf-8") for page in sorted((PROJECT / "book" / "api").glob("*.md"))}

SECTIONS = {
    name: section
    for text in REFERENCE.values()
    for section in text.split("\n## ")[1:]
    for name in re.findall(r"automodule:: (\S+)", section)
}
"""A module's section of its page."""


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


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of the examples' own, but for the embedded model, which takes long to make."""
    folder = tmp_path_factory.mktemp("examples")
    load("tiny-random")
    (folder / "weights").symlink_to(artifacts.default_store().root / "weights")
    return folder


@pytest.mark.parametrize("module", sorted(SECTIONS))
def test_a_module_has_an_example_that_gives_what_it_says(module, store, monkeypatch):
    monkeypatch.setenv("HELPERS_STORE", str(store))
    monkeypatch.chdir(PROJECT)
    examples = re.findall(r"^```pycon\n(.+?)^```$", SECTIONS[module], flags=re.DOTALL | re.MULTILINE)
    assert examples
    for example in examples:
        said = io.StringIO()
        runner = doctest.DocTestRunner()
        runner.run(doctest.DocTestParser().get_doctest(example, {}, module, None, 0), out=said.write)
        assert runner.summarize(verbose=False).failed == 0, said.getvalue()


def test_a_module_s_table_names_what_is_defined_in_it_with_constants_last():
    named = [line.strip() for line in summary(verdicts) if re.fullmatch(r"   \w+", line)]
    assert {"Claim", "Measurement", "verdict"} <= set(named)
    assert "Estimate" not in named and not any(name.startswith("_") for name in named)
    assert named[-1] == "NOT_MEASURED"
    assert not any(line.strip() == "np" for line in summary(statistics))


@pytest.mark.parametrize("address", ["", "https://someone.github.io/book/latest/"])
def test_pages_name_their_address_and_have_a_card_where_there_is_one(monkeypatch, address):
    config = Config({}, {"html_baseurl": address})
    config.add("html_baseurl", "", "html", str)
    monkeypatch.delenv("BOOK_ADDRESS", raising=False)
    published_at(config)
    assert config.ogp_site_url == address
    assert config.ogp_social_cards == {"enable": bool(address)}
    monkeypatch.setenv("BOOK_ADDRESS", "https://elsewhere.org/")
    published_at(config)
    assert config.html_baseurl == config.ogp_site_url == "https://elsewhere.org/"
