"""The generated pages show what was recorded, and keep reference runs apart."""

import json

import pytest

from helpers.findings import load_claims
from helpers.scoreboard import scoreboard, status

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
        return {**facts, "parameters": {"model": "m", "layer": 15}, "findings": [finding]}

    return recorded


def rows(page, start):
    return [line for line in page.splitlines() if line.startswith(start)]


def test_the_verdict_of_a_reference_run_stands_in_a_column_of_its_own(run):
    here, reference = run("quick", 0.5, "direction only"), run("full", 0.9, "reproduced")
    page = scoreboard({CLAIM.id: CLAIM}, {CLAIM.chapter: here}, {CLAIM.chapter: reference})
    assert rows(page, "| claim | this book: quick, m, cpu | reference: full, m, cpu |")
    assert rows(page, f"| {CLAIM.statement} | **direction only** | **reproduced** |")
    assert page.index("**This book") < page.index("0.5 [0.4, 0.6]") < page.index("**Reference")
    assert page.index("**Reference") < page.index("0.9 [0.8, 1]")


def test_a_claim_that_was_not_measured_is_not_judged(run):
    empty = {**run("quick", 0.5, "reproduced"), "findings": []}
    page = scoreboard({CLAIM.id: CLAIM}, {CLAIM.chapter: empty}, {})
    assert rows(page, f"| {CLAIM.statement} | not judged |")
    assert "No reference run" in page


def test_a_bar_in_a_name_does_not_break_the_table(run):
    page = scoreboard({CLAIM.id: CLAIM}, {CLAIM.chapter: run("quick", 0.5, "reproduced")}, {})
    assert r"random\|vector (strength): failed" in page


def test_the_status_page_has_parameters_and_versions_of_every_run(run):
    page = status({"01": run("quick", 0.5, "reproduced")}, {"01": run("full", 0.5, "reproduced")}, {})
    for heading in ("This book", "Reference runs"):
        assert f"## {heading}: chapter 1\n\n{{doc}}`../notebooks/01`" in page
    assert page.count("`layer = 15`") == page.count("torch 2.13.0") == 2
    assert json.dumps("m") in page
