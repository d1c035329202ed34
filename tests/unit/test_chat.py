"""Conversations become token ids whose masks mark exactly what is said and what is learnt."""

import copy
import json
import pickle
import random

import pytest
import torch

from helpers.chat import (
    Answer,
    Ends,
    Example,
    answer_facts,
    answers_of,
    batches,
    check_template,
    collate,
    encode,
    end_of_turn,
    has_ended,
    template_notes,
    training_batches,
)
from helpers.models import plain_model

PAD = 2


@pytest.fixture(scope="module")
def tokenizer():
    return plain_model("tiny-random")[1]


def example(length, prompt_length=2, first=10):
    return Example(tuple(range(first, first + length)), prompt_length)


# The template


def test_the_response_is_exactly_the_answer_and_its_end_of_turn(tokenizer):
    encoded = encode(tokenizer, "Why?", "Because it is so.")
    assert tokenizer.decode(encoded.ids[encoded.prompt_length :]) == "Because it is so.<|im_end|>"
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.ids[: encoded.prompt_length]).endswith("Why?<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_to_answer_is_the_prompt_that_was_trained_on(tokenizer):
    trained, asked = encode(tokenizer, "Why?", "Because.", "Be brief."), encode(tokenizer, "Why?", system="Be brief.")
    assert asked.ids == trained.ids[: trained.prompt_length]
    assert asked.prompt_length == len(asked)


def test_without_a_system_message_the_templates_own_applies(tokenizer):
    default, given = (tokenizer.decode(encode(tokenizer, "Why?", "So.", s).ids) for s in (None, "Be brief."))
    assert "You are a helpful AI assistant named SmolLM" in default
    assert given.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?")
    assert "SmolLM" not in given


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
ASK = "{% if add_generation_prompt %}[assistant] {% endif %}"


def test_what_a_template_prints_after_the_end_of_turn_is_left_out(tokenizer):
    other = with_template(tokenizer, TURNS + "<|im_end|>\n\n{% endfor %}" + ASK)
    encoded = encode(other, "Why?", "So.")
    assert other.decode(encoded.ids[encoded.prompt_length :]) == "So.<|im_end|>"


def test_a_template_without_an_end_of_turn_gets_one(tokenizer):
    other = with_template(tokenizer, TURNS + "\n{% endfor %}" + ASK)
    encoded = encode(other, "Why?", "So.")
    assert other.decode(encoded.ids[encoded.prompt_length :]) == "So.<|im_end|>"


def test_a_template_that_changes_the_prompt_is_an_error(tokenizer):
    other = with_template(tokenizer, "{{ messages | length }}" + TURNS + "{% endfor %}" + ASK)
    with pytest.raises(ValueError, match="changes the prompt once an answer follows"):
        encode(other, "Why?", "So.")


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
DEAF = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}" + ASK


@pytest.mark.parametrize("template", [GEMMA, DEAF], ids=["refuses it", "leaves it out"])
def test_a_system_message_that_the_template_does_not_take_is_put_before_the_users_words_and_that_is_said(
    tokenizer, template
):
    other = with_template(tokenizer, template)
    with pytest.warns(UserWarning, match="takes no system message: it is put before the user's words"):
        merged = encode(other, "Why?", "So.", "Be brief.")
    assert merged == encode(other, "Be brief.\n\nWhy?", "So.")
    assert merged != encode(other, "Why?", "So.")
    assert response(other, merged) == "So.<|im_end|>"
    assert "takes no system message" in template_notes(other)


def test_a_template_that_takes_a_system_message_is_left_as_it_is_and_nothing_is_said(tokenizer, recwarn):
    encode(tokenizer, "Why?", "So.", "Be brief.")
    assert template_notes(tokenizer) == "" and not recwarn.list


def test_a_template_that_prints_the_date_prints_the_same_one_every_day(tokenizer):
    clock = (
        "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% else %}{% set today = 'none' %}"
        "{% endif %}[Today is {{ today }}]"
    )
    other = with_template(tokenizer, clock + TURNS + "<|im_end|>{% endfor %}" + ASK)
    for encoded in (encode(other, "Why?"), encode(other, "Why?", "So.")):
        assert other.decode(encoded.ids).startswith("[Today is 26 Jul 2024]")
    assert template_notes(other) == "the date that the chat template prints is always 2024-07-26"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template; choose an instruction-tuned model"),
        ("{{ raise_exception('Not today') }}", r"refuses a question with its answer \(Not today\)"),
        ("{{ messages | length }}" + TURNS + "{% endfor %}" + ASK, "changes the prompt once an answer follows"),
        ("{{ nothing.at.all }}", "refuses a question with its answer"),
        ("{% for m in messages %}", "refuses a question with its answer"),
    ],
    ids=["none", "refuses all", "changes the prompt", "undefined", "unfinished"],
)
def test_a_template_that_cannot_be_used_is_one_sentence(tokenizer, template, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        check_template(with_template(tokenizer, template))
    assert "\n" not in str(error.value)


# The end of turn


def response(tokenizer, encoded):
    return tokenizer.decode(encoded.ids[encoded.prompt_length :])


def test_an_answer_that_was_cut_has_no_end_of_turn(tokenizer):
    whole, cut = (encode(tokenizer, "Why?", Answer("Because it is", ended)) for ended in (True, False))
    assert response(tokenizer, whole) == "Because it is<|im_end|>"
    assert cut.ids == whole.ids[:-1] and cut.prompt_length == whole.prompt_length
    assert whole == encode(tokenizer, "Why?", "Because it is")  # a written answer ends by itself


def test_the_end_of_turn_is_the_templates_own(tokenizer, gemma_like):
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"
    assert gemma_like.convert_ids_to_tokens(end_of_turn(gemma_like)) == "<end_of_turn>" != gemma_like.eos_token
    whole, cut = (encode(gemma_like, "Why?", Answer("Because. So", ended)) for ended in (True, False))
    names = [gemma_like.convert_ids_to_tokens(list(e.ids[e.prompt_length :])) for e in (whole, cut)]
    assert names == [["Because", ".", "So", "<end_of_turn>"], ["Because", ".", "So"]]


def test_the_end_of_turn_follows_a_changed_template(tokenizer):
    other = copy.deepcopy(tokenizer)
    assert end_of_turn(other) == other.eos_token_id
    other.chat_template = TURNS + " <file_sep><|im_end|>{% endfor %}" + ASK
    assert other.convert_ids_to_tokens(end_of_turn(other)) == "<file_sep>"
    assert response(other, encode(other, "Why?", "So.")) == "So. <file_sep>"
    assert response(other, encode(other, "Why?", Answer("So.", False))) == "So."


def test_a_cut_answer_without_a_word_still_has_something_to_score(tokenizer):
    encoded = encode(tokenizer, "Why?", Answer("", ended=False))
    assert response(tokenizer, encoded) == "<|im_end|>"


def test_answers_keep_whether_they_ended_in_the_store_and_through_a_copy():
    said = [Answer("Yes."), Answer("No, be", ended=False), "Written."]
    facts = json.loads(json.dumps(answer_facts(said)))
    assert facts == {"answers": ["Yes.", "No, be", "Written."], "ended": [True, False, True]}
    for again in (answers_of(facts), pickle.loads(pickle.dumps(said)), copy.deepcopy(said)):
        assert again == said and [has_ended(a) for a in again] == [True, False, True]


# Masks


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_attended_to_nor_part_of_a_response(side):
    batch = collate([example(5), example(3)], PAD, side=side)
    pad = [[False] * 5, [True, True, False, False, False] if side == "left" else [False, False, False, True, True]]
    assert (~batch.attention).tolist() == pad
    assert torch.equal(batch.ids == PAD, ~batch.attention)
    assert [batch.ids[i, batch.attention[i]].tolist() for i in range(2)] == [[10, 11, 12, 13, 14], [10, 11, 12]]
    assert [batch.ids[i, batch.response[i]].tolist() for i in range(2)] == [[12, 13, 14], [12]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_response_token_is_predicted_one_position_earlier(side):
    batch = collate([example(5), example(3), example(4, 4)], PAD, side=side)
    rows, places = batch.predicting.nonzero().T
    assert torch.equal(batch.ids[rows, places + 1], batch.ids[batch.response])
    assert torch.equal(batch.predicting.sum(1), batch.response.sum(1))
    assert not batch.predicting[2].any()  # a prompt alone carries no loss


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_name_the_same_tokens_on_either_side_of_the_padding(side):
    batch = collate([example(6, 4), example(4, 3)], PAD, side=side)

    def named(where):
        mask = batch.positions(where)
        return [batch.ids[i, mask[i]].tolist() for i in range(2)]

    assert named("all") == [[10, 11, 12, 13, 14, 15], [10, 11, 12, 13]]
    assert named("prompt") == [[10, 11, 12, 13], [10, 11, 12]]
    assert named("response") == [[14, 15], [13]]
    assert named((0, 1)) == [[10, 11], [10, 11]]
    assert named((-1,)) == [[13], [12]]
    assert named((0, -2)) == [[10, 12], [10, 11]]
    assert named((2, -1)) == [[12, 13], [12]]  # a token that is named twice counts once
    assert named(()) == [[], []]


@pytest.mark.parametrize("where", [(3,), (-4,), (0, 9)])
def test_a_position_that_the_shortest_prompt_lacks_is_an_error(where):
    batch = collate([example(6, 4), example(4, 3)], PAD)
    with pytest.raises(ValueError, match="reach outside the shortest prompt, which has 3 tokens"):
        batch.positions(where)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_ends_of_a_prompt_are_its_first_and_last_tokens_each_once_where_it_is_short(side):
    batch = collate([example(8, 6), example(4, 3)], PAD, side=side)

    def named(first, last):
        mask = batch.positions(Ends(first, last))
        return [batch.ids[i, mask[i]].tolist() for i in range(2)]

    assert named(2, 2) == [[10, 11, 14, 15], [10, 11, 12]]
    assert named(1, 0) == [[10], [10]]
    assert named(0, 1) == [[15], [12]]
    assert named(50, 50) == [[10, 11, 12, 13, 14, 15], [10, 11, 12]]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (-1, 2), (2, -1)])
def test_ends_of_no_or_of_negative_length_are_an_error(first, last):
    with pytest.raises(ValueError, match="neither may be negative, and at least one must be above 0"):
        Ends(first, last)


def test_an_unknown_name_of_positions_is_an_error(untyped):
    with pytest.raises(ValueError, match="Unknown positions 'answer': use 'all', 'prompt', 'response'"):
        collate([example(4)], PAD).positions("answer")


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match="at least one example"):
        collate([], PAD)


# Batches


def test_batches_hold_every_example_once_and_lead_back_to_its_place():
    examples = [example(length, first=100 * i) for i, length in enumerate((7, 3, 5, 9, 4))]
    given = batches(examples, 2, PAD)
    assert [len(batch.rows) for batch in given] == [2, 2, 1]
    found = {row: tuple(b.ids[i, b.attention[i]].tolist()) for b in given for i, row in enumerate(b.rows)}
    assert found == {i: e.ids for i, e in enumerate(examples)}
    assert [b.ids.shape[1] for b in given] == [4, 7, 9]


def train(examples, steps, seed=0, batch_size=4):
    return list(training_batches(lambda rng: examples, steps=steps, batch_size=batch_size, seed=seed, pad_id=PAD))


@pytest.fixture
def varied():
    rng = random.Random(1)
    return [example(rng.randint(5, 60), first=1000 * (i + 1)) for i in range(64)]


def test_training_batches_depend_on_the_seed_and_on_nothing_else(varied):
    one, same, other = train(varied, 20, seed=3), train(varied, 20, seed=3), train(varied, 20, seed=4)
    assert all(torch.equal(a.ids, b.ids) and a.rows == b.rows for a, b in zip(one, same, strict=True))
    assert [b.rows for b in one] != [b.rows for b in other]


@pytest.mark.parametrize("count", [64, 63])
def test_every_example_is_visited_once_an_epoch(varied, count):
    given = train(varied[:count], 40)
    assert len(given) == 40
    for epoch in (given[:16], given[16:32]):
        assert sorted(row for batch in epoch for row in batch.rows) == list(range(count))
    assert [b.rows for b in given[:16]] != [b.rows for b in given[16:32]]


def test_examples_are_drawn_anew_each_epoch():
    drawn = []

    def draw(rng):
        drawn.append(rng.random())
        return [example(5, first=100 * len(drawn)) for _ in range(8)]

    given = list(training_batches(draw, steps=6, batch_size=4, seed=0, pad_id=PAD))
    assert [int(batch.ids[0, 0]) for batch in given] == [100, 100, 200, 200, 300, 300]
    assert len(set(drawn)) == 3  # the generator goes on: a prompt that is drawn differs between epochs


def test_given_lengths_decide_which_rows_meet_whatever_is_drawn(varied):
    lengths = [len(e) for e in varied]

    def longer(rng):  # as with a system message drawn for each row
        return [Example((7,) * rng.randint(0, 90) + e.ids, 2) for e in varied]

    def rows(draw, **more):
        return [b.rows for b in training_batches(draw, steps=40, batch_size=4, seed=0, pad_id=PAD, **more)]

    plain = rows(lambda rng: varied)
    assert rows(longer, lengths=lengths) == plain
    assert rows(longer) != plain


def test_lengths_that_do_not_fit_the_examples_are_an_error(varied):
    with pytest.raises(ValueError, match="There are 3 lengths for 64 examples"):
        next(training_batches(lambda rng: varied, steps=1, batch_size=4, seed=0, pad_id=PAD, lengths=[1, 2, 3]))


def test_batches_of_similar_length_pad_less_than_random_ones(varied):
    def padding(groups):
        return sum(int((~batch.attention).sum()) for batch in groups)

    order = random.Random(0).sample(range(64), 64)
    at_random = [collate([varied[i] for i in order[k : k + 4]], PAD) for k in range(0, 64, 4)]
    assert padding(train(varied, 16)) < 0.4 * padding(at_random)


def test_examples_meet_others_in_every_epoch(varied):
    given = [frozenset(batch.rows) for batch in train(varied, 32)]
    assert len(set(given[:16]) & set(given[16:])) < 4


def test_batches_of_similar_length_come_in_random_order(varied):
    lengths = [batch.ids.shape[1] for batch in train(varied, 16)]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


def test_training_without_examples_is_an_error_and_not_an_endless_loop():
    with pytest.raises(ValueError, match="are no examples to train on"):
        next(training_batches(lambda rng: [], steps=1, batch_size=4, seed=0, pad_id=PAD))


# The full sequence


def test_without_prompt_every_token_but_the_first_is_part_of_the_response():
    whole = example(6, 4)
    full = whole.without_prompt()
    assert full.ids == whole.ids and whole.prompt_length == 4
    batch = collate([full, example(4, 3).without_prompt()], PAD)
    assert [batch.ids[i, batch.response[i]].tolist() for i in range(2)] == [[11, 12, 13, 14, 15], [11, 12, 13]]
    assert [batch.ids[i, batch.predicting[i]].tolist() for i in range(2)] == [[10, 11, 12, 13, 14], [10, 11, 12]]
    assert full.without_prompt() == full
