"""Where a model tells harmful prompts from harmless ones: candidate directions, one a block and position.

Arditi et al. (2024): a candidate direction is the difference between mean activations of harmful and of harmless
prompts at one block's output and one of the last positions. Only prompts count that the model treats as they are meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.chat import Batch, Example, encode
from helpers.forward import PromptSet
from helpers.interventions import READ_AND_WRITTEN, Ablate, Hook, resid_post
from helpers.models import Model
from helpers.studies.margins import refusal_log_odds

NO_PROMPTS = "The attack needs at least one harmful and one harmless prompt."


def ablating(directions: Float[Tensor, "k d_model"] | None) -> tuple[Ablate, ...]:
    """The intervention that projects these directions out at all three sites; none for no directions."""
    return () if directions is None or not len(directions) else (Ablate(directions),)


# Prompts


def header_positions(tokenizer: Any) -> tuple[int, ...]:
    """The last positions of a prompt, those that the template writes after the user's words, from -n to -1.

    Llama's template writes five tokens there, SmolLM2's six: the end of the user's turn is one of them.
    """
    one, other = (encode(tokenizer, question).ids for question in ("Why?", "Name a river"))
    same = 0
    while one[-1 - same] == other[-1 - same]:
        same += 1
    return tuple(range(-same, 0))


@dataclass(frozen=True)
class ByBehaviour:
    """Prompts that a model treats as they are meant."""

    harmful: list[Example]
    """Those with refusal log-odds above 0; all, where there are none."""
    harmless: list[Example]
    """Those with refusal log-odds below 0; all, where there are none."""
    refused: int
    """How many harmful prompts have log-odds above 0."""
    answered: int
    """How many harmless ones have log-odds below 0."""


def by_behaviour(
    model: Model, harmful: Sequence[Example], harmless: Sequence[Example], refusal_ids: Sequence[int]
) -> ByBehaviour:
    """The harmful prompts that are refused and the harmless ones that are answered, as the source filters them.

    A harmless prompt that is refused already carries most of the KL divergence once refusal is ablated, and says
    nothing of damage. A kind of which nothing passes stays whole. Raises `ValueError` if there are no prompts of a kind
    or no refusal tokens.
    """
    if not harmful or not harmless:
        raise ValueError(NO_PROMPTS)
    odds = refusal_log_odds(PromptSet.of(model, [*harmful, *harmless]).last_logits(model), refusal_ids)
    refused = [e for e, s in zip(harmful, odds[: len(harmful)].tolist(), strict=True) if s > 0]
    answered = [e for e, s in zip(harmless, odds[len(harmful) :].tolist(), strict=True) if s < 0]
    return ByBehaviour(refused or list(harmful), answered or list(harmless), len(refused), len(answered))


# Candidates


def attacked_layers(model: Model) -> tuple[int, ...]:
    """The first four fifths of the layers, where the source looks for candidates."""
    return tuple(range(max(1, int(0.8 * model.layers))))


def prompt_states(
    model: Model,
    prompts: Sequence[Example],
    layers: Sequence[int],
    positions: Sequence[int] | None = None,
    ablated: Float[Tensor, "k d_model"] | None = None,
    *,
    batch_size: int = 64,
) -> Float[Tensor, "prompt layer position d_model"]:
    """Block outputs at the last positions of each prompt (-1 is its last token; None: `header_positions`), on the CPU,
    with `ablated` projected out. Raises `ValueError` for a layer or position that does not exist, or if there are no
    prompts.
    """
    points = [resid_post(model, layer) for layer in layers]
    return _read_points(model, prompts, points, positions, ablated, batch_size)


def site_means(
    model: Model,
    harmless: Sequence[Example],
    positions: Sequence[int] | None = None,
    *,
    batch_size: int = 64,
) -> Float[Tensor, "position block site d_model"]:
    """What passes the three sites of every block (`READ_AND_WRITTEN`) after harmless prompts, on average, at each of
    their last positions: where affine ablation moves activations. Raises as `prompt_states`.
    """
    points = [f"blocks.{layer}.{site}" for layer in range(model.layers) for site in READ_AND_WRITTEN]
    means = _read_points(model, harmless, points, positions, None, batch_size).mean(0)
    return means.transpose(0, 1).unflatten(1, (model.layers, -1))


def _read_points(
    model: Model,
    prompts: Sequence[Example],
    points: Sequence[str],
    positions: Sequence[int] | None,
    ablated: Float[Tensor, "k d_model"] | None,
    batch_size: int,
) -> Float[Tensor, "prompt point position d_model"]:
    """What passes these hook points at the last positions of each prompt, on the CPU."""
    if not prompts:
        raise ValueError(NO_PROMPTS)
    positions = header_positions(model.tokenizer) if positions is None else positions
    shortest = min(map(len, prompts))
    if any(not -shortest <= p < 0 for p in positions):
        raise ValueError(
            f"Positions {tuple(positions)} must be negative, counted from the end of prompts of which the shortest has "
            f"{shortest} tokens."
        )
    streams: dict[str, Tensor] = {}
    reader = _Keep({point: point for point in points}, streams)
    back = torch.tensor(positions, device=model.device)
    found = torch.empty(len(prompts), len(points), len(positions), model.width)

    def keep(batch: Batch, hidden: Float[Tensor, "batch pos d_model"]) -> None:
        rows = torch.arange(len(batch.rows), device=model.device)[:, None]
        places = batch.attention.sum(1, keepdim=True) + back
        for i, point in enumerate(points):
            found[list(batch.rows), i] = streams[point][rows, places].float().cpu()

    together = PromptSet.of(model, prompts, batch_size=batch_size, tail=-min(positions))
    together.read(model, keep, (*ablating(ablated), reader))
    return found


def candidate_directions(
    model: Model,
    harmful: Sequence[Example],
    harmless: Sequence[Example],
    layers: Sequence[int],
    positions: Sequence[int] | None = None,
    ablated: Float[Tensor, "k d_model"] | None = None,
    *,
    batch_size: int = 64,
) -> Float[Tensor, "layer position d_model"]:
    """Mean block output of harmful prompts minus that of harmless ones, raw, with `ablated` projected out.

    Raises as `prompt_states`.
    """
    if not harmful or not harmless:
        raise ValueError(NO_PROMPTS)
    both = [*harmful, *harmless]
    states = prompt_states(model, both, layers, positions, ablated, batch_size=batch_size)
    return difference_of_means(*states.double().tensor_split([len(harmful)])).float()


def difference_of_means(
    harmful: Float[Tensor, "harmful layer position d_model"],
    harmless: Float[Tensor, "harmless layer position d_model"],
) -> Float[Tensor, "layer position d_model"]:
    """r = mu_harmful - mu_harmless, one candidate for each layer and position."""
    return harmful.mean(0) - harmless.mean(0)


@dataclass(frozen=True)
class _Keep:
    """Put what passes the named points into `kept`."""

    names: dict[str, Any]
    kept: dict[Any, Float[Tensor, "batch pos d_model"]]

    def hooks(self, model: Model) -> list[Hook]:
        def keeper(point: str) -> Any:
            def keep(h: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
                self.kept[self.names[point]] = h
                return h

            return keep

        return [(point, keeper(point)) for point in self.names]


def unit(vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """The vector at length one; zero stays zero."""
    return torch.nn.functional.normalize(vector, dim=0)
