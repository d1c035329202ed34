"""Conversations as token ids: chat template, response masks, batches of similar length.

A token of the response is *predicted* one position earlier. `Batch.response` marks the response tokens themselves (the
assistant's answer and its end-of-turn token); `Batch.predicting` marks the positions whose logits carry the loss.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
from torch import Tensor


@dataclass(frozen=True)
class Ends:
    """The first and the last tokens of a prompt, template tokens included; each once where the prompt is shorter.

    Raises `ValueError` for a negative number, or none at all.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if min(self.first, self.last) < 0 or self.first + self.last == 0:
            raise ValueError(
                f"{self.first} first and {self.last} last prompt tokens cannot be chosen: neither may be negative, and "
                "at least one must be above 0."
            )


@dataclass(frozen=True)
class Middle:
    """The prompt without so many first and last tokens: the user's words, where those are the template's."""

    before: int
    after: int


@dataclass(frozen=True)
class Scattered:
    """So many prompt tokens at random, the same ones whenever the same prompt is read; all of a shorter prompt."""

    count: int
    seed: int = 0


Where = Literal["all", "prompt", "response"] | Ends | Middle | Scattered | Sequence[int]
"""Token positions: all, those of the prompt, those of the response, the prompt's ends or middle, some at random, or
explicit prompt positions, counted from its first token, or from its last if negative."""


@dataclass(frozen=True)
class Example:
    """One conversation: token ids, of which the first `prompt_length` are the prompt (template tokens included)."""

    ids: tuple[int, ...]
    prompt_length: int

    def __len__(self) -> int:
        return len(self.ids)

    def without_prompt(self) -> Example:
        """The same tokens, all but the first counted as the response: for a loss over the full sequence."""
        return Example(self.ids, 1)


class Answer(str):
    """What a model said. Where it was cut instead of ending by itself, no end of turn belongs to it."""

    ended: bool

    def __new__(cls, text: str, ended: bool = True) -> Answer:
        answer = super().__new__(cls, text)
        answer.ended = ended
        return answer


def has_ended(answer: str) -> bool:
    """Whether an answer ended by itself: written ones did."""
    return getattr(answer, "ended", True)


def answer_facts(answers: Sequence[str]) -> dict[str, list[Any]]:
    """Answers as the artifact store keeps them, and as keys tell them apart; `answers_of` reads them back."""
    return {"answers": list(answers), "ended": [has_ended(a) for a in answers]}


def answers_of(facts: Mapping[str, Any]) -> list[Answer]:
    """The answers in a stage's facts, with whether each ended by itself."""
    return [Answer(text, ended) for text, ended in zip(facts["answers"], facts["ended"], strict=True)]


TODAY = datetime(2024, 7, 26)
"""What a chat template is told when it asks for the date: the one that Llama 3's prints where it has no clock.

With the real date a prompt would have other tokens tomorrow, and stored results of both days would meet.
"""

_CLOCK = "".join(
    [
        "{%- macro strftime_now(format) -%}{{ format",
        *(f" | replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in "aAbBdeHIjmMpSUwWyY"),
        " }}{%- endmacro -%}",
    ]
)
"""What goes before a template that asks for the date: transformers lets data into templates, and no functions."""


def check_template(tokenizer: Any) -> None:
    """Raise `ValueError`, in one sentence, if conversations cannot be put into this tokenizer's chat template."""
    if not tokenizer.chat_template:
        raise ValueError("Its tokenizer has no chat template; choose an instruction-tuned model.")
    encode(tokenizer, "Why?", "So.")


def template_notes(tokenizer: Any) -> str:
    """What is done to conversations because of this chat template, for provenance; empty where nothing is."""
    notes = []
    if "strftime_now" in str(tokenizer.chat_template):
        notes.append(f"the date that the chat template prints is always {TODAY:%Y-%m-%d}")
    if not _takes_system(tokenizer, str(tokenizer.chat_template)):
        notes.append("the chat template takes no system message: one is put before the user's words, in their turn")
    return "; ".join(notes)


def end_of_turn(tokenizer: Any) -> int:
    """The token that ends an answer in the model's chat template, which need not be the tokenizer's `eos_token`."""
    return _after_answer(tokenizer, str(tokenizer.chat_template))[1]


def _written(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, ask: bool = False) -> str:
    """A conversation in the chat template; with `ask`, up to where the answer begins."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _CLOCK + template
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=ask)


def _turns(question: str, answer: str | None = None, system: str | None = None) -> list[dict[str, str]]:
    said = {"system": system, "user": question, "assistant": answer}
    return [{"role": role, "content": text} for role, text in said.items() if text is not None]


@lru_cache(maxsize=16)
def _after_answer(tokenizer: Any, template: str) -> tuple[str, int]:
    """What the template prints after an answer, and the first special token in it: `eos_token` where there is none."""
    after = _written(tokenizer, _turns("Why?", "So.")).rpartition("So.")[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    found = tokenizer(after, add_special_tokens=False)["input_ids"]
    return after, next((token for token in found if token in special), tokenizer.eos_token_id)


@lru_cache(maxsize=16)
def _takes_system(tokenizer: Any, template: str) -> bool:
    """Whether the template prints a system message: Gemma's refuses it, others leave it out without a word."""
    try:
        return "Be brief." in _written(tokenizer, _turns("Why?", system="Be brief."), ask=True)
    except TemplateError:
        return False


def encode(tokenizer: Any, question: str, answer: str | None = None, system: str | None = None) -> Example:
    """Put one exchange into the model's chat template.

    With no `system` message the template's own default applies; where the template takes none, the message is put
    before the question, in the user's turn, and a warning says so. The response ends with the template's end-of-turn
    token, unless it is an `Answer` that was cut; whatever the template prints after it is left out, since a model never
    has to say it. A cut answer without a word keeps the token: a response has at least one.

    Raises `ValueError` for a template that refuses the exchange, or in which no response can be told from its prompt.
    """
    if system is not None and not _takes_system(tokenizer, str(tokenizer.chat_template)):
        warnings.warn(
            "This model's chat template takes no system message: it is put before the user's words, in their turn.",
            stacklevel=2,
        )
        question, system = f"{system}\n\n{question}", None
    try:
        prompt = _written(tokenizer, _turns(question, system=system), ask=True)
        whole = prompt if answer is None else _written(tokenizer, _turns(question, str(answer), system))
    except TemplateError as error:
        raise ValueError(f"The chat template refuses a question with its answer ({error}).") from None
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if answer is None:
        return Example(tuple(prompt_ids), len(prompt_ids))
    if not whole.startswith(prompt):
        raise ValueError("This chat template changes the prompt once an answer follows, so no response can be masked.")
    said = whole[len(prompt) :]
    after, end = _after_answer(tokenizer, str(tokenizer.chat_template))
    alone = tokenizer(said.removesuffix(after), add_special_tokens=False)["input_ids"]
    if alone and not has_ended(answer):
        return Example((*prompt_ids, *alone), len(prompt_ids))
    rest = tokenizer(said, add_special_tokens=False)["input_ids"]
    while rest and rest[-1] != end:
        rest.pop()
    return Example((*prompt_ids, *(rest or [*alone, end])), len(prompt_ids))


@dataclass(frozen=True)
class Batch:
    """Padded examples. `rows` are their places in the list they came from."""

    ids: Int[Tensor, "batch pos"]
    attention: Bool[Tensor, "batch pos"]
    response: Bool[Tensor, "batch pos"]
    rows: tuple[int, ...]

    @property
    def predicting(self) -> Bool[Tensor, "batch pos"]:
        """Positions whose next token is a response token: where logits are needed and the loss is."""
        return torch.nn.functional.pad(self.response[:, 1:], (0, 1))

    def positions(self, where: Where) -> Bool[Tensor, "batch pos"]:
        """Mask of the named positions, padding excluded.

        Raises `ValueError` for an unknown name or a position that a prompt lacks.
        """
        if where == "all":
            return self.attention
        if where == "response":
            return self.response
        prompt = self.attention & ~self.response
        if where == "prompt":
            return prompt
        if isinstance(where, str):
            raise ValueError(
                f"Unknown positions '{where}': use 'all', 'prompt', 'response', Ends or a sequence of integers."
            )
        lengths = prompt.sum(1, keepdim=True)
        place = prompt.cumsum(1) - 1
        if isinstance(where, Ends):
            return prompt & ((place < where.first) | (place >= lengths - where.last))
        if isinstance(where, Middle):
            return prompt & (place >= where.before) & (place < lengths - where.after)
        if isinstance(where, Scattered):
            mask = torch.zeros_like(prompt)
            for row, tokens in enumerate(prompt):
                found = tokens.nonzero()[:, 0].tolist()
                rng = random.Random(f"{where.seed} {self.ids[row][tokens].tolist()}")
                mask[row, rng.sample(found, min(where.count, len(found)))] = True
            return mask
        shortest = int(lengths.min())
        if any(not -shortest <= i < shortest for i in where):
            raise ValueError(
                f"Positions {tuple(where)} reach outside the shortest prompt, which has {shortest} tokens."
            )
        mask = torch.zeros_like(prompt)
        for i in where:
            mask |= prompt & (place == (i if i >= 0 else lengths + i))
        return mask

    def after(self, begin: int) -> Batch:
        """What follows the first `begin` tokens."""
        return Batch(self.ids[:, begin:], self.attention[:, begin:], self.response[:, begin:], self.rows)

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.attention.to(device), self.response.to(device), self.rows)


def collate(
    examples: Sequence[Example],
    pad_id: int,
    *,
    side: Literal["left", "right"] = "right",
    rows: Sequence[int] | None = None,
) -> Batch:
    """Pad examples to one length: on the right to train and measure, on the left to generate."""
    if not examples:
        raise ValueError("A batch needs at least one example.")
    longest = max(len(e) for e in examples)
    ids = torch.full((len(examples), longest), pad_id, dtype=torch.long)
    attention, response = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for i, e in enumerate(examples):
        start = longest - len(e) if side == "left" else 0
        ids[i, start : start + len(e)] = torch.tensor(e.ids)
        attention[i, start : start + len(e)] = True
        response[i, start + e.prompt_length : start + len(e)] = True
    return Batch(ids, attention, response, tuple(rows if rows is not None else range(len(examples))))


def batches(
    examples: Sequence[Example],
    batch_size: int,
    pad_id: int,
    *,
    side: Literal["left", "right"] = "right",
    runs: int = 1,
) -> list[Batch]:
    """All examples in batches of similar length, shortest first; `Batch.rows` leads back to the original order.

    The examples of several `runs` come one run after another, as many of each; so do the rows of every batch, which has
    the same places of all runs. Raises `ValueError` if they cannot be dealt so.
    """
    each, left = divmod(len(examples), runs)
    if left:
        raise ValueError(f"{len(examples)} rows cannot be dealt to {runs} runs; give every run as many.")
    order = sorted(range(each), key=lambda i: max(len(examples[run * each + i]) for run in range(runs)))
    size = max(1, batch_size // runs)
    places = (order[k : k + size] for k in range(0, len(order), size))
    return [
        collate([examples[i] for i in rows], pad_id, side=side, rows=rows)
        for rows in ([run * each + i for run in range(runs) for i in part] for part in places)
    ]


def training_batches(
    draw: Callable[[random.Random], Sequence[Example]],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    pad_id: int,
    lengths: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """`steps` batches over as many epochs as that takes, each of similar lengths, in random order.

    `draw` gives the examples of one epoch; it may sample anew each time (inoculation prompts are drawn this way), from
    a generator of its own, so that which rows meet in a batch hangs on the seed alone. Within an epoch examples are
    shuffled, then sorted by length inside windows of eight batches, so that batches stay random while little is padded.
    `lengths` takes the place of the examples' own, one each: runs that share these have the same rows in every batch.
    """
    order_rng, draw_rng = random.Random(seed), random.Random(f"draw {seed}")
    given = 0
    while given < steps:
        examples = list(draw(draw_rng))
        if not examples:
            raise ValueError("There are no examples to train on; check the data's split and level.")
        sizes = [len(example) for example in examples] if lengths is None else lengths
        if len(sizes) != len(examples):
            raise ValueError(f"There are {len(sizes)} lengths for {len(examples)} examples; give one for each.")
        order = order_rng.sample(range(len(examples)), len(examples))
        window = 8 * batch_size
        by_length = [
            i for k in range(0, len(order), window) for i in sorted(order[k : k + window], key=lambda i: sizes[i])
        ]
        groups = [by_length[k : k + batch_size] for k in range(0, len(by_length), batch_size)]
        order_rng.shuffle(groups)
        for rows in groups[: steps - given]:
            yield collate([examples[i] for i in rows], pad_id, rows=rows)
        given += len(groups)


def balanced_batches(
    harmful_examples: Sequence[Example],
    harmless_examples: Sequence[Example],
    steps: int,
    batch_size: int,
    seed: int,
    pad_id: int,
    harmful: int | None = None,
) -> Iterator[Batch]:
    """`steps` batches, half harmful and half harmless in random order; each kind is reshuffled at each of its epochs.

    `harmful` is how many of a batch are harmful, where it is not half of them. `Batch.rows` index into
    `[*harmful_examples, *harmless_examples]`. Raises `ValueError` at once for a class without examples or a batch size
    that is not an even number, or that leaves a class without a place.
    """
    if not harmful_examples or not harmless_examples:
        raise ValueError(
            f"Balanced batches need examples of both kinds; got {len(harmful_examples)} harmful and "
            f"{len(harmless_examples)} harmless."
        )
    if harmful is None and (batch_size < 2 or batch_size % 2):
        raise ValueError(f"A balanced batch is half harmful and half harmless, so its size cannot be {batch_size}.")
    of_harmful = batch_size // 2 if harmful is None else harmful
    if not 0 < of_harmful < batch_size:
        raise ValueError(f"Of {batch_size} examples in a batch {harmful} cannot be harmful: each kind needs a place.")
    examples = [*harmful_examples, *harmless_examples]
    rng = random.Random(seed)

    def epochs(rows: range) -> Iterator[int]:
        while True:
            yield from rng.sample(rows, len(rows))

    kinds = [epochs(range(len(harmful_examples))), epochs(range(len(harmful_examples), len(examples)))]

    def draw() -> Iterator[Batch]:
        for _ in range(steps):
            shares = of_harmful, batch_size - of_harmful
            rows = [next(kind) for kind, share in zip(kinds, shares, strict=True) for _ in range(share)]
            rng.shuffle(rows)  # so that micro-batches are mixed by chance, as those of the source are
            yield collate([examples[i] for i in rows], pad_id, rows=rows)

    return draw()
