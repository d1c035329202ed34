"""The prose holds together: references resolve, claims have chapters, words are spelt the book's way."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pybtex.database import parse_file

from helpers.book.findings import load_claims
from helpers.book.pages import MAP
from helpers.chapters import CHAPTERS

PROJECT = Path(__file__).resolve().parents[2]
PAGES = sorted((PROJECT / "book").glob("*.md"))
PROSE = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
GENERATED = {"book/scoreboard", "book/status", "book/map", "book/parameters"}
BRITISH = {
    "behavior": "behaviour",
    "neutralize": "neutralise",
    "neutralized": "neutralised",
    "uncentered": "uncentred",
    "quantized": "quantised",
    "defense": "defence",
    "color": "colour",
    "normalized": "normalised",
    "learned": "learnt",
    "analyze": "analyse",
}


def cited(text: str) -> set[str]:
    return {key for keys in re.findall(r"\{cite[^}]*\}`([^`]+)`", text) for key in keys.split(",")}


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def glossary_terms() -> list[str]:
    terms = re.findall(r"^(\S.*)$", PROSE["glossary.md"].split("{glossary}")[1], flags=re.MULTILINE)
    return [term for term in terms if not term.startswith(":::")]


def linked_terms(text: str) -> set[str]:
    return {re.sub(r".*<(.+)>$", r"\1", term) for term in re.findall(r"\{term\}`([^`]+)`", text)}


def toc_files(entry: object) -> list[str]:
    if isinstance(entry, list):
        return [file for item in entry for file in toc_files(item)]
    if isinstance(entry, dict):
        here = [entry[name] for name in ("file", "root") if name in entry]
        return here + [file for value in entry.values() for file in toc_files(value)]
    return []


def test_there_is_prose_to_check():
    assert len(PROSE) >= 7


def test_every_glossary_term_is_explained_once():
    terms = [term.lower() for term in glossary_terms()]
    assert len(terms) > 20
    assert [term for term, count in Counter(terms).items() if count > 1] == []


def test_the_glossary_is_in_alphabetical_order():
    terms = glossary_terms()
    assert terms == sorted(terms, key=lambda term: term.lower().replace("-", " "))


def test_every_term_referred_to_is_in_the_glossary():
    terms = set(glossary_terms())
    for name, text in PROSE.items():
        assert linked_terms(text) <= terms, name
    for path in NOTEBOOKS:
        assert linked_terms(path.read_text(encoding="utf-8")) <= terms, path.name


def test_every_term_of_the_glossary_is_linked_from_a_page_or_a_chapter():
    texts = [text for name, text in PROSE.items() if name != "glossary.md"]
    texts += [path.read_text(encoding="utf-8") for path in NOTEBOOKS]
    assert set(glossary_terms()) - {term for text in texts for term in linked_terms(text)} == set()


def test_every_citation_is_in_the_bibliography():
    known = set(parse_file(PROJECT / "book" / "references.bib").entries)
    for name, text in PROSE.items():
        assert cited(text) <= known, name
    for notebook in NOTEBOOKS:
        assert cited(notebook.read_text(encoding="utf-8")) <= known, notebook.name


def test_every_entry_of_the_bibliography_is_cited():
    texts = [*PROSE.values(), *(path.read_text(encoding="utf-8") for path in NOTEBOOKS)]
    sources = {
        said["source"] for said in yaml.safe_load(MAP.read_text("utf-8"))["chapters"].values() if "source" in said
    }
    known = set(parse_file(PROJECT / "book" / "references.bib").entries)
    assert sources <= known
    assert known - sources - {key for text in texts for key in cited(text)} == set()


def test_every_reference_has_authors_a_title_and_a_year_or_says_that_it_has_none():
    for key, entry in parse_file(PROJECT / "book" / "references.bib").entries.items():
        assert entry.persons.get("author"), key
        assert {"title", "url"} <= set(entry.fields), key
        assert "year" in entry.fields or entry.fields.get("note") == "Undated", key
        assert entry.type != "inproceedings" or "booktitle" in entry.fields, key


def test_every_reference_can_be_followed_to_its_text():
    for key, entry in parse_file(PROJECT / "book" / "references.bib").entries.items():
        assert entry.fields.get("url", "").startswith("https://"), key
        if "eprint" in entry.fields:
            assert entry.fields["url"].endswith(entry.fields["eprint"]), key


def test_every_page_of_the_contents_exists_and_every_page_is_in_the_contents():
    listed = toc_files(yaml.safe_load((PROJECT / "_toc.yml").read_text(encoding="utf-8")))
    missing = [
        file
        for file in listed
        if file not in GENERATED and not any((PROJECT / f"{file}{suffix}").is_file() for suffix in (".md", ".ipynb"))
    ]
    assert missing == []
    assert {f"book/{page.stem}" for page in PAGES} <= set(listed)


def test_every_link_to_a_page_leads_to_a_page_of_the_contents():
    listed = set(toc_files(yaml.safe_load((PROJECT / "_toc.yml").read_text(encoding="utf-8"))))
    for name, text in PROSE.items():
        for target in re.findall(r"\{doc\}`([^`]+)`", text):
            page = target.removeprefix("../") if target.startswith("../") else f"book/{target}"
            assert page in listed, f"{name} links to {target}"


@pytest.mark.parametrize("name", PROSE)
def test_the_prose_is_spelt_the_british_way(name):
    words = set(re.findall(r"[a-z]+", without_code(PROSE[name]).lower()))
    assert {word: BRITISH[word] for word in words & BRITISH.keys()} == {}


def test_every_claim_belongs_to_a_chapter_and_every_chapter_has_claims():
    claims = load_claims()
    assert {claim.chapter for claim in claims.values()} == set(CHAPTERS)


def test_no_claim_can_be_reproduced_without_an_effect():
    for claim in load_claims().values():
        beyond = claim.threshold - claim.no_effect
        assert (beyond >= 0) if claim.direction == "above" else (beyond <= 0), claim.id


def test_a_source_number_that_is_quoted_second_hand_says_so():
    """Those of "Shifting the Gradient" are; the post of chapter 3 was read itself."""
    for claim in load_claims().values():
        if claim.source_value is not None and claim.source == "arXiv 2604.16423":
            assert "second-hand" in claim.note, claim.id


def test_the_tables_that_notebooks_display_are_rendered_as_tables():
    config = yaml.safe_load((PROJECT / "_config.yml").read_text(encoding="utf-8"))
    assert config["sphinx"]["config"].get("nb_render_markdown_format") == "myst", (
        "claim and provenance boxes are Markdown tables, which myst-nb's default CommonMark does not know"
    )
