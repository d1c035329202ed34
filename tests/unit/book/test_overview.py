"""The first page says what the runs found."""

import base64

import nbformat

from helpers.book.findings import badge, load_claims
from helpers.book.overview import headline, overview, pictures, write_pictures

CLAIM = next(claim for claim in load_claims().values() if claim.id == "pps.reversal")
CHAPTER = CLAIM.chapter
DESCRIBED = {"headline": CHAPTER, "chapters": {CHAPTER: {"figure": CLAIM.figure, "finding": "It turns round."}}}
FOUND = {"claim": CLAIM.id, "value": 0.5, "low": 0.4, "high": 0.6, "verdict": "undecided", "reason": "Because."}
RUN = {"preset": "quick", "device": "cpu", "parameters": {"model": "m"}, "findings": [FOUND]}


def executed(outputs):
    figure = nbformat.v4.new_code_cell("plt.show()", outputs=outputs)
    figure.metadata |= {"figure": {"name": CLAIM.figure, "data": []}, "mystnb": {"image": {"alt": "Dots."}}}
    caption = nbformat.v4.new_markdown_cell("**Dots.**", metadata={"tags": ["caption"]})
    return nbformat.from_dict(nbformat.v4.new_notebook(cells=[figure, caption]))


def test_the_headline_says_what_was_found_beside_its_figure():
    page = overview(DESCRIBED, {CLAIM.id: CLAIM}, {CHAPTER: RUN}, {CHAPTER: "Reversal"}, {CHAPTER: "Dots."})
    assert f"figures/{CHAPTER}.png" in page and "quick, m, cpu" in page
    assert f"**{CLAIM.statement}** {badge('undecided')} 0.5 of sequences [0.4, 0.6]" in page
    assert "grid-item-card} 1. Reversal" in page and "It turns round." in page


def test_a_figure_that_was_not_drawn_leaves_no_gap():
    assert pictures(DESCRIBED, {CHAPTER: executed([])}) == {}
    assert headline(DESCRIBED, {CLAIM.id: CLAIM}, {CHAPTER: RUN}, {}) == ""
    assert ".png" not in overview(DESCRIBED, {CLAIM.id: CLAIM}, {CHAPTER: RUN}, {CHAPTER: "Reversal"}, {})


def test_the_pictures_are_those_that_the_run_drew(tmp_path):
    output = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(b"picture").decode()})
    found = pictures(DESCRIBED, {CHAPTER: executed([output])})
    assert found == {CHAPTER: (b"picture", "Dots.")}
    write_pictures(tmp_path / "figures", found)
    assert (tmp_path / "figures" / f"{CHAPTER}.png").read_bytes() == b"picture"
