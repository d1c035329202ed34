"""The next-token loss of responses, with logits computed only where the loss is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.chat import Batch, Example, batches
from helpers.interventions import Intervention, applied
from helpers.models import Model


def token_losses(model: Model, batch: Batch) -> tuple[Float[Tensor, " token"], Int[Tensor, " token"]]:
    """Cross-entropy in nats of every response token, and the row of the batch that each belongs to.

    The vocabulary is most of a small model's output cost, so hidden states are selected before they meet it.
    """
    batch = batch.to(model.device)
    with model.reading(batch), model.autocast():
        hidden = model.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)[0]
        where = batch.predicting
        logits = model.hf.get_output_embeddings()(hidden[where])  # (token, vocabulary)
        cap = getattr(model.hf.config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        losses = torch.nn.functional.cross_entropy(logits.float(), batch.ids[batch.response], reduction="none")
    return losses, where.nonzero()[:, 0]


def sequence_losses(model: Model, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy over each sequence's response tokens, in nats."""
    losses, rows = token_losses(model, batch)
    total = losses.new_zeros(len(batch.rows)).index_add(0, rows, losses)
    return total / batch.response.to(losses.device).sum(1)


@torch.no_grad()
def evaluate_losses(
    model: Model, examples: list[Example], *, interventions: Iterable[Intervention] = (), batch_size: int = 32
) -> Float[Tensor, " example"]:
    """Each example's mean response loss in nats, in the order given, on the CPU."""
    result = torch.empty(len(examples))
    with applied(model, *interventions):
        for batch in batches(examples, batch_size, model.tokenizer.pad_token_id):
            result[list(batch.rows)] = sequence_losses(model, batch).float().cpu()
    return result
