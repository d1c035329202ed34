"""The next-token loss of responses, with logits computed only where the loss is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.chat import Batch, Example, batches
from helpers.interventions import Intervention, applied
from helpers.models import Model, repeated
from helpers.progress import watched

WORTH_SHARING = 8
"""Fewer tokens than this are not worth a pass of their own."""


def token_losses(
    model: Model,
    batch: Batch,
    *,
    share_prefix: bool = False,
    states: Float[Tensor, "batch pos d_model"] | None = None,
    past: Any = None,
) -> tuple[Float[Tensor, " token"], Int[Tensor, " token"]]:
    """Cross-entropy in nats of every response token, and the row of the batch that each belongs to.

    The vocabulary is most of a small model's output cost, so hidden states are selected before they meet it. Arguments
    are those of `response_logits`.
    """
    batch = batch.to(model.device)
    logits, targets, which = _distinct(model, batch, share_prefix, states, past)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")[which]
    return losses, batch.predicting.nonzero()[:, 0]


def response_logits(
    model: Model,
    batch: Batch,
    *,
    share_prefix: bool = False,
    states: Float[Tensor, "batch pos d_model"] | None = None,
    past: Any = None,
) -> Float[Tensor, "token vocabulary"]:
    """Float32 logits at the positions that predict a response token, row after row of the batch.

    With `share_prefix`, what all rows begin with (a system message) is read once and its keys and values are shared,
    which differs from reading it in every row by rounding alone. Not while a hook is on: it expects whole rows, unless
    it says that it `reads_parts` (`interventions.Hook`).
    With `states` the first block reads these instead of the tokens' embeddings; they are those of the tokens that
    follow `past`, a key-value cache, if there is one.
    """
    logits, _, which = _distinct(model, batch.to(model.device), share_prefix, states, past)
    return logits if len(which) == len(logits) else logits[which]


def _distinct(
    model: Model,
    batch: Batch,
    share_prefix: bool,
    states: Float[Tensor, "batch pos d_model"] | None,
    past: Any,
) -> tuple[Float[Tensor, "distinct vocabulary"], Int[Tensor, " distinct"], Int[Tensor, " token"]]:
    """Logits and the tokens that they should predict, those of a shared beginning once, and which of them is whose."""
    shared = _shared_prefix(model, batch) if share_prefix and states is None else 0
    if past is not None:
        shared = past.get_seq_length()
    given = {"input_ids": batch.ids[:, shared:]} if states is None else {"inputs_embeds": states}
    inputs = {**given, "attention_mask": batch.attention.long(), "use_cache": False}
    predicting, following = batch.predicting, torch.nn.functional.pad(batch.ids[:, 1:], (0, 1))
    hidden, targets = [], []
    with model.autocast():
        if shared and past is None:
            begun = model.read_start(batch.ids[0, :shared].tolist())
            past = repeated(begun.past_key_values, len(batch.rows))
            hidden.append(begun[0][0, predicting[0, :shared]])
            targets.append(following[0, :shared][predicting[0, :shared]])
        if past is not None:
            inputs |= {"past_key_values": past, "use_cache": True}
        with model.reading(batch):
            hidden.append(model.hf.base_model(**inputs)[0][predicting[:, shared:]])
        targets.append(following[:, shared:][predicting[:, shared:]])
        logits = model.hf.get_output_embeddings()(torch.cat(hidden))
        cap = getattr(model.hf.config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
    start, counts = sum(map(len, hidden[:-1])), predicting[:, shared:].sum(1).tolist()
    own = torch.arange(start, len(logits), device=model.device).split(counts)
    once = torch.arange(start, device=model.device)
    return logits.float(), torch.cat(targets), torch.cat([part for rest in own for part in (once, rest)])


def _shared_prefix(model: Model, batch: Batch) -> int:
    """How many tokens all rows begin with and predict alike; 0 where it pays little or a hook or block needs whole
    rows."""
    points = model.bridge.hook_dict.values()
    hooks = [handle.user_hook for point in points for handle in (*point.fwd_hooks, *point.bwd_hooks)]
    parts = all(getattr(hook, "reads_parts", False) for hook in hooks)
    if len(batch.rows) < 2 or not parts or not model.keeps(batch.ids.shape[1]):
        return 0
    same = (batch.ids == batch.ids[0]) & batch.attention
    predicting = batch.predicting
    alike = (predicting == predicting[0]) & (~predicting | torch.nn.functional.pad(same[:, 1:], (0, 1)))
    length = int((same & alike).all(0)[:-1].cumprod(0).sum())
    return length if length >= WORTH_SHARING else 0


def sequence_losses(model: Model, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy over each sequence's response tokens, in nats."""
    return _sequence_means(token_losses(model, batch, share_prefix=True)[0], batch)


def sequence_sums(
    model: Model, batch: Batch, *, states: Float[Tensor, "batch pos d_model"] | None = None, past: Any = None
) -> Float[Tensor, " batch"]:
    """Cross-entropy summed over each sequence's response tokens, in nats: what it adds to a mean over tokens.

    `states` and `past` are those of `response_logits`.
    """
    return _sequence_totals(token_losses(model, batch, share_prefix=True, states=states, past=past)[0], batch)


def _sequence_means(values: Float[Tensor, " token"], batch: Batch) -> Float[Tensor, " batch"]:
    return _sequence_totals(values, batch) / batch.response.to(values.device).sum(1)


def _sequence_totals(values: Float[Tensor, " token"], batch: Batch) -> Float[Tensor, " batch"]:
    rows = batch.predicting.nonzero()[:, 0].to(values.device)
    return values.new_zeros(len(batch.rows)).index_add(0, rows, values)


def sequence_divergences(model: Model, batch: Batch, reference: Model) -> Float[Tensor, " batch"]:
    """KL(reference || model) of the next-token distributions, mean over each sequence's response tokens, in nats.

    Only the model's side is differentiated.
    """
    batch = batch.to(model.device)
    with torch.no_grad():
        target = response_logits(reference, batch, share_prefix=True).log_softmax(-1)
    found = response_logits(model, batch, share_prefix=True).log_softmax(-1)
    kl = torch.nn.functional.kl_div(found, target, log_target=True, reduction="none").sum(-1)
    return _sequence_means(kl, batch)


@torch.no_grad()
def evaluate_losses(
    model: Model, examples: list[Example], *, interventions: Iterable[Intervention] = (), batch_size: int = 32
) -> Float[Tensor, " example"]:
    """Each example's mean response loss in nats, in the order given, on the CPU."""
    result = torch.empty(len(examples))
    once = model.weights_in(model.dtype, only_frozen_linear=True)
    with once, applied(model, *interventions):
        for batch in watched(batches(examples, batch_size, model.tokenizer.pad_token_id), "losses", "batch"):
            result[list(batch.rows)] = sequence_losses(model, batch).float().cpu()
    return result
