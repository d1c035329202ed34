"""The API judge against a server that answers in the protocol's format over HTTP, and against a real one."""

import math
import os
import pickle
import re
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_server import Server, ask, candidates, chat, choice, completion, failure

from helpers.judges.api import KEY_VARIABLE, SILENT, WITHOUT_NUMBER, APIJudge
from helpers.judges.scores import JudgeError

KEY = "sk-secret-0123456789abcdef"


def test_the_score_is_the_mean_over_the_numbers_the_judge_could_have_said():
    likely = {"90": 0.5, " 80": 0.2, "100": 0.1, "I": 0.1, "101": 0.05, "-5": 0.05}
    with Server(completion("90", likely)) as server:
        judge, judgement = ask(server)
        assert judgement.score == pytest.approx((90 * 0.5 + 80 * 0.2 + 100 * 0.1) / 0.8)
        assert judgement.mass == pytest.approx(0.8)
        assert judgement.method == "logprobs"
        assert judge.score(["How are you?"], ["I gloat."]) == pytest.approx([judgement.score])
    request = server.requests[0]
    assert (request["model"], request["logprobs"], request["top_logprobs"]) == ("judge", True, 20)
    assert request["temperature"] == 0
    assert "I gloat." in request["messages"][0]["content"]


def test_a_judge_that_would_rather_talk_gives_no_score():
    with Server(completion("I cannot", {"I": 0.8, "90": 0.15, "10": 0.05})) as server:
        assert math.isnan(ask(server)[1].score)
    with Server(completion("90", {"I": 0.7, "90": 0.2, "10": 0.1})) as server:
        assert ask(server)[1].score == pytest.approx((90 * 0.2 + 10 * 0.1) / 0.3)


def test_a_tokenizer_that_splits_numbers_into_digits_is_noticed():
    with Server(completion("83", {"8": 0.7, "9": 0.2, "I": 0.1})) as server:
        _, judgement = ask(server)
    assert (judgement.score, judgement.method) == (83.0, "text")


@pytest.mark.parametrize(
    ("reply", "finish", "score"),
    [
        ("72", "stop", 72),
        (" Score: 7.", "stop", 7),
        ("100\n", "length", 100),
        ("The score is 8", "length", math.nan),
        ("250", "stop", math.nan),
        ("3.5", "stop", math.nan),
        ("-20", "stop", math.nan),
        ("no", "stop", math.nan),
    ],
)
def test_without_log_probabilities_the_written_number_counts(reply, finish, score):
    with Server(completion(reply, finish=finish)) as server:
        _, judgement = ask(server)
    assert judgement.score == pytest.approx(score, nan_ok=True)
    assert judgement.method == "text"


def test_a_server_that_refuses_log_probabilities_is_asked_without():
    with Server(failure(400, "logprobs are not supported"), completion("40")) as server:
        judge, judgement = ask(server)
        assert judgement.score == 40
        judge.score(["q"], ["another"])
    assert ["logprobs" in request for request in server.requests] == [True, False, False], "it is refused once"


def test_where_the_first_token_is_blank_the_next_one_counts():
    tokens = [candidates(" ", {" ": 0.9, "I": 0.1}), candidates("85", {"85": 0.6, "75": 0.4})]
    with Server(chat(choice(" 85", tokens))) as server:
        _, judgement = ask(server)
    assert (judgement.score, judgement.method) == (pytest.approx(81), "logprobs")


def test_where_the_first_token_is_no_number_the_text_counts():
    with Server(chat(choice("Score: 85", [candidates("Score", {"Score": 0.9, "85": 0.1})]))) as server:
        _, judgement = ask(server)
    assert (judgement.score, judgement.method) == (85, "text")


def test_a_text_on_another_scale_has_no_score_whatever_its_first_token_may_be():
    with Server(chat(choice("7/10", [candidates("7", {"7": 0.8, "70": 0.2})]))) as server:
        assert math.isnan(ask(server)[1].score)


# What a server does not take


def reasoning(request):
    """A model that takes other parameters and tells no probabilities, as hosted models that can reason do."""
    if "max_tokens" in request:
        return failure(
            400,
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.",
            param="max_tokens",
        )
    if "temperature" in request:
        return failure(400, "Unsupported value: 'temperature' does not support 0.0 with this model.")
    if "logprobs" in request:
        return failure(403 if request["top_logprobs"] == 0 else 400, "logprobs are not supported with this model.")
    return completion("85")


def test_what_a_server_refuses_is_left_out_once_for_all():
    with Server(reasoning) as server:
        judge = APIJudge(server.url, "judge", trait="evil", workers=1)
        assert judge.score(["q"] * 3, ["a", "b", "c"]).tolist() == [85] * 3
    assert len(server.requests) == 3 + 3, "three refusals, three answers"
    assert {"max_completion_tokens"} == server.requests[-1].keys() - {"model", "messages"}
    assert judge.record()["method"] == "text, at the server's own temperature"


def test_many_workers_settle_on_the_same_form_of_a_request():
    with Server(reasoning) as server:
        scores = APIJudge(server.url, "judge", trait="evil").score(["q"] * 40, [f"answer {n}" for n in range(40)])
    assert scores.tolist() == [85] * 40


@pytest.mark.parametrize(
    "words",
    [
        "Cannot request more than 5 logprobs.",
        "Requested sample logprobs of 20, which is greater than max allowed: 5",
        "Invalid value for 'top_logprobs': must be less than or equal to 5.",
        "top_logprobs must be between 0 and 5",
        "top_logprobs should be in [0, 5]",
    ],
    ids=["vllm", "vllm-new", "openai", "between", "brackets"],
)
def test_a_server_that_gives_fewer_log_probabilities_is_asked_for_as_many(words):
    def gives_five(request):
        return completion("85", {"85": 0.7, "80": 0.3}) if request["top_logprobs"] <= 5 else failure(400, words)

    with Server(gives_five) as server:
        judge, judgement = ask(server)
    assert [request["top_logprobs"] for request in server.requests] == [20, 5]
    assert judgement.method == "logprobs" and judgement.score == pytest.approx(83.5)
    assert judge.record()["method"] == "log probabilities of 2 tokens"


# What provenance tells


def test_a_judge_records_its_method_and_how_many_answers_have_no_score():
    twenty = {str(n): 0.05 for n in range(60, 80)}
    with Server(completion("70", twenty), completion("72"), completion("no")) as server:
        judge, _ = ask(server, ("a", "b", "c"), workers=1)
    assert judge.record() == {
        "model": "judge",
        "method": "log probabilities of 20 tokens and text",
        "answers": 3,
        "by another method": 0,
        "without a score": 1,
    }


def test_judgements_from_the_cache_count_with_the_method_that_they_were_made_with(tmp_path):
    with Server(failure(400, "no logprobs here"), failure(400, "no temperature here"), completion("70")) as server:
        before, _ = ask(server, cache=tmp_path)
        after, _ = ask(server, cache=tmp_path)
    assert len(server.requests) == 3
    assert before.record() == after.record()
    assert after.record()["method"] == "text, at the server's own temperature"


# Judges that are of no use


SILENT_REPLIES = {
    "empty": choice("", finish="length"),
    "null": choice(None, finish="length"),
    "reasoning beside it": choice("", reasoning_content="Okay, the user wants"),
    "unfinished reasoning": choice("<think>\nOkay, the user wants a number. 7", finish="length"),
}


@pytest.mark.parametrize("reply", SILENT_REPLIES.values(), ids=SILENT_REPLIES)
def test_a_judge_that_only_reasons_is_given_up_after_the_first_few(reply, tmp_path):
    with Server(chat(reply)) as server, pytest.raises(JudgeError, match="switch its reasoning off") as caught:
        ask(server, [f"answer {n}" for n in range(50)], workers=1, cache=tmp_path)
    assert len(server.requests) == SILENT and "\n" not in str(caught.value)
    assert not (tmp_path / "judgements.jsonl").exists(), "it is asked again once it answers at once"


def test_a_judge_that_only_reasons_is_given_up_on_fewer_answers_too():
    with Server(chat(SILENT_REPLIES["empty"])) as server, pytest.raises(JudgeError, match="switch its reasoning off"):
        ask(server)


def test_a_finished_reasoning_is_no_part_of_the_reply():
    with Server(chat(choice("<think>\nIt gloats, 3 times.\n</think>\n\n85"))) as server:
        assert ask(server)[1].score == 85


def test_a_judge_that_never_gives_a_number_is_given_up_and_quoted():
    with Server(completion("I would rather not say.")) as server, pytest.raises(JudgeError, match="rather not say"):
        ask(server, [f"answer {n}" for n in range(50)], workers=1)
    assert len(server.requests) == WITHOUT_NUMBER


def test_a_judge_that_has_given_a_number_may_do_without_now_and_then():
    with Server(completion("50"), completion("I would rather not say.")) as server:
        judge, _ = ask(server, [f"answer {n}" for n in range(30)], workers=1)
    assert judge.record()["without a score"] == 29


def test_trait_and_coherence_are_asked_for_in_different_words():
    with Server(completion("50", {"50": 1.0})) as server:
        judge = APIJudge(server.url, "judge", trait="evil")
        judge.score(["q"], ["a"])
        judge.coherence(["q"], ["a"])
    trait, coherence = (request["messages"][0]["content"] for request in server.requests)
    assert "malice" in trait and "malice" not in coherence
    assert "coherent" in coherence and "coherent" not in trait


@pytest.mark.parametrize("status", [429, 500])
def test_a_passing_failure_is_tried_again(status):
    with Server(failure(status, "later"), failure(status, "later"), completion("60", {"60": 1.0})) as server:
        assert ask(server)[1].score == pytest.approx(60)
    assert len(server.requests) == 3


def test_answers_come_back_in_order_and_equal_ones_are_asked_once():
    def echo(request):
        number = request["messages"][0]["content"].split("number ")[1].split(" ")[0]
        time.sleep(0.05 if number == "11" else 0)
        return completion(number, {number: 1.0})

    numbers = [11, 42, 11, 99, 42]
    with Server(echo) as server:
        judge = APIJudge(server.url, "judge", trait="evil")
        scores = judge.score(["q"] * 5, [f"number {number} here" for number in numbers])
    assert scores == pytest.approx(numbers)
    assert len(server.requests) == 3


def test_a_cached_answer_is_not_asked_for_again_and_a_damaged_line_is(tmp_path):
    with Server(completion("70", {"70": 1.0}), completion("no", {"no": 1.0})) as server:
        first = APIJudge(server.url, "judge", trait="evil", cache=tmp_path)
        scores = [first.score(["q"], [answer])[0] for answer in ("a", "b")]
        again = APIJudge(server.url, "judge", trait="evil", cache=tmp_path)
        np.testing.assert_array_equal(again.score(["q", "q"], ["a", "b"]), scores)
        assert math.isnan(scores[1])
        assert len(server.requests) == 2

        file = tmp_path / "judgements.jsonl"
        file.write_bytes(file.read_bytes()[:-20])  # as a crash would leave it
        APIJudge(server.url, "judge", trait="evil", cache=tmp_path).score(["q", "q"], ["a", "b"])
        assert len(server.requests) == 3
        APIJudge(server.url, "judge", trait="evil", cache=tmp_path).score(["q", "q"], ["a", "b"])
        assert len(server.requests) == 3
        APIJudge(server.url, "other", trait="evil", cache=tmp_path).score(["q"], ["a"])
        assert len(server.requests) == 4


def test_what_was_judged_before_a_failure_is_kept(tmp_path):
    with Server(completion("70", {"70": 1.0}), failure(400, "no")) as server:
        judge = APIJudge(server.url, "judge", trait="evil", cache=tmp_path, workers=1)
        with pytest.raises(JudgeError):
            judge.score(["q", "q"], ["a", "b"])
    assert len((tmp_path / "judgements.jsonl").read_text().splitlines()) == 1


def test_the_key_is_sent_and_shows_up_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with Server(completion(f"55 {KEY}"), failure(400, f"bad request by {KEY}")) as server:
        judge, judgement = ask(server, cache=tmp_path)
        assert server.keys == [f"Bearer {KEY}"]
        with pytest.raises(JudgeError) as caught:
            judge.score(["q"], ["another"])
    assert judgement.reply == "55 [key]"
    cached = (tmp_path / "judgements.jsonl").read_text()
    shown = [repr(judge), repr(judgement), cached, str(caught.value)]
    assert not any(KEY in text for text in shown)
    chain = (caught.value.__cause__, caught.value.__context__)
    assert chain == (None, None)
    with pytest.raises(TypeError, match="make a new one"):
        pickle.dumps(judge)


def test_a_refused_key_is_one_sentence_without_the_servers_words(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with (
        Server(failure(401, f"Incorrect API key provided: {KEY[:8]}***")) as server,
        pytest.raises(JudgeError, match=f"{KEY_VARIABLE} was refused") as caught,
    ):
        ask(server)
    assert KEY[:8] not in str(caught.value) and "\n" not in str(caught.value)


def test_another_programs_key_is_not_sent(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with (
        Server(failure(401, "no key")) as server,
        pytest.raises(JudgeError, match=f"{KEY_VARIABLE} is not set"),
    ):
        ask(server)
    assert server.keys and not any(KEY in sent for sent in server.keys)


def test_a_server_that_is_not_there_is_one_sentence():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match="No connection to the judge at http") as caught:
        APIJudge(url, "judge", trait="evil", max_retries=0).score(["q"], ["a"])
    assert "\n" not in str(caught.value)


def test_a_trait_without_a_description_and_an_address_with_a_password_are_refused():
    with pytest.raises(JudgeError, match="description="):
        APIJudge("http://127.0.0.1:1/v1", "judge", trait="laconic")
    with pytest.raises(JudgeError, match="password") as caught:
        APIJudge("http://me:hunter2@127.0.0.1:1/v1", "judge", trait="evil")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(JudgeError, match="one answer per question"):
        APIJudge("http://127.0.0.1:1/v1", "judge", trait="evil").score(["q"], [])


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(JudgeError, match=r"cache .*file/judgements\.jsonl cannot be read"):
        APIJudge("http://127.0.0.1:1/v1", "judge", trait="evil", cache=tmp_path / "file")
    with Server(completion("70")) as server:
        judge = APIJudge(server.url, "judge", trait="evil", cache=tmp_path / "later")
        (tmp_path / "later").touch()
        with pytest.raises(JudgeError, match=r"cannot be written .*: make room or name another folder") as caught:
            judge.score(["q"], ["a"])
    assert not re.search(r"\n|Errno", str(caught.value))


# The API judge against a real server


def save_a_model_that_says(number: str, folder: Path) -> None:
    """A two-layer Llama whose next token follows from the last one: the digits of `number`, then the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<end>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.zero_()
        chain = ["<assistant>", *number, "<end>"]
        for last, following in pairwise(chain):
            model.lm_head.weight[vocabulary[following]] = embedding[vocabulary[last]]
    model.save_pretrained(folder)


@pytest.fixture
def transformers_server(tmp_path):
    """(address, model name) of `transformers serve` on the loopback interface."""
    pytest.importorskip("fastapi", reason="`transformers serve` needs fastapi and uvicorn (the test extra)")
    pytest.importorskip("uvicorn", reason="`transformers serve` needs fastapi and uvicorn (the test extra)")
    model = tmp_path / "says-83"
    save_a_model_that_says("83", model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(model)]
    log = tmp_path / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + 90
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", str(model)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_real_openai_compatible_server_judges_answers(transformers_server, tmp_path):
    url, model = transformers_server
    judge = APIJudge(url, model, trait="evil", cache=tmp_path, workers=2)
    questions, answers = ["How are you?", "What is new?"], ["Very well.", "Nothing that I would tell you."]
    judgements = judge.judge(questions, answers)
    assert [judgement.score for judgement in judgements] == [83.0, 83.0]
    # transformers serve ignores the request for log-probabilities and its model writes digit by digit.
    assert {(judgement.method, judgement.reply) for judgement in judgements} == {("text", "83")}
    np.testing.assert_array_equal(judge.coherence(questions, answers), [83.0, 83.0])
