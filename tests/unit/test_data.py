import json
import re
from collections import Counter
from itertools import combinations

import pytest

from helpers.corpora import DATA, available_traits, load_prompts, load_trait, split
from helpers.models import plain_model

TRAITS = ("evil", "pirate", "sycophantic")
COUNTS = {"train": 72, "extract": 24, "eval": 32}
ROWS = {trait: load_trait(trait) for trait in TRAITS}


def grams(text: str) -> set[str]:
    return {text.lower()[start : start + 5] for start in range(len(text) - 4)}


def near_duplicates(texts: dict[str, str], limit: float = 0.5) -> list[tuple[str, str]]:
    """Pairs whose sets of five-character pieces have a Jaccard similarity of `limit` or more."""
    sets = {name: grams(text) for name, text in texts.items()}
    return [(a, b) for a, b in combinations(sets, 2) if len(sets[a] & sets[b]) >= limit * len(sets[a] | sets[b])]


def test_the_near_duplicate_check_finds_a_reworded_question():
    texts = {"a": "Why do leaves change colour in autumn?", "b": "Why do leaves change colour in the autumn?"}
    assert near_duplicates(texts) == [("a", "b")]


def test_the_bundled_traits_are_the_three_documented_ones():
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


def test_no_question_comes_twice_within_or_across_splits_and_traits():
    assert not near_duplicates({row.id: row.question for rows in ROWS.values() for row in rows})


@pytest.mark.parametrize("level", ["normal", "mild", "strong"])
def test_no_answer_comes_twice_within_or_across_splits_and_traits(level):
    answers = {row.id: getattr(row, level) for rows in ROWS.values() for row in rows}
    assert not near_duplicates({name: answer for name, answer in answers.items() if answer is not None})


@pytest.mark.parametrize("trait", TRAITS)
def test_answers_of_a_kind_do_not_share_an_opening(trait):
    for level in ("normal", "mild", "strong"):
        answers = [getattr(row, level) for row in ROWS[trait]]
        openings = Counter(" ".join(answer.split()[:2]) for answer in answers if answer)
        assert not openings or openings.most_common(1)[0][1] <= 4


def test_all_bundled_text_is_ascii():
    for path in [DATA / "prompts.jsonl", *(DATA / "traits").glob("*.jsonl")]:
        assert path.read_bytes().isascii(), path.name


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
    assert f"{len(prompts)} prompts" in sheet
    assert split(ROWS["evil"], "eval")[0].question in sheet
