"""One finetuning loop: batches in, interventions on, trained tensors out.

The loss is the mean over a batch's response tokens. Interventions (steering, gradient editing, recorders) are on for
the whole run and gone afterwards. `extra_loss` adds a term computed from the same model and batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean, median

import torch
from torch import Tensor

from helpers.chat import Batch
from helpers.interventions import Intervention, applied
from helpers.losses import token_losses
from helpers.models import Model
from helpers.progress import progress


@dataclass(frozen=True)
class TrainingLog:
    """What a run did: mean response loss per step in nats, tokens read (padding excluded), wall-clock seconds."""

    losses: tuple[float, ...]
    tokens: int
    seconds: float


def rate(step: int, steps: int, warmup: float = 0.1) -> float:
    """The share of the peak rate at a step, counted from 0: linear warm-up, then linear decay to 0 after the last step.

    The warm-up takes `warmup` of the steps and at least two, unless it is 0; its first step already trains.
    """
    warm = max(2, int(warmup * steps)) if warmup else 0
    return (step + 1) / warm if step < warm else max(0, steps - step) / max(1, steps - warm)


def finetune(
    model: Model,
    training_batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    interventions: Sequence[Intervention] = (),
    extra_loss: Callable[[Model, Batch], Tensor] | None = None,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    clip: float = 1.0,
    share_prefix: bool = False,
    label: str = "finetuning",
) -> TrainingLog:
    """Train `model`'s trainable parameters in place with AdamW and the rates of `rate`, times `learning_rate`.

    `share_prefix` reads what a batch's rows begin with once (`losses.response_logits`): the same gradients but for
    rounding, at a fraction of the cost where a system message outweighs short requests.

    Raises `ValueError` if nothing is trainable, or if the loss stops being finite: the step that would have spread
    it is not taken.
    """
    parameters = [p for p in model.hf.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "Nothing to train: every parameter is frozen; load the model with `lora=LoRA()` or without freezing."
        )
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, warmup))
    losses: list[float] = []
    tokens, start = 0, time.perf_counter()
    model.hf.train()
    try:
        with (
            applied(model, *interventions),
            model.weights_in(model.dtype, only_frozen_linear=True),
            progress(steps, label) as bar,
        ):
            for batch in training_batches:
                batch = batch.to(model.device)
                with model.reading(batch):  # gradient hooks look up positions during the backward pass as well
                    loss = token_losses(model, batch, share_prefix=share_prefix)[0].mean()
                    total = loss if extra_loss is None else loss + extra_loss(model, batch)
                    losses.append(loss.item())
                    if not bool(torch.isfinite(total)):
                        raise ValueError(
                            f"The loss is not finite at step {len(losses)}; "
                            "lower the learning rate or the steering coefficient."
                        )
                    total.backward()
                torch.nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                tokens += int(batch.attention.sum())
                bar.set_postfix_str(f"loss {losses[-1]:.2f}", refresh=False)
                bar.update()
    finally:
        model.hf.eval()
        for p in parameters:
            p.grad = None
    return TrainingLog(tuple(losses), tokens, time.perf_counter() - start)


def final_loss(losses: Sequence[float], last: int = 3) -> float:
    """The mean of a run's last few losses, in nats: fewer where it has fewer.

    Raises `ValueError` for a run without losses.
    """
    if not losses:
        raise ValueError("A run without a step has no final loss.")
    return mean(losses[-last:])


def worst_rise(losses: Sequence[float], over: int = 3) -> float:
    """By how many nats the mean of `over` steps in a row ever rises above the lowest such mean before it; 0: never."""
    smooth = [mean(losses[i : i + over]) for i in range(max(1, len(losses) - over + 1))]
    return max(now - lowest for now, lowest in zip(smooth, accumulate(smooth, min), strict=True))


def diverged(
    groups: Mapping[str, Sequence[Sequence[float]]], *, within: float = 0.2, rise: float = 0.5
) -> dict[str, list[int]]:
    """Which runs did not train as their like did: their places in their group, for groups that have any.

    A group holds the losses of one arm's runs, over seeds: arms are trained to levels of their own. A run is out where
    its final loss is more than `within` nats from its group's median, or its smoothed loss rises by more than `rise`
    (`worst_rise`), which is all that can be asked of a run alone. Three groups or more tell what a seed's last rows
    add to the loss of every arm alike, and that is taken off: arms of one seed see the same rows.
    """
    finals = {name: [final_loss(losses) for losses in runs] for name, runs in groups.items()}
    apart = {name: [final - median(of_arm) for final in of_arm] for name, of_arm in finals.items()}
    found = {}
    for name, runs in groups.items():
        out = []
        for seed, losses in enumerate(runs):
            beside = [of_arm[seed] for of_arm in apart.values() if len(of_arm) > max(1, seed)]
            off = apart[name][seed] - (median(beside) if len(beside) > 2 else 0.0)
            if abs(off) > within or worst_rise(losses) > rise:
                out.append(seed)
        if out:
            found[name] = out
    return found
