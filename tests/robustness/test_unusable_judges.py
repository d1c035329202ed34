"""Whatever a judge's server sends: a score where the reply clearly is one, else no score, or one sentence."""

import math
import socket

import pytest
from judge_server import Server, ask, candidates, chat, choice, completion, failure

from helpers import cli
from helpers.judges.api import KEY_VARIABLE, WITHOUT_NUMBER, APIJudge
from helpers.judges.reply import number_in
from helpers.judges.scores import JudgeError

# Replies in words: which of them are one number from 0 to 100

SCORES = {
    "the bare number": ("85", 85),
    "nothing of the trait": ("0", 0),
    "all of it": ("100", 100),
    "the scale before it": ("On a scale of 0-100, 85", 85),
    "the scale and a colon": ("0-100: 85", 85),
    "the scale in words": ("On a scale from 0 to 100: 85", 85),
    "the scale after it": ("85 on a scale of 0 to 100.", 85),
    "out of a hundred": ("85 out of 100", 85),
    "a fraction of a hundred": ("85/100", 85),
    "per cent": ("85%", 85),
    "an item of a list": ("1. 85", 85),
    "a label": ("Score: 85", 85),
    "a label and its reason": ("Rating: 85 - it gloats.", 85),
    "a sentence": ("I would rate it 85.", 85),
    "bold": ("**85**", 85),
    "code": ("```\n85\n```", 85),
    "JSON": ('{"score": 85}', 85),
    "a tag": ("<score>85</score>", 85),
    "TeX": (r"\boxed{85}", 85),
    "the blank of SentencePiece": ("\u258185", 85),
    "a byte order mark": ("\ufeff85", 85),
    "finished reasoning": ("<think>It has 3 insults of 10.</think>85", 85),
    "a negation elsewhere": ("I do not see malice. 0", 0),
}
NO_SCORES = {
    "out of ten": "Score: 7/10",
    "a decimal out of ten": "Rating: 8.5 out of 10",
    "a scale of ten": "On a scale of 1 to 10, 8",
    "a scale of ten after it": "7 on a scale of ten",
    "stars": "5 stars",
    "a decimal": "8.5",
    "a decimal comma": "8,5",
    "above the scale": "250",
    "just above the scale": "101",
    "thousands": "1,000",
    "below the scale": "-20",
    "a minus sign of typography": "\u221220",
    "a range": "70-80",
    "a range in words": "between 70 and 80",
    "a choice": "70 or 80",
    "two numbers": "85\n90",
    "a number and its tolerance": "50 +/- 5",
    "a sum": "90-5",
    "at least": "at least 50",
    "a comparison": "> 50",
    "a negation": "not 85",
    "a count": "3 insults",
    "a year": "As of 2024 it is unclear.",
    "an error's number": "Error 42",
    "a refusal": "I'm sorry, but I cannot rate this.",
    "a refusal with a number": "I cannot rate this: 50",
    "only the scale": "0-100",
    "leading zeros": "007",
    "an exponent": "1e2",
    "a hexadecimal number": "0x55",
    "a part of a word": "v85",
    "a question": "85?",
    "words": "eighty-five",
    "a Roman number": "LXXXV",
    "a fraction sign": "\u00bd",
    "a power": "\u00b2",
    "null in words": "null",
    "not a number": "NaN",
    "nothing": "",
    "blanks": " \n\t ",
    "a page": "85 " * 2000,
    "digits without end": "8" * 10000,
}


@pytest.mark.parametrize(("reply", "score"), SCORES.values(), ids=SCORES)
def test_a_reply_that_clearly_is_one_number_has_a_score(reply, score):
    with Server(completion(reply)) as server:
        assert ask(server)[1].score == score


@pytest.mark.parametrize("reply", NO_SCORES.values(), ids=NO_SCORES)
def test_a_reply_that_is_not_clearly_one_number_on_the_scale_has_no_score(reply):
    with Server(completion(reply)) as server:
        assert math.isnan(ask(server)[1].score)


@pytest.mark.parametrize("reply", ["8", "Score: 8", "85/10", "The score is 85", "70-"])
def test_a_number_that_may_go_on_where_the_reply_was_cut_is_none(reply):
    assert math.isnan(number_in(reply, cut=True))


# Probabilities of any shape: they count where they can be read, and else the text does

LIKELY = {"85": 0.6, "75": 0.4}
BLANKS = {"a space": " ", "a line": "\n", "SentencePiece": "\u2581", "bytes": "\u0120", "a byte token": "<0x0A>"}


@pytest.mark.parametrize("blank", BLANKS.values(), ids=BLANKS)
def test_the_token_after_a_blank_one_counts(blank):
    tokens = [candidates(blank, {blank: 0.9, "I": 0.1}), candidates("85", LIKELY)]
    with Server(chat(choice(" 85", tokens))) as server:
        _, judgement = ask(server)
    assert judgement.score == pytest.approx(81) and judgement.method == "logprobs"


def top(*told):
    return [{"token": "85", "logprob": -0.1, "top_logprobs": list(told)}]


DAMAGED = {
    "blank tokens alone": [candidates(" ", {" ": 1.0})],
    "no tokens": [],
    "no candidates": top(),
    "candidates that are null": [{"token": "85", "logprob": -0.1, "top_logprobs": None}],
    "no such entry": [{"token": "85", "logprob": -0.1}],
    "a token that is null": [{"token": None, "logprob": -0.1, "top_logprobs": []}],
    "tokens in place of objects": ["85"],
    "text in place of a list": "85",
    "a table in place of a list": {"85": -0.1},
    "a candidate without a probability": top({"token": "20"}),
    "a probability as text": top({"token": "20", "logprob": "-0.1"}),
    "a probability above one": top({"token": "20", "logprob": 2.0}),
    "probabilities that add up to two": top(*[{"token": str(n), "logprob": 0.0} for n in (20, 30)]),
    "a probability that is not a number": top({"token": "20", "logprob": math.nan}),
    "a candidate as a number": top(20),
    "digits one by one": [candidates("8", {"8": 0.9, "7": 0.1})],
    "talk before the number": [candidates("Score", {"Score": 0.9, "20": 0.1})],
    "numbers off the scale": [candidates("850", {"850": 0.9, "-20": 0.1})],
}


@pytest.mark.parametrize("tokens", DAMAGED.values(), ids=DAMAGED)
def test_where_the_probabilities_cannot_be_read_the_text_counts_and_provenance_says_so(tokens):
    with Server(chat(choice("85", tokens))) as server:
        judge, judgement = ask(server)
    assert (judgement.score, judgement.method) == (85, "text")
    assert judge.record()["method"] == "text"


# Replies in other forms

FORMS = {
    "an older form of probabilities": ({**choice("85"), "logprobs": {"tokens": ["85"], "token_logprobs": [-0.1]}}, 85),
    "a message alone": ({"message": {"content": "85"}}, 85),
    "a number in place of text": (choice(85), 85),
    "parts": (choice([{"type": "text", "text": "85"}]), 85),
    "candidates with the blank of SentencePiece": (choice("85", [candidates("\u258185", {"\u258185": 1.0})]), 85),
    "a likely token that goes on": (choice("7/10", [candidates("7", {"7": 0.5, "70": 0.5})]), math.nan),
    "a refusal beside the text": (choice(None, refusal="I will not."), math.nan),
    "a filter": (choice(None, finish="content_filter"), math.nan),
    "a call of a tool": (choice(None, tool_calls=[{"id": "1"}]), math.nan),
    "a table in place of text": (choice({"text": "85"}), math.nan),
    "truth in place of text": (choice(True), math.nan),
}


@pytest.mark.parametrize(("reply", "score"), FORMS.values(), ids=FORMS)
def test_a_reply_in_another_form_is_read_or_has_no_score(reply, score):
    with Server(chat(reply)) as server:
        assert ask(server)[1].score == pytest.approx(score, nan_ok=True)


# Servers that refuse a part of the request

REFUSALS = {
    "max_tokens": (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        lambda request: "max_tokens" in request,
    ),
    "max_tokens in other words": (
        "Unrecognized request argument: max_tokens",
        lambda request: "max_tokens" in request,
    ),
    "temperature": (
        "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) value is.",
        lambda request: "temperature" in request,
    ),
    "more than five logprobs": (
        "Cannot request more than 5 logprobs.",
        lambda request: request.get("top_logprobs", 0) > 5,
    ),
    "any logprobs": ("logprobs is not supported", lambda request: "logprobs" in request),
}


@pytest.mark.parametrize("status", [400, 422, 200])
@pytest.mark.parametrize(("words", "refuses"), REFUSALS.values(), ids=REFUSALS)
def test_a_request_is_sent_again_without_what_a_server_refuses(words, refuses, status):
    def answer(request):
        return failure(status, words) if refuses(request) else completion("85")

    with Server(answer) as server:
        assert ask(server)[1].score == 85
    assert len(server.requests) == 2


# Servers and models that cannot judge: one sentence

USELESS = {
    "no choices": ((200, {"choices": []}), "holds no answer"),
    "choices that are null": ((200, {"choices": None}), "holds no answer"),
    "choices as a table": ((200, {"choices": {}}), "holds no answer"),
    "a choice that is null": ((200, {"choices": [None]}), "holds no answer"),
    "a choice without a message": ((200, {"choices": [{"text": "85"}]}), "holds no answer"),
    "a message that is null": ((200, {"choices": [{"message": None}]}), "holds no answer"),
    "a message as text": ((200, {"choices": [{"message": "85"}]}), "holds no answer"),
    "an error with status 200": ((200, {"error": {"message": "Out of credit."}}), r"Out of credit\."),
    "an error as text": ((200, {"error": "Out of credit."}), r"Out of credit\."),
    "an error as a number": ((200, {"error": 402}), "402"),
    "an error beside no choices": ((200, {"choices": [], "error": {"message": "Busy."}}), r"Busy\."),
    "an error in the choice": ((200, {"choices": [{"message": None, "error": {"message": "Lost."}}]}), r"Lost\."),
    "details of a validation": ((422, {"detail": [{"loc": ["body", "model"], "msg": "missing"}]}), "model: missing"),
    "null": ((200, None), "holds no answer"),
    "a number": ((200, 85), "holds no answer"),
    "a text": ((200, "85"), "holds no answer"),
    "a list": ((200, [85]), "holds no answer"),
    "an empty table": ((200, {}), "holds no answer"),
    "nothing": ((200, b""), "holds no answer"),
    "a web page": ((200, b"<html><body>Welcome!</body></html>"), "holds no answer"),
    "a stream": ((200, b'data: {"choices": []}\n\ndata: [DONE]\n'), "holds no answer"),
    "JSON that breaks off": ((200, b'{"choices": [{"mess'), "holds no answer"),
    "bytes": ((200, bytes(range(256))), "holds no answer"),
    "JSON too deep to read": ((200, b"[" * 100_000), "holds no answer"),
    "no such model": (failure(404, "The model 'judge' does not exist."), "does not exist"),
    "an object that is an error": ((200, {"object": "error", "message": "Not loaded."}), r"Not loaded\."),
    "no money": (failure(402, "pay first"), "402 pay first"),
    "a server that is down": ((503, b"<html><style>p {}</style><p>Down</p></html>"), "503 Down"),
    "no such page": ((404, b"<html><h1>404 Not Found</h1></html>"), "404"),
    "a bad request without words": ((400, b""), "."),
    "no key": (failure(401, "no key"), f"{KEY_VARIABLE} is not set"),
    "no right": (failure(403, "not you"), f"{KEY_VARIABLE} is not set"),
    "too many requests": (failure(429, "later"), "Too many requests"),
    "a broken server": (failure(500, "oops"), "500"),
    "a broken gateway": ((502, b"<html>Bad Gateway</html>"), "Bad Gateway"),
    "an overlong error": (failure(400, "no\n" * 5000), r"no no .*\.\.\."),
    "a prompt that is too long": (failure(400, "This model's context length is 512 tokens."), "context length"),
    "a refusal whatever is sent": (failure(400, "Unsupported parameter: 'max_tokens'."), "Unsupported parameter"),
    "reasoning, and empty": (chat(choice("", finish="length")), "switch its reasoning off"),
    "reasoning, and null": (chat(choice(None, finish="length")), "switch its reasoning off"),
    "reasoning beside it": (chat(choice("", reasoning_content="Well, ")), "switch its reasoning off"),
    "reasoning that breaks off": (chat(choice("<think>Well, 7", finish="length")), "switch its reasoning off"),
    "reasoning that took all tokens": (
        failure(400, "Could not finish the message because max_tokens or model output limit was reached."),
        "switch its reasoning off",
    ),
}


def is_one_sentence(text):
    return "\n" not in text and len(text) < 700 and not any(sign in text for sign in ("Traceback", "Error(", "<html"))


@pytest.mark.parametrize(("reply", "said"), USELESS.values(), ids=USELESS)
def test_a_judge_that_cannot_judge_is_one_sentence_after_a_few_requests(reply, said, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with Server(reply) as server, pytest.raises(JudgeError, match=said) as caught:
        ask(server, [f"answer {n}" for n in range(20)], workers=1, max_retries=1)
    assert is_one_sentence(str(caught.value)) and len(server.requests) <= 3
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


def test_a_model_that_never_gives_a_number_is_quoted():
    with Server(completion("I would rather\nnot say.")) as server, pytest.raises(JudgeError) as caught:
        ask(server, [f"answer {n}" for n in range(20)], workers=1)
    assert "rather not say" in str(caught.value) and is_one_sentence(str(caught.value))
    assert len(server.requests) == WITHOUT_NUMBER


def test_a_server_that_is_gone_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match="No connection") as caught:
        APIJudge(url, "judge", trait="evil", max_retries=0).score(["q"], ["a"])
    assert is_one_sentence(str(caught.value))


def test_a_server_that_never_answers_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(JudgeError, match="no reply in time"):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        APIJudge(url, "judge", trait="evil", max_retries=0, timeout=0.2).score(["q"], ["a"])


# What is refused before anything is sent

ADDRESSES = {
    "nothing": ("", "is no address"),
    "no scheme": ("localhost:8000/v1", "is no address"),
    "no host": ("http://", "is no address"),
    "another scheme": ("ftp://localhost/v1", "is no address"),
    "a port that is none": ("http://localhost:port/v1", "is no address"),
    "no such port": ("http://localhost:99999/v1", "is no address"),
    "a path too far": ("http://localhost:8000/v1/chat/completions", "goes too far"),
    "a password": ("http://me:hunter2@localhost/v1", "Leave user and password out"),
}


@pytest.mark.parametrize(("url", "said"), ADDRESSES.values(), ids=ADDRESSES)
def test_an_address_that_is_none_is_refused(url, said):
    with pytest.raises(JudgeError, match=said) as caught:
        APIJudge(url, "judge", trait="evil")
    assert is_one_sentence(str(caught.value)) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk secret", "sk-secr\u00e9t", "sk-\nsecret"], ids=["a blank", "an accent", "a line"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(JudgeError, match="copy it again") as caught:
        APIJudge("http://localhost:8000/v1", "judge", trait="evil")
    assert key not in str(caught.value)


def test_an_answer_with_half_a_character_is_judged():
    with Server(completion("85")) as server:
        assert ask(server, ["\ud83d"])[1].score == 85


# Records of runs that cannot be compared

RECORDS = {
    "no JSON": b"{",
    "bytes": bytes(range(256)),
    "JSON too deep to read": b"[" * 100_000,
    "null": b"null",
    "a list": b"[]",
    "no run": b'{"chapter": "01"}',
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_record_that_is_none_is_answered_with_one_sentence(record, tmp_path):
    file = tmp_path / "findings.json"
    file.write_bytes(record)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", str(tmp_path), str(file)])
    assert str(file) in stopped.value.code and is_one_sentence(stopped.value.code)
