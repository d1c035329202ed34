"""A run is kept as a reference without what differs between two runs alike, whole or not at all."""

import json

import pytest

from helpers.book import reference
from helpers.book.reference import ReferenceRunError, code, headline, is_older, keep, references
from helpers.chapters import CHAPTERS

CHAPTER = "02_ip_loss_reduction"
COST = {"computed": {"finetuning": 5}, "stored": {"aligned": 7, "finetuning": 1}, "outside": 2}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    run = {"chapter": CHAPTER, "minutes": 2.5, "cost": COST, "findings": [], "seeds": [0, 1]}
    (folder / "findings.json").write_text(json.dumps(run))
    for name in headline(CHAPTER):
        (folder / f"{name}.csv").write_text("a\n1\n")
    (folder / "another.csv").write_text("a\n2\n")
    return folder


def test_what_is_kept_are_the_findings_and_the_tables_of_the_headline_figure(results, tmp_path):
    place = keep(CHAPTER, results, tmp_path / "kept")
    assert {path.stem for path in place.iterdir()} == {"findings", *headline(CHAPTER)}
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [CHAPTER]
    run = references(tmp_path / "kept")[CHAPTER]
    assert run["seeds"] == [0, 1] and run["commit"]
    assert run["cost"] == {"computed": {"aligned": 7, "finetuning": 6}, "stored": {}, "outside": 2}
    assert "minutes" not in run


def test_it_is_the_same_whatever_was_stored_and_takes_the_place_of_the_one_before(results, tmp_path):
    def kept(cost, minutes):
        run = {**json.loads((results / "findings.json").read_text()), "cost": cost, "minutes": minutes}
        (results / "findings.json").write_text(json.dumps(run))
        return (keep(CHAPTER, results, tmp_path / "kept") / "findings.json").read_text()

    at_once = kept({"computed": {"finetuning": 6, "aligned": 7}, "stored": {}, "outside": 2}, 9.0)
    assert kept(COST, 1.0) == at_once


def test_a_run_without_a_table_or_with_one_too_large_leaves_what_was_kept_before(results, tmp_path, monkeypatch):
    before = keep(CHAPTER, results, tmp_path / "kept") / "findings.json"
    text = before.read_text()
    monkeypatch.setattr(reference, "LIMIT", 1)
    with pytest.raises(ReferenceRunError, match=r"show what fits into 0 kB\.$"):
        keep(CHAPTER, results, tmp_path / "kept")
    (results / f"{headline(CHAPTER)[0]}.csv").unlink()
    with pytest.raises(ReferenceRunError, match=r"lacks .*\.csv, which the headline figure of 02_ip"):
        keep(CHAPTER, results, tmp_path / "kept")
    assert before.read_text() == text


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_chapter_has_a_headline_figure_with_a_table(chapter):
    assert headline(chapter)


def test_a_reference_is_older_where_code_that_decides_its_numbers_has_changed(monkeypatch):
    run = {"chapter": CHAPTER, "code": code(CHAPTER)}
    assert not is_older(run)
    digest = reference.code_digest

    def changed(file):
        return lambda path: "another" if path.as_posix().endswith(file) else digest(path)

    monkeypatch.setattr(reference, "code_digest", changed("helpers/losses.py"))
    assert is_older(run)
    monkeypatch.setattr(reference, "code_digest", changed("helpers/book/figures.py"))
    assert not is_older(run)
    monkeypatch.setattr(reference, "code_digest", changed("chapters/fihs_filtering/study.py"))
    assert not is_older(run)


def test_a_reference_is_older_where_its_data_have_changed(monkeypatch):
    run = {"chapter": CHAPTER, "code": code(CHAPTER)}
    monkeypatch.setattr(reference, "file_digest", lambda path: path.name)
    assert is_older(run)
