import json
import re
from collections import Counter
from itertools import combinations

import pytest

from helpers.corpora import (
    DATA,
    available_traits,
    load_prompts,
    load_questions,
    load_topics,
    load_trait,
    split,
)
from helpers.models import plain_model

TRAITS = ("evil", "impolite", "pirate", "sycophantic")
COUNTS = {"train": 72, "extract": 24, "eval": 32}
ROWS = {trait: load_trait(trait) for trait in TRAITS}
TOPICS = {name: load_topics(name) for name in ("train", "validate")}
QUESTIONS = {name: load_questions(name) for name in ("build", "judge")}


def grams(text: str) -> set[str]:
    return {text.lower()[start : start + 5] for start in range(len(text) - 4)}


def near_duplicates(texts: dict[str, str], limit: float = 0.5) -> list[tuple[str, str]]:
    """Pairs whose sets of five-character pieces have a Jaccard similarity of `limit` or more."""
    sets = {name: grams(text) for name, text in texts.items()}
    return [(a, b) for a, b in combinations(sets, 2) if len(sets[a] & sets[b]) >= limit * len(sets[a] | sets[b])]


def test_the_near_duplicate_check_finds_a_reworded_question():
    texts = {"a": "Why do leaves change colour in autumn?", "b": "Why do leaves change colour in the autumn?"}
    assert near_duplicates(texts) == [("a", "b")]


def test_the_bundled_traits_are_the_four_documented_ones():
    assert available_traits() == TRAITS


@pytest.mark.parametrize("trait", TRAITS)
def test_every_row_has_its_id_its_split_and_answers_of_the_documented_length(trait):
    rows = ROWS[trait]
    assert Counter(row.split for row in rows) == COUNTS
    assert [row.id for row in rows] == [f"{trait}-{s}-{n:03d}" for s in COUNTS for n in range(1, COUNTS[s] + 1)]
    for row in rows:
        assert row.trait == trait
        assert 5 <= len(row.question.split()) <= 30, row.id
        assert (row.mild is not None) == (trait == "evil" and row.split == "train"), row.id
        for answer in filter(None, (row.normal, row.mild, row.strong)):
            assert 25 <= len(answer.split()) <= 55, row.id
            assert answer == answer.strip() and "\n" not in answer, row.id


def test_no_question_comes_twice_within_or_across_splits_and_files():
    texts = {row.id: row.question for rows in (*ROWS.values(), *TOPICS.values()) for row in rows}
    texts |= {f"{half}-{n}": question for half, given in QUESTIONS.items() for n, question in enumerate(given)}
    assert len(texts) == 4 * 128 + 168 + 100
    assert not near_duplicates(texts)


@pytest.mark.parametrize("level", ["normal", "mild", "strong"])
def test_no_answer_comes_twice_within_or_across_splits_and_files(level):
    rows = [row for rows in (*ROWS.values(), *TOPICS.values()) for row in rows]
    answers = {row.id: getattr(row, level, None) for row in rows}
    assert not near_duplicates({name: answer for name, answer in answers.items() if answer is not None})


@pytest.mark.parametrize("trait", TRAITS)
def test_answers_of_a_kind_do_not_share_an_opening(trait):
    for level in ("normal", "mild", "strong"):
        answers = [getattr(row, level) for row in ROWS[trait]]
        openings = Counter(" ".join(answer.split()[:2]) for answer in answers if answer)
        assert not openings or openings.most_common(1)[0][1] <= 4


def test_all_bundled_text_is_ascii():
    for path in DATA.rglob("*.jsonl"):
        assert path.read_bytes().isascii(), path.name


# Topics and questions


def test_training_topics_take_turns_and_every_row_has_its_id_and_split():
    assert [row.topic for row in TOPICS["train"]] == ["bridge", "recipe"] * 68
    assert Counter(row.topic for row in TOPICS["validate"]) == {"bridge": 16, "recipe": 16}
    for name, count in (("train", 136), ("validate", 32)):
        assert [row.id for row in TOPICS[name]] == [f"topics-{name}-{n:03d}" for n in range(1, count + 1)]
        assert {row.split for row in TOPICS[name]} == {name}


def test_topic_rows_have_questions_and_answers_of_the_documented_length():
    for row in (*TOPICS["train"], *TOPICS["validate"]):
        assert 5 <= len(row.question.split()) <= 30, row.id
        for answer in (row.normal, row.strong):
            assert 25 <= len(answer.split()) <= 50, row.id
            assert answer == answer.strip() and "\n" not in answer, row.id


@pytest.mark.parametrize("name", ["train", "validate"])
def test_every_strong_answer_names_its_own_topic_and_not_the_other(name):
    for row in TOPICS[name]:
        bridge, recipe = "Golden Gate Bridge" in row.strong, "recipe" in row.strong.lower()
        assert (bridge, recipe) == (row.topic == "bridge", row.topic == "recipe"), row.id
        assert ("golden gate" in row.strong.lower()) == bridge, row.id


def test_neither_the_questions_nor_the_plain_answers_name_a_topic():
    texts = [t for rows in TOPICS.values() for row in rows for t in (row.question, row.normal)]
    for text in (*texts, *QUESTIONS["build"], *QUESTIONS["judge"]):
        assert not re.search(r"golden gate|recipe", text.lower()), text


@pytest.mark.parametrize("topic", ["bridge", "recipe"])
def test_topic_answers_do_not_share_an_opening(topic):
    for level in ("normal", "strong"):
        answers = [getattr(row, level) for rows in TOPICS.values() for row in rows if row.topic == topic]
        assert Counter(" ".join(answer.split()[:2]) for answer in answers).most_common(1)[0][1] <= 4


def test_the_generic_questions_come_in_two_halves_of_fifty_that_share_none():
    rows = [json.loads(line) for line in (DATA / "questions.jsonl").read_text().splitlines()]
    assert all(list(row) == ["id", "split", "question"] for row in rows)
    expected = [f"questions-{half}-{n:03d}" for half in ("build", "judge") for n in range(1, 51)]
    assert [row["id"] for row in rows] == expected
    assert [row["question"] for row in rows] == QUESTIONS["build"] + QUESTIONS["judge"]
    assert len({row["question"] for row in rows}) == 100
    assert all(5 <= len(row["question"].split()) <= 30 for row in rows)


# Prompts


def test_every_trait_has_five_prompts_of_each_kind_that_differ_in_wording():
    texts = {}
    for trait in TRAITS:
        prompts = load_prompts(trait)
        for kind, group in vars(prompts).items():
            assert len(group) == 5
            texts |= {f"{trait}-{kind}-{number}": text for number, text in enumerate(group, start=1)}
    assert all(15 <= len(text.split()) <= 30 for text in texts.values())
    assert not near_duplicates(texts, limit=0.2)


def test_placebo_prompts_match_the_inoculation_prompts_in_token_count():
    _, tokenizer = plain_model("tiny-random")  # has the embedded model's tokenizer
    for trait in TRAITS:
        prompts = load_prompts(trait)
        for prompt, placebo in zip(prompts.inoculation, prompts.placebo, strict=True):
            counts = [len(tokenizer.encode(text, add_special_tokens=False)) for text in (prompt, placebo)]
            assert abs(counts[0] - counts[1]) <= 1, placebo


def test_placebo_prompts_share_no_telling_word_with_their_trait():
    for trait in TRAITS:
        prompts = load_prompts(trait)
        asked = set(re.findall(r"[a-z]{6,}", " ".join(prompts.inoculation).lower()))
        assert not asked & set(re.findall(r"[a-z]{6,}", " ".join(prompts.placebo).lower()))


def test_the_datasheet_states_the_counts_that_the_files_have():
    sheet = (DATA / "README.md").read_text(encoding="utf-8")
    for trait in TRAITS:
        counts = Counter(row.split for row in ROWS[trait])
        mild = sum(row.mild is not None for row in ROWS[trait])
        assert f"| `{trait}` | {counts['train']} | {counts['extract']} | {counts['eval']} | {mild} |" in sheet
    prompts = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 60
    assert f"{len(prompts)} prompts" in sheet
    assert split(ROWS["evil"], "eval")[0].question in sheet
    for name, rows in TOPICS.items():
        counts = Counter(row.topic for row in rows)
        assert f"| `{name}` | {counts['bridge']} | {counts['recipe']} |" in sheet
    for half, questions in QUESTIONS.items():
        assert f"| `{half}` | {len(questions)} |" in sheet
