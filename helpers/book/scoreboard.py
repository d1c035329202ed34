"""The two pages of the book that are made from recorded runs: the scoreboard and the status page.

Everything on them is read from files: the `findings.json` that each notebook saved, papermill's metadata in
the executed notebooks, `book/claims.yml`, and reference runs in `book/reference/`. A reference run stands
beside the run that made the book, in a column or table of its own.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from helpers import cost
from helpers.book.findings import SIGNS, badge, expectation, number, plain
from helpers.book.forest import axis, drawing
from helpers.book.tables import markdown_table
from helpers.verdicts import Claim

Run = Mapping[str, Any]
"""A chapter's run: preset, model, digest, device, dtype, seeds, versions, minutes, cost, parameters, findings."""

MEANINGS = {
    "reproduced": "the number meets the threshold, its 95% interval excludes no effect, and every control passed",
    "direction only": "the interval excludes no effect, but the threshold or a strength control is missed",
    "undecided": "the interval holds both no effect and the threshold",
    "contradicted": "the interval excludes the claim",
    "invalid": "a validity control failed, so the number says nothing of the claim",
    "not judged": "no verdict, for the reason given",
}


def scoreboard(
    claims: Mapping[str, Claim],
    runs: Mapping[str, Run],
    references: Mapping[str, Run],
    shown: Set[str] = frozenset(),
    older: Set[str] = frozenset(),
) -> str:
    """The scoreboard as Markdown: how many claims of a chapter got which verdict, then a forest plot with its
    numbers for each chapter.

    Args:
        claims: id -> claim.
        runs: chapter -> the run that made the book.
        references: chapter -> reference run.
        shown: names of the figures that the book shows.
        older: chapters whose reference was made by other code or data.
    """
    text = [
        "# Scoreboard",
        "What each source claims, and what came out. One mark is one claim.",
        matrix(claims, runs),
        "\n".join(f"- {badge(verdict)}: {meaning}." for verdict, meaning in MEANINGS.items()),
        "Each row of the tables is a claim. On its axis, 0 is no effect and 1 is what was asked for, so that all "
        "claims can be held side by side: a dot is the value, a line its 95% interval, and a tip says that the "
        "interval goes on. "
        + ("A reference run is the upper, bold line, and this run the lower one. " if references else "")
        + "A claim whose threshold is no effect has no scale. Under each table stands why claims were not reproduced. "
        "The controls are in a chapter's table of claims.",
    ]
    for chapter, here in by_chapter(claims).items():
        run, reference = runs.get(chapter), references.get(chapter)
        text += [f"## {_number(chapter)}", f"{{doc}}`../notebooks/{chapter}`" + (f", {place_of(run)}." if run else "")]
        rows = []
        for place, claim in enumerate(here, 1):
            here_found, there_found = (finding(found, claim) for found in (run, reference))
            row = [
                f"{_label(chapter, place)} {_statement(claim)}",
                drawing(claim, here_found, there_found),
                *_number_and_verdict(here_found, claim),
            ]
            if reference:
                row.append(" ".join(reversed(_number_and_verdict(there_found, claim))))
            rows.append([*row, _where(claim, shown)])
        beside = [f"reference: {place_of(reference)}{', by older code' * (chapter in older)}"] if reference else []
        header = ["claim", axis(), "value [95% interval]", "verdict", *beside, "see"]
        text += [
            f":::{{div}} verdicts claims forest\n{markdown_table(header, rows)}\n:::",
            _reasons(chapter, here, run),
        ]
    if not references:
        text.append("No reference run is kept in this copy of the book.")
    return "\n\n".join(filter(None, text)) + "\n"


def matrix(claims: Mapping[str, Claim], runs: Mapping[str, Run]) -> str:
    """How many claims of each chapter got which verdict, as a Markdown table with a mark for every claim."""
    counts = {chapter: Counter(verdict_of(runs.get(chapter), c) for c in here) for chapter, here in _sorted(claims)}
    columns = [verdict for verdict in SIGNS if any(count[verdict] for count in counts.values())]
    rows = [
        [f"{{doc}}`../notebooks/{chapter}`", *(marks(verdict, count[verdict]) for verdict in columns)]
        for chapter, count in counts.items()
    ]
    return f":::{{div}} verdicts matrix\n{markdown_table(['chapter', *map(badge, columns)], rows)}\n:::"


def marks(verdict: str, count: int) -> str:
    """A count of claims with a verdict as HTML: a mark for each, and the number."""
    if not count:
        return ""
    sign = f'<span class="marks" aria-hidden="true">{SIGNS[verdict] * count}</span>'
    return f'<span class="count {verdict.replace(" ", "-")}">{sign} {count}</span>'


def by_chapter(claims: Mapping[str, Claim]) -> dict[str, list[Claim]]:
    """The claims of every chapter, in the order of the book."""
    return dict(_sorted(claims))


def finding(run: Run | None, claim: Claim) -> Mapping[str, Any] | None:
    """What a run recorded of a claim, if anything."""
    return next((found for found in (run or {}).get("findings", []) if found["claim"] == claim.id), None)


def verdict_of(run: Run | None, claim: Claim) -> str:
    """The verdict that a run gave on a claim."""
    found = finding(run, claim)
    return found["verdict"] if found else "not judged"


def status(runs: Mapping[str, Run], references: Mapping[str, Run], notebooks: Mapping[str, Any]) -> str:
    """The status page as Markdown: when and how long each notebook ran, on what, with which parameters.

    Args:
        runs: chapter -> the run that made the book.
        references: chapter -> reference run.
        notebooks: chapter -> its executed notebook, with papermill's metadata.
    """
    times = []
    for chapter, notebook in notebooks.items():
        record = notebook.metadata.papermill
        spent = {
            number: cell.metadata.get("papermill", {}).get("duration") or 0
            for number, cell in enumerate(notebook.cells, 1)
        }
        slowest = max(spent, key=lambda number: spent[number])
        times.append(
            [
                f"{{doc}}`../notebooks/{chapter}`",
                str(record.start_time)[:16].replace("T", " "),
                f"{record.duration / 60:.1f}",
                f"cell {slowest}, {spent[slowest] / 60:.1f}",
                record.version,
            ]
        )
    text = [
        "# Status",
        "How this copy of the book was made.",
        markdown_table(["notebook", "started (UTC)", "minutes", "slowest cell, minutes", "papermill"], times),
        "## Cost\n\nArithmetic in PFLOP ($10^{15}$ floating point operations of the models' matrix products), as the "
        "runs counted it. What the artifact store held was not computed again. The dearest stages are named with what "
        "each costs where the store is empty.",
        _costs(runs),
    ]
    for heading, recorded in (("This book", runs), ("Reference runs", references)):
        for chapter, run in recorded.items():
            text += [f"## {heading}: {_number(chapter).lower()}", f"{{doc}}`../notebooks/{chapter}`", _conditions(run)]
    return "\n\n".join(text) + "\n"


def _costs(runs: Mapping[str, Run]) -> str:
    """What each chapter's run cost, and the whole book, as a table."""
    rows, sums = [], [0, 0]
    for chapter, run in runs.items():
        here, saved = cost.spent(run["cost"]), cost.whole(run["cost"]) - cost.spent(run["cost"])
        sums = [sums[0] + here, sums[1] + saved]
        stages = [(name, took) for name, took in cost.by_stage(run["cost"]).items() if took][:4]
        dearest = _listed(f"{name} {cost.petaflop(took)}" for name, took in stages)
        rows.append([f"{{doc}}`../notebooks/{chapter}`", *map(cost.petaflop, (here, saved, here + saved)), dearest])
    rows.append(["the book", *map(cost.petaflop, (*sums, sum(sums))), ""])
    return markdown_table(["notebook", "computed", "saved by the store", "together", "dearest stages"], rows)


def _number(chapter: str) -> str:
    """What a heading calls a chapter; a link to it would show its path in the page's contents."""
    return f"Chapter {int(chapter.split('_')[0])}"


def _conditions(run: Run) -> str:
    """What a run was made with, as a table."""
    parameters = (f"`{name} = {json.dumps(value)}`" for name, value in run["parameters"].items())
    rows = [
        ["model", f"{run['model']} (SHA-256 `{run['digest'][:16]}`)"],
        ["preset", run["preset"]],
        ["device and number format", f"{run['device']}, {run['dtype']}"],
        ["seeds", _listed(run["seeds"])],
        ["versions", _listed(f"{name} {version}" for name, version in run["versions"].items())],
        *([["minutes", f"{run['minutes']:.1f}"]] if "minutes" in run else []),
        *([["commit", f"`{run['commit']}`"]] if "commit" in run else []),
        ["arithmetic", cost.told(run["cost"])],
        ["parameters", _listed(parameters)],
    ]
    return markdown_table(["", "used"], rows)


def place_of(run: Run) -> str:
    """Which run it was, in a few words."""
    return f"{run['preset']}, {run['parameters']['model']}, {run['device']}"


def _sorted(claims: Mapping[str, Claim]) -> list[tuple[str, list[Claim]]]:
    chapters = sorted({claim.chapter for claim in claims.values()})
    return [(chapter, [claim for claim in claims.values() if claim.chapter == chapter]) for chapter in chapters]


def _label(chapter: str, place: int) -> str:
    """What a claim is called in the list of reasons: the chapter's number and its place in the table."""
    return f"{int(chapter.split('_')[0])}.{place}"


def _statement(claim: Claim) -> str:
    """The claim, and in small print how it is measured, what it must reach, and where the source says it."""
    small = f"{expectation(claim)}; {claim.where}."
    return f"{plain(claim.statement)}<br><small>{plain(small)} <code>{claim.id}</code></small>"


def _number_and_verdict(found: Mapping[str, Any] | None, claim: Claim) -> list[str]:
    if found is None:
        return ["", badge("not judged")]
    return [number(found, claim.unit), badge(found["verdict"])]


def _reasons(chapter: str, claims: Sequence[Claim], run: Run | None) -> str:
    """Why claims were not reproduced, each reason once, as a list."""
    named: dict[str, list[str]] = {}
    for place, claim in enumerate(claims, 1):
        found = finding(run, claim)
        if found is None or found["verdict"] != "reproduced":
            named.setdefault(found["reason"] if found else "Not measured in this run.", []).append(
                _label(chapter, place)
            )
    if len(named) == 1 and len(next(iter(named.values()))) == len(claims):
        return f"All: {plain(next(iter(named)))}"
    return "\n".join(f"- {', '.join(labels)}: {plain(reason)}" for reason, labels in named.items())


def _where(claim: Claim, shown: Set[str]) -> str:
    """A link to the figure that shows the number, or else to the chapter's table of claims."""
    if claim.figure in shown:
        return f"{{numref}}`{claim.figure}`"
    return f"{{ref}}`table of claims <claims-{claim.chapter.split('_')[0]}>`"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)
