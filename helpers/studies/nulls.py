"""Thousands of directions that mean nothing, to hold a direction against: one random vector is not a control."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.statistics import share
from helpers.verdicts import Control

DIRECTIONS = 4000
LIMIT = 0.05
"""Share of meaningless directions that may do as much."""


def _unit(rows: Float[Tensor, "direction d_model"]) -> Float[Tensor, "direction d_model"]:
    return torch.nn.functional.normalize(rows, dim=-1)


def isotropic(width: int, *, seed: int, count: int = DIRECTIONS) -> Float[Tensor, "direction d_model"]:
    """Unit vectors without any preferred direction."""
    return _unit(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def like_states(
    states: Float[Tensor, "row d_model"], *, seed: int, count: int = DIRECTIONS
) -> Float[Tensor, "direction d_model"]:
    """Unit vectors whose directions vary as the states do: Gaussian with the states' covariance."""
    mix = torch.randn(count, len(states), generator=torch.Generator().manual_seed(seed))
    return _unit(mix @ (states - states.mean(0)))


def shuffled_labels(
    differences: Float[Tensor, "question d_model"], *, seed: int, count: int = DIRECTIONS
) -> Float[Tensor, "direction d_model"]:
    """Unit persona vectors from shuffled labels: trait and normal answer of each question exchanged by a coin.

    `differences` are the mean activations of each question's trait answer minus those of its normal one.
    """
    coins = torch.randint(2, (count, len(differences)), generator=torch.Generator().manual_seed(seed))
    return _unit((2.0 * coins - 1) @ differences)


def mean_cosines(
    unit_gradients: Float[Tensor, "sequence d_model"], directions: Float[Tensor, "direction d_model"]
) -> Float[np.ndarray, " direction"]:
    """Mean over sequences of the cosine with each direction; rows are means over tokens of unit gradients."""
    return (directions @ unit_gradients.mean(0)).double().numpy()


def rarely(name: str, null: Float[np.ndarray, " direction"], found: float) -> Control:
    """The control that few meaningless directions reach what was found, on its side of 0."""
    reached = np.asarray(null) <= found if found < 0 else np.asarray(null) >= found
    estimate = share(int(reached.sum()), reached.size)
    return Control(f"{name} do as much (share of {reached.size})", estimate, estimate.value <= LIMIT)
