"""What differs between two recorded runs: parameters, provenance, findings and verdicts.

    python -m helpers compare results/quick/02_ip_loss_reduction results/mine
    python -m helpers compare book/executed/quick book/executed/full

A run is a folder with the `findings.json` that a notebook saved, such a file itself (a reference run, for
instance), or a whole executed book with one folder a chapter. Values are compared as they were recorded: two
runs are the same where every digit is. Runs of a chapter that were judged by different methods are not compared.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helpers.cost import petaflop, whole

Run = Mapping[str, Any]
"""A chapter's run, as `Findings.save` wrote it."""

NEEDED = (
    "chapter",
    "preset",
    "model",
    "digest",
    "device",
    "dtype",
    "seeds",
    "versions",
    "cost",
    "parameters",
    "findings",
)
FINDING = ("claim", "value", "low", "high", "n", "seeds", "controls", "verdict", "reason")
DECIDING = ("preset", "model", "digest", "device", "dtype")
"""What has to be the same for two runs' numbers to be comparable digit by digit."""


class ComparisonError(ValueError):
    """Two paths that cannot be compared; the message is one sentence saying what was wrong and what to do."""


def compare(one: Path, other: Path) -> str:
    """What differs between two runs, as text to read.

    Raises:
        ComparisonError: if a path holds no run, a run's file is damaged, or the two have no chapter in common that
            was judged by one method.
    """
    runs_a, runs_b = load_runs(one), load_runs(other)
    shared = [chapter for chapter in runs_a if chapter in runs_b]
    if not shared:
        raise ComparisonError(
            f"{one} is a run of {', '.join(runs_a)} and {other} of {', '.join(runs_b)}: "
            "name two runs of the same chapter."
        )
    apart = {chapter: judged_apart(runs_a[chapter], runs_b[chapter]) for chapter in shared}
    if all(apart.values()):
        raise ComparisonError(" ".join(f"{chapter}: {refusal}" for chapter, refusal in apart.items()))
    text = [f"A: {one}", f"B: {other}"]
    for chapter in shared:
        lines = [apart[chapter]] if apart[chapter] else differences(runs_a[chapter], runs_b[chapter])
        text += ["", chapter, *(f"  {line}" for line in lines)]
    if len(runs_a) > 1 and len(runs_b) > 1:
        for label, runs in (("A", runs_a), ("B", runs_b)):
            alone = [chapter for chapter in runs if chapter not in shared]
            if alone:
                text += ["", f"Only in {label}: {', '.join(alone)}"]
    return "\n".join(text)


def load_runs(path: Path) -> dict[str, Run]:
    """The runs that a path holds: chapter -> run.

    Raises:
        ComparisonError: if there is none, or a file cannot be read.
    """
    if not path.exists():
        raise ComparisonError(f"There is no {path}: name a results folder, or an executed book.")
    if path.is_file():
        files = [path]
    elif (path / "findings.json").is_file():
        files = [path / "findings.json"]
    else:
        files = sorted(path.glob("notebooks/*/findings.json")) or sorted(path.glob("*/findings.json"))
    if not files:
        raise ComparisonError(
            f"There is no findings.json in {path}: name the folder that a chapter was told to put its results in, "
            "or an executed book such as book/executed/quick."
        )
    runs = [_read(file) for file in files]
    return {run["chapter"]: run for run in runs}


def judged_apart(a: Run, b: Run) -> str:
    """Why two runs of a chapter are not compared, in a sentence: their answers were judged by different methods."""
    one, other = (_judged_by(run) for run in (a, b))
    if one == other:
        return ""
    return f"not compared, since A was judged by {one} and B by {other}; run one of them again with the other's judge."


def _judged_by(run: Run) -> str:
    if judge := _judge(run):
        return str(judge.get("method"))
    by_api = all(run["parameters"].get(name) for name in ("judge_url", "judge_model"))
    return "an API judge whose method was not recorded" if by_api else "the offline judge"


def _judge(run: Run) -> Mapping[str, Any]:
    """What an API judge said of itself; nothing where the offline judges judged."""
    judge = run.get("judge")
    return judge if isinstance(judge, Mapping) else {}


def differences(a: Run, b: Run) -> list[str]:
    """The lines that say what differs between two runs of one chapter."""
    return [*_conditions(a, b), *_parameters(a, b), *_findings(a, b)]


def _conditions(a: Run, b: Run) -> list[str]:
    """With what the runs were made, and whether their numbers may be held side by side."""
    apart = [name for name in DECIDING if a[name] != b[name]]
    versions = _changes(a["versions"], b["versions"])
    lines = []
    judges_apart = _judge(a).get("model") != _judge(b).get("model")
    if apart or judges_apart:
        named = [name for name in apart if not (name == "digest" and "model" in apart)]
        said = ["weights of the model" if name == "digest" else name for name in named] + ["judge"] * judges_apart
        lines.append(f"The runs differ in {_listed(said)}: their numbers are not to be compared as if they were equal.")
        lines += [_change(name, a[name], b[name]) for name in apart]
    if versions:
        lines.append("versions")
        lines += [f"  {line}" for line in versions]
    same = [name for name in DECIDING if name not in apart] + ([] if versions else ["versions"])
    lines += [f"judge's {line}" for line in _changes(_judge(a), _judge(b))]
    lines.append(f"the same: {_listed(same) or 'no condition'}")
    lines.append(_change("minutes", a.get("minutes"), b.get("minutes")))
    lines.append(_change("PFLOP", *(petaflop(whole(run["cost"])) for run in (a, b))))
    return lines


def _parameters(a: Run, b: Run) -> list[str]:
    told = {"preset", "results"}  # the preset is told above; where results lie changes no number
    one, other = ({name: value for name, value in run["parameters"].items() if name not in told} for run in (a, b))
    changes = _changes(one, other)
    if not changes:
        return [f"parameters: all {len(one)} the same"]
    same = sum(name in other and one[name] == other[name] for name in one)
    return ["parameters", *(f"  {line}" for line in changes), f"  the same: {same} others"]


def _findings(a: Run, b: Run) -> list[str]:
    one, other = ({found["claim"]: found for found in run["findings"]} for run in (a, b))
    lines = []
    same = 0
    for claim in dict.fromkeys((*one, *other)):
        if claim not in one or claim not in other:
            measured = one.get(claim) or other[claim]
            lines.append(f"  {claim}: only in {'A' if claim in one else 'B'}, {_estimate(measured)}")
        elif one[claim] == other[claim]:
            same += 1
        else:
            lines += [f"  {line}" for line in _finding(claim, one[claim], other[claim])]
    if not lines:
        return [f"findings: all {same} the same, and so are the verdicts" if same else "findings: none recorded"]
    verdicts = [f["verdict"] != other[c]["verdict"] for c, f in one.items() if c in other]
    turned = f"{sum(verdicts)} of {len(verdicts)} verdicts differ"
    return [f"findings ({turned})", *lines, f"  the same: {same} others"]


def _finding(claim: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """How one claim came out in two runs that do not agree in everything."""
    lines = [f"{claim}: {_estimate(a)} -> {_estimate(b)}, {_overlap(a, b)}"]
    if a["verdict"] != b["verdict"]:
        lines.append(f"  verdict: {a['verdict']} -> {b['verdict']}: {b['reason']}")
    for name in ("n", "seeds"):
        if a[name] != b[name]:
            lines.append(f"  {_change(name, a[name], b[name])}")
    one, other = ({control["name"]: control["state"] for control in found["controls"]} for found in (a, b))
    lines += [f"  control {line}" for line in _changes(one, other)]
    return lines


def _estimate(found: Mapping[str, Any]) -> str:
    value, low, high = ("none" if found[name] is None else f"{found[name]:.3g}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    ends = [found[end] for found in (a, b) for end in ("low", "high")]
    if None in ends:
        return "an interval is missing"
    if all(a[name] == b[name] for name in ("value", "low", "high")):
        return "the same value and interval"
    apart = a["low"] > b["high"] or b["low"] > a["high"]
    return "intervals do not overlap" if apart else "intervals overlap"


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """One line for each name whose value differs, or that only one of the two has."""
    lines = []
    for name in dict.fromkeys((*a, *b)):
        if name not in a or name not in b:
            lines.append(f"{name}: only in {'A' if name in a else 'B'}")
        elif a[name] != b[name]:
            lines.append(_change(name, a[name], b[name]))
    return lines


def _change(name: str, a: Any, b: Any) -> str:
    before, after = (value if isinstance(value, str) else json.dumps(value) for value in (a, b))
    return f"{name}: {before} -> {after}"


def _listed(names: Iterable[str]) -> str:
    *most, last = [*names] or [""]
    return f"{', '.join(most)} and {last}" if most else last


def _read(path: Path) -> Run:
    try:
        run = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ComparisonError(f"{path} cannot be read ({error}): run the chapter again.") from None
    missing = [name for name in NEEDED if not isinstance(run, dict) or name not in run]
    if missing:
        raise ComparisonError(
            f"{path} is no record of a run, as it has no {missing[0]!r}: name a findings.json that a chapter saved."
        )
    if not _is_whole(run):
        raise ComparisonError(f"{path} is damaged: run the chapter again.")
    return run


def _is_whole(run: Run) -> bool:
    """Whether what is read of a run has the types it was saved with."""
    cost = run["cost"]
    if not isinstance(cost, dict) or not {"computed", "stored", "outside"} <= {*cost}:
        return False
    tables = (run["parameters"], run["versions"], cost["computed"], cost["stored"], run.get("judge", {}))
    if not isinstance(run["chapter"], str) or not all(isinstance(table, dict) for table in tables):
        return False
    return isinstance(run["findings"], list) and all(map(_is_whole_finding, run["findings"]))


def _is_whole_finding(found: Any) -> bool:
    if not isinstance(found, dict) or not {*FINDING} <= {*found} or not isinstance(found["controls"], list):
        return False
    texts = all(isinstance(found[name], str) for name in ("claim", "verdict", "reason"))
    numbers = all(isinstance(found[name], float | int | None) for name in ("value", "low", "high"))
    return texts and numbers and all(isinstance(c, dict) and {"name", "state"} <= {*c} for c in found["controls"])
