"""Verdicts follow from the numbers, and the record of a run is complete and honest."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pandas as pd
import pytest

from helpers.book.figures import estimates
from helpers.book.findings import SIGNS, FindingError, Findings, badge, load_claims, outcome, provenance
from helpers.book.reference import OLDER, code
from helpers.statistics import Estimate
from helpers.verdicts import Claim, Control, Measurement, Verdict, verdict

ABOVE = Claim(
    id="a.rises",
    chapter="01_a",
    statement="It rises.",
    source="A paper",
    where="Fig. 1",
    metric="share",
    unit="share",
    direction="above",
    threshold=0.9,
    no_effect=0.5,
)
BELOW = ABOVE.model_copy(update={"id": "a.falls", "direction": "below", "threshold": 0.1, "source_value": 0.05})
OTHER = ABOVE.model_copy(update={"id": "b.other", "chapter": "02_b"})


class RunParams(SimpleNamespace):
    """Parameters of a run with the attributes that findings read."""

    def model_dump(self, *, mode: str) -> dict[str, object]:
        return {"preset": self.preset, "seeds": list(self.seeds)}


def run(folder: Path, preset: str = "quick") -> Findings:
    params = RunParams(preset=preset, seeds=(0, 1), results=str(folder), chapter="01_a")
    model = SimpleNamespace(name="a-model", digest="f" * 64, device="cpu", dtype="torch.float32")
    claims = {claim.id: claim for claim in (ABOVE, BELOW, OTHER)}
    return Findings(params, provenance(params, model), claims)


@pytest.mark.parametrize(
    ("claim", "value", "low", "high", "expected"),
    [
        (ABOVE, 0.95, 0.8, 1.0, "reproduced"),
        (ABOVE, 0.90, 0.8, 1.0, "reproduced"),
        (ABOVE, 0.80, 0.6, 0.9, "direction only"),
        (ABOVE, 0.95, 0.4, 1.0, "undecided"),
        (ABOVE, 0.95, 0.5, 1.0, "undecided"),
        (ABOVE, 0.55, 0.4, 0.7, "contradicted"),
        (ABOVE, 0.30, 0.2, 0.4, "contradicted"),
        (BELOW, 0.05, 0.0, 0.2, "reproduced"),
        (BELOW, 0.20, 0.1, 0.4, "direction only"),
        (BELOW, 0.05, 0.0, 0.6, "undecided"),
        (BELOW, 0.40, 0.2, 0.6, "contradicted"),
        (BELOW, 0.95, 0.9, 1.0, "contradicted"),
        (ABOVE, float("nan"), 0.6, 0.9, "not judged"),
        (ABOVE, 0.95, float("nan"), float("nan"), "not judged"),
    ],
)
def test_the_verdict_follows_from_value_interval_and_threshold(claim, value, low, high, expected):
    assert verdict(claim, Estimate(value, low, high, 20), preset="quick")[0] == expected


def test_a_failed_control_turns_reproduced_into_direction_only_and_is_named():
    controls = [Control("random vector", 0.4, passed=False), Control("placebo", 0.0, passed=True)]
    decided, reason = verdict(ABOVE, Estimate(0.95, 0.8, 1.0, 20), controls, preset="quick")
    assert decided == "direction only"
    assert "random vector" in reason and "placebo" not in reason


def test_a_failed_validity_control_makes_any_number_invalid():
    broken = [Control("answers are words", 0.4, passed=False, kind="validity")]
    for estimate in (Estimate(0.95, 0.8, 1.0, 20), Estimate(0.3, 0.2, 0.4, 20), Estimate(0.5, 0.1, 1.0, 20)):
        assert verdict(ABOVE, estimate, broken, preset="quick")[0] == "invalid"


@pytest.mark.parametrize("kind", ["validity", "strength"])
def test_a_control_that_was_not_measured_has_not_passed(kind):
    controls = [Control("random vector", float("nan"), passed=None, kind=kind)]
    decided, reason = verdict(ABOVE, Estimate(0.95, 0.8, 1.0, 20), controls, preset="quick")
    assert decided == "direction only" and "was not measured: random vector" in reason


def test_undecided_says_what_could_have_been_shown():
    reason = verdict(ABOVE, Estimate(0.6, 0.3, 0.95, 32, seeds=(0, 1)), preset="quick")[1]
    assert "n = 32 and 2 seeds could have shown a difference of 0.465 or more" in reason


def test_the_sentence_of_a_claim_is_chosen_by_its_verdict(tmp_path):
    findings = run(tmp_path)
    assert findings.sentence("a.rises") == "Not judged: it rises. This run has no verdict: it was not measured."
    for low, opening in ((0.8, "Reproduced here: it rises."), (0.4, "Undecided here: it rises.")):
        findings.judge(Measurement("a.rises", Estimate(0.95, low, 1.0, 20, seeds=(0,))))
        said = findings.sentence("a.rises")
        assert said.startswith(opening) and f"0.95 [{low}, 1]" in said and "n = 20, one seed" in said


def test_a_missed_threshold_does_not_hide_a_control_that_failed(tmp_path):
    findings, low = run(tmp_path), Estimate(0.8, 0.6, 0.85, 20)
    findings.judge(Measurement("a.rises", low, [Control("random vector", 0.4, passed=False)]))
    reason = findings.found["a.rises"].reason
    assert reason.startswith("The value is not at least") and "failed as well: random vector" in reason
    findings.judge(Measurement("a.rises", Estimate(0.95, 0.8, 1.0, 20), [Control("random vector", 0.4, passed=False)]))
    assert findings.found["a.rises"].reason.count("random vector") == 1


@pytest.mark.parametrize(
    ("statement", "within"),
    [("A step helps.", "a step helps."), ("It rises.", "it rises."), ("FIHS rises.", "FIHS rises.")],
)
def test_a_statement_after_a_colon_begins_as_a_sentence_goes_on(tmp_path, statement, within):
    findings = run(tmp_path)
    findings.claims = {"a.rises": ABOVE.model_copy(update={"statement": statement})}
    assert findings.sentence("a.rises").startswith(f"Not judged: {within} ")


def test_a_random_model_is_never_judged():
    assert verdict(ABOVE, Estimate(1.0, 0.9, 1.0, 20), preset="tiny")[0] == "not judged"


def test_an_unknown_claim_is_an_error_that_names_the_nearest(tmp_path):
    with pytest.raises(FindingError, match=r"did you mean 'a\.rises'"):
        run(tmp_path).judge(Measurement("a.rise", Estimate(1.0, 1.0, 1.0, 1)))


def test_a_claim_of_another_chapter_cannot_be_judged_here(tmp_path):
    with pytest.raises(FindingError, match="belongs to 02_b"):
        run(tmp_path).judge(Measurement("b.other", Estimate(1.0, 1.0, 1.0, 1)))


def test_saved_findings_hold_what_was_measured_and_where_it_comes_from(tmp_path):
    findings = run(tmp_path)
    control = Control("random", Estimate(0.1, 0.0, 0.2, 7), passed=np.bool_(True))
    findings.judge(
        Measurement("a.rises", Estimate(np.float64(0.95), 0.8, 1.0, 20, seeds=(3,)), [control], "Held out."),
        Measurement("a.falls", Estimate(float("nan"), 0.0, 1.0, 0)),
    )
    findings.save()

    saved = json.loads((tmp_path / "findings.json").read_text())
    first, second = saved["findings"]
    assert (first["claim"], first["value"], first["n"], first["seeds"]) == ("a.rises", 0.95, 20, [3])
    shown = {"name": "random", "kind": "strength", "value": 0.1, "low": 0.0, "high": 0.2, "n": 7, "state": "passed"}
    assert first["controls"] == [shown]
    assert first["verdict"] == "reproduced" and first["reason"].endswith("Held out.")
    assert second["value"] is None and second["verdict"] == "not judged"
    assert {"preset", "device", "versions", "parameters"} <= saved.keys()
    assert json.loads((tmp_path / "provenance.json").read_text())["digest"] == "f" * 64

    rows = list(csv.DictReader((tmp_path / "findings.csv").open()))
    assert [row["claim"] for row in rows] == ["a.rises", "a.falls"]
    assert rows[0]["controls"] == "random=passed" and rows[1]["value"] == ""
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"


def test_saving_before_anything_is_judged_gives_an_empty_list(tmp_path):
    folder = run(tmp_path).save()
    assert json.loads((folder / "findings.json").read_text())["findings"] == []
    assert len((folder / "findings.csv").read_text().splitlines()) == 1


def test_judging_a_claim_again_replaces_the_finding(tmp_path):
    findings = run(tmp_path)
    findings.judge(Measurement("a.rises", Estimate(0.95, 0.8, 1.0, 20)))
    findings.judge(Measurement("a.rises", Estimate(0.2, 0.1, 0.3, 20)))
    findings.save()
    saved = json.loads((tmp_path / "findings.json").read_text())["findings"]
    assert [row["verdict"] for row in saved] == ["contradicted"]


def test_a_figures_numbers_are_saved_from_rows_and_from_a_data_frame(tmp_path):
    findings = run(tmp_path)
    rows = [{"x": np.float64(0.5), "y": 1}, {"x": 2.0, "y": np.int64(3)}]
    from_rows = findings.table("fig-1", rows).read_text()
    assert from_rows == "x,y\n0.5,1\n2.0,3\n"
    assert findings.table("fig-2", pd.DataFrame(rows)).read_text() == "x,y\n0.5,1\n2.0,3\n"


@pytest.mark.parametrize("name", ["findings", "../escape", "Figure 1", ""])
def test_a_table_cannot_overwrite_the_findings_or_leave_the_folder(tmp_path, name):
    with pytest.raises(FindingError, match="cannot name a table"):
        run(tmp_path).table(name, [{"x": 1}])


def test_a_table_without_rows_is_an_error(tmp_path):
    with pytest.raises(FindingError, match="no rows"):
        run(tmp_path).table("empty", [])


def test_a_glued_number_is_shown_formatted_without_quotation_marks_and_remembered(tmp_path):
    from IPython.testing.globalipapp import start_ipython
    from IPython.utils.capture import capture_output

    start_ipython()
    findings = run(tmp_path)
    with capture_output() as captured:
        assert findings.glue("share", np.float64(0.953), ".0%") == "95%"
    (output,) = captured.outputs
    assert output.data == {"application/papermill.record/text/plain": "95%"}
    assert output.metadata["scrapbook"]["name"] == "share"
    findings.save()
    glued = json.loads((tmp_path / "findings.json").read_text())["glued"]
    assert glued == {"share": {"value": 0.953, "text": "95%"}}


def test_a_star_in_a_claim_is_no_markup_in_the_box(tmp_path):
    findings = run(tmp_path)
    findings.claims["a.rises"] = ABOVE.model_copy(update={"statement": "It raises K*.", "metric": "K* minus K*"})
    line = findings.claim_box().data.splitlines()[2]
    assert r"**It raises K\*.**" in line and r"K\* minus K\*" in line


def test_the_claim_box_lists_every_claim_of_the_chapter_and_no_other(tmp_path):
    findings = run(tmp_path)
    findings.judge(Measurement("a.rises", Estimate(0.95, 0.8, 1.0, 20), [Control("random", 0.1, passed=True)]))
    lines = findings.claim_box().data.splitlines()
    assert len(lines) == 4, "a header, a rule, two claims of this chapter"
    assert "**It rises.**" in lines[2] and "0.95 [0.8, 1], n = 20" in lines[2]
    assert f"{badge('reproduced')} Controls: random: passed." in lines[2]
    assert "Not measured in this run" in lines[3] and "(source: 0.05)" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_every_verdict_has_a_shape_of_its_own_beside_its_word():
    assert set(SIGNS) == set(get_args(Verdict))
    assert len(set(SIGNS.values())) == len(SIGNS)
    assert badge("direction only") == '<span class="verdict direction-only">◐ direction only</span>'


def test_the_box_on_top_has_the_central_claims_alone_with_verdict_number_and_what_was_asked(tmp_path):
    findings = run(tmp_path)
    findings.claims["a.rises"] = ABOVE.model_copy(update={"central": True, "unit": "of answers"})
    findings.judge(Measurement("a.rises", Estimate(0.95, 0.8, 1.0, 20)))
    (line,) = findings.central_box().data.splitlines()
    assert line == f"- **It rises.** {badge('reproduced')} 0.95 of answers [0.8, 1]; asked for: at least 0.9."


def test_a_claim_without_a_number_says_so():
    assert "Not measured" in outcome(ABOVE, None)
    nothing = {"value": None, "low": None, "high": None, "verdict": "not judged"}
    assert "no number" in outcome(ABOVE, nothing)


def test_minutes_count_from_the_given_start():
    params = RunParams(preset="quick", seeds=(0,), results=None, chapter="01_a")
    model = SimpleNamespace(name="a-model", digest="f" * 64, device="cpu", dtype="torch.bfloat16")
    origin = provenance(params, model, started=time.monotonic() - 120)
    assert 2 <= origin.minutes < 2.1
    assert origin.record()["dtype"] == "bfloat16"
    assert "| Minutes | 2.0 |" in origin.box().data


def test_a_claim_registry_with_a_mistake_says_which_claim_and_field(tmp_path):
    entry = ABOVE.model_dump() | {"direction": "up"}
    file = tmp_path / "claims.yml"
    file.write_text(json.dumps([entry]))
    with pytest.raises(FindingError, match=r"'a\.rises', field 'direction'"):
        load_claims(file)


def test_a_claim_registry_with_the_same_id_twice_is_refused(tmp_path):
    file = tmp_path / "claims.yml"
    file.write_text(json.dumps([ABOVE.model_dump(), ABOVE.model_dump()]))
    with pytest.raises(FindingError, match="appears twice"):
        load_claims(file)


def test_importing_findings_loads_neither_torch_nor_models():
    code = "import sys, helpers.book.findings; print([m for m in ('torch', 'helpers.models') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reference_run_stands_beside_this_run_and_does_not_enter_it(tmp_path):
    findings = run(tmp_path)
    assert "No reference run" in findings.reference_box(tmp_path).data
    there = {"claim": ABOVE.id, "value": 0.125, "low": 0.1, "high": 0.15, "verdict": "direction only"}
    kept = {"preset": "full", "model": "m", "device": "cuda", "seeds": [0, 1], "findings": [there]}
    kept |= {"chapter": "01_pps_gradient_reversal", "code": code("01_pps_gradient_reversal")}
    (tmp_path / "01_a").mkdir()
    (tmp_path / "01_a" / "findings.json").write_text(json.dumps(kept))
    box = findings.reference_box(tmp_path).data
    assert OLDER not in box
    (tmp_path / "01_a" / "findings.json").write_text(json.dumps({**kept, "code": "of another day"}))
    assert OLDER in findings.reference_box(tmp_path).data
    assert "Reference run (full, m, cuda, 2 seeds)" in box
    assert "0.125 [0.1, 0.15] direction only" in box
    assert not findings.found


def test_the_headline_figures_tables_come_from_this_run_and_beside_it_from_the_reference(tmp_path):
    findings, kept = run(tmp_path / "here"), tmp_path / "kept"
    with pytest.raises(FindingError, match="'doses' is not saved yet; call `table` before `beside`"):
        findings.beside("doses", folder=kept)
    findings.table("doses", [{"value": 0.5, "low": 0.25, "high": 0.75, "n": 32}])
    assert list(findings.beside("doses", folder=kept)) == ["this run"]
    there = run(kept / "01_a", preset="full")
    there.table("doses", [{"value": 1.0, "low": 0.5, "high": 1.5, "n": 160}])
    runs = findings.beside("doses", folder=kept)
    assert {name: estimates(table)[0].value for name, (table,) in runs.items()} == {
        "this run": 0.5,
        "reference run": 1.0,
    }
    assert estimates(runs["reference run"][0]) == [Estimate(1.0, 0.5, 1.5, 160)]
