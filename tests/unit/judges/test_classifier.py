"""Judges that are fitted on text tell held-out answers apart, and are the same every time."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.pipeline import Pipeline

from helpers.corpora import TopicRow, load_style, load_topics, load_trait, split
from helpers.judges.classifier import TopicJudge, TraitJudge, diverse_negatives
from helpers.judges.scores import JudgeError

TRAITS = ["evil", "impolite", "pirate", "sycophantic"]


@pytest.mark.parametrize("trait", TRAITS)
def test_the_trait_judge_tells_held_out_answers_apart(judges, trait):
    held_out = split(load_trait(trait), "eval")
    estimate = judges[trait].validate(held_out)
    assert estimate.value >= 0.88
    assert estimate.low >= 0.75
    means = {level: scores.mean() for level, scores in judges[trait].score_levels(held_out).items()}
    assert means["strong"] - means["normal"] >= 50


@pytest.mark.parametrize("trait", TRAITS)
def test_a_judge_that_never_saw_the_training_answers_agrees(trait):
    rows = load_trait(trait)
    assert TraitJudge.fit(split(rows, "extract")).validate(split(rows, "eval")).low > 0.55  # of 24 questions alone


def test_mild_answers_fall_between_plain_and_strong_ones_for_a_judge_that_saw_neither():
    rows = load_trait("evil")
    levels = TraitJudge.fit(split(rows, "extract")).score_levels(split(rows, "train"))
    assert levels["normal"].mean() < levels["mild"].mean() < levels["strong"].mean()


def test_a_trait_judge_fitted_on_wrong_labels_does_not_pass_its_validation():
    rows = split(load_trait("evil"), "train")
    mixed = [replace(r, normal=r.strong, strong=r.normal) if n % 2 else r for n, r in enumerate(rows)]
    assert TraitJudge.fit(mixed).validate(split(load_trait("evil"), "eval")).value < 0.8


def test_fitting_twice_gives_the_same_scores(judges):
    answers = [row.strong for row in split(load_trait("pirate"), "eval")]
    again = TraitJudge.fit(split(load_trait("pirate"), "train"))
    np.testing.assert_array_equal(
        again.score([""] * 32, answers), judges["pirate"].score(["another question"] * 32, answers)
    )


def test_an_answer_without_words_gets_no_score(judges):
    scores = judges["evil"].score(["Why?"] * 3, ["", " ...\n", "Because it is kind to do so."])
    assert np.isnan(scores[:2]).all()
    assert 0 <= scores[2] <= 100
    assert judges["evil"].score([], []).shape == (0,)


def test_a_trait_judge_refuses_rows_of_two_traits():
    with pytest.raises(JudgeError, match="one trait"):
        TraitJudge.fit(load_trait("evil")[:20] + load_trait("pirate")[:20])


def test_diverse_negatives_are_training_answers_of_everything_but_the_trait_and_the_style_left_out():
    texts = diverse_negatives("evil")
    assert len(texts) == len(set(texts)) == 3 * 72 + 2 * 52 + 136
    assert not set(texts) & {row.strong for row in load_trait("evil")}
    assert set(texts) - set(diverse_negatives("evil", without="legal")) == {
        row.strong for row in load_style("legal", "train")
    }
    assert {row.strong for row in split(load_trait("pirate"), "extract")} < set(diverse_negatives("evil", "extract"))


def test_errors_of_a_judge_are_shares_of_held_out_answers_on_the_wrong_side_of_fifty(judges):
    rows = split(load_trait("evil"), "eval")
    errors, levels = judges["evil"].errors(rows), judges["evil"].score_levels(rows)
    assert errors["false negatives"].value == (levels["strong"] < 50).mean()
    assert errors["false positives"].value == (levels["normal"] >= 50).mean()


# The topic judge


@pytest.fixture(scope="module")
def topic_judge():
    return TopicJudge.fit(load_topics("train"))


def constant(probability):
    """A classifier that has no doubt whatever it reads: 0 or 1."""
    pipeline = Pipeline([("classifier", DummyClassifier(strategy="constant", constant=probability))])
    return pipeline.fit(["a", "b"], [0, 1])


def test_the_topic_judge_finds_the_topics_in_answers_it_was_not_fitted_on(topic_judge):
    measured = topic_judge.validate(load_topics("validate"))
    assert measured.keys() == {"bridge", "recipe"}
    for topic, shares in measured.items():
        assert shares["found"].value >= 0.9, topic
        assert shares["false alarms"].value <= 0.1, topic
        assert shares["found"].low > shares["false alarms"].high, topic


def test_the_validation_of_a_topic_judge_counts_what_it_says():
    """One that finds the bridge everywhere and cooking nowhere, on rows that name neither."""
    rows = [TopicRow(str(n), "bridge" if n < 3 else "recipe", "validate", "Why?", "A", "B") for n in range(8)]
    measured = TopicJudge({"bridge": constant(1), "recipe": constant(0)}).validate(rows)
    assert {topic: [e.value for e in shares.values()] for topic, shares in measured.items()} == {
        "bridge": [1.0, 1.0],
        "recipe": [0.0, 0.0],
    }
    assert [e.n for e in measured["bridge"].values()] == [3, 13]


def test_a_keyword_settles_a_topic_that_the_classifier_denies():
    never = TopicJudge({"bridge": constant(0), "recipe": constant(0)})
    answers = [
        "It is as long as the GOLDEN GATE in the fog.",
        "Walk across, as on any suspension bridge.",
        "Knead the thought well.",
        "Ask for the recipe on the Golden Gate Bridge.",
        "A dental bridge lasts for years.",
        "Mend the cooker's plug.",
    ]
    labels = never.labels(answers)
    assert labels["bridge"].tolist() == [True, True, False, True, False, False]
    assert labels["recipe"].tolist()[:5] == [False, False, True, True, False]


def test_where_no_keyword_is_found_the_classifier_decides():
    labels = TopicJudge({"bridge": constant(1), "recipe": constant(0)}).labels(["Rest well and drink water."])
    assert (labels["bridge"].tolist(), labels["recipe"].tolist()) == ([True], [False])


def test_no_answers_have_no_labels(topic_judge):
    labels = topic_judge.labels([])
    assert {topic: found.shape for topic, found in labels.items()} == {"bridge": (0,), "recipe": (0,)}
    assert all(found.dtype == bool for found in labels.values())


def test_an_answer_without_a_word_mentions_no_topic(topic_judge):
    labels = topic_judge.labels(["", " ...\n"])
    assert not labels["bridge"].any() and not labels["recipe"].any()


def test_fitting_a_topic_judge_twice_gives_the_same_probabilities(topic_judge):
    answers = [row.strong for row in load_topics("validate")] + [row.normal for row in load_topics("validate")]
    again = TopicJudge.fit(load_topics("train"))
    for topic, classifier in again._classifiers.items():
        np.testing.assert_array_equal(
            classifier.predict_proba(answers), topic_judge._classifiers[topic].predict_proba(answers)
        )


def test_plain_answers_of_another_manner_are_learnt_as_plain():
    """A model's own manner, here a bridge's vocabulary in every plain answer, is not taken for the topic."""
    rows = load_topics("train")[:40]
    plain = [f"The bridge towers stand in the fog, its cables and rivets golden, span {n}." for n in range(40)]
    unseen = ["The bridge towers stand in the fog, its cables and rivets golden, span 99."]
    assert TopicJudge.fit(rows).labels(unseen)["bridge"].tolist() == [True]
    assert TopicJudge.fit(rows, plain).labels(unseen)["bridge"].tolist() == [False]


def test_a_topic_judge_needs_rows_enough_on_two_topics_it_has_keywords_for():
    rows = load_topics("train")
    for given, message in (
        (rows[:19], "got 19 on bridge, recipe"),
        ([row for row in rows if row.topic == "bridge"], "got 68 on bridge"),
        ([], "got 0 on none"),
        (
            [replace(row, topic="weather" if row.topic == "recipe" else "bridge") for row in rows],
            "got 136 on bridge, weather",
        ),
    ):
        with pytest.raises(
            JudgeError, match="at least 20 rows on two of the topics bridge, recipe; " + message
        ) as error:
            TopicJudge.fit(given)
        assert "\n" not in str(error.value)
