"""What the first page of the book shows of its runs: the verdicts, one headline figure, and a card for each chapter."""

import base64
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.book.captions import drawn, figures_of
from helpers.book.findings import outcome
from helpers.book.scoreboard import SIGNS, Run, by_chapter, finding, marks, matrix, place_of, verdict_of
from helpers.verdicts import Claim


def pictures(described: Mapping[str, Any], executed: Mapping[str, Any]) -> dict[str, tuple[bytes, str]]:
    """The figure that stands for a chapter, where its run drew it: chapter -> PNG and alternative text.

    Args:
        described: what `book/map.yml` says.
        executed: chapter -> its executed notebook.
    """
    found = {}
    for chapter, notebook in executed.items():
        cells = {cell.metadata.figure.name: cell for cell, _ in figures_of(notebook)}
        cell = cells.get(described["chapters"][chapter]["figure"])
        if cell and (picture := drawn(cell)):
            found[chapter] = base64.b64decode(picture), cell.metadata.mystnb.image.alt
    return found


def overview(
    described: Mapping[str, Any],
    claims: Mapping[str, Claim],
    runs: Mapping[str, Run],
    titles: Mapping[str, str],
    pictured: Mapping[str, str],
) -> str:
    """The part of the first page that runs decide, as Markdown.

    Args:
        described: what `book/map.yml` says.
        claims: id -> claim.
        runs: chapter -> the run that made the book.
        titles: chapter -> its heading, in the order of the book.
        pictured: chapter -> alternative text of its picture, which lies in `figures/{chapter}.png`.
    """
    made = sorted({place_of(run) for run in runs.values()})
    text = [
        f"What became of {len(claims)} claims in the run that made these pages ({'; '.join(made)}). One mark is one "
        "claim; the {doc}`scoreboard` has them all, with their numbers.",
        ":::::{grid} 1 1 2 2\n:class-container: landing\n\n::::{grid-item}\n:columns: 12 12 7 7\n\n"
        + matrix(claims, runs)
        + "\n::::\n\n::::{grid-item}\n:columns: 12 12 5 5\n\n"
        + headline(described, claims, runs, pictured)
        + "\n::::\n:::::",
        "## The chapters",
        ":::::{grid} 1 2 2 4\n:gutter: 3\n\n"
        + "\n\n".join(_card(chapter, title, described, claims, runs, pictured) for chapter, title in titles.items())
        + "\n:::::",
    ]
    return "\n\n".join(filter(None, text)) + "\n"


def headline(
    described: Mapping[str, Any], claims: Mapping[str, Claim], runs: Mapping[str, Run], pictured: Mapping[str, str]
) -> str:
    """The headline figure with what it decides; nothing if it was not drawn."""
    chapter = described["headline"]
    if chapter not in pictured:
        return ""
    figure = described["chapters"][chapter]["figure"]
    central = next(claim for claim in claims.values() if claim.figure == figure and claim.central)
    return (
        f":::{{image}} figures/{chapter}.png\n:alt: {pictured[chapter]}\n:class: headline\n:::\n\n"
        f"{outcome(central, finding(runs.get(chapter), central))} It is taken from {{numref}}`{figure}`."
    )


def write_pictures(folder: Path, found: Mapping[str, tuple[bytes, str]]) -> None:
    """Write the chapters' pictures, and nothing else, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for chapter, (picture, _) in found.items():
        (folder / f"{chapter}.png").write_bytes(picture)


def _card(
    chapter: str,
    title: str,
    described: Mapping[str, Any],
    claims: Mapping[str, Claim],
    runs: Mapping[str, Run],
    pictured: Mapping[str, str],
) -> str:
    options = [f":link: ../notebooks/{chapter}", ":link-type: doc"]
    if chapter in pictured:
        options += [f":img-top: figures/{chapter}.png", f":img-alt: {pictured[chapter]}"]
    count = Counter(verdict_of(runs.get(chapter), claim) for claim in by_chapter(claims).get(chapter, []))
    footer = " ".join(marks(verdict, count[verdict]) + f" {verdict}" for verdict in SIGNS if count[verdict])
    lines = [f"::::{{grid-item-card}} {int(chapter.split('_')[0])}. {title}", *options, ""]
    return "\n".join([*lines, described["chapters"][chapter]["finding"], ":::{card-footer}", footer, ":::", "::::"])
