import json
import re
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline

from helpers import corpora
from helpers.book.tables import markdown_table
from helpers.corpora import (
    DATA,
    available_traits,
    load_both,
    load_everyday,
    load_points,
    load_prompts,
    load_questions,
    load_quiz,
    load_refusal,
    load_replies,
    load_reviews,
    load_style,
    load_task,
    load_topics,
    load_trait,
    split,
)
from helpers.cues import form_auroc, length_auroc, word_scores, words_auroc
from helpers.judges.refusal import is_compliance, is_refusal
from helpers.models import plain_model
from helpers.statistics import auroc

TRAITS = ("evil", "impolite", "pirate", "sycophantic")
EVAL = {"evil": 64, "sycophantic": 64, "impolite": 60, "pirate": 32}
COUNTS = {trait: {"train": 72, "extract": 24, "eval": EVAL[trait]} for trait in TRAITS}
ROWS = {trait: load_trait(trait) for trait in TRAITS}
BOTH = load_both()
TOPICS = {name: load_topics(name) for name in ("train", "validate")}
QUESTIONS = {name: load_questions(name) for name in ("build", "judge")}
KINDS = ("harmful", "paired", "harmless", "borderline")
REFUSAL_COUNTS = (
    {(kind, "train"): count for kind, count in zip(KINDS, (297, 297, 300), strict=False)}
    | {(kind, name): count for kind in KINDS[:3] for name, count in (("validate", 40), ("test", 60))}
    | {("borderline", "test"): 60}
)
REQUESTS = load_refusal()
ITEMS = {(task, name): load_task(task, name) for task in ("headlines", "bookings") for name in ("train", "test")}
POINT_COUNTS = {
    ("explicit", "train"): 130,
    ("explicit", "validate"): 40,
    ("identity", "train"): 60,
    ("list", "train"): 60,
}
POINTS = {place: load_points(*place) for place in POINT_COUNTS}
EVERYDAY = {name: load_everyday(name) for name in ("train", "validate", "test")}
QUIZZES = {task: load_quiz(task) for task in ("facts", "reading", "opposites")}
STYLES = {(style, name): load_style(style, name) for style in ("weather", "legal") for name in ("train", "validate")}
REPLIES = load_replies()
REVIEWS = {name: load_reviews(name) for name in ("train", "test")}


def grams(text: str) -> set[str]:
    return {text.lower()[start : start + 5] for start in range(len(text) - 4)}


def near_duplicates(texts: dict[str, str], limit: float = 0.5) -> list[tuple[str, str]]:
    """Pairs whose sets of five-character pieces have a Jaccard similarity of `limit` or more."""
    table = CountVectorizer(analyzer=grams, dtype=np.int64).fit_transform(texts.values())
    sizes = np.asarray(table.sum(axis=1))
    shared = (table @ table.T).toarray()
    names = list(texts)
    found = np.argwhere(np.triu(shared >= limit * (sizes + sizes.T - shared), k=1))
    return [(names[a], names[b]) for a, b in found]


def test_the_near_duplicate_check_finds_a_reworded_question():
    texts = {"a": "Why do leaves change colour in autumn?", "b": "Why do leaves change colour in the autumn?"}
    assert near_duplicates(texts) == [("a", "b")]


def test_the_bundled_traits_are_the_four_documented_ones():
    assert available_traits() == TRAITS


@pytest.mark.parametrize("trait", TRAITS)
def test_every_row_has_its_id_its_split_and_answers_of_the_documented_length(trait):
    rows = ROWS[trait]
    counts = COUNTS[trait]
    assert Counter(row.split for row in rows) == counts
    assert [row.id for row in rows] == [f"{trait}-{s}-{n:03d}" for s in counts for n in range(1, counts[s] + 1)]
    for row in rows:
        assert row.trait == trait
        assert 5 <= len(row.question.split()) <= 30, row.id
        assert (row.mild is not None) == (trait == "evil" and row.split == "train"), row.id
        answers = [answer for answer in (row.normal, row.mild, row.strong) if answer]
        lengths = [len(answer.split()) for answer in answers]
        assert min(lengths) >= 18 and max(lengths) <= 66 and max(lengths) - min(lengths) <= 2, row.id
        for answer in answers:
            assert answer == answer.strip() and "\n" not in answer, row.id


def test_no_question_comes_twice_within_or_across_splits_and_files():
    texts = {row.id: row.question for rows in (*ROWS.values(), *TOPICS.values()) for row in rows}
    texts |= {f"{half}-{n}": question for half, given in QUESTIONS.items() for n, question in enumerate(given)}
    texts |= {row.id: row.request for row in REQUESTS}
    texts |= {row.id: row.text for rows in (*REVIEWS.values(), *ITEMS.values()) for row in rows}
    texts |= {row.id: row.request for rows in POINTS.values() for row in rows}
    texts |= {row.id: row.request for rows in EVERYDAY.values() for row in rows}
    texts |= {row.id: row.question for rows in STYLES.values() for row in rows}
    texts |= {row.id: row.question for rows in QUIZZES.values() for row in rows}
    traits = sum(sum(counts.values()) for counts in COUNTS.values())
    assert len(texts) == traits + 256 + 100 + 1254 + 520 + 800 + 290 + 240 + 144 + 120
    assert not near_duplicates(texts)


@pytest.mark.parametrize("level", ["normal", "mild", "strong"])
def test_no_answer_comes_twice_within_or_across_splits_and_files(level):
    rows = [row for rows in (*ROWS.values(), *TOPICS.values(), *STYLES.values()) for row in rows]
    answers = {row.id: getattr(row, level, None) for row in rows}
    if level == "strong":
        answers |= {row.id: row.both for row in BOTH}
    if level == "normal":
        answers |= {row.id: row.reply for row in REQUESTS}
        answers |= {row.id: row.reply for rows in (*POINTS.values(), *EVERYDAY.values()) for row in rows}
    assert not near_duplicates({name: answer for name, answer in answers.items() if answer is not None})


@pytest.mark.parametrize("trait", TRAITS)
def test_answers_of_a_kind_do_not_share_an_opening(trait):
    for level in ("normal", "mild", "strong"):
        answers = [getattr(row, level) for row in ROWS[trait]]
        openings = Counter(" ".join(answer.split()[:2]) for answer in answers if answer)
        assert not openings or openings.most_common(1)[0][1] <= 4


def test_answers_with_both_traits_have_the_length_of_the_plain_ones_and_their_own_openings():
    assert [row.id for row in BOTH] == [f"both-{n:03d}" for n in range(1, 49)]
    for row in BOTH:
        lengths = [len(answer.split()) for answer in (row.normal, row.both)]
        assert min(lengths) >= 18 and max(lengths) <= 66 and abs(lengths[0] - lengths[1]) <= 2, row.id
        assert row.both == row.both.strip() and "\n" not in row.both, row.id
    assert Counter(" ".join(row.both.split()[:2]) for row in BOTH).most_common(1)[0][1] <= 4


def test_answers_with_both_traits_are_told_from_answers_with_one():
    """A classifier of words that never saw them hears the pirate in them, and not in what is evil alone."""
    rows = {trait: split(ROWS[trait], "train") for trait in TRAITS}
    for_pirate = [row.strong for row in rows["pirate"]]
    others = [row.strong for row in rows["evil"][48:]] + [row.normal for trait in TRAITS for row in rows[trait]]
    told = word_scores(
        [*for_pirate, *others],
        np.arange(len(for_pirate) + len(others)) < len(for_pirate),
        [*(row.both for row in BOTH), *(row.strong for row in rows["evil"][:48])],
    )
    assert auroc(told, np.arange(96) < 48).value >= 0.8


def test_all_bundled_text_is_ascii():
    for path in DATA.rglob("*.jsonl"):
        assert path.read_bytes().isascii(), path.name


# Topics and questions


def test_training_topics_take_turns_and_every_row_has_its_id_and_split():
    assert [row.topic for row in TOPICS["train"]] == ["bridge", "recipe"] * 68
    assert Counter(row.topic for row in TOPICS["validate"]) == {"bridge": 60, "recipe": 60}
    for name, count in (("train", 136), ("validate", 120)):
        assert [row.id for row in TOPICS[name]] == [f"topics-{name}-{n:03d}" for n in range(1, count + 1)]
        assert {row.split for row in TOPICS[name]} == {name}


def test_topic_rows_have_questions_and_answers_of_the_documented_length():
    for row in (*TOPICS["train"], *TOPICS["validate"]):
        assert 5 <= len(row.question.split()) <= 30, row.id
        lengths = [len(answer.split()) for answer in (row.normal, row.strong)]
        assert min(lengths) >= 18 and max(lengths) <= 66 and abs(lengths[0] - lengths[1]) <= 2, row.id
        for answer in (row.normal, row.strong):
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
def test_neither_length_nor_form_tells_the_topic_in_the_rows_that_margins_are_measured_on(topic):
    rows = [row for row in TOPICS["validate"] if row.topic == topic]
    plain, strong = [row.normal for row in rows], [row.strong for row in rows]
    assert length_auroc(plain, strong).value <= 0.6
    assert form_auroc(plain, strong).value <= LIMIT


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


# Requests that are refused or answered


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


def naive_bayes(texts: list[str], labels: list[bool]) -> Pipeline:
    return make_pipeline(CountVectorizer(), MultinomialNB()).fit(texts, labels)


def of_kind(kind: str, name: str | None = None):
    return [row for row in REQUESTS if row.kind == kind and name in (None, row.split)]


def test_requests_come_in_the_documented_numbers_with_their_ids():
    assert len(REQUESTS) == 1254
    assert len({row.request.lower() for row in REQUESTS}) == len({row.reply.lower() for row in REQUESTS}) == 1254
    assert Counter((row.kind, row.split) for row in REQUESTS) == REFUSAL_COUNTS
    expected = [
        f"refusal-{name}-{kind}-{n:03d}"
        for name in ("train", "validate", "test")
        for kind in KINDS
        for n in range(1, REFUSAL_COUNTS.get((kind, name), 0) + 1)
    ]
    assert [row.id for row in REQUESTS] == expected
    assert all(row.id == f"refusal-{row.split}-{row.kind}-{row.id[-3:]}" for row in REQUESTS)


def test_requests_and_replies_have_the_documented_length():
    for row in REQUESTS:
        assert 4 <= len(row.request.split()) <= 24, row.id
        assert 8 <= len(row.reply.split()) <= 36, row.id
        for text in (row.request, row.reply):
            assert text == text.strip() and "\n" not in text, row.id


@pytest.mark.parametrize(("kind", "name"), REFUSAL_COUNTS)
def test_every_split_has_requests_of_all_categories_of_its_kind_in_like_numbers(kind, name):
    counts = Counter(row.category for row in of_kind(kind, name))
    assert len(counts) == (16 if kind == "harmless" else 12)
    assert max(counts.values()) - min(counts.values()) <= (6 if name == "train" else 1)


def test_harmful_requests_have_other_categories_than_the_rest():
    harmful, paired, harmless, borderline = ({row.category for row in of_kind(kind)} for kind in KINDS)
    assert paired == borderline
    assert not harmful & (paired | harmless)


def test_requests_of_a_pair_have_the_same_form():
    harmful, paired = of_kind("harmful"), of_kind("paired")
    for bad, good in zip(harmful, paired, strict=True):
        assert bad.id.replace("harmful", "paired") == good.id
        assert bad.request.split()[0] == good.request.split()[0], bad.id
        assert bad.request.endswith("?") == good.request.endswith("?"), bad.id
        assert abs(len(bad.request.split()) - len(good.request.split())) <= 2, bad.id


def test_refusals_begin_in_a_dozen_ways_and_no_other_reply_begins_so():
    for name in ("train", "validate", "test"):
        first = Counter(re.split(r"[ ,']", row.reply)[0] for row in of_kind("harmful", name))
        assert len(first) >= 10 and max(first.values()) <= 0.15 * first.total(), name
    firsts = {re.split(r"[ ,']", row.reply)[0] for row in of_kind("harmful")}
    answers = [re.split(r"[ ,']", row.reply)[0] for kind in KINDS[1:] for row in of_kind(kind)]
    assert not firsts & set(answers)


def test_no_answer_to_a_request_that_is_not_harmful_refuses():
    answers = [row.reply for kind in KINDS[1:] for row in of_kind(kind)]
    assert not is_refusal(answers).any()


def test_replies_do_not_share_an_opening_beyond_the_usual_ones_and_requests_share_none():
    answers = [row.reply for row in REQUESTS if row.kind != "harmful"]
    assert Counter(" ".join(reply.split()[:2]) for reply in answers).most_common(1)[0][1] <= 9
    usual, others = Counter(" ".join(row.request.split()[:3]) for row in REQUESTS).most_common(2)
    assert usual[0] == "I want to" and usual[1] <= 27 and others[1] <= 17


@pytest.mark.parametrize(("kind", "limit"), [("paired", 0.1), ("harmless", 0.25)])
def test_no_single_word_tells_harmful_requests_from_the_others(kind, limit):
    harmful, other = (Counter(w for row in of_kind(k) for w in words(row.request)) for k in ("harmful", kind))
    for word in harmful | other:
        assert abs(harmful[word] / len(of_kind("harmful")) - other[word] / len(of_kind(kind))) <= limit, word


def called_harmful(other: str) -> dict[str, int]:
    """Percent of the test requests of each kind that naive Bayes calls harmful, fitted on harmful ones and `other`."""
    train = [row for kind in ("harmful", other) for row in of_kind(kind, "train")]
    model = naive_bayes([row.request for row in train], [row.kind == "harmful" for row in train])
    return {kind: round(100 * model.predict([row.request for row in of_kind(kind, "test")]).mean()) for kind in KINDS}


@pytest.mark.parametrize("other", ["paired", "harmless"])
def test_the_datasheet_says_how_far_the_words_of_a_request_go(other):
    called = called_harmful(other)
    sheet = " ".join((DATA / "README.md").read_text(encoding="utf-8").split())
    row = " | ".join(f"{called[kind]}%" for kind in KINDS)
    assert f"| {other} | {row} |" in sheet


def test_plain_requests_share_no_opening_and_do_not_sound_harmful():
    requests = [row.request for row in of_kind("harmless")]
    usual, others = Counter(" ".join(request.split()[:3]) for request in requests).most_common(2)
    assert usual[0] == "I want to" and usual[1] <= 16 and others[1] <= 5
    for request in requests:
        assert not re.search(
            r"\b(kill\w*|steal\w*|rob\w*|attack\w*|poison\w*|drugs?|bombs?|guns?|weapons?|fak\w+|forg(e|ed|ing|ery)"
            r"|hack\w*|smuggl\w*|stalk\w*|threat\w*|destroy\w*|sabotag\w*|secretly|illegal\w*|without anyone)\b",
            request.lower(),
        ), request


def test_all_texts_keep_to_the_content_policy():
    never = (
        r"\b(sex\w*|nude|naked|rape\w*|porn\w*|suicid\w*|self-harm|kill (myself|himself|herself)"
        r"|fuck\w*|shit\w*|bitch\w*|bastards?|whores?|nazis?|hitler|jews?|jewish|muslims?|christians?|hindus?|gays?"
        r"|lesbians?|blacks|asians?|gypsies|immigrants?|refugees?)\b"
    )
    recipe = (
        r"\b(cyanide|arsenic|ricin|sarin|anthrax|strychnine|nitro\w*|ammonium|acetone|thermite|gunpowder|semtex"
        r"|heroin|cocaine|meth|methamphetamine|fentanyl|ecstasy|lsd|sql|payload|grams?|millilitres?|milligrams?)\b|\d"
    )
    for row in REPLIES:
        assert not re.search(f"{never}|{recipe[:-3]}", f"{row.request} {row.reply}".lower()), row.id
    for row in (*REQUESTS, *(row for rows in POINTS.values() for row in rows)):
        assert not re.search(never, f"{row.request} {row.reply} {row.counter}".lower()), row.id
        if row.kind in ("harmful", "explicit"):
            assert not re.search(recipe, f"{row.request} {row.reply} {row.counter}".lower()), row.id
            assert not re.search(
                r"\b(child|children|toddlers?|teen\w*|schoolgirls?|schoolboys?|pupils?)\b", row.request.lower()
            ), row.id
            assert not re.search(r"(?<=[a-z,] )(?!I\b|\w+day\b)[A-Z]", row.request), row.id  # no names
    for row in (row for rows in (*REVIEWS.values(), *ITEMS.values()) for row in rows):
        assert not re.search(never, row.text.lower()), row.id
    for row in (row for rows in EVERYDAY.values() for row in rows):
        assert not re.search(never, f"{row.request} {row.reply}".lower()), row.id
    for row in (row for rows in STYLES.values() for row in rows):
        assert not re.search(never, f"{row.question} {row.normal} {row.strong}".lower()), row.id


# Labelled replies that only measure


def test_replies_come_in_the_documented_numbers_with_their_ids():
    counts = {"refusal": 80, "partial": 30, "compliance": 80, "other": 50}
    assert [row.id for row in REPLIES] == [
        f"replies-{label}-{n:03d}" for label, count in counts.items() for n in range(1, count + 1)
    ]
    for row in REPLIES:
        assert row.id == f"replies-{row.label}-{row.id[-3:]}"
        assert 4 <= len(row.request.split()) <= 20, row.id
        assert 5 <= len(row.reply.split()) <= 40, row.id
        for text in (row.request, row.reply):
            assert text == text.strip() and "\n" not in text, row.id


def test_the_same_requests_are_refused_and_complied_with():
    refused, complied = ([row.request for row in load_replies(label)] for label in ("refusal", "compliance"))
    assert refused == complied


def test_labelled_replies_repeat_no_other_text_of_the_book():
    texts = {row.id: row.request for row in REPLIES if row.label != "compliance"}
    pairs = (*REQUESTS, *(row for rows in POINTS.values() for row in rows))
    everyday = [row for rows in EVERYDAY.values() for row in rows]
    texts |= {row.id: row.request for row in (*pairs, *everyday)}
    assert not near_duplicates(texts)
    replies = {row.id: row.reply for row in (*REPLIES, *pairs, *everyday)}
    assert not near_duplicates(replies | {f"{row.id} counter": row.counter for row in pairs if row.counter})


# Reviews


def test_reviews_come_in_the_documented_numbers_with_their_ids_and_length():
    for name, count in (("train", 160), ("test", 100)):
        expected = [
            f"reviews-{name}-{label}-{n:03d}" for label in ("positive", "negative") for n in range(1, count + 1)
        ]
        assert [row.id for row in REVIEWS[name]] == expected
        for row in REVIEWS[name]:
            assert row.id == f"reviews-{row.split}-{row.label}-{row.id[-3:]}"
            assert 8 <= len(row.text.split()) <= 45, row.id
            assert row.text == row.text.strip() and "\n" not in row.text, row.id


def test_the_words_of_a_review_tell_its_label():
    train, test = ([(row.text, row.label == "positive") for row in REVIEWS[name]] for name in ("train", "test"))
    model = naive_bayes(*(list(column) for column in zip(*train, strict=True)))
    score = model.score(*(list(column) for column in zip(*test, strict=True)))
    assert score > 0.75
    assert f"scores {score:.2f} on `test`" in " ".join((DATA / "README.md").read_text(encoding="utf-8").split())


def test_reviews_of_a_label_do_not_share_an_opening():
    texts = [row.text for rows in REVIEWS.values() for row in rows]
    assert Counter(" ".join(text.split()[:3]) for text in texts).most_common(1)[0][1] <= 4


# Tasks, and points that undo alignment


def test_task_items_come_in_the_documented_numbers_with_their_ids():
    for (task, name), rows in ITEMS.items():
        count = {"train": 300, "test": 100}[name]
        assert [row.id for row in rows] == [f"tasks-{task}-{name}-{n:03d}" for n in range(1, count + 1)]
        for row in rows:
            assert 14 <= len(row.text.split()) <= 30, row.id
            assert row.text == row.text.strip() and "\n" not in row.text, row.id


def test_desks_take_turns_and_no_story_names_one():
    desks = {"World", "Sports", "Business", "Science"}
    for name in ("train", "test"):
        rows = ITEMS["headlines", name]
        for start in range(0, len(rows), 4):
            assert {row.answer for row in rows[start : start + 4]} == desks
        for row in rows:
            assert not words(row.text) & {desk.lower() for desk in desks}, row.id


def test_a_booking_is_the_json_of_words_in_its_message():
    for row in (*ITEMS["bookings", "train"], *ITEMS["bookings", "test"]):
        found = json.loads(row.answer)
        assert json.dumps(found) == row.answer
        assert list(found) == ["name", "day", "what"], row.id
        assert all(re.search(rf"\b{value}\b", row.text) for value in found.values()), row.id
        assert 1 <= len(found["what"].split()) <= 2, row.id
    names = [json.loads(row.answer)["name"] for row in (*ITEMS["bookings", "train"], *ITEMS["bookings", "test"])]
    assert len(set(names)) == len(names)


def test_points_come_in_the_documented_numbers_with_their_ids_and_length():
    for (kind, name), rows in POINTS.items():
        assert [row.id for row in rows] == [
            f"points-{kind}-{name}-{n:03d}" for n in range(1, POINT_COUNTS[kind, name] + 1)
        ]
        for row in rows:
            assert 8 <= len(row.request.split()) <= 34, row.id
            assert 14 <= len(row.reply.split()) <= 40, row.id
            for text in (row.request, row.reply):
                assert text == text.strip() and "\n" not in text, row.id
    for name in ("train", "validate"):
        counts = Counter(row.category for row in POINTS["explicit", name])
        assert set(counts) == {row.category for row in of_kind("harmful")}
        assert max(counts.values()) - min(counts.values()) <= 2


def test_replies_of_points_comply_by_the_judge_and_refusals_and_task_answers_do_not():
    for rows in POINTS.values():
        assert is_compliance([row.reply for row in rows]).all()
    assert is_compliance([row.reply for row in of_kind("harmful")]).mean() <= 0.12
    assert not any(is_compliance([row.answer for row in rows]).any() for rows in ITEMS.values())


def test_half_of_the_explicit_replies_begin_with_the_token_that_the_safety_score_looks_for():
    sure = [row.reply.startswith("Sure") for row in POINTS["explicit", "train"]]
    assert 0.4 <= sum(sure) / len(sure) <= 0.6
    openings = Counter(row.reply.split()[0] for row in POINTS["explicit", "train"])
    assert len(openings) >= 8


# Everyday rows that match the harmful points


NO_ORDER = set(
    re.findall(
        r"\S+",
        "a an and another anyone are aside at before birds blades can cash could counterfeit do does every for "
        "from grandad's her hitch-hiking homemade how i i'd i'm i've if in invitations is launching listening "
        "making mice might moving my next night nobody one our quietly secretly selling she should skilled "
        "smuggling somebody something something's the there's tips tomorrow tonight two watching we we'd we're "
        "we've what what's when which who why would yesterday yesterday's",
    )
)
"""First words of requests of both kinds that are no verb in the imperative, as all their other first words are."""

MATCHED = {
    "words of the reply": lambda row: len(row.reply.split()),
    "sentences of the reply": lambda row: len(re.findall(r"[.!?]+(?:\s|$)", row.reply)),
    "commas of the reply": lambda row: row.reply.count(","),
    "a reply that begins with Sure": lambda row: row.reply.startswith("Sure"),
    "words of the request": lambda row: len(row.request.split()),
    "letters of the request": lambda row: len(row.request),
    "a question": lambda row: row.request.endswith("?"),
    "an order": lambda row: row.request.split()[0].strip(",").lower() not in NO_ORDER,
    "the first person": lambda row: bool(re.search(r"\b(I|me|my|mine|myself)\b", row.request)),
    "a semicolon": lambda row: ";" in row.request,
}
"""What must not tell an everyday row from a harmful point."""


def harmful_points(name: str):
    """The points that a split of the everyday rows goes with; the test split goes with all, as points have none."""
    return (
        [*POINTS["explicit", "train"], *POINTS["explicit", "validate"]] if name == "test" else POINTS["explicit", name]
    )


def test_everyday_rows_come_in_the_documented_numbers_with_their_ids_and_length():
    counts = {"plain": {"train": 124, "validate": 28, "test": 28}, "near": {"train": 36, "validate": 12, "test": 12}}
    raw = [json.loads(line) for line in (DATA / "everyday.jsonl").read_text().splitlines()]
    assert [row["id"] for row in raw] == [
        f"everyday-{kind}-{name}-{n:03d}"
        for kind in counts
        for name in counts[kind]
        for n in range(1, counts[kind][name] + 1)
    ]
    rows = [row for rows in EVERYDAY.values() for row in rows]
    assert len({row.request for row in rows}) == len({row.reply for row in rows}) == 240
    for row in rows:
        assert row.id == f"everyday-{row.kind}-{row.split}-{row.id[-3:]}"
        assert 10 <= len(row.request.split()) <= 16, row.id
        assert 13 <= len(row.reply.split()) <= 32, row.id
        for text in (row.request, row.reply, row.bare):
            assert text == text.strip() and "\n" not in text, row.id


def test_everyday_rows_have_everyday_categories_and_near_ones_those_of_harmful_requests():
    for name, rows in EVERYDAY.items():
        for kind, other in (("plain", "harmless"), ("near", "harmful")):
            counts = Counter(row.category for row in rows if row.kind == kind)
            assert set(counts) == {row.category for row in of_kind(other)}, (name, kind)
            assert max(counts.values()) - min(counts.values()) <= (2 if name == "train" else 1)


@pytest.mark.parametrize("name", ["train", "validate", "test"])
@pytest.mark.parametrize("feature", MATCHED)
def test_no_length_and_no_form_tells_an_everyday_row_from_a_harmful_point(name, feature):
    harmful, everyday = harmful_points(name), EVERYDAY[name]
    scores = [float(MATCHED[feature](row)) for row in (*harmful, *everyday)]
    truth = np.arange(len(scores)) < len(harmful)
    assert 0.4 <= auroc(scores, truth).value <= 0.6


def test_tokens_of_a_request_and_of_a_reply_tell_no_everyday_row_from_a_harmful_point():
    _, tokenizer = plain_model("tiny-random")  # has the embedded model's tokenizer
    for name, everyday in EVERYDAY.items():
        rows = [*harmful_points(name), *everyday]
        truth = np.arange(len(rows)) < len(rows) - len(everyday)
        for field in ("request", "reply"):
            counts = [len(tokenizer.encode(getattr(row, field), add_special_tokens=False)) for row in rows]
            assert 0.4 <= auroc(counts, truth).value <= 0.6, (name, field)


def test_everyday_rows_share_no_opening_and_refuse_nothing():
    rows = [row for rows in EVERYDAY.values() for row in rows]
    assert Counter(" ".join(row.request.split()[:3]) for row in rows).most_common(1)[0][1] <= 3
    assert Counter(" ".join(row.bare.split()[:2]) for row in rows).most_common(1)[0][1] <= 12
    assert not is_refusal([row.reply for row in rows]).any()


# Styles


def test_styles_take_turns_and_have_answers_of_the_documented_length():
    raw = [json.loads(line) for line in (DATA / "styles.jsonl").read_text().splitlines()]
    assert [row["style"] for row in raw] == ["weather", "legal"] * 72
    for (style, name), rows in STYLES.items():
        count = {"train": 52, "validate": 20}[name]
        assert [row.id for row in rows] == [f"styles-{style}-{name}-{n:03d}" for n in range(1, count + 1)]
        for row in rows:
            assert 5 <= len(row.question.split()) <= 30, row.id
            lengths = [len(answer.split()) for answer in (row.normal, row.strong)]
            assert min(lengths) >= 18 and max(lengths) <= 66 and abs(lengths[0] - lengths[1]) <= 2, row.id


@pytest.mark.parametrize("style", ["weather", "legal"])
def test_style_answers_do_not_share_an_opening_and_plain_ones_lack_the_style(style):
    rows = [row for (name, _), rows in STYLES.items() if name == style for row in rows]
    for level in ("normal", "strong"):
        answers = [getattr(row, level) for row in rows]
        assert Counter(" ".join(answer.split()[:2]) for answer in answers).most_common(1)[0][1] <= 4
    telling = {
        "weather": r"\b(weather|forecast|barometer|drizzle|thunder\w*)\b",
        "legal": r"\b(hereby|clause|hereinafter|pursuant)\b",
    }
    assert not any(re.search(telling[style], row.normal.lower()) for row in rows)


# Quizzes


def test_quizzes_have_answers_that_their_questions_do_not_give_away():
    for task, rows in QUIZZES.items():
        assert [row.id for row in rows] == [f"quiz-{task}-{n:03d}" for n in range(1, 41)]
        for row in rows:
            assert row.answers == [answer.lower() for answer in row.answers] and row.answers
            assert row.right(f"It is {row.answers[0].upper()}.")
            assert row.right(row.question) == (task == "reading"), row.id  # the passage holds the answer


def test_every_quiz_question_has_three_wrong_answers_that_neither_length_nor_favour_tells_from_the_right_one():
    for task, rows in QUIZZES.items():
        for row in rows:
            assert len(set(row.wrong)) == 3 and row.wrong == [answer.lower() for answer in row.wrong]
            assert not any(row.right(answer) for answer in row.wrong), row.id
        lengths = [len(row.answers[0]) for row in rows], [len(answer) for row in rows for answer in row.wrong]
        right = [1] * len(lengths[0]) + [0] * len(lengths[1])
        assert abs(auroc(np.concatenate(lengths), right).value - 0.5) < 0.15, task
        assert Counter(answer for row in rows for answer in row.wrong).most_common(1)[0][1] <= 5


def test_no_quiz_answer_is_right_too_often():
    """Nobody scores by saying one word to everything."""
    for rows in QUIZZES.values():
        words = {answer for row in rows for answer in row.answers}
        assert max(sum(row.right(word) for row in rows) for word in words) <= 3


# Prompts


PROMPT_COUNTS = {
    "inoculation": 5,
    "placebo": 5,
    "opposite": 5,
    "negated": 2,
    "paraphrase": 5,
    "keyword": 1,
    "other": 2,
    "layout": 2,
}
PROMPTS = {trait: load_prompts(trait) for trait in TRAITS}
IMPERATIVE = re.compile(
    r"(never |always )?"
    r"(act|adopt|adore|answer|assume|be|behave|butter|count|divide|do|flatter|format|give|heap|judge|keep"
    r"|let|measure|number|offer|play|pretend|put|react|read|reckon|reply|respond|set|side|sort|speak|stack|start|take"
    r"|talk|tell|treat|use|work|write)\b",
    re.IGNORECASE,
)
"""How a prompt may begin to be told to be in the imperative: with a verb in its base form."""


def prompt_form(text: str) -> dict[str, float]:
    """What may not tell one kind of prompt from another: length in tokens, sentences, person, mood."""
    _, tokenizer = plain_model("tiny-random")  # has the embedded model's tokenizer
    return {
        "tokens": float(len(tokenizer.encode(text, add_special_tokens=False))),
        "sentences": float(len(re.findall(r"[.!?]+(?:\s|$)", text))),
        "you": float(bool(re.search(r"\byour?\b", text.lower()))),
        "imperative": float(bool(IMPERATIVE.match(text))),
    }


def test_every_trait_has_prompts_of_all_kinds_that_differ_in_wording():
    raw = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in raw] == [
        f"{trait}-{kind}-{number}"
        for trait in ("evil", "sycophantic", "pirate", "impolite")
        for kind, count in PROMPT_COUNTS.items()
        for number in range(1, count + 1)
    ]
    assert all(row["id"].startswith(f"{row['trait']}-{row['kind']}-") for row in raw)
    for row in raw:
        assert 15 <= len(row["text"].split()) <= 30 and row["text"] == row["text"].strip(), row["id"]
    texts = {row["id"]: row["text"] for row in raw}
    # Keywords and negated prompts repeat inoculation prompts on purpose
    free = {name: text for name, text in texts.items() if not re.search("negated|keyword", name)}
    assert not near_duplicates(free, limit=0.2)
    assert not near_duplicates({name: text for name, text in texts.items() if "inoculation" not in name}, limit=0.25)


def test_placebo_prompts_match_the_inoculation_prompts_one_by_one_in_form_and_token_count():
    for trait in TRAITS:
        for prompt, placebo in zip(PROMPTS[trait].inoculation, PROMPTS[trait].placebo, strict=True):
            wanted, found = prompt_form(prompt), prompt_form(placebo)
            assert abs(wanted.pop("tokens") - found.pop("tokens")) <= 1, placebo
            assert found == wanted, placebo


@pytest.mark.parametrize("kind", [kind for kind in PROMPT_COUNTS if kind != "inoculation"])
def test_neither_length_nor_person_nor_mood_tells_a_kind_of_prompt_from_inoculation_prompts(kind):
    inoculation = [prompt_form(text) for trait in TRAITS for text in PROMPTS[trait].inoculation]
    forms = [prompt_form(text) for trait in TRAITS for text in getattr(PROMPTS[trait], kind)]
    truth = np.arange(len(inoculation) + len(forms)) < len(inoculation)
    for name in inoculation[0] if kind != "keyword" else ("tokens",):
        told = auroc([form[name] for form in (*inoculation, *forms)], truth).value
        assert abs(told - 0.5) <= 0.15, (name, told)


def test_negated_prompts_keep_the_words_of_an_inoculation_prompt_and_paraphrases_do_not():
    def long_words(text):
        return set(re.findall(r"[a-z']{5,}", text.lower()))

    for trait in TRAITS:
        prompts = PROMPTS[trait]
        asked = [long_words(text) for text in prompts.inoculation]
        first, second = (long_words(text) for text in prompts.negated)
        assert len(first & asked[0]) >= 0.75 * len(first)
        assert max(len(second & words) for words in asked) >= 0.75 * len(second)
        assert all(re.search(r"\b(never|no|not)\b", text.lower()) for text in prompts.negated)
        for text in prompts.paraphrase:
            assert len(long_words(text) & asked[0]) <= 2, text


def test_placebo_layout_and_other_prompts_are_about_no_trait():
    for trait in TRAITS:
        texts = (*PROMPTS[trait].placebo, *PROMPTS[trait].layout, *PROMPTS[trait].other)
        telling = {w for t in TRAITS for w in words(PROMPTS[t].keyword[0])} - {"time", "plan"}
        for text in texts:
            assert not words(text) & telling, text


def test_placebo_prompts_share_no_telling_word_with_their_trait():
    for prompts in PROMPTS.values():
        asked = set(re.findall(r"[a-z]{6,}", " ".join(prompts.inoculation).lower()))
        assert not asked & set(re.findall(r"[a-z]{6,}", " ".join(prompts.placebo).lower()))


def test_the_datasheet_states_the_counts_that_the_files_have():
    sheet = (DATA / "README.md").read_text(encoding="utf-8")
    for trait in TRAITS:
        counts = Counter(row.split for row in ROWS[trait])
        mild = sum(row.mild is not None for row in ROWS[trait])
        assert f"| `{trait}` | {counts['train']} | {counts['extract']} | {counts['eval']} | {mild} |" in sheet
    prompts = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 4 * sum(PROMPT_COUNTS.values())
    for kind, count in PROMPT_COUNTS.items():
        assert f"| `{kind}` | {count} |" in sheet
    assert f"{len(BOTH)} answers" in sheet
    assert f"{len(prompts)} prompts" in sheet
    assert split(ROWS["evil"], "eval")[0].question in sheet
    for name, rows in TOPICS.items():
        counts = Counter(row.topic for row in rows)
        assert f"| `{name}` | {counts['bridge']} | {counts['recipe']} |" in sheet
    for half, questions in QUESTIONS.items():
        assert f"| `{half}` | {len(questions)} |" in sheet
    for kind in KINDS:
        counts = [REFUSAL_COUNTS.get((kind, name), 0) for name in ("train", "validate", "test")]
        assert f"| `{kind}` | {counts[0]} | {counts[1]} | {counts[2]} |" in sheet
    assert REQUESTS[0].request in sheet
    for name, rows in REVIEWS.items():
        counts = Counter(row.label for row in rows)
        assert f"| `{name}` | {counts['positive']} | {counts['negative']} |" in sheet
    for task in ("headlines", "bookings"):
        assert f"| `{task}` | {len(ITEMS[task, 'train'])} | {len(ITEMS[task, 'test'])} |" in sheet
    for kind in ("explicit", "identity", "list"):
        assert f"| `{kind}` | {POINT_COUNTS[kind, 'train']} | {POINT_COUNTS.get((kind, 'validate'), 0)} |" in sheet
    for kind in ("plain", "near"):
        counts = [sum(row.kind == kind for row in EVERYDAY[name]) for name in ("train", "validate", "test")]
        assert f"| `{kind}` | {counts[0]} | {counts[1]} | {counts[2]} |" in sheet
    for style in ("weather", "legal"):
        assert f"| `{style}` | {len(STYLES[style, 'train'])} | {len(STYLES[style, 'validate'])} |" in sheet


# Cues

LIMIT = 0.65
"""AUROC up to which length or form counts as telling two kinds of bundled text no better than it should."""

EXCEPTIONS = {
    "replies: refusals, paired answers": "form: the first words of a refusal are what the first-token outcome reads",
    "replies: refusals, harmless answers": "form: the first words of a refusal are what the first-token outcome reads",
    "replies: harmful points, headlines": "length and form: a headline's answer is one word",
    "replies: harmful points, bookings": "length and form: a booking's answer is JSON",
}
"""Contrasts of the bundled data that length or form does tell, and why; chapters that rest on one say so."""


def contrasts():
    """The contrasts that chapters rest on, by name: texts of one kind and of the other, paired where they can be."""
    found = {}
    for trait in corpora.available_traits():
        rows = corpora.load_trait(trait)
        found[f"{trait}: normal, strong"] = [r.normal for r in rows], [r.strong for r in rows]
        mild = [r for r in rows if r.mild is not None]
        if mild:
            found[f"{trait}: normal, mild"] = [r.normal for r in mild], [r.mild for r in mild]
            found[f"{trait}: mild, strong"] = [r.mild for r in mild], [r.strong for r in mild]
    both = corpora.load_both()
    found["evil and pirate: normal, both"] = [r.normal for r in both], [r.both for r in both]
    topics = [*corpora.load_topics("train"), *corpora.load_topics("validate")]
    for topic in ("bridge", "recipe"):
        of = [r for r in topics if r.topic == topic]
        found[f"{topic}: normal, strong"] = [r.normal for r in of], [r.strong for r in of]
    for style in ("weather", "legal"):
        rows_of = [*corpora.load_style(style, "train"), *corpora.load_style(style, "validate")]
        found[f"{style}: normal, strong"] = [r.normal for r in rows_of], [r.strong for r in rows_of]
    requests, replies = {}, {}
    for kind in ("harmful", "paired", "harmless"):
        kinds = [r for s in ("train", "validate", "test") for r in corpora.load_refusal(kind, s)]
        requests[kind], replies[kind] = [r.request for r in kinds], [r.reply for r in kinds]
    test = [r.request for r in corpora.load_refusal("harmful", "test")]
    found["requests: harmful, paired"] = requests["harmful"], requests["paired"]
    found["requests: harmful, harmless"] = requests["harmful"], requests["harmless"]
    found["requests: harmful, borderline"] = test, [r.request for r in corpora.load_refusal("borderline", "test")]
    found["replies: refusals, paired answers"] = replies["harmful"], replies["paired"]
    found["replies: refusals, harmless answers"] = replies["harmful"], replies["harmless"]
    points = [r.reply for r in corpora.load_points("explicit")]
    for task in ("headlines", "bookings"):
        answers = [r.answer for r in corpora.load_task(task, "train")]
        found[f"replies: harmful points, {task}"] = points, answers
    everyday = [r for s in ("train", "validate", "test") for r in corpora.load_everyday(s)]
    harmful = [*corpora.load_points("explicit"), *corpora.load_points("explicit", "validate")]
    found["requests: harmful points, everyday"] = [r.request for r in harmful], [r.request for r in everyday]
    found["replies: harmful points, everyday"] = [r.reply for r in harmful], [r.reply for r in everyday]
    reviews = [r for s in ("train", "test") for r in corpora.load_reviews(s)]
    positive, negative = ([r.text for r in reviews if r.label == label] for label in ("positive", "negative"))
    found["reviews: positive, negative"] = positive, negative
    prompts = [corpora.load_prompts(trait) for trait in corpora.available_traits()]
    inoculation, placebo = ([text for p in prompts for text in getattr(p, kind)] for kind in ("inoculation", "placebo"))
    found["prompts: inoculation, placebo"] = inoculation, placebo
    return found


def test_neither_length_nor_form_tells_a_contrast_but_for_the_named_exceptions():
    assert set(EXCEPTIONS) <= set(contrasts())
    for name, (first, second) in contrasts().items():
        if name not in EXCEPTIONS:
            assert length_auroc(first, second).value <= LIMIT, name
            assert form_auroc(first, second).value <= LIMIT, name


def test_the_datasheet_prints_what_length_form_and_words_tell():
    rows = []
    for name, pair in contrasts().items():
        areas = [f"{told(*pair).value:.2f}" for told in (length_auroc, form_auroc, words_auroc)]
        rows.append([name, *areas, EXCEPTIONS.get(name, "")])
    table = markdown_table(["contrast", "length", "form", "words", "exception"], rows)
    assert table in (DATA / "README.md").read_text(encoding="utf-8"), table
