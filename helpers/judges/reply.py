"""The reply of a judge by API, read: values out of JSON of any shape, and a score out of text or probabilities."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Method = Literal["logprobs", "text"]


@dataclass(frozen=True)
class Judgement:
    """What an API judge says of one answer."""

    score: float
    """0 to 100, NaN where the judge gave no usable number."""
    method: Method
    """`logprobs`: the mean over the judge's distribution of numbers; `text`: the number that it wrote."""
    candidates: int
    """How many likely tokens the server gave for the distribution; 0 for method `text`."""
    mass: float
    """P(an integer from 0 to 100) as the first token, NaN for method `text`."""
    greedy: bool
    """Whether temperature 0 was asked for; some models take none."""
    reply: str
    """What the judge wrote."""


def value_at(value: Any, *path: str | int) -> Any:
    """The value at a path in JSON values, or None: servers leave out, rename and nest as they like."""
    for step in path:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, Mapping) else None
        else:
            value = value[step] if isinstance(value, list) and len(value) > step else None
    return value


def error_text(error: Any) -> str:
    """An error's message on one line, of at most 300 characters, whatever the server wraps it in."""
    if not error:
        return ""
    if isinstance(error, Mapping):
        inner = next((error[name] for name in ("message", "error", "detail", "msg") if error.get(name)), None)
        place = error.get("loc")
        named = f"{place[-1]}: " if isinstance(place, list) and place else ""
        return f"{named}{error_text(inner)}" if inner is not None else shortened(json.dumps(error))
    if isinstance(error, list):
        return shortened("; ".join(filter(None, map(error_text, error))))
    tags = r"<(style|script|head)\b.*?</\1>|<[^>]*>"
    return shortened(re.sub(tags, " ", str(error), flags=re.DOTALL | re.IGNORECASE))


def shortened(text: str) -> str:
    """Text on one line, of at most 300 characters."""
    words = " ".join(text.split())
    return words if len(words) <= 300 else f"{words[:300]}..."


def _text(choice: Mapping[str, Any]) -> str:
    content = value_at(choice, "message", "content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(value_at(part, "text"), str))
    return str(content) if isinstance(content, str | int | float) and not isinstance(content, bool) else ""


def _without_reasoning(reply: str) -> str:
    """A reply without the reasoning that some servers leave in it."""
    return reply.split("</think>")[-1].split("<think>")[0]


def only_reasons(choice: Mapping[str, Any]) -> bool:
    """Whether there is no answer because the model was still at its reasoning when its tokens were used up."""
    reply = _text(choice)
    reasoning = any(value_at(choice, "message", name) for name in ("reasoning_content", "reasoning"))
    cut = value_at(choice, "finish_reason") == "length"
    return not _without_reasoning(reply).strip() and (cut or reasoning or "<think>" in reply)


def read_choice(choice: Mapping[str, Any], *, asked: int, greedy: bool) -> Judgement:
    """The judgement in one choice of a chat completion.

    Args:
        choice: of the protocol, in whatever shape the server sent it.
        asked: how many likely tokens were asked for; 0 for none.
        greedy: whether temperature 0 was asked for.
    """
    reply = _text(choice)
    cut = value_at(choice, "finish_reason") == "length"
    written = Judgement(number_in(_without_reasoning(reply), cut=cut), "text", 0, math.nan, greedy, reply)
    probabilities = _first_token_probabilities(choice) if _without_reasoning(reply) == reply and asked else []
    # The distribution is over first tokens: where the text goes on to "8.5" or "7/10", it says nothing.
    if not probabilities or (math.isnan(written.score) and len(_numbers(reply)[1]) > cut):
        return written
    numbers = [(int(word), p) for word, p in probabilities if re.fullmatch(r"[1-9]?[0-9]|100", word)]
    mass = math.fsum(p for _, p in numbers)
    # Only single digits among the candidates: a tokenizer that writes numbers digit by digit.
    digits = all(number < 10 for number, _ in numbers)
    if mass >= 0.25 and not digits:
        score = math.fsum(number * p for number, p in numbers) / mass
        return replace(written, score=score, method="logprobs", candidates=min(len(probabilities), asked), mass=mass)
    return written


def _first_token_probabilities(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The likeliest tokens and their probabilities at the first place that is not blank; empty if not given."""
    tokens = value_at(choice, "logprobs", "content")
    for token in tokens if isinstance(tokens, list) else []:
        chosen, candidates = value_at(token, "token"), value_at(token, "top_logprobs")
        if not isinstance(chosen, str) or not isinstance(candidates, list):
            return []
        if not _without_blanks(chosen):
            continue
        given = [(value_at(candidate, "token"), value_at(candidate, "logprob")) for candidate in candidates]
        if not all(isinstance(word, str) and isinstance(p, float | int) and p <= 1e-6 for word, p in given):
            return []
        probabilities = [(_without_blanks(word), math.exp(max(p, -1000.0))) for word, p in given]
        return probabilities if math.fsum(p for _, p in probabilities) <= 1.01 else []
    return []


_BLANKS = r"(?:[\s\u2581\u0120\u010a\u200b\ufeff]|<0x(?:09|0A|0D|20)>)+"
"""White space, also as SentencePiece, byte-level and byte tokens spell it."""


def _without_blanks(token: str) -> str:
    return re.sub(rf"^{_BLANKS}|{_BLANKS}$", "", token)


def number_in(reply: str, *, cut: bool = False) -> float:
    """The score in a reply that clearly is one number from 0 to 100, else NaN.

    The scale may be repeated ("On a scale of 0-100, 85", "85/100", "85%"), and words may introduce the number or give
    reasons after it. Another scale ("7/10"), a decimal, a range, a second number, a comparison ("at least 50"), a
    negation or a count ("3 insults") is no score, nor is a number that may go on where the reply was `cut`.
    """
    text, numbers = _numbers(re.sub(r"\S+\Z", "", reply) if cut else reply)
    if len(numbers) != 1:
        return math.nan
    digits, before, after = numbers[0][0], text[: numbers[0].start()], text[numbers[0].end() :]
    on_scale = len(digits) <= 3 and int(digits) <= 100 and len(str(int(digits))) == len(digits)
    if not on_scale or not _may_precede_score(before) or not (_AFTER_NUMBER_CUT if cut else _AFTER_NUMBER).match(after):
        return math.nan
    return float(digits)


def _numbers(reply: str) -> tuple[str, list[re.Match[str]]]:
    """A reply without mark-up and mentions of the scale, and the runs of digits in it."""
    text = re.sub(r"</?[A-Za-z]\w*>|[*_`#\"“”$\\{}]|(?<!\w)['’]|['’](?!\w)", " ", reply)
    text = re.sub(r"(?<![\d.,])[01]\s*(?:[-–—]|to\b|and\b|\.{2,3}|…)\s*100(?!\d|[.,]\d)", "", text)
    text = re.sub(r"(?<=\d)\s*(?:(?:/|(?:out )?of\b)\s*100(?!\d|[.,]\d)|%)", "", text)
    text = re.sub(r"^\s*1[.)]\s+(?=\S)", "", text)  # the first item of a list
    return text, list(re.finditer(r"\d+", text))


_AFTER_NUMBER = re.compile(
    r"[^\S\n]*(?:points?\b|per ?cent\b)?[^\S\n]*"
    r"(?:$|[!;:)\]|\n(\[]|[.,](?!\d)|[-–—](?=\s)|(?:because|since|as|for)\b"
    r"|on (?:a|the|this|that|your)\s+scale\b(?: (?:of|from))?\s*(?:$|[.,;!)\n]))"
)
_AFTER_NUMBER_CUT = re.compile(r"[^\S\n]*(?:\n|[.!]\s|,? (?:because|since)\b)")

_UNCLEAR_BEFORE = re.compile(r"(?:[-+−±.<>≤≥/^\w]|[+−±<>≤≥]\s*|[:=]\s*[-–—]\s*)\Z")
"""A sign, a comparison or a part of a word, right before a number."""
_CLAUSE_END = re.compile(r"[.,:;!?()\[\]\n=|–—]|\s-\s")
_NEGATION = re.compile(
    r"\b(not|no|nor|never|cannot|neither|without|unable|refuse|decline|if|unless|than|least|most|under|over|below"
    r"|above|between|minus|instead)\b|n['’]t\b",
    re.IGNORECASE,
)
_NO_RATING = re.compile(
    r"\b(refuse|decline|unable to|(cannot|can['’]?t|won['’]?t|will not|do not|don['’]?t) "
    r"(rate|score|judge|evaluate|assess|answer|give|assign|provide|comply))\b",
    re.IGNORECASE,
)
_INTRODUCTION = re.compile(
    r"(^|\b(scores?|ratings?|rates?|rated|grade|number|answer|value|result|trait|is|at|as|of|be|it|this|an?|about|around"
    r"|approximately|roughly|say|give|gets|deserves|so|thus|therefore|boxed|final))$",
    re.IGNORECASE,
)
"""What a score may follow without a colon or the like between them."""


def _may_precede_score(before: str) -> bool:
    """Whether what stands before a number leaves it a score."""
    if _UNCLEAR_BEFORE.search(before) or _NO_RATING.search(before):
        return False
    clause = re.sub(r"[^\w\s'’]", " ", _CLAUSE_END.split(before)[-1]).strip()
    return not _NEGATION.search(clause) and _INTRODUCTION.search(clause) is not None
