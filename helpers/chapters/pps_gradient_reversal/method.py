"""Positive preventative steering (PPS): add a trait's vector while training on the trait's data.

Chen et al. 2025 (arXiv 2507.21509) proposed it; "Shifting the Gradient" (arXiv 2604.16423) explains it by the gradient.
During training only, h' = h + a v after block l. The shift is constant, so dL/dh = dL/dh': what changes is the point
at which the gradient is taken. cos(dL/dh, v) < 0 means that descent raises the activation along v (the trait is
learnt); cos > 0 means that it lowers it (the trait is unlearnt).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.interventions import Hook, project_towards, resid_post
from helpers.models import Model, plain_name


def predicted_shift(
    gradients: Float[Tensor, "example d_model"], vector: Float[Tensor, " d_model"]
) -> Float[Tensor, " example"]:
    """-(g . v_hat): the direction in which a small step should move the activation along v (first order, unit step).

    A step on the weights moves h by -eta J J^T g, not by -eta g, so this predicts a sign and a ranking, not a size.
    """
    return -(gradients @ (vector / vector.norm())).to(torch.float32)


def central_slope(losses: Float[np.ndarray, "4 example"], step: float) -> Float[np.ndarray, " example"]:
    """dL/da from losses at a - 2 h, a - h, a + h and a + 2 h, for h the `step`: exact up to the fourth order of h."""
    return (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)


@dataclass(frozen=True)
class HoldComponent:
    """Hold the stream's component along `vector`, after block `layer`, where that of `centre` is.

    Concept ablation finetuning (CAFT, Casademunt et al. 2025) with one direction: while training, and only then. A
    centre of zero takes the component out; the mean of normal answers keeps it where they have it.
    """

    layer: int
    vector: Float[Tensor, " d_model"]
    centre: Float[Tensor, " d_model"]

    def hooks(self, model: Model) -> list[Hook]:
        basis, centre = (self.vector / self.vector.norm())[:, None].to(model.device), self.centre.to(model.device)

        def hold(h: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
            return project_towards(h, basis.to(h.dtype), centre.to(h.dtype))

        hold.reads_parts = True  # type: ignore[attr-defined]
        return [(resid_post(model, self.layer), hold)]


@contextlib.contextmanager
def descended(model: Model, gradient: Mapping[str, Tensor], fall: float) -> Iterator[float]:
    """The model one step of gradient descent on, theta - eta g, and back on the way out; yields eta.

    eta is such that the loss falls by `fall` to first order, eta |g|^2 = fall. Raises ValueError for a gradient of
    zero.
    """
    square = sum(float(g.double().square().sum()) for g in gradient.values())
    if not square > 0:
        raise ValueError("This gradient is zero, so no step along it lowers the loss.")
    eta = fall / square
    weights = {plain_name(name): p for name, p in model.hf.named_parameters()}
    before = {name: weights[name].detach().clone() for name in gradient}
    try:
        with torch.no_grad():
            for name, g in gradient.items():
                weights[name].sub_(eta * g.to(weights[name]))
        yield eta
    finally:
        with torch.no_grad():
            for name, kept in before.items():
                weights[name].copy_(kept)


def update_shares(factors: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of a LoRA update's squared Frobenius norm in each kind of matrix, such as `o_proj`, over all blocks.

    An update is B A up to one scale; |B A|^2 = tr((B^T B)(A A^T)), so it is never written out.
    """
    squares: dict[str, float] = {}
    for name, a in factors.items():
        found = re.search(r"(\w+)\.lora_A", name)
        if found is None:
            continue
        a, b = a.double(), factors[name.replace("lora_A", "lora_B")].double()
        square = float(((b.T @ b) * (a @ a.T)).sum())
        squares[found[1]] = squares.get(found[1], 0.0) + square
    total = sum(squares.values())
    return {kind: square / total for kind, square in sorted(squares.items())}
