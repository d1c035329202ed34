"""One forward pass, in which what all rows begin with is read once.

Chat prompts begin alike: with the template's system message. Its keys and values are computed once for all rows that
are treated alike there (a prefill), copied to every row, and only the rest of each row is read. Losses, decoding,
prompts under attack and trained vectors all read this way. Results are those of whole rows but for rounding.

Not every model allows it: a block whose attention window is short forgets the beginning (`keeps_beginning`). Such a
model reads whole rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers.chat import Batch, Example
from helpers.interventions import Intervention, applied
from helpers.models import Model

WORTH_SHARING = 8
"""Fewer tokens than this are not worth a pass of their own."""


@dataclass(frozen=True)
class Beginning:
    """Tokens that were read: one row for each way in which they are treated."""

    states: Float[Tensor, "kind begin d_model"]
    """After the final norm."""
    cache: Any
    """Keys and values of every block."""

    def __len__(self) -> int:
        return self.states.shape[1]

    def copied(self, kinds: Sequence[int]) -> Any:
        """A key-value cache whose row i is row `kinds[i]` of this one; gradients flow through."""
        from transformers import DynamicCache

        copy, whole = DynamicCache(), next(part for part in self.cache.layers if part.is_initialized)
        for layer, part in enumerate(self.cache.layers):
            # blocks that `only_blocks` left out have no keys; the cache is asked there how long it is
            kept = (part.keys, part.values) if part.is_initialized else (whole.keys, whole.values)
            # [kind, head, begin, d_head] -> [row, head, begin, d_head]
            rows = [t.expand(len(kinds), -1, -1, -1) if len(t) == 1 else t[list(kinds)] for t in kept]
            copy.update(*rows, layer)
        return copy


def read(
    model: Model,
    batch: Batch,
    *,
    states: Float[Tensor, "batch pos d_model"] | None = None,
    after: Beginning | None = None,
    kinds: Sequence[int] | None = None,
) -> Float[Tensor, "batch pos d_model"]:
    """The states of a batch, padded on the right, after the final norm: without the vocabulary.

    With `states` the first block reads these in place of the tokens' embeddings. With `after`, the batch's tokens
    follow a beginning: row i that of the kind `kinds[i]`, or all the only one.

    The pass is run as it stands: open `Model.autocast` for the model's compute precision, and `Model.reading` for
    interventions that ask which positions these are.
    """
    given = {"input_ids": batch.ids} if states is None else {"inputs_embeds": states}
    mask = batch.attention.long()
    if after is None:
        return model.hf.base_model(**given, attention_mask=mask, use_cache=False)[0]
    mask = nn.functional.pad(mask, (len(after), 0), value=1)  # [batch, begin + pos]
    cache = after.copied([0] * len(mask) if kinds is None else kinds)
    return model.hf.base_model(**given, attention_mask=mask, past_key_values=cache, use_cache=True)[0]


def read_beginning(model: Model, ids: Sequence[int], rows: Sequence[int] = (0,)) -> Beginning:
    """Read what rows begin with: once for all, or once for each of `rows` where an intervention treats them apart."""
    tokens = torch.tensor([list(ids)] * len(rows), device=model.device)  # [kind, begin]
    attended = torch.ones_like(tokens, dtype=torch.bool)
    with model.reading(Batch(tokens, attended, ~attended, tuple(rows))):
        return _beginning(model, input_ids=tokens)


def resume_beginning(model: Model, states: Float[Tensor, "kind begin d_model"]) -> Beginning:
    """`read_beginning` from states in place of tokens: inside `only_blocks`."""
    return _beginning(model, inputs_embeds=states)


def _beginning(model: Model, **given: Tensor) -> Beginning:
    out = model.hf.base_model(**given, use_cache=True)
    return Beginning(out[0], out.past_key_values)


def unembed(model: Model, states: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocabulary"]:
    """Logits, in float32 at least, of states that the final norm has seen: with the model's cap, where it has one."""
    logits = model.hf.get_output_embeddings()(states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def keeps_beginning(model: Model, length: int) -> bool:
    """Whether every block still attends to the first of `length` tokens, so that a beginning can be read once for all.

    Blocks with a sliding window shorter than that forget it, and count the padding after it; those without keys and
    values have nothing to copy.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return all(
        type(part) is DynamicLayer or (type(part) is DynamicSlidingWindowLayer and part.sliding_window >= length)
        for part in DynamicCache(config=model.hf.config).layers
    )


def common_beginning(examples: Sequence[Example], tail: int = 1) -> int:
    """How many tokens all examples begin with (the template's system message), their last `tail` tokens left out."""
    columns = zip(*(e.ids for e in examples), strict=False)
    common = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    return max(0, min(common, min(map(len, examples), default=0) - tail))


def shareable_beginning(model: Model, batch: Batch) -> int:
    """How many tokens all rows begin with and predict alike; 0 where it pays little, where a hook or block needs whole
    rows, and in a stack, whose runs read them each in its own way."""
    points = model.bridge.hook_dict.values()
    hooks = [handle.user_hook for point in points for handle in (*point.fwd_hooks, *point.bwd_hooks)]
    parts = all(getattr(hook, "reads_parts", False) for hook in hooks)
    if len(batch.rows) < 2 or model.runs > 1 or not parts or not keeps_beginning(model, batch.ids.shape[1]):
        return 0
    same = (batch.ids == batch.ids[0]) & batch.attention
    predicting = batch.predicting
    alike = (predicting == predicting[0]) & (~predicting | nn.functional.pad(same[:, 1:], (0, 1)))
    length = int((same & alike).all(0)[:-1].cumprod(0).sum())
    return length if length >= WORTH_SHARING else 0


@contextlib.contextmanager
def only_blocks(model: Model, first: int, last: int) -> Iterator[None]:
    """While open, the model is its blocks from `first` to `last`: for passes that start or stop in the middle.

    Without its last block it has no final norm either: what it gives is the residual stream. Blocks keep their
    numbers, since the number says which attention mask and which rotation a block gets.
    """
    stack = model.hf.base_model
    layers, norm = stack.layers, stack.norm
    left_out = _LeftOut()
    stack.layers = nn.ModuleList(layer if first <= number <= last else left_out for number, layer in enumerate(layers))
    if last < model.layers - 1:
        stack.norm = nn.Identity()
    try:
        yield
    finally:
        stack.layers, stack.norm = layers, norm


class _LeftOut(nn.Module):
    """A block that does nothing."""

    def forward(self, states: Tensor, **_: Any) -> Tensor:
        return states


@dataclass(frozen=True)
class PromptSet:
    """Prompts whose common beginning is read once.

    The last `tail` tokens of every prompt are read on their own. With `copies` every prompt is read so many times, copy
    after copy: row c n + i is prompt i of n in copy c, by which interventions tell them apart.
    """

    shared: tuple[int, ...]
    rest: tuple[Batch, ...]
    count: int
    copies: int = 1

    @classmethod
    def of(
        cls, model: Model, prompts: Sequence[Example], *, batch_size: int = 64, tail: int = 1, copies: int = 1
    ) -> PromptSet:
        """Raises `ValueError` if there are no prompts."""
        if not prompts:
            raise ValueError("There are no prompts to read; give at least one.")
        together = model.runs == 1 and keeps_beginning(model, max(map(len, prompts)))
        length = common_beginning(prompts, tail) if together else 0
        rest = [Example(e.ids[length:], len(e) - length) for e in prompts] * copies
        parts = model.batches(rest, batch_size)
        return cls(prompts[0].ids[:length], tuple(parts), len(prompts), copies)

    @torch.no_grad()
    def read(
        self,
        model: Model,
        visit: Callable[[Batch, Float[Tensor, "batch pos d_model"]], None],
        interventions: Sequence[Intervention] = (),
    ) -> None:
        """Show `visit` each batch of what is left of the prompts, with its states after the final norm.

        Interventions see only what is left, and the common beginning once a copy.
        """
        once = model.weights_in(model.dtype, only_frozen_linear=True)
        with once, applied(model, *interventions), model.autocast():
            firsts = [copy * self.count for copy in range(self.copies)]
            begun = read_beginning(model, self.shared, firsts) if self.shared else None
            for batch in self.rest:
                batch = batch.to(model.device)
                copies = [row // self.count for row in batch.rows]
                with model.reading(batch):
                    hidden = read(model, batch, after=begun, kinds=copies)
                visit(batch, hidden)

    def last_logits(
        self, model: Model, interventions: Sequence[Intervention] = ()
    ) -> Float[Tensor, "example vocabulary"]:
        """Next-token logits after each prompt, in the order given, copy after copy."""
        found: dict[int, Tensor] = {}

        def visit(batch: Batch, hidden: Float[Tensor, "batch pos d_model"]) -> None:
            last = batch.attention.sum(1) - 1
            logits = unembed(model, hidden[torch.arange(len(hidden), device=hidden.device), last])
            found.update(zip(batch.rows, logits, strict=True))

        self.read(model, visit, interventions)
        return torch.stack([found[row] for row in range(self.count * self.copies)])
