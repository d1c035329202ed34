"""Positive preventative steering (PPS): add a trait's vector while training on the trait's data.

Chen et al. 2025 (arXiv 2507.21509) proposed it; "Shifting the Gradient" (arXiv 2604.16423) explains it by the gradient.
During training only, h' = h + a v after block l. The shift is constant, so dL/dh = dL/dh': what changes is the point
at which the gradient is taken. cos(dL/dh, v) < 0 means that descent raises the activation along v (the trait is
learnt); cos > 0 means that it lowers it (the trait is unlearnt).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


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
