"""The generated pages show what was recorded, and keep reference runs apart."""

import json
import re

import pytest

from helpers.book.findings import load_claims
from helpers.book.scoreboard import matrix, scoreboard, status

CLAIM = next(iter(load_claims().values()))


@pytest.fixture
def run():
    """A recorded run with one finding; a function of preset, value and verdict."""

    def recorded(preset, value, verdict):
        finding = {"claim": CLAIM.id, "value": value, "low": value - 0.1, "high": value + 0.1, "n": 32}
        finding |= {"seeds": [0], "controls": [{"name": "random|vector", "kind": "strength", "state": "failed"}]}
        finding |= {"verdict": verdict, "reason": "Because."}
        facts = {"model": "m", "digest": "abcdef" * 10, "device": "cpu", "dtype": "float32", "seeds": [0]}
        facts |= {"preset": preset, "minutes": 2.5, "versions": {"torch": "2.13.0"}}
        facts["cost"] = {"computed": {"finetuning": 3 * 10**13}, "stored": {"aligned": 10**13}, "outside": 10**12}
        return {**facts, "parameters": {"model": "m", "layer": 15}, "findings": [finding]}

    return recorded


def rows(page, start):
    return [line for line in page.splitlines() if line.startswith(start)]


def test_the_verdict_of_a_reference_run_stands_in_a_column_of_its_own(run):
    here, reference = run("quick", 0.5, "direction only"), run("full", 0.9, "reproduced")
    page = scoreboard({CLAIM.id: CLAIM}, {CLAIM.chapter: here}, {CLAIM.chapter: reference})
    (header,) = rows(page, "| claim | <svg")
    assert header.endswith("</svg> | value [95% interval] | verdict | reference: full, m, cpu | see |")
    (row,) = rows(page, f"| 0.1 {CLAIM.statement}<br>")
    row = re.sub("<svg.*?</svg>", "", row)
    assert row.index("0.5 of numbers [0.4, 0.6]") < row.index("direction only") < row.index("0.9 of numbers [0.8, 1]")


def test_a_claim_that_was_not_measured_is_not_judged(run):
    empty = {**run("quick", 0.5, "reproduced"), "findings": []}
    page = scoreboard({CLAIM.id: CLAIM}, {CLAIM.chapter: empty}, {})
    assert "– not judged" in rows(page, f"| 0.1 {CLAIM.statement}<br>")[0]
    assert "No reference run" in page


def test_the_matrix_has_a_mark_for_every_claim_and_only_verdicts_that_were_given(run):
    other = CLAIM.model_copy(update={"id": "primer.other"})
    table = matrix({CLAIM.id: CLAIM, other.id: other}, {CLAIM.chapter: run("quick", 0.5, "reproduced")})
    header, _, row = [line for line in table.splitlines() if line.startswith("|")]
    assert "● reproduced" in header and "– not judged" in header and "contradicted" not in header
    assert ">●</span> 1</span>" in row and ">–</span> 1</span>" in row


def test_a_reason_that_claims_share_is_said_once_and_none_for_what_was_reproduced(run):
    others = [CLAIM.model_copy(update={"id": f"primer.{i}"}) for i in range(3)]
    findings = [
        {**run("quick", 0.5, verdict)["findings"][0], "claim": claim.id, "reason": reason}
        for claim, verdict, reason in zip(
            others, ("invalid", "reproduced", "invalid"), ("It broke.", "All well.", "It broke."), strict=True
        )
    ]
    page = scoreboard({c.id: c for c in others}, {CLAIM.chapter: {**run("quick", 0, ""), "findings": findings}}, {})
    assert rows(page, "- 0.1, 0.3: It broke.") and page.count("It broke.") == 1
    assert "All well." not in page


def test_a_claim_links_to_its_figure_where_the_book_shows_it_and_else_to_the_table_of_claims(run):
    claim = CLAIM.model_copy(update={"figure": "fig-a"})
    for shown, link in ((frozenset({"fig-a"}), "{numref}`fig-a`"), (frozenset(), "<claims-00>`")):
        page = scoreboard({claim.id: claim}, {claim.chapter: run("quick", 0.5, "reproduced")}, {}, shown)
        assert rows(page, f"| 0.1 {CLAIM.statement}<br>")[0].endswith(f"{link} |")


def test_the_status_page_has_parameters_and_versions_of_every_run(run):
    page = status({"01": run("quick", 0.5, "reproduced")}, {"01": run("full", 0.5, "reproduced")}, {})
    for heading in ("This book", "Reference runs"):
        assert f"## {heading}: chapter 1\n\n{{doc}}`../notebooks/01`" in page
    assert page.count("`layer = 15`") == page.count("torch 2.13.0") == 2
    assert json.dumps("m") in page


def test_the_status_page_says_what_was_computed_what_the_store_saved_and_which_stages_are_dear(run):
    page = status({"01": run("quick", 0.5, "reproduced"), "02": run("quick", 0.5, "reproduced")}, {}, {})
    dearest = "finetuning 0.03, aligned 0.01, outside 0.001"
    assert f"| {{doc}}`../notebooks/01` | 0.031 | 0.01 | 0.041 | {dearest} |" in page
    assert "| the book | 0.062 | 0.02 | 0.082 |" in page
