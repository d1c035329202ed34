"""Steering in weight space: the difference of two piles' average gradients, added to the weights.

L. Graves, "Gradient-Diff Steering for Behavior Editing in Small LMs" (2025). At a finetuned model theta_anchor,

    V = G_target - G_neutral,    theta_steered = theta_anchor + alpha V,

where G is a pile-average loss gradient (`gradients.pile_gradient`). V points to higher loss on the target behaviour, so
alpha > 0 *reduces* the behaviour and alpha < 0 raises it. A strength that means the same on any model is the
ratio ||alpha V|| / ||Delta||, with Delta = theta_anchor - theta_base.

A direction is a `WeightVector`; every variant is a function from `WeightVector` to `WeightVector`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.chat import collate, encode
from helpers.losses import sequence_losses
from helpers.models import Model, plain_name


@dataclass(frozen=True)
class WeightVector:
    """A direction in weight space: one float32 tensor on the CPU for each parameter, by plain name."""

    tensors: Mapping[str, Tensor]

    @cached_property
    def norm(self) -> float:
        """Euclidean norm over all weights."""
        return sum(_square(t) for t in self.tensors.values()) ** 0.5

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and values, which the artifact store can key results by."""
        whole = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            whole.update(name.encode())
            whole.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return whole.hexdigest()

    def each(self, change: Callable[[str, Tensor], Tensor]) -> WeightVector:
        """The direction with `change(name, tensor)` in place of every tensor."""
        return WeightVector({name: change(name, tensor) for name, tensor in self.tensors.items()})


def difference(
    minuend: Mapping[str, Tensor],
    subtrahend: Mapping[str, Tensor],
) -> WeightVector:
    """Tensor by tensor: V = G_target - G_neutral, or Delta = theta_anchor - theta_base.

    Raises `ValueError` if the two are not of one architecture.
    """
    _same_architecture(minuend, subtrahend)
    return WeightVector({n: minuend[n].float() - subtrahend[n].float() for n in minuend})


def finetuning_diff(anchor: Model, base: Model) -> WeightVector:
    """Delta = theta_anchor - theta_base. Raises `ValueError` if the two models are not of one architecture."""
    return difference(_weights(anchor), _weights(base))


def cosine(a: WeightVector, b: WeightVector) -> float:
    """Cosine between two directions, over all weights."""
    return dot(a, b.tensors) / (a.norm * b.norm)


def dot(a: WeightVector, b: Mapping[str, Tensor]) -> float:
    """Inner product over all weights. With a pile's gradient G, alpha <V, G> is the first-order change of its loss."""
    _same_architecture(a.tensors, b)
    return sum(float(torch.linalg.vecdot(t, b[name].to(t)).sum(dtype=torch.float64)) for name, t in a.tensors.items())


NO_DIRECTION = "This direction is zero everywhere: no strength reaches a ratio other than 0."


def alpha_for(
    vector: WeightVector,
    diff: WeightVector,
    ratio: float,
) -> float:
    """The alpha at which ||alpha V|| / ||Delta|| is `ratio` (negative: the other way along V)."""
    if not vector.norm > 0:
        raise ValueError(NO_DIRECTION)
    return ratio * diff.norm / vector.norm


def alpha_for_change(
    change: Callable[[float], float], wanted: float, slope: float, *, tolerance: float = 0.1, steps: int = 8
) -> float:
    """The alpha > 0 at which `change(alpha)` is `wanted` > 0, within a relative tolerance.

    `slope` is the change's derivative at 0, such as first order's <V, G>. From `wanted / slope` on, each next alpha is
    where the parabola with this slope through 0 and the point last found reaches `wanted`, or between the bounds known
    so far. Gives the last alpha tried if `steps` do not do.
    """
    low, high, alpha = 0.0, math.inf, wanted / slope
    for _ in range(steps):
        found = change(alpha)
        if abs(found / wanted - 1) < tolerance:
            break
        low, high = (alpha, high) if found < wanted else (low, alpha)
        bend = (found - slope * alpha) / alpha**2
        square = slope**2 + 4 * bend * wanted
        parabola = 2 * wanted / (slope + math.sqrt(square)) if square >= 0 else math.inf
        if low < parabola < high:
            alpha = parabola
        elif low > 0 and math.isfinite(high):
            alpha = math.sqrt(low * high)
        else:
            alpha *= 2.0 if found < wanted else 0.5
    return alpha


def check_alpha(alpha: float) -> float:
    """The alpha, if float32 can hold it. Raises `ValueError` if not."""
    if not abs(alpha) <= torch.finfo(torch.float32).max:
        raise ValueError(f"Steered by alpha = {alpha:g} the loss is not finite; choose an alpha nearer to 0.")
    return float(alpha)


@contextlib.contextmanager
def steered(model: Model, vector: WeightVector, alpha: float) -> Iterator[Model]:
    """Run with theta + alpha V. On the way out the very same weights are back, bit for bit, whatever happened.

    Raises `ValueError` if the direction does not fit the model, or if the steered model's loss is not finite.
    """
    parameters = {plain_name(name): p for name, p in model.hf.named_parameters()}
    _same_architecture(parameters, vector.tensors)
    check_alpha(alpha)
    kept = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            v = vector.tensors[name].to(kept[name])
            p.data = torch.add(kept[name], v, alpha=alpha)
        _check_loss(model, vector, alpha)
        yield model
    finally:
        for name, p in parameters.items():
            p.data = kept[name]


# Variants


NO_SCALE = "Finetuning changed too few weights for this scale: fewer than 3% of |Delta| are not 0."


def hadamard(
    vector: WeightVector,
    diff: WeightVector,
    scale: Literal["percentile", "active median"],
) -> WeightVector:
    """(|Delta| / s) * V, element by element: steer where finetuning changed the weights (the source's own variant).

    s is one number for all weights: the 97th percentile of |Delta|, as in the source, or the median of the active
    tail, which the source names as the better choice. The tail is what exceeds a tenth of that percentile.
    """
    sizes = magnitudes(diff)
    s = float(sizes.kthvalue(max(1, round(0.97 * len(sizes)))).values)
    if scale == "active median":
        tail = sizes[sizes > s / 10]
        s = float(tail.median()) if len(tail) else 0.0
    if not s > 0:
        raise ValueError(NO_SCALE)
    return vector.each(lambda name, v: v * diff.tensors[name].abs() / s)


def project_on_diff(vector: WeightVector, diff: WeightVector, rank: int) -> WeightVector:
    """V projected, matrix by matrix, on the span of Delta's leading singular pairs: U_r U_r^T V W_r W_r^T.

    A vector-valued parameter (a norm's gain) is projected on Delta's own direction.
    """

    def project(name: str, tensor: Tensor) -> Tensor:
        delta = diff.tensors[name]
        if delta.ndim < 2:
            square = delta @ delta
            return delta * ((tensor @ delta) / square) if square > 0 else torch.zeros_like(tensor)
        u, _, w = _leading(delta, rank)
        return u @ (u.T @ tensor @ w) @ w.T

    return vector.each(project)


def low_rank(vector: WeightVector, rank: int) -> WeightVector:
    """The best approximation of every matrix of V by one of rank `rank`; other parameters are kept."""

    def cut(_: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return tensor
        u, s, w = _leading(tensor, rank)
        return (u * s) @ w.T

    return vector.each(cut)


def sign_restricted(vector: WeightVector, sign: Literal["positive", "negative"]) -> WeightVector:
    """Only the entries of V with this sign; the others become 0."""
    return vector.each(lambda _, t: t.clamp(min=0) if sign == "positive" else t.clamp(max=0))


def only_layers(vector: WeightVector, layers: Sequence[int]) -> WeightVector:
    """V in these blocks and 0 elsewhere, embedding and final norm included."""
    return vector.each(lambda name, t: t if layer_of(name) in layers else torch.zeros_like(t))


def without_layers(vector: WeightVector, layers: Sequence[int]) -> WeightVector:
    """V everywhere but in these blocks."""
    return vector.each(lambda name, t: torch.zeros_like(t) if layer_of(name) in layers else t)


def random_like(vector: WeightVector, seed: int) -> WeightVector:
    """Gaussian, with V's norm in every parameter: the control for "any push of this size in these places would do"."""
    generator = torch.Generator().manual_seed(seed)

    def noise(_: str, tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator)
        return drawn * (tensor.norm() / drawn.norm())

    return vector.each(noise)


# Profiles


def magnitudes(diff: WeightVector, most: int = 2**22) -> Float[Tensor, " weight"]:
    """|Delta| of all weights, or of every k-th where there are more than `most`.

    From four million weights the 97th percentile's rank is known to about a hundredth of a per cent.
    """
    stride = -(-diff.count // most)
    return torch.cat([t.flatten()[::stride].abs() for t in diff.tensors.values()])


def layer_of(name: str) -> int | None:
    """The block that a parameter belongs to; None for the embedding and the final norm."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}")
    return int(found[1]) if found else None


def module_of(name: str) -> Literal["attention", "MLP", "norm", "embedding"]:
    """The kind of module that a parameter belongs to."""
    if "norm" in name or "ln_" in name:
        return "norm"
    if "attn" in name or "attention" in name:
        return "attention"
    return "MLP" if "mlp" in name else "embedding"


def profile(vector: WeightVector) -> list[dict[str, float | int | str]]:
    """Sum of squares and norm by layer and module (Figs. 3 to 5 of the source); the embedding is layer -1.

    The final norm counts with the embedding's layer.
    """
    squares: dict[tuple[int, str], float] = {}
    for name, tensor in vector.tensors.items():
        layer = layer_of(name)
        place = (-1 if layer is None else layer, module_of(name))
        squares[place] = squares.get(place, 0.0) + _square(tensor)
    return [
        {"layer": layer, "module": module, "sum_of_squares": total, "norm": total**0.5}
        for (layer, module), total in sorted(squares.items())
    ]


def _square(tensor: Tensor) -> float:
    """Sum of squares, row by row: float32 sums over millions of weights are wrong in the fourth digit."""
    return float(torch.linalg.vecdot(tensor, tensor).sum(dtype=torch.float64))


def _weights(model: Model) -> dict[str, Tensor]:
    return {plain_name(name): p.detach().cpu() for name, p in model.hf.named_parameters()}


def _same_architecture(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        raise ValueError(
            "The weights are not those of one architecture, so they cannot be combined; take anchor, base and "
            "direction from the same model."
        )


def _leading(matrix: Float[Tensor, "m n"], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples by a randomised method with a fixed seed; exact for matrices of low rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, w = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=2)
    return u[:, :rank], s[:rank], w[:, :rank]


@torch.no_grad()
def _check_loss(model: Model, vector: WeightVector, alpha: float) -> None:
    """Raises `ValueError` where the loss of a greeting is not finite."""
    example = encode(model.tokenizer, "Hello!", "Hello! How can I help?")
    if not bool(torch.isfinite(sequence_losses(model, collate([example], model.tokenizer.pad_token_id))).all()):
        raise ValueError(
            f"Steered by alpha = {alpha:g} the loss is not finite; choose an alpha nearer to 0 "
            f"(||alpha V|| is {abs(alpha) * vector.norm:.3g} here)."
        )
