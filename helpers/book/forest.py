"""The forest plot of the scoreboard: every claim on one axis, where 0 is no effect and 1 is what was asked for."""

from collections.abc import Mapping
from html import escape
from typing import Any

from helpers.book.findings import number
from helpers.verdicts import Claim

Record = Mapping[str, Any]
"""What a run recorded of a claim: value, low, high, verdict."""

LOW, HIGH = -1.0, 2.0
"""What the axis shows; an interval that goes on beyond it ends in a tip."""
WIDTH, HEIGHT = 180, 22
"""Pixels of a drawing."""


def scaled(claim: Claim, record: Record) -> tuple[float, float, float] | None:
    """Value, lower and upper end as (x - no effect) / (threshold - no effect).

    None where there is no number, and for a claim whose threshold is no effect.
    """
    span = claim.threshold - claim.no_effect
    numbers = [record[name] for name in ("value", "low", "high")]
    if not span or None in numbers:
        return None
    value, *ends = ((x - claim.no_effect) / span for x in numbers)
    return value, min(ends), max(ends)


def drawing(claim: Claim, run: Record | None, reference: Record | None) -> str:
    """A claim's values with their intervals: a reference above, in bold, and this run below, hollow."""
    drawn = [
        (record, name, name == "reference")
        for record, name in ((reference, "reference"), (run, "this run"))
        if record and scaled(claim, record)
    ]
    if not drawn:
        return "no scale" if claim.threshold == claim.no_effect else ""
    heights = (7, 16) if len(drawn) == 2 else (11,)
    told = [f"{name}: {number(record, claim.unit)}, {record['verdict']}" for record, name, _ in drawn]
    lines = [_interval(claim, record, y, bold) for (record, _, bold), y in zip(drawn, heights, strict=True)]
    grid = [f'<path d="M{_x(at)} 0V{HEIGHT}" class="{name}"/>' for at, name in ((0.0, "nothing"), (1.0, "asked"))]
    return _svg(f"<title>{escape('; '.join(told))}</title>{''.join((*grid, *lines))}")


def axis() -> str:
    """The head of the column of drawings: where no effect and the threshold are."""
    words = [f'<text x="{_x(at)}" y="15">{text}</text>' for at, text in ((0.0, "no effect"), (1.0, "asked for"))]
    return _svg("".join(words))


def _interval(claim: Claim, record: Record, y: int, bold: bool) -> str:
    numbers = scaled(claim, record)
    assert numbers is not None
    value, low, high = numbers
    left, right = (_x(max(LOW, min(HIGH, end))) for end in (low, high))
    parts = [f'<path d="M{left} {y}H{right}"/>']
    parts += [f'<path d="M{left + 5} {y - 4}L{left} {y}L{left + 5} {y + 4}"/>'] * (low < LOW)
    parts += [f'<path d="M{right - 5} {y - 4}L{right} {y}L{right - 5} {y + 4}"/>'] * (high > HIGH)
    if LOW <= value <= HIGH:
        parts.append(f'<circle cx="{_x(value)}" cy="{y}" r="{4 if bold else 3}"/>')
    return f'<g class="{record["verdict"].replace(" ", "-")} {"bold" if bold else "hollow"}">{"".join(parts)}</g>'


def _x(at: float) -> float:
    return round(6 + (at - LOW) / (HIGH - LOW) * (WIDTH - 12), 1)


def _svg(inside: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">{inside}</svg>'
