"""The next-token loss of responses, with logits computed only where the loss is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.chat import Batch, Example
from helpers.forward import Beginning, read, read_beginning, shareable_beginning, unembed
from helpers.interventions import Intervention, applied
from helpers.models import Model
from helpers.progress import watched


def token_losses(
    model: Model,
    batch: Batch,
    *,
    share_prefix: bool = False,
    states: Float[Tensor, "batch pos d_model"] | None = None,
    after: Beginning | None = None,
    kinds: Sequence[int] | None = None,
) -> tuple[Float[Tensor, " token"], Int[Tensor, " token"]]:
    """Cross-entropy in nats of every response token, and the row of the batch that each belongs to.

    The vocabulary is most of a small model's output cost, so hidden states are selected before they meet it. Arguments
    are those of `response_logits`.
    """
    batch = batch.to(model.device)
    logits, targets, which = _distinct(model, batch, share_prefix, states, after, kinds)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")[which]
    return losses, batch.predicting.nonzero()[:, 0]


def response_logits(
    model: Model,
    batch: Batch,
    *,
    share_prefix: bool = False,
    states: Float[Tensor, "batch pos d_model"] | None = None,
    after: Beginning | None = None,
    kinds: Sequence[int] | None = None,
) -> Float[Tensor, "token vocabulary"]:
    """Float32 logits at the positions that predict a response token, row after row of the batch.

    With `share_prefix`, what all rows begin with (a system message) is read once and its keys and values are shared,
    which differs from reading it in every row by rounding alone. Not while a hook is on: it expects whole rows, unless
    it says that it `reads_parts` (`interventions.Hook`).
    `states`, `after` and `kinds` are those of `forward.read`: the rows' own states, in place of embeddings, of what
    follows a beginning that was read before.
    """
    logits, _, which = _distinct(model, batch.to(model.device), share_prefix, states, after, kinds)
    return logits if len(which) == len(logits) else logits[which]


def _distinct(
    model: Model,
    batch: Batch,
    share_prefix: bool,
    states: Float[Tensor, "batch pos d_model"] | None,
    after: Beginning | None,
    kinds: Sequence[int] | None,
) -> tuple[Float[Tensor, "distinct vocabulary"], Int[Tensor, " distinct"], Int[Tensor, " token"]]:
    """Logits and the tokens that they should predict, those of a shared beginning once, and which of them is whose."""
    predicting, following = batch.predicting, torch.nn.functional.pad(batch.ids[:, 1:], (0, 1))
    hidden, targets = [], []
    with model.autocast():
        shared = shareable_beginning(model, batch) if share_prefix and states is None else 0
        if shared:
            after = read_beginning(model, batch.ids[0, :shared].tolist())
            once = predicting[0, :shared]
            hidden.append(after.states[0, once])
            targets.append(following[0, :shared][once])
        begun = 0 if after is None else len(after)
        with model.reading(batch):
            own = read(model, batch.after(begun), states=states, after=after, kinds=kinds)
        hidden.append(own[predicting[:, begun:]])
        targets.append(following[:, begun:][predicting[:, begun:]])
        logits = unembed(model, torch.cat(hidden))
    start, counts = len(targets[0]) if shared else 0, predicting[:, begun:].sum(1).tolist()
    each = torch.arange(start, len(logits), device=model.device).split(counts)
    first = torch.arange(start, device=model.device)
    return logits, torch.cat(targets), torch.cat([part for rest in each for part in (first, rest)])


def sequence_losses(model: Model, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy over each sequence's response tokens, in nats."""
    return _sequence_means(token_losses(model, batch, share_prefix=True)[0], batch)


def sequence_sums(
    model: Model,
    batch: Batch,
    *,
    states: Float[Tensor, "batch pos d_model"] | None = None,
    after: Beginning | None = None,
    kinds: Sequence[int] | None = None,
) -> Float[Tensor, " batch"]:
    """Cross-entropy summed over each sequence's response tokens, in nats: what it adds to a mean over tokens.

    `states`, `after` and `kinds` are those of `forward.read`.
    """
    losses, _ = token_losses(model, batch, share_prefix=True, states=states, after=after, kinds=kinds)
    return _sequence_totals(losses, batch)


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
        target = response_logits(reference, batch, share_prefix=True)
    return _sequence_means(kl_divergence(target, response_logits(model, batch, share_prefix=True)), batch)


def kl_divergence(
    reference: Float[Tensor, "*row vocabulary"], found: Float[Tensor, "*row vocabulary"]
) -> Float[Tensor, "*row"]:
    """KL(reference || found) of the next-token distributions that two sets of logits give, in nats."""
    p, q = (logits.log_softmax(-1) for logits in (reference, found))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@torch.no_grad()
def evaluate_losses(
    model: Model, examples: list[Example], *, interventions: Iterable[Intervention] = (), batch_size: int = 32
) -> Float[Tensor, " example"]:
    """Each example's mean response loss in nats, in the order given, on the CPU."""
    result = torch.empty(len(examples))
    once = model.weights_in(model.dtype, only_frozen_linear=True)
    with once, applied(model, *interventions):
        for batch in watched(model.batches(examples, batch_size), "losses", "batch"):
            result[list(batch.rows)] = sequence_losses(model, batch).float().cpu()
    return result
