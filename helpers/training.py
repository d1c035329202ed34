"""The finetuning loop, of one run or of a stack of runs: batches in, interventions on, trained tensors out.

The loss is the mean over a batch's response tokens. Interventions (steering, gradient editing, recorders) are on for
the whole run and gone afterwards. `extra_loss` adds a term computed from the same model and batch.
"""

from __future__ import annotations

import math
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
    interventions: Sequence[Intervention] | Callable[[int], Sequence[Intervention]] = (),
    objective: Callable[[Model, Batch], Tensor] | None = None,
    extra_loss: Callable[[Model, Batch], Tensor] | None = None,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    clip: float = 1.0,
    share_prefix: bool = False,
    label: str = "finetuning",
) -> TrainingLog:
    """Train `model`'s trainable parameters in place with AdamW and the rates of `rate`, times `learning_rate`.

    `interventions` may be a function of the step, counted from 0, that gives those of this step.
    `objective`, if given, takes the place of the mean loss of response tokens; `extra_loss` is added to either.
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
        with model.weights_in(model.dtype, only_frozen_linear=True), progress(steps, label) as bar:
            for step, batch in enumerate(training_batches):
                batch = batch.to(model.device)
                active = interventions(step) if callable(interventions) else interventions
                with (
                    applied(model, *active),
                    model.reading(batch),
                ):  # gradient hooks look up positions during the backward pass as well
                    if objective is None:
                        loss = token_losses(model, batch, share_prefix=share_prefix)[0].mean()
                    else:
                        loss = objective(model, batch)
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


def finetune_stack(
    model: Model,
    training_batches: Sequence[Iterable[Batch]],
    *,
    steps: Sequence[int],
    learning_rates: Sequence[float],
    interventions: Sequence[Intervention] = (),
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    clip: float = 1.0,
    label: str = "finetuning",
) -> list[TrainingLog]:
    """Train the runs of a stack (`load(..., stack=...)`) side by side: `finetune` for each, in one pass a step.

    Every run has batches, a number of steps and a peak rate of its own. While interventions run, a row's place in the
    batch (`Batch.rows`) is the number of its run, so that `SteerRows` gives every run a vector of its own, or zero.
    A run that is done is left as it is. Seconds are those of the whole stack.

    Raises `ValueError` if there is not one of everything for each run, or a loss stops being finite.
    """
    parameters = [p for p in model.hf.parameters() if p.requires_grad]
    runs = len(parameters[0]) if parameters else 0
    if not len(training_batches) == len(steps) == len(learning_rates) == runs:
        raise ValueError(
            f"The stack has {runs} runs, and was given {len(training_batches)} lists of batches, {len(steps)} numbers "
            f"of steps and {len(learning_rates)} learning rates; give each run one."
        )
    peak, todo = max(learning_rates), [iter(batches) for batches in training_batches]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=weight_decay, fused=True)
    losses: list[list[float]] = [[] for _ in todo]
    tokens, start = [0] * runs, time.perf_counter()
    model.hf.train()
    try:
        with (
            applied(model, *interventions),
            model.weights_in(model.dtype, only_frozen_linear=True),
            progress(max(steps), label) as bar,
        ):
            for step in range(max(steps)):
                parts = [next(todo[k]) if step < steps[k] else None for k in range(runs)]
                batch = side_by_side(parts, model.tokenizer.pad_token_id).to(model.device)
                with model.reading(batch):
                    each, rows = token_losses(model, batch)
                    of_run = torch.tensor(batch.rows, device=model.device)[rows]
                    means = each.new_zeros(runs).index_add(0, of_run, each)
                    means = means / torch.bincount(of_run, minlength=runs).clamp(min=1)
                    for k, (part, loss) in enumerate(zip(parts, means.tolist(), strict=True)):
                        if part is not None:
                            losses[k].append(loss)
                            tokens[k] += int(part.attention.sum())
                            if not math.isfinite(loss):
                                raise ValueError(
                                    f"The loss of run {k} is not finite at step {step + 1}; lower its learning rate "
                                    "or its steering coefficient."
                                )
                    means.sum().backward()
                _clip_each(parameters, clip)
                shares = [
                    learning_rates[k] / peak * rate(step, steps[k], warmup) if step < steps[k] else 0.0
                    for k in range(runs)
                ]
                _step_each(optimizer, parameters, shares)
                bar.set_postfix_str(f"loss {mean(run[-1] for run in losses):.2f}", refresh=False)
                bar.update()
    finally:
        model.hf.eval()
        for p in parameters:
            p.grad = None
    seconds = time.perf_counter() - start
    return [TrainingLog(tuple(run), count, seconds) for run, count in zip(losses, tokens, strict=True)]


def side_by_side(parts: Sequence[Batch | None], pad_id: int) -> Batch:
    """The batches of several runs in one, run after run, all padded to one shape; a row's place is its run's number.

    A run that has fewer rows than another, or none, is filled up with rows that have no response, and so no loss.
    """
    there = [part for part in parts if part is not None]
    count, length = (max(part.ids.shape[axis] for part in there) for axis in (0, 1))

    def padded(part: Batch | None, of: Callable[[Batch], Tensor], filler: int) -> Tensor:
        known = there[0] if part is None else part
        wide = torch.nn.functional.pad(of(known), (0, length - known.ids.shape[1]), value=filler)
        return torch.cat([wide, wide[:1].expand(count - len(wide), -1)]) if len(wide) < count else wide[:count]

    real = torch.cat([torch.arange(count) < (0 if part is None else len(part.rows)) for part in parts])
    return Batch(
        torch.cat([padded(part, lambda b: b.ids, pad_id) for part in parts]),
        torch.cat([padded(part, lambda b: b.attention, 0) for part in parts]),
        torch.cat([padded(part, lambda b: b.response, 0) for part in parts]) & real[:, None],
        tuple(k for k in range(len(parts)) for _ in range(count)),
    )


def _clip_each(parameters: Sequence[Tensor], most: float) -> None:
    """`torch.nn.utils.clip_grad_norm_`, for each run of a stack by its own norm."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # [tensor, run] -> [run]
    shares = (most / (norms + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(shares.view(-1, 1, 1))


@torch.no_grad()
def _step_each(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], shares: Sequence[float]) -> None:
    """An AdamW step in which run k goes `shares[k]` of the way: a step is linear in the rate."""
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    moved = torch.tensor(shares, device=parameters[0].device, dtype=parameters[0].dtype).view(-1, 1, 1)
    for p, old in zip(parameters, before, strict=True):
        p.copy_(torch.where(moved == 0, old, old + moved * (p - old)))


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
