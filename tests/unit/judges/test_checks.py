"""What judges get wrong is measured on texts that none of them is fitted on."""

import numpy as np
import pytest

from helpers.corpora import load_replies, load_style, load_trait, split
from helpers.judges.checks import (
    baselines,
    check_concept_judge,
    check_trait_judge,
    error_table,
    off_target,
    off_target_texts,
)
from helpers.judges.classifier import ConceptJudge, TraitJudge, diverse_negatives
from helpers.judges.refusal import is_refusal


@pytest.fixture(scope="module")
def diverse():
    """A judge of evil that has read other voices, all but legal ones."""
    others = diverse_negatives("evil", without="legal")
    return TraitJudge.fit(split(load_trait("evil"), "train"), others=others)


def shares(table):
    return dict(zip(table["source"], table["share"], strict=True))


def test_no_judge_is_fitted_on_the_texts_that_tell_what_it_takes_for_the_trait():
    texts = {text for found in off_target_texts("evil", ["One of its own."]).values() for text in found}
    assert "One of its own." in texts
    for fitted_on in ("train", "extract"):
        assert not texts & set(diverse_negatives("evil", fitted_on))
        assert not texts & {
            answer for row in split(load_trait("evil"), fitted_on) for answer in (row.normal, row.strong)
        }


def test_other_voices_among_the_negatives_keep_a_judge_from_taking_them_for_the_trait(judges, diverse):
    before, after = (shares(check_trait_judge(judge, "evil")) for judge in (judges["evil"], diverse))
    seen = ("strong impolite", "strong pirate", "strong sycophantic", "weather style", "other topics")
    assert np.mean([after[s] for s in seen]) <= np.mean([before[s] for s in seen]) / 2
    assert after["strong evil"] >= 0.85 and after["normal evil"] <= 0.15
    assert diverse.validate(split(load_trait("evil"), "eval")).value >= 0.9
    assert after["legal style"] >= 0.25  # a voice that it has not read: no remedy
    assert after["its words shuffled"] >= 0.4  # it counts words


def test_the_off_target_table_counts_scores_of_fifty_and_more():
    class Length:
        def score(self, questions, answers):
            assert len(questions) == len(answers)
            return np.array([10.0 * len(answer.split()) or np.nan for answer in answers])

    table = off_target(Length(), {"long": ["a b c d e", "a b c d e f"], "mixed": ["a b c d e", "", "a", "b"]})
    assert table[["source", "texts", "share"]].values.tolist() == [["long", 2, 1.0], ["mixed", 4, 0.25]]
    assert (table["low"] < table["share"]).all() and (table["high"] <= 1).all()


def test_baselines_stand_beside_the_judge_on_the_same_texts(judges):
    rows = split(load_trait("pirate"), "eval")
    table = baselines(judges["pirate"], [row.strong for row in rows], [row.normal for row in rows])
    assert table["by"].tolist() == ["judge", "length alone", "form alone", "words (TF-IDF)"]
    assert table["auroc"][0] == judges["pirate"].validate(rows).value
    assert table["auroc"].between(table["low"], table["high"]).all()


def test_a_concept_judge_is_asked_about_every_concept_that_a_text_does_not_show():
    rows = {style: load_style(style, "train") for style in ("weather", "legal")}
    judge = ConceptJudge.fit(
        {s: [r.strong for r in found] for s, found in rows.items()}, [r.normal for r in rows["legal"]]
    )
    held_out = {style: load_style(style, "validate") for style in rows}
    found = shares(check_concept_judge(judge, held_out, ["Rain falls."] * 3))
    assert found["shows the concept"] >= 0.8 > 0.2 >= found["plain answers"]
    assert {"shows another concept", "its words shuffled", "the model's own", "reviews"} < set(found)


def test_the_table_of_errors_counts_what_both_judges_say_of_every_label():
    table = error_table(load_replies()).set_index(["judge", "label"])
    assert table["texts"].to_dict() == {
        (judge, label): count
        for judge in ("is_refusal", "is_compliance")
        for label, count in (("refusal", 80), ("partial", 30), ("compliance", 80), ("other", 50))
    }
    assert table["should"].sum() == 2
    refusals = [row.reply for row in load_replies("refusal")]
    assert table["share"]["is_refusal", "refusal"] == is_refusal(refusals).mean()
    assert table["share"]["is_refusal", "refusal"] > 0.7 > 0.2 > table["share"]["is_refusal", "compliance"]
