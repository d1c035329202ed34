"""Claims, verdicts, and the record that a chapter leaves behind.

`book/claims.yml` says what each source claims and which number would decide it. A notebook measures that
number, asks `Findings.judge` for the verdict, and saves everything beside the executed notebook. A verdict is
never typed by hand: it follows from the estimate, its interval and the controls.

    findings = Findings(params, provenance(params, model))
    findings.judge(Measurement("pps.undefended-cosine-negative", share(negative.sum(), negative.size)))
    findings.claim_box()
    findings.save()
"""

import csv
import difflib
import importlib.metadata
import importlib.util
import io
import json
import math
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import yaml
from IPython.display import Markdown
from pydantic import ValidationError

from helpers import cost
from helpers.book.tables import markdown_table
from helpers.files import replace_text
from helpers.statistics import Estimate
from helpers.verdicts import Claim, Control, Measurement, Verdict, format_number, verdict

if TYPE_CHECKING:
    import pandas as pd

PROJECT = Path(__file__).resolve().parents[2]
CLAIMS_FILE = PROJECT / "book" / "claims.yml"
REFERENCES = PROJECT / "book" / "reference"
PACKAGES = (
    "helpers",
    "torch",
    "transformers",
    "transformer-lens",
    "peft",
    "numpy",
    "scipy",
    "scikit-learn",
)
_IMPORTED = time.monotonic()

SIGNS: Mapping[str, str] = {
    "reproduced": "●",
    "direction only": "◐",
    "undecided": "○",
    "contradicted": "✕",
    "invalid": "⊘",
    "not judged": "–",
}
"""A shape for every verdict, best first, so that verdicts are told apart without colour."""


class FindingError(ValueError):
    """A claim, estimate or table that cannot be recorded; the message says what to do."""


def load_claims(path: Path = CLAIMS_FILE) -> dict[str, Claim]:
    """Read the claims registry: id -> Claim, in the order of the file.

    Raises FindingError if an entry is malformed, or an id appears twice.
    """
    claims: dict[str, Claim] = {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        try:
            claim = Claim(**entry)
        except ValidationError as error:
            problem = error.errors()[0]
            raise FindingError(
                f"{path.name}: claim {entry.get('id', '(without id)')!r}, field "
                f"{'.'.join(map(str, problem['loc']))!r}: {problem['msg']}; correct that entry."
            ) from error
        if claim.id in claims:
            raise FindingError(f"{path.name}: the id {claim.id!r} appears twice; give each claim its own id.")
        claims[claim.id] = claim
    return claims


@cache
def _registry() -> dict[str, Claim]:
    return load_claims()


@dataclass(frozen=True)
class Finding:
    """A claim after measurement."""

    claim: str
    value: float
    low: float
    high: float
    n: int
    """Units behind the value, such as questions; with several seeds, those of each seed."""
    seeds: tuple[int, ...]
    """Training seeds behind the value; empty where nothing was trained."""
    controls: tuple[Control, ...]
    verdict: Verdict
    reason: str
    """Why this verdict, in one sentence."""

    @property
    def measured(self) -> str:
        """Value and interval, such as `0.12 [0.05, 0.2]`."""
        return f"{format_number(self.value)} [{format_number(self.low)}, {format_number(self.high)}]"

    @property
    def units(self) -> str:
        """Of what it is a mean, such as `n = 32 of each of 5 seeds`."""
        count = len(self.seeds)
        return f"n = {self.n}" + (f" of each of {count} seeds" if count > 1 else ", one seed" if count else "")

    def record(self) -> dict[str, Any]:
        """The finding as JSON-ready values; a number that is not finite becomes None."""
        return {
            "claim": self.claim,
            "value": _finite(self.value),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "n": self.n,
            "seeds": list(self.seeds),
            "controls": [
                {"name": c.name, "kind": c.kind, **_estimate_record(c.estimate), "state": c.state}
                for c in self.controls
            ],
            "verdict": self.verdict,
            "reason": self.reason,
        }


@runtime_checkable
class LoadedModel(Protocol):
    """What provenance needs to know of a model."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def device(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...


@runtime_checkable
class RunParams(Protocol):
    """What findings need to know of a notebook's parameters; every `helpers.params.Params` has it."""

    @property
    def preset(self) -> str: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def results(self) -> str | None: ...
    @property
    def chapter(self) -> str: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


@runtime_checkable
class RecordingJudge(Protocol):
    """A judge that says by which method it judged; `helpers.judges.api.APIJudge` is one."""

    def record(self) -> dict[str, str | int]: ...


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of a run come from."""

    chapter: str
    parameters: Mapping[str, Any]
    model: str
    digest: str
    seeds: tuple[int, ...]
    device: str
    dtype: str
    judge: Mapping[str, str | int] | None = field(default=None, kw_only=True)
    """What an API judge says of itself, its method above all; None where only offline judges judged."""
    versions: Mapping[str, str]
    started: float
    """Monotonic clock at the start of the run, in seconds."""
    template: str = ""
    """What is done to conversations because of the model's chat template, if anything."""

    @property
    def minutes(self) -> float:
        """Minutes from the start of the run until now."""
        return (time.monotonic() - self.started) / 60

    def record(self) -> dict[str, Any]:
        """Everything as JSON-ready values, with the minutes and operations up to now."""
        return {
            "chapter": self.chapter,
            "preset": self.parameters["preset"],
            "model": self.model,
            "digest": self.digest,
            "seeds": list(self.seeds),
            "device": self.device,
            "dtype": self.dtype,
            **({"judge": dict(self.judge)} if self.judge else {}),
            "versions": dict(self.versions),
            "minutes": round(self.minutes, 2),
            "cost": cost.LEDGER.record(),
            "parameters": dict(self.parameters),
            **({"template": self.template} if self.template else {}),
        }

    def box(self) -> Markdown:
        """A table for the reader of the notebook."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        parameters = ", ".join(
            f"`{name}={json.dumps(value)}`" for name, value in self.parameters.items() if value is not None
        )
        rows = {
            "Model": f"{self.model} (SHA-256 `{self.digest[:16]}`)",
            "Preset": self.parameters["preset"],
            "Seeds": ", ".join(map(str, self.seeds)),
            "Device": f"{self.device}, {self.dtype}",
            **({"Judge": _judge_told(self.judge)} if self.judge else {}),
            "Versions": versions,
            "Minutes": f"{self.minutes:.1f}",
            "Arithmetic": cost.told(cost.LEDGER.record()),
            "Parameters": parameters,
            **({"Chat template": self.template} if self.template else {}),
        }
        return Markdown(markdown_table(("Provenance", "of this run"), rows.items()))


def provenance(params: RunParams, model: LoadedModel, *, started: float | None = None) -> Provenance:
    """Collect where a run's numbers come from.

    `started` is a `time.monotonic()` reading; without it, minutes count from the import of this module.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Provenance(
        chapter=params.chapter,
        parameters=params.model_dump(mode="json"),
        model=model.name,
        digest=model.digest,
        seeds=tuple(params.seeds),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=versions,
        started=_IMPORTED if started is None else started,
        template=getattr(model, "template_notes", ""),
    )


@dataclass
class Findings:
    """Collects a chapter's findings and glued numbers, and saves them.

    Files go to `params.results`, by default `results/{preset}/{chapter}`;
    a relative path starts at the project.
    """

    params: RunParams
    provenance: Provenance
    claims: Mapping[str, Claim] = field(default_factory=_registry)
    found: dict[str, Finding] = field(default_factory=dict, init=False)
    glued: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    @property
    def folder(self) -> Path:
        """Where this run's files go."""
        return PROJECT / (self.params.results or f"results/{self.params.preset}/{self.params.chapter}")

    def judge(self, *measurements: Measurement) -> None:
        """Give the verdict on each claim that was measured, and remember it.

        Raises FindingError if a claim is unknown or belongs to another chapter.
        """
        for measured in measurements:
            claim = self.claims.get(measured.claim)
            if claim is None:
                near = "".join(difflib.get_close_matches(measured.claim, self.claims, n=1, cutoff=0))
                raise FindingError(f"There is no claim {measured.claim!r} in book/claims.yml; did you mean {near!r}?")
            if claim.chapter != self.params.chapter:
                raise FindingError(
                    f"The claim {claim.id!r} belongs to {claim.chapter}, not to {self.params.chapter}; judge it there."
                )
            estimate = measured.estimate
            decided, why = verdict(claim, estimate, measured.controls, preset=self.params.preset)
            self.found[claim.id] = Finding(
                claim=claim.id,
                value=float(estimate.value),
                low=float(estimate.low),
                high=float(estimate.high),
                n=int(estimate.n),
                seeds=tuple(estimate.seeds),
                controls=tuple(measured.controls),
                verdict=decided,
                reason=" ".join(filter(None, (why, _also_failed(why, measured.controls), measured.reason))),
            )

    def judged_by(self, judge: object) -> None:
        """Keep in the provenance how a judge by API came to its scores; of an offline judge there is nothing to tell.

        Call it when everything is judged.
        """
        if isinstance(judge, RecordingJudge):
            self.provenance = replace(self.provenance, judge=judge.record())

    def sentence(self, claim_id: str) -> str:
        """What this run says of a claim, in a sentence or two that its verdict chooses; for the text under a figure."""
        claim, finding = self.claims[claim_id], self.found.get(claim_id)
        if finding is None or not math.isfinite(finding.value):
            why = f": {_uncapped(finding.reason)}" if finding else ": it was not measured."
            return f"Not judged: {_uncapped(claim.statement)} This run has no verdict{why}"
        opening = {
            "reproduced": "Reproduced here",
            "direction only": "Only the direction is reproduced here",
            "contradicted": "Contradicted here",
            "undecided": "Undecided here",
            "invalid": "No valid test here",
            "not judged": "Not judged",
        }[finding.verdict]
        number = f"The {claim.metric}: {finding.measured} {claim.unit}, {finding.units}."
        why = "" if finding.verdict == "reproduced" else f" {finding.reason}"
        return f"{opening}: {_uncapped(claim.statement)} {number}{why}"

    def central_box(self) -> Markdown:
        """What became of the chapter's central claims, as a list: statement, verdict and number."""
        central = [claim for claim in self._chapter_claims() if claim.central]
        records = {name: finding.record() for name, finding in self.found.items()}
        return Markdown("\n".join(f"- {outcome(claim, records.get(claim.id))}" for claim in central))

    def glue_sentences(self) -> None:
        """Make each claim's sentence available to the prose as `said.{claim}`, and the central claims as `central`."""
        from myst_nb import glue

        for claim in self._chapter_claims():
            self.glue(f"said.{claim.id}", self.sentence(claim.id))
        glue("central", self.central_box(), display=False)

    def glue(self, name: str, value: Any, fmt: str = "") -> str:
        """Make a number available to the prose under `name` (role `glue:text`), formatted by the format spec `fmt`.

        Returns the text that the prose will show.
        """
        plain = value.item() if hasattr(value, "item") else value
        text = format(plain, fmt)
        if importlib.util.find_spec("myst_nb") is not None:  # it is not in Colab, where no page is rendered
            from myst_nb import glue  # here, because it imports Sphinx, which no other use of findings needs

            glue(name, _Plain(text), display=False)
        self.glued[name] = {"value": _finite(plain), "text": text}
        return text

    def claim_box(self) -> Markdown:
        """The chapter's claims with what was measured and the verdicts, as a table."""
        rows = []
        for claim in self._chapter_claims():
            finding = self.found.get(claim.id)
            statement, asked = map(plain, (claim.statement, expectation(claim)))
            expected = f"**{statement}** Counts as reproduced if: {asked}."
            if finding is None:
                rows.append((expected, "", f"{badge('not judged')} Not measured in this run."))
                continue
            measured = f"{finding.measured}, {finding.units}"
            why = "" if finding.verdict == "reproduced" else f" {finding.reason}"
            controls = "; ".join(f"{c.name}: {c.state}" for c in finding.controls)
            rows.append(
                (expected, measured, f"{badge(finding.verdict)}{why}" + f" Controls: {controls}." * bool(controls))
            )
        return Markdown(markdown_table(("Claim", "Measured here, 95% interval", "Verdict"), rows))

    def reference_box(self, folder: Path = REFERENCES) -> Markdown:
        """The committed reference run of this chapter, as a table of its own; a sentence where there is none.

        It was made before, usually by the `full` preset (`make reference`); nothing of it enters this run's findings.
        """
        path = folder / self.params.chapter / "findings.json"
        if not path.exists():
            return Markdown("No reference run of this chapter is kept in this copy of the book.")
        run = json.loads(path.read_text("utf-8"))
        recorded = {finding["claim"]: finding for finding in run["findings"]}
        rows = []
        for claim in self._chapter_claims():
            there, here = recorded.get(claim.id), self.found.get(claim.id)
            numbers = [
                ""
                if f is None or f["value"] is None
                else f"{format_number(f['value'])} [{f['low']:.3g}, {f['high']:.3g}]"
                for f in (here.record() if here else None, there)
            ]
            verdicts = [here.verdict if here else "not judged", there["verdict"] if there else "not judged"]
            rows.append((claim.statement, *(f"{n} {v}".strip() for n, v in zip(numbers, verdicts, strict=True))))
        made = f"{run['preset']}, {run['model']}, {run['device']}, {len(run['seeds'])} seeds"
        text = markdown_table(("Claim", "This run", f"Reference run ({made})"), rows)
        from helpers.book.reference import OLDER, is_older  # here, as it imports torch

        return Markdown(f"{text}\n\n{OLDER}" if is_older(run) else text)

    def beside(self, *names: str, folder: Path = REFERENCES) -> "dict[str, list[pd.DataFrame]]":
        """Tables that this run has saved, under "this run", and where a reference run is kept the same tables of it.

        The chapter's headline figure is drawn from these, one row a run. Raises FindingError if this run has not saved
        a table yet.
        """
        import pandas as pd

        missing = [name for name in names if not (self.folder / f"{name}.csv").is_file()]
        if missing:
            raise FindingError(f"The table {missing[0]!r} is not saved yet; call `table` before `beside`.")
        runs = {"this run": self.folder}
        kept = folder / self.params.chapter
        if all((kept / f"{name}.csv").is_file() for name in names):
            runs["reference run"] = kept
        return {run: [pd.read_csv(place / f"{name}.csv") for name in names] for run, place in runs.items()}

    def table(self, name: str, rows: "pd.DataFrame | Iterable[Mapping[str, Any]]") -> Path:
        """Save the numbers of a figure as `{name}.csv`, and return its path.

        Raises FindingError if the name is no plain file name, or there are no rows.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name == "findings":
            raise FindingError(
                f"{name!r} cannot name a table; use lower-case letters, digits, '-' and '_', and not 'findings'."
            )
        records = rows.to_dict("records") if hasattr(rows, "to_dict") else [dict(row) for row in rows]
        if not records:
            raise FindingError(f"The table {name!r} has no rows; pass the numbers that the figure shows.")
        path = self.folder / f"{name}.csv"
        replace_text(path, _csv(records))
        return path

    def save(self) -> Path:
        """Write findings.json, findings.csv and provenance.json, each atomically; returns their folder.

        findings.json is complete in itself, so that it can be kept as a reference run (`helpers.book.reference`).
        """
        origin = self.provenance.record()
        found = [self.found[claim.id].record() for claim in self._chapter_claims() if claim.id in self.found]
        replace_text(self.folder / "provenance.json", _json(origin))
        replace_text(self.folder / "findings.csv", _csv(_csv_rows(found)))
        replace_text(self.folder / "findings.json", _json({**origin, "findings": found, "glued": self.glued}))
        return self.folder

    def _chapter_claims(self) -> list[Claim]:
        return [claim for claim in self.claims.values() if claim.chapter == self.params.chapter]


def _judge_told(judge: Mapping[str, str | int]) -> str:
    missing = f"{judge['without a score']} of {judge['answers']} answers without a score"
    mixed = f" ({others} by another method)" if (others := judge["by another method"]) else ""
    return f"{judge['model']}, by {judge['method']}{mixed}; {missing}"


def _also_failed(why: str, controls: Sequence[Control]) -> str:
    """The strength controls that failed beside what decided the verdict, which `why` says."""
    names = [c.name for c in controls if c.kind == "strength" and c.state == "failed" and c.name not in why]
    return f"This control failed as well: {', '.join(names)}." if names else ""


def badge(verdict: str) -> str:
    """A verdict as HTML: its colour, its shape and its word."""
    return f'<span class="verdict {verdict.replace(" ", "-")}">{SIGNS[verdict]} {verdict}</span>'


def number(record: Mapping[str, Any], unit: str = "") -> str:
    """The value of a recorded finding with its 95% interval, such as `0.12 of answers [0.05, 0.2]`."""
    if record["value"] is None:
        return "no number"
    value, low, high = (
        "none" if x is None else format_number(x) for x in (record["value"], record["low"], record["high"])
    )
    return f"{value}{f' {unit}' if unit else ''} [{low}, {high}]"


def outcome(claim: Claim, record: Mapping[str, Any] | None) -> str:
    """What became of a claim, in Markdown: the statement, its verdict, the number with its interval, what was asked."""
    if record is None:
        return f"**{plain(claim.statement)}** {badge('not judged')} Not measured in this run."
    limit = "at least" if claim.direction == "above" else "at most"
    asked = f"asked for: {limit} {format_number(claim.threshold)}"
    return f"**{plain(claim.statement)}** {badge(record['verdict'])} {number(record, claim.unit)}; {asked}."


def expectation(claim: Claim) -> str:
    """What is measured for a claim, and which value counts as reproduced."""
    limit = "at least" if claim.direction == "above" else "at most"
    source = "" if claim.source_value is None else f" (source: {format_number(claim.source_value)})"
    return f"{claim.metric}: {limit} {format_number(claim.threshold)} {claim.unit}{source}"


def plain(text: str) -> str:
    """Text for Markdown in which a star is a star."""
    return text.replace("*", r"\*")


class _Plain:
    """Text whose repr has no quotation marks, because a notebook stores an object's repr."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _estimate_record(estimate: Estimate | float) -> dict[str, Any]:
    if isinstance(estimate, Estimate):
        return {
            "value": _finite(float(estimate.value)),
            "low": _finite(float(estimate.low)),
            "high": _finite(float(estimate.high)),
            "n": int(estimate.n),
        }
    return {"value": _finite(float(estimate)), "low": None, "high": None, "n": None}


def _uncapped(sentence: str) -> str:
    """A sentence as it follows a colon; abbreviations and names keep their capitals."""
    head = sentence.split(" ", 1)[0]
    return sentence[0].lower() + sentence[1:] if head == "A" or head[1:].islower() else sentence


def _csv_rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            **row,
            "seeds": " ".join(map(str, row["seeds"])),
            "controls": "; ".join(f"{control['name']}={control['state']}" for control in row["controls"]),
        }
        for row in found
    ] or [dict.fromkeys(("claim", "value", "low", "high", "n", "seeds", "controls", "verdict", "reason"))]


def _csv(records: Sequence[Mapping[Any, Any]]) -> str:
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(record for record in records if any(value is not None for value in record.values()))
    return text.getvalue()


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
