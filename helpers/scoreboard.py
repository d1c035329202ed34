"""The two pages of the book that are made from recorded runs: the scoreboard and the status page.

Everything on them is read from files: the `findings.json` that each notebook saved, papermill's metadata in
the executed notebooks, `book/claims.yml`, and reference runs in `book/reference/`. A reference run stands
beside the run that made the book, in a column or table of its own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helpers.findings import Claim

Run = Mapping[str, Any]
"""A chapter's run: preset, model, digest, device, dtype, seeds, versions, minutes, parameters, findings."""


def scoreboard(claims: Mapping[str, Claim], runs: Mapping[str, Run], references: Mapping[str, Run]) -> str:
    """The scoreboard as Markdown: claims x runs with verdicts, then each run's numbers.

    Args:
        claims: id -> claim.
        runs: chapter -> the run that made the book.
        references: chapter -> reference run.
    """
    text = [
        "# Scoreboard",
        "What each source claims, and what came out. *Reproduced*: the number meets the threshold, its 95% "
        "interval excludes no effect, and every control passed. *Direction only*: the interval excludes no "
        "effect, but the threshold or a strength control is missed. *Contradicted*: the interval excludes the "
        "claim. *Undecided*: the interval holds both no effect and the threshold. *Invalid*: a validity control "
        "failed, so the number says nothing of the claim. *Not judged*: no verdict, for the reason given.",
    ]
    for chapter in sorted({claim.chapter for claim in claims.values()}):
        here = [claim for claim in claims.values() if claim.chapter == chapter]
        shown = [(f"this book: {_place(run)}", run) for run in [runs.get(chapter)] if run]
        shown += [(f"reference: {_place(run)}", run) for run in [references.get(chapter)] if run]
        text += [f"## {_number(chapter)}", f"{{doc}}`../notebooks/{chapter}`"]
        rows = [[claim.statement, *(_verdict(run, claim) for _, run in shown)] for claim in here]
        text.append(markdown_table(["claim", *(label for label, _ in shown)], rows))
        for label, run in shown:
            text.append(f"**{label[0].upper()}{label[1:]}**")
            text.append(_numbers(here, run))
    if not references:
        text.append("No reference run is kept in this copy of the book.")
    return "\n\n".join(text) + "\n"


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
    ]
    for heading, recorded in (("This book", runs), ("Reference runs", references)):
        for chapter, run in recorded.items():
            text += [f"## {heading}: {_number(chapter).lower()}", f"{{doc}}`../notebooks/{chapter}`", _conditions(run)]
    return "\n\n".join(text) + "\n"


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
        ["minutes", f"{run['minutes']:.1f}"],
        ["parameters", _listed(parameters)],
    ]
    return markdown_table(["", "used"], rows)


def _place(run: Run) -> str:
    """Which run it was, in a few words."""
    return f"{run['preset']}, {run['parameters']['model']}, {run['device']}"


def _finding(run: Run, claim: Claim) -> Mapping[str, Any] | None:
    return next((finding for finding in run["findings"] if finding["claim"] == claim.id), None)


def _verdict(run: Run, claim: Claim) -> str:
    found = _finding(run, claim)
    return f"**{found['verdict']}**" if found else "not judged"


def _numbers(claims: Sequence[Claim], run: Run) -> str:
    """Every number of a run, with interval, source and reason."""
    rows = []
    for claim in claims:
        found = _finding(run, claim)
        if found is None:
            rows.append([f"`{claim.id}`", claim.metric, f"{claim.source}, {claim.where}", "", "", "", "not measured"])
            continue
        controls = [f"{c['name']} ({c['kind']}): {c['state']}" for c in found["controls"]]
        rows.append(
            [
                f"`{claim.id}`",
                f"{claim.metric} ({claim.unit})" if claim.unit else claim.metric,
                f"{claim.source}, {claim.where}"
                + (f": {claim.source_value:g}" if claim.source_value is not None else ""),
                f"{_short(found['value'])} [{_short(found['low'])}, {_short(found['high'])}]",
                f"{found['n']}, {len(found['seeds']) or 'none'}",
                "; ".join(controls) or "none",
                found["reason"],
            ]
        )
    header = ["claim", "measured", "source, its number", "value [95%]", "n, seeds", "controls", "reason"]
    return markdown_table(header, rows)


def _short(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
