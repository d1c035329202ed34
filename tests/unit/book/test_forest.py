"""On the forest plot every claim has its place between no effect and what was asked for."""

import re

import pytest

from helpers.book.findings import load_claims
from helpers.book.forest import HEIGHT, WIDTH, axis, drawing, scaled

CLAIM = next(iter(load_claims().values())).model_copy(
    update={"direction": "above", "no_effect": 0.5, "threshold": 0.9, "unit": "of answers"}
)


def record(value, low, high, verdict="reproduced"):
    return {"value": value, "low": low, "high": high, "verdict": verdict}


def circles(svg):
    return [(float(x), int(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="(\d+)"', svg)]


def test_no_effect_is_0_and_the_threshold_1_whichever_side_the_claim_is_on():
    assert scaled(CLAIM, record(0.9, 0.5, 1.3)) == pytest.approx((1, 0, 2))
    below = CLAIM.model_copy(update={"direction": "below", "no_effect": 0, "threshold": -2})
    assert scaled(below, record(-2, -3, -1)) == pytest.approx((1, 0.5, 1.5))


def test_what_has_no_number_or_no_scale_has_no_place():
    assert scaled(CLAIM, record(None, None, None)) is None
    without = CLAIM.model_copy(update={"threshold": 0.5})
    assert scaled(without, record(0.6, 0.5, 0.7)) is None
    assert drawing(without, record(0.6, 0.5, 0.7), None) == "no scale"
    assert drawing(CLAIM, None, None) == drawing(CLAIM, record(None, None, None), None) == ""


def test_a_reference_is_the_upper_bold_line_and_this_run_the_lower_hollow_one():
    svg = drawing(CLAIM, record(0.5, 0.4, 0.6, "undecided"), record(0.9, 0.8, 1.0))
    (x_reference, above), (x_run, below) = circles(svg)
    assert above < below and x_reference > x_run
    assert svg.index('class="reproduced bold"') < svg.index('class="undecided hollow"')
    assert "<title>reference: 0.9 of answers [0.8, 1], reproduced; this run: 0.5 of answers [0.4, 0.6]" in svg
    ((_, alone),) = circles(drawing(CLAIM, record(0.5, 0.4, 0.6), None))
    assert above < alone < below


def test_what_lies_beyond_the_axis_ends_in_a_tip_inside_the_drawing():
    svg = drawing(CLAIM, record(9.0, -9.0, 9.0), None)
    assert circles(svg) == [] and svg.count("L") == 4
    numbers = [float(x) for x in re.findall(r"[MLH](-?[\d.]+)", svg)]
    assert min(numbers) >= 0 and max(numbers) <= WIDTH and HEIGHT > 0


def test_the_head_of_the_column_stands_above_the_two_lines():
    words = re.findall(r'<text x="([\d.]+)" y="15">([^<]+)</text>', axis())
    grid = re.findall(r'<path d="M([\d.]+) 0V', drawing(CLAIM, record(0.9, 0.8, 1.0), None))
    assert [x for x, _ in words] == grid and [word for _, word in words] == ["no effect", "asked for"]
