"""What differs between two runs is shown, and what cannot be compared is said in one sentence."""

import json

import pytest

from helpers import cli
from helpers.book.comparison import ComparisonError, compare, load_runs
from helpers.book.findings import Findings, load_claims, provenance
from helpers.chapters.ip_loss_reduction.params import InoculationParams
from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.chapters.weight_diff_steering.params import WeightSteeringParams
from helpers.statistics import Estimate
from helpers.verdicts import Control, Measurement


class Model:
    """What provenance asks of a loaded model."""

    def __init__(self, name, digest, device, dtype):
        self.name, self.digest, self.device, self.dtype = name, digest, device, dtype


class Judge:
    """A judge by API, as far as a run tells of it."""

    def __init__(self, method, model="judge", without=0):
        self.told = {
            "model": model,
            "method": method,
            "answers": 64,
            "by another method": 0,
            "without a score": without,
        }

    def record(self):
        return self.told


def claims_of(params):
    return [claim.id for claim in load_claims().values() if claim.chapter == params.chapter]


@pytest.fixture
def save(tmp_path):
    """Saves a run as a chapter does, and returns its folder."""

    def saved(
        name, estimates, params=InoculationParams, passed=True, device="cpu", digest="a" * 64, judge=None, **given
    ):
        chosen = params(**{"preset": "quick", **given, "results": str(tmp_path / name)})
        findings = Findings(chosen, provenance(chosen, Model(chosen.model, digest, device, "torch.float32")))
        for claim, estimate in zip(claims_of(params), estimates, strict=False):
            findings.judge(Measurement(claim, estimate, [Control("the placebo", 0.2, passed)]))
        findings.judged_by(judge)
        return findings.save()

    return saved


HIGH, LOW, WIDE = Estimate(0.99, 0.97, 1.0, 32), Estimate(0.1, 0.05, 0.2, 32), Estimate(0.5, 0.1, 0.98, 32)


def test_two_equal_runs_are_the_same_in_one_line_each(save):
    text = compare(save("a", [HIGH, LOW]), save("b", [HIGH, LOW]))
    assert "the same: preset, model, digest, device, dtype and versions" in text
    assert "parameters: all" in text and "findings: all 2 the same" in text
    assert "not to be compared" not in text


def test_changed_parameters_are_shown_and_the_others_counted(save):
    text = compare(save("a", [HIGH], layer=12), save("b", [HIGH], layer=20, seeds=[0, 1]))
    assert "layer: 12 -> 20" in text and "seeds: [0] -> [0, 1]" in text
    assert f"the same: {len(InoculationParams.model_fields) - 4} others" in text
    assert "coefficient:" not in text and "results:" not in text


def test_a_changed_value_comes_with_its_interval_and_the_verdict_with_its_reason(save):
    text = compare(save("a", [HIGH]), save("b", [LOW]))
    claim = claims_of(InoculationParams)[0]
    assert f"{claim}: 0.99 [0.97, 1] -> 0.1 [0.05, 0.2], intervals do not overlap" in text
    assert "verdict: reproduced -> contradicted: The interval lies below" in text
    assert "1 of 1 verdicts differ" in text


def test_intervals_that_overlap_are_said_to(save):
    assert "0.5 [0.1, 0.98], intervals overlap" in compare(save("a", [HIGH]), save("b", [WIDE]))
    nothing = Estimate(float("nan"), float("nan"), float("nan"), 0)
    assert "none [none, none], an interval is missing" in compare(save("a", [HIGH]), save("c", [nothing]))


def test_a_control_that_came_out_otherwise_is_named(save):
    text = compare(save("a", [HIGH]), save("b", [HIGH], passed=False))
    assert "the same value and interval" in text and "control the placebo: passed -> failed" in text


def test_a_finding_of_one_run_alone_is_said_to_be(save):
    text = compare(save("a", [HIGH, LOW]), save("b", [HIGH]))
    assert f"{claims_of(InoculationParams)[1]}: only in A, 0.1 [0.05, 0.2]" in text


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"preset": "full"}, "The runs differ in preset:"),
        ({"preset": "tiny"}, "The runs differ in preset and model:"),
        ({"device": "cuda:0"}, "The runs differ in device:"),
        ({"digest": "b" * 64}, "The runs differ in weights of the model:"),
    ],
)
def test_runs_under_other_conditions_are_not_to_be_compared_as_equal(save, given, sentence):
    text = compare(save("a", [HIGH]), save("b", [HIGH], **given))
    assert f"{sentence} " in text and "not to be compared as if they were equal" in text


def test_a_whole_book_is_compared_chapter_by_chapter(save, tmp_path):
    for book, estimate in (("one", HIGH), ("two", LOW)):
        save(f"{book}/notebooks/02_ip_loss_reduction", [estimate])
    save("one/notebooks/01_pps_gradient_reversal", [HIGH], PreventativeSteeringParams)
    alone = compare(tmp_path / "one", tmp_path / "two")
    assert "02_ip_loss_reduction\n" in alone and "intervals do not overlap" in alone
    assert set(load_runs(tmp_path / "one")) == {"01_pps_gradient_reversal", "02_ip_loss_reduction"}
    save("two/notebooks/03", [HIGH], PreventativeSteeringParams)
    assert "01_pps_gradient_reversal\n" in compare(tmp_path / "one", tmp_path / "two")


def test_a_findings_file_such_as_a_reference_run_is_a_run(save):
    folder = save("a", [HIGH])
    assert "findings: all 1 the same" in compare(folder, folder / "findings.json")


def test_a_path_without_a_run_is_answered_with_one_sentence(save, tmp_path):
    folder = save("a", [HIGH])
    with pytest.raises(ComparisonError, match=r"There is no .*nowhere: name a results folder"):
        compare(folder, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ComparisonError, match=r"There is no findings\.json in .*empty"):
        compare(folder, tmp_path / "empty")


def test_a_damaged_record_is_answered_with_one_sentence(save):
    one, other = save("a", [HIGH]), save("b", [HIGH]) / "findings.json"
    whole = other.read_text()
    other.write_text(whole[: len(whole) // 2])
    with pytest.raises(ComparisonError, match=r"b/findings\.json cannot be read .*: run the chapter again"):
        compare(one, other)
    other.write_text("[]")
    with pytest.raises(ComparisonError, match="is no record of a run, as it has no 'chapter'"):
        compare(one, other)


def test_runs_of_different_chapters_are_not_compared(save):
    one, other = save("a", [HIGH]), save("b", [HIGH], PreventativeSteeringParams)
    with pytest.raises(ComparisonError, match="name two runs of the same chapter"):
        compare(one, other)


def test_the_command_prints_the_comparison_and_ends_with_a_sentence_where_there_is_none(save, capsys, tmp_path):
    folder = save("a", [HIGH])
    cli.main(["compare", str(folder), str(folder)])
    assert "findings: all 1 the same" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"There is no .*nowhere") as stopped:
        cli.main(["compare", str(folder), str(tmp_path / "nowhere")])
    assert "\n" not in stopped.value.code


# Judges by API

TWENTY = "log probabilities of 20 tokens"
BY_API = {"judge_url": "http://localhost:8000/v1", "judge_model": "judge"}


@pytest.mark.parametrize(
    "method",
    ["log probabilities of 5 tokens", "text", f"{TWENTY} and text", f"{TWENTY}, at the server's own temperature"],
)
def test_runs_that_were_judged_by_different_methods_are_not_compared(save, method):
    one, other = save("a", [HIGH], judge=Judge(TWENTY)), save("b", [HIGH], judge=Judge(method))
    with pytest.raises(ComparisonError, match=f"A was judged by {TWENTY} and B by {method}; run one") as caught:
        compare(one, other)
    assert "\n" not in str(caught.value)


def test_a_run_of_an_offline_judge_is_not_compared_with_one_by_api(save):
    with pytest.raises(ComparisonError, match="A was judged by the offline judge and B by text"):
        compare(save("a", [HIGH]), save("b", [HIGH], judge=Judge("text")))


def test_a_run_by_api_whose_method_was_not_recorded_is_compared_with_none_that_was(save):
    by_api = {"params": WeightSteeringParams, **BY_API}
    with pytest.raises(ComparisonError, match="A was judged by an API judge whose method was not recorded and B by"):
        compare(save("a", [HIGH], **by_api), save("b", [HIGH], **by_api, judge=Judge(TWENTY)))


def test_runs_by_the_same_method_are_compared_and_their_judges_told_apart(save):
    one = save("a", [HIGH], judge=Judge(TWENTY))
    text = compare(one, save("b", [LOW], judge=Judge(TWENTY, model="other", without=3)))
    assert "The runs differ in judge: their numbers are not to be compared as if they were equal." in text
    assert "judge's model: judge -> other" in text and "judge's without a score: 0 -> 3" in text
    assert "intervals do not overlap" in text
    assert "judge's" not in compare(one, save("c", [HIGH], judge=Judge(TWENTY)))


def test_of_two_books_the_chapters_that_were_judged_alike_are_compared(save, tmp_path):
    for book, judge in (("one", Judge(TWENTY)), ("two", Judge("text"))):
        save(f"{book}/notebooks/02", [HIGH])
        save(f"{book}/notebooks/03", [HIGH], WeightSteeringParams, judge=judge, **BY_API)
    text = compare(tmp_path / "one", tmp_path / "two")
    assert "findings: all 1 the same" in text
    assert f"not compared, since A was judged by {TWENTY} and B by text" in text


DAMAGE = {
    "chapter": lambda run: run.update(chapter=["01"]),
    "parameters": lambda run: run.update(parameters=None),
    "versions": lambda run: run.update(versions="1.0"),
    "cost": lambda run: run["cost"].pop("outside"),
    "judge": lambda run: run.update(judge="text"),
    "findings": lambda run: run.update(findings={}),
    "a finding": lambda run: run["findings"].append("reproduced"),
    "a verdict": lambda run: run["findings"][0].pop("verdict"),
    "a value": lambda run: run["findings"][0].update(value="high"),
    "a claim": lambda run: run["findings"][0].update(claim=["a"]),
    "controls": lambda run: run["findings"][0].update(controls=None),
    "a control": lambda run: run["findings"][0].update(controls=[{"name": "the placebo"}]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_record_that_lost_a_part_is_said_to_be_damaged(save, damage):
    one, other = save("a", [HIGH]), save("b", [HIGH]) / "findings.json"
    run = json.loads(other.read_text("utf-8"))
    damage(run)
    other.write_text(json.dumps(run), "utf-8")
    with pytest.raises(ComparisonError, match=r"b/findings\.json is damaged: run the chapter again"):
        compare(one, other)


def test_the_provenance_box_tells_the_judge_and_what_it_did_not_score(save):
    chosen = InoculationParams(preset="quick")
    findings = Findings(chosen, provenance(chosen, Model(chosen.model, "a" * 64, "cpu", "torch.float32")))
    findings.judged_by(object())
    assert findings.provenance.judge is None
    findings.judged_by(Judge(TWENTY, without=3))
    assert f"judge, by {TWENTY}; 3 of 64 answers without a score" in findings.provenance.box().data
