"""Every figure of a chapter has a number, a name, a caption that says what to look at, and its data."""

import re
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from sphinx_external_toc.parsing import parse_toc_yaml

from helpers.book.captions import figures_of
from helpers.book.editions import part_of
from helpers.book.findings import load_claims
from helpers.book.pages import MAP

PROJECT = Path(__file__).resolve().parents[2]
CHAPTERS = [page for page in map(str, parse_toc_yaml(PROJECT / "_toc.yml")) if page.startswith("notebooks/")]
SITE = PROJECT / "book" / "executed" / "tiny" / "_build" / "html"
NOTEBOOKS = {page: nbformat.read(PROJECT / f"{page}.ipynb", as_version=4) for page in CHAPTERS}
NAMES = {page: [cell.metadata.figure.name for cell, _ in figures_of(book)] for page, book in NOTEBOOKS.items()}


def page_of(name):
    return BeautifulSoup((SITE / f"{name}.html").read_text("utf-8"), "html.parser")


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_cell_that_draws_a_figure_says_its_name_and_data(name):
    for cell in NOTEBOOKS[name].cells:
        if cell.cell_type == "code" and "plt.show()" in cell.source and part_of(cell) != "yours":
            assert cell.metadata.figure.name.startswith("fig-") and cell.metadata.figure.data, cell.source[:200]


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_caption_begins_with_a_title_and_says_what_to_look_at(name):
    for _, caption in figures_of(NOTEBOOKS[name]):
        assert re.match(r"\*\*[^*]+[.?,]\*\* ", caption.source), caption.source
        assert re.search(r"\b[Ll]ook(?! closer)\b", caption.source), caption.source


def test_the_figure_on_a_chapter_s_card_is_one_of_its_figures():
    described = yaml.safe_load((PROJECT / "book" / "map.yml").read_text("utf-8"))["chapters"]
    assert all(described[Path(page).name]["figure"] in figures for page, figures in NAMES.items())


def test_no_two_figures_have_the_same_name():
    names = [name for names in NAMES.values() for name in names]
    assert len(names) == len(set(names)) > 40


def test_a_claim_is_shown_in_a_figure_of_its_own_chapter_and_two_or_three_are_central():
    for name, figures in NAMES.items():
        claims = [claim for claim in load_claims().values() if f"notebooks/{claim.chapter}" == name]
        assert {claim.figure for claim in claims} - {""} <= set(figures), name
        assert 2 <= sum(claim.central for claim in claims) <= 3, name


def test_the_figure_that_stands_for_a_chapter_is_one_of_its_own_and_shows_the_headline_s_central_claim():
    described = yaml.safe_load(MAP.read_text("utf-8"))
    for name, figures in NAMES.items():
        assert described["chapters"][Path(name).name]["figure"] in figures
    headline = described["chapters"][described["headline"]]["figure"]
    assert any(claim.central and claim.figure == headline for claim in load_claims().values())


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("name", CHAPTERS)
def test_every_figure_on_a_page_has_its_number_its_name_and_its_data(name):
    figures = page_of(name).select("main .cell_output figure")
    drawn = [figure for figure in figures if figure.find("img")]
    assert len(drawn) == len(page_of(name).select("main .cell_output img")) > 0
    chapter = int(Path(name).name[:2])
    for place, figure in enumerate(drawn, 1):
        assert figure["id"] in NAMES[name]
        assert figure.select_one(".caption-number").text.strip() == f"Figure {chapter}.{place}"
        links = [link["href"] for link in figure.select("figcaption a.download")]
        assert links and all(link.endswith(".csv") for link in links), figure["id"]


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("name", CHAPTERS)
def test_every_file_of_a_run_is_linked_from_its_chapter(name):
    linked = {Path(link["href"]).name for link in page_of(name).select("main a.download")}
    made = {path.name for path in (SITE.parents[1] / name).iterdir() if path.suffix in (".csv", ".json")}
    assert len(made) > 3 and made <= linked


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_says_in_words_what_became_of_its_central_claims(name):
    (box,) = [box for box in page_of(name).select("main .admonition") if "What this run found" in box.text]
    central = [c for c in load_claims().values() if c.central and f"notebooks/{c.chapter}" == name]
    items = [item.text for item in box.select("li")]
    assert len(items) == len(central)
    assert all(item.select_one(".verdict") for item in box.select("li"))


@pytest.mark.usefixtures("site")
def test_the_first_page_shows_verdicts_a_figure_and_a_card_for_every_chapter():
    page = page_of("book/intro")
    assert len(page.select(".landing .matrix tbody tr")) == len(page.select(".sd-card")) == len(CHAPTERS)
    assert page.select_one(".landing img")["alt"]
    assert all(card.select_one("img")["alt"] and card.select_one(".sd-card-footer") for card in page.select(".sd-card"))


@pytest.mark.usefixtures("site")
def test_the_scoreboard_has_every_claim_once_with_its_place_on_the_axis():
    page = page_of("book/scoreboard")
    names = [code.text for code in page.select(".claims td code")]
    assert sorted(names) == sorted(load_claims())
    for claim in load_claims().values():
        assert page.text.count(claim.statement.replace("'", "’")) == 1, claim.id
    rows = page.select(".forest tbody tr")
    assert len(rows) == len(load_claims()) and sum(bool(row.select("svg")) for row in rows) > len(rows) / 2
