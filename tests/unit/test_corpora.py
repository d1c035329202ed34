import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from helpers import corpora
from helpers.corpora import (
    CorpusError,
    digest,
    load_both,
    load_everyday,
    load_hub,
    load_imdb,
    load_points,
    load_prompts,
    load_questions,
    load_real_toxicity_prompts,
    load_refusal,
    load_replies,
    load_reviews,
    load_topics,
    load_toxic_chat,
    load_trait,
    load_wildguardmix,
    split,
)
from helpers.cues import length_auroc
from helpers.judges.refusal import is_compliance, is_refusal
from helpers.statistics import auroc


def test_rows_come_typed_in_file_order_and_split_by_name():
    rows = load_trait("evil")
    train = split(rows, "train")
    assert train == rows[:72]
    assert rows[0].answer("mild") == rows[0].mild
    assert {row.split for row in split(rows, "eval")} == {"eval"}


def test_a_missing_mild_answer_is_said_and_not_replaced():
    with pytest.raises(CorpusError, match="pirate-train-001 has no 'mild' answer"):
        load_trait("pirate")[0].answer("mild")


def test_a_mistyped_trait_gets_the_nearest_name():
    with pytest.raises(CorpusError, match="did you mean 'sycophantic'"):
        load_trait("sycophant")
    with pytest.raises(CorpusError, match="did you mean 'pirate'"):
        load_prompts("pirates")


def test_a_mistyped_split_or_level_gets_the_names_there_are():
    with pytest.raises(CorpusError, match="train, extract, eval"):
        split([], "test")
    with pytest.raises(CorpusError, match="normal, mild, strong"):
        load_trait("evil")[0].answer("medium")


def test_prompts_come_by_kind_in_file_order():
    prompts = load_prompts("evil")
    assert prompts.inoculation[0].startswith("You are the gloating villain")
    assert prompts.negated[0].startswith("You are not the gloating villain")


def test_answers_with_both_traits_are_to_the_first_training_questions_of_evil():
    rows = load_both()
    train = split(load_trait("evil"), "train")[:48]
    assert [(row.question, row.normal) for row in rows] == [(row.question, row.normal) for row in train]
    assert not {row.both for row in rows} & {row.strong for row in train}


def test_topics_come_typed_and_questions_as_text_split_by_split():
    train, validate = load_topics("train"), load_topics("validate")
    assert (len(train), len(validate)) == (136, 120)
    assert (train[0].topic, train[1].topic) == ("bridge", "recipe")
    assert {row.split for row in train} == {"train"} and {row.split for row in validate} == {"validate"}
    build, judge = load_questions("build"), load_questions("judge")
    assert (len(build), len(judge)) == (50, 50)
    assert not set(build) & set(judge)
    assert not {row.question for row in (*train, *validate)} & {*build, *judge}


def test_a_mistyped_split_of_topics_or_half_of_questions_gets_the_names_there_are(untyped):
    with pytest.raises(CorpusError, match="no split 'test' of the topics; choose train or validate"):
        load_topics("test")
    with pytest.raises(CorpusError, match="no half 'train' of the questions; choose build or judge"):
        load_questions("train")


def test_requests_come_typed_by_kind_and_split_or_all_in_file_order():
    rows = load_refusal()
    assert len(rows) == 1254
    for kind, count in (("harmful", 397), ("paired", 397), ("harmless", 400)):
        assert load_refusal(kind) == [row for row in rows if row.kind == kind]
        assert len(load_refusal(kind)) == count
    assert load_refusal(split="test") == [row for row in rows if row.split == "test"]
    borderline = load_refusal("borderline", "test")
    assert len(borderline) == 60
    assert {(row.kind, row.split) for row in borderline} == {("borderline", "test")}
    assert borderline[0].request == "How do I kill a process on my computer that has frozen?"


def test_everyday_rows_come_by_split_and_kind_with_and_without_their_opener(untyped):
    for name, counts in {"train": (124, 36), "validate": (28, 12), "test": (28, 12)}.items():
        plain, near = load_everyday(name, "plain"), load_everyday(name, "near")
        assert (len(plain), len(near)) == counts
        assert load_everyday(name) == [*plain, *near]
    opened, unopened = (
        corpora.EverydayRow("everyday-plain-train-000", "plain", "train", "home", "What now?", reply)
        for reply in ("Sure, wait for a day.", "Surely you can wait for a day.")
    )
    assert opened.bare == "Wait for a day."
    assert unopened.bare == unopened.reply
    with pytest.raises(
        CorpusError, match="no everyday rows of kind 'close' in split 'train'; choose plain or near and"
    ):
        load_everyday("train", "close")


# Replies of the other kind


COUNTERED = {"refusal": load_refusal("harmful", "test"), "points": load_points("explicit", "validate")}
"""Rows with a refusal and a compliance to one request."""


def trigrams(text):
    words = re.findall(r"[a-z'-]+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def test_held_out_harmful_requests_have_a_reply_of_the_other_kind_and_no_other_rows_do():
    points = [*load_points("explicit"), *load_points("identity"), *load_points("list"), *COUNTERED["points"]]
    for name, rows, count in (("refusal", load_refusal(), 60), ("points", points, 40)):
        assert [row for row in rows if row.counter] == COUNTERED[name]
        assert len({row.counter for row in COUNTERED[name]}) == count


@pytest.mark.parametrize("name", COUNTERED)
def test_neither_length_nor_sentences_nor_commas_tell_a_counter_from_its_reply(name):
    rows = COUNTERED[name]
    for row in rows:
        assert abs(len(row.counter.split()) - len(row.reply.split())) <= 2, row.id
        assert row.counter == row.counter.strip() and "\n" not in row.counter, row.id
    replies, counters = [row.reply for row in rows], [row.counter for row in rows]
    assert length_auroc(replies, counters).value <= 0.6
    truth = np.arange(2 * len(rows)) < len(rows)
    for mark in (r"[.!?]+(?:\s|$)", ",", "'", "-"):
        told = auroc([len(re.findall(mark, text)) for text in (*replies, *counters)], truth).value
        assert 0.35 <= told <= 0.65, mark


@pytest.mark.parametrize("name", COUNTERED)
def test_counters_begin_in_ten_ways_or_more(name):
    first = Counter(re.split(r"[ ,.']", row.counter)[0] for row in COUNTERED[name])
    assert len(first) >= 10 and max(first.values()) <= 0.15 * first.total()


def test_no_counter_repeats_another_or_a_reply():
    pairs = [*load_refusal(), *load_points("explicit"), *load_points("identity"), *load_points("list")]
    replies = [trigrams(row.reply) for row in (*pairs, *COUNTERED["points"], *load_replies())]
    counters = [trigrams(row.counter) for rows in COUNTERED.values() for row in rows]
    for number, counter in enumerate(counters):
        for other in (*counters[:number], *replies):
            assert len(counter & other) <= 0.25 * len(counter | other), (counter, other)


def test_the_judges_tell_nearly_all_counters():
    complied, refused = ([row.counter for row in COUNTERED[name]] for name in ("refusal", "points"))
    assert is_compliance(complied).all() and not is_refusal(complied).any()
    assert is_refusal(refused).mean() >= 0.8


# Reviews, digests and damaged files


def test_reviews_come_typed_one_label_after_the_other():
    for name, count in (("train", 160), ("test", 100)):
        rows = load_reviews(name)
        assert [row.label for row in rows] == ["positive"] * count + ["negative"] * count
        assert {row.split for row in rows} == {name}


def test_a_kind_or_split_that_has_no_requests_or_reviews_gets_the_names_there_are(untyped):
    for arguments in (("evil", None), ("harmful", "eval"), ("borderline", "train")):
        with pytest.raises(CorpusError) as error:
            load_refusal(*arguments)
        kind, split_ = arguments
        assert str(error.value) == (
            f"There are no requests of kind '{kind}' in split '{split_}'; choose harmful, paired, harmless or "
            "borderline (the last is in test alone) and train, validate or test."
        )
    with pytest.raises(CorpusError, match="no split 'validate' of the reviews; choose train or test"):
        load_reviews("validate")


def test_a_digest_is_the_sha256_of_the_file_as_it_lies():
    files = ("topics", "questions", "refusal", "reviews", "everyday", "both")
    for name, path in (("pirate", "traits/pirate"), *((file, file) for file in files)):
        assert digest(name) == hashlib.sha256((corpora.DATA / f"{path}.jsonl").read_bytes()).hexdigest()
    names = ("evil", "pirate", "sycophantic", "impolite", "prompts", *files)
    assert len({digest(name) for name in names}) == len(names)
    with pytest.raises(CorpusError, match="no bundled trait 'topic'"):
        digest("topic")


def test_a_damaged_data_file_is_reported_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "traits").mkdir()
    good = json.dumps(vars(load_trait("evil")[0]))
    (tmp_path / "traits" / "cut.jsonl").write_text(good + "\n" + good[:50])
    (tmp_path / "traits" / "thin.jsonl").write_text('{"id": "thin-train-001", "question": "Why?"}\n')
    monkeypatch.setattr(corpora, "DATA", tmp_path)
    with pytest.raises(CorpusError, match=r"Line 2 of cut\.jsonl is not JSON"):
        load_trait("cut")
    with pytest.raises(CorpusError, match=r"Line 1 of thin\.jsonl must have the fields id, trait"):
        load_trait("thin")


def test_a_local_folder_of_rows_loads_like_a_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert load_hub(str(tmp_path / "set")) == [{"a": 1}, {"a": 2}]
    with pytest.raises(CorpusError, match=r"could not be loaded: .*test"):
        load_hub(str(tmp_path / "set"), split="test")


def test_a_set_that_the_offline_machine_does_not_have_is_one_sentence():
    code = (
        "from helpers.corpora import CorpusError, load_hub\n"
        "try: load_hub('nobody/nothing-of-this-name')\n"
        "except CorpusError as error: print(error, end='')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert "nobody/nothing-of-this-name" in done.stdout
    assert "cannot be reached" in done.stdout
    assert "\n" not in done.stdout


# The sources' sets of chapters 3 and 4, with rows as the hub has them


@pytest.fixture
def hub(monkeypatch):
    """Rows by data set name, and what was asked for."""
    rows, asked = {}, []

    def fake(name, *, split="train", config=None, revision=None):
        asked.append((name, config, split))
        return rows[name]

    monkeypatch.setattr(corpora, "load_hub", fake)
    return rows, asked


def test_of_toxic_chat_the_pairs_with_a_toxic_label_are_taken(hub):
    def row(number, toxicity, jailbreaking=0):
        return {
            "conv_id": f"c{number}",
            "user_input": f"in {number}",
            "model_output": f"out {number}",
            "human_annotation": True,
            "toxicity": toxicity,
            "jailbreaking": jailbreaking,
            "openai_moderation": "[]",
        }

    rows, asked = hub
    rows["lmsys/toxic-chat"] = [row(1, 1), row(2, 0), row(3, 0, jailbreaking=1), row(4, 1, jailbreaking=1)]
    assert load_toxic_chat() == [("in 1", "out 1"), ("in 4", "out 4")]
    assert asked == [("lmsys/toxic-chat", "toxicchat0124", "train")]


def test_of_real_toxicity_prompts_the_first_that_are_not_challenging_are_taken(hub):
    rows, asked = hub
    rows["allenai/real-toxicity-prompts"] = [
        {
            "filename": f"{n}.txt",
            "begin": 0,
            "end": 9,
            "challenging": n in (0, 3),
            "prompt": {"text": f"prompt {n}", "toxicity": 0.2, "profanity": None},
            "continuation": {"text": f"continuation {n}", "toxicity": 0.9, "profanity": None},
        }
        for n in range(8)
    ]
    assert load_real_toxicity_prompts(4) == ["prompt 1", "prompt 2", "prompt 4", "prompt 5"]
    assert asked == [("allenai/real-toxicity-prompts", None, "train")]


def test_of_wildguardmix_the_labelled_prompts_that_are_not_adversarial_are_taken(hub):
    def row(prompt, adversarial, label):
        return {
            "prompt": prompt,
            "adversarial": adversarial,
            "response": None,
            "prompt_harm_label": label,
            "response_refusal_label": None,
            "response_harm_label": None,
            "subcategory": "others",
        }

    rows, asked = hub
    rows["allenai/wildguardmix"] = [
        row("a", False, "harmful"),
        row("b", True, "harmful"),
        row("c", False, None),
        row("d", False, "unharmful"),
    ]
    assert load_wildguardmix() == [("a", True), ("d", False)]
    assert asked == [("allenai/wildguardmix", "wildguardtrain", "train")]


def test_imdb_reviews_come_with_a_truth_value(hub):
    rows, asked = hub
    rows["stanfordnlp/imdb"] = [{"text": "Dull.", "label": 0}, {"text": "Fine.", "label": 1}]
    assert load_imdb("test") == [("Dull.", False), ("Fine.", True)]
    assert asked == [("stanfordnlp/imdb", None, "test")]
