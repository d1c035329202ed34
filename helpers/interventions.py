"""Interventions on a running model: steering, directional ablation, editing gradients.

Each is a frozen description; `with applied(model, *interventions):` puts their hooks on TransformerLens hook points
and takes them off again, whatever happens inside. Hooks also act inside generation.

Layer convention: layer l is the output of block l (`blocks.{l}.hook_resid_post`), counted from 0. The persona-vectors
code calls the same place `hidden_states[l + 1]`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.chat import Where
from helpers.cost import LEDGER
from helpers.models import Model

Hook = tuple[str, Any]
"""A hook point and a function of (activation, hook).

A function with an attribute `reads_parts = True` may be shown what all rows of a batch begin with apart from the rest;
any other is shown whole rows.
"""


@runtime_checkable
class Intervention(Protocol):
    """Anything that can name hook points and what to do there."""

    def hooks(self, model: Model) -> list[Hook]:
        """(hook point, function of (activation, hook)) pairs. Raises `ValueError` if the model lacks the place."""
        ...


@contextlib.contextmanager
def applied(model: Model, *interventions: Intervention) -> Iterator[None]:
    """Run the model with these interventions on; every hook is gone on the way out, also after an exception."""
    with model.bridge.hooks(fwd_hooks=[hook for i in interventions for hook in i.hooks(model)]):
        yield


def resid_post(model: Model, layer: int) -> str:
    """The hook point of block `layer`'s output. Raises `ValueError` if there is no such block."""
    if not 0 <= layer < model.layers:
        raise ValueError(f"Layer {layer} does not exist: {model.name} has layers 0 to {model.layers - 1}.")
    return f"blocks.{layer}.hook_resid_post"


def add_at(
    h: Float[Tensor, "batch pos d_model"],
    shift: Float[Tensor, "*one_or_batch d_model"],
    mask: Bool[Tensor, "batch pos"] | None,
) -> Float[Tensor, "batch pos d_model"]:
    """h_i + a v at the positions i that `mask` marks (None: at all of them), and h_i at the others.

    `shift` is a v: one for all rows, or one for each with a dimension of size 1 for the positions.
    """
    shift = shift.to(h.dtype)
    return h + (shift if mask is None else mask[..., None].to(h.dtype) * shift)


@dataclass(frozen=True)
class Steer:
    """Add `coefficient * vector` to the residual stream after block `layer`: h' = h + a v.

    With a trait's persona vector, during training only, this is positive preventative steering (Chen et al. 2025;
    Grant et al. 2026). The vector is used as it is, not normalised.
    """

    layer: int
    vector: Float[Tensor, " d_model"]
    coefficient: float
    where: Where = "all"

    def hooks(self, model: Model) -> list[Hook]:
        if self.vector.shape != (model.width,):
            raise ValueError(f"The vector has shape {tuple(self.vector.shape)}; {model.name} needs ({model.width},).")
        shift = self.coefficient * self.vector.to(model.device)

        def add(h: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
            if model.reads_none_of(self.where, h.shape[1]):
                return h
            return add_at(h, shift, model.positions(self.where, h.shape[1]))

        add.reads_parts = self.where == "all"  # type: ignore[attr-defined]
        return [(resid_post(model, self.layer), add)]


@dataclass(frozen=True)
class SteerRows:
    """Add to every sequence a shift of its own: row i of a batch gets `shifts[batch.rows[i]]` where `where` says.

    Many vectors are trained or applied in one pass. `shifts` may be a function, called in every pass, so that
    gradients reach what it computes them from.
    """

    layer: int
    shifts: Float[Tensor, "example d_model"] | Callable[[], Float[Tensor, "example d_model"]]
    where: Where = "all"

    def hooks(self, model: Model) -> list[Hook]:
        def add(h: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
            if model.current is None or model.reads_none_of(self.where, h.shape[1]):
                return h
            shifts = self.shifts() if callable(self.shifts) else self.shifts
            each = shifts.to(h.device)[list(model.current.rows), None]  # (batch, 1, d_model)
            return add_at(h, each, model.positions(self.where, h.shape[1]))

        return [(resid_post(model, self.layer), add)]


def project_out(
    a: Float[Tensor, "*batch d_model"], basis: Float[Tensor, "d_model k"]
) -> Float[Tensor, "*batch d_model"]:
    """a - D^T D a: what is left without the components along the columns of `basis`, D^T, which are orthonormal."""
    return a - (a @ basis) @ basis.T


@dataclass(frozen=True)
class Ablate:
    """Project `directions` out of what every block reads and writes: a <- a - D^T D a, with D orthonormal.

    Three sites a block: its input, the attention's output and the MLP's output (Arditi et al. 2024).
    """

    directions: Float[Tensor, "k d_model"]
    layers: tuple[int, ...] | None = None

    def hooks(self, model: Model) -> list[Hook]:
        _check_directions(self.directions, model)
        basis = _basis(self.directions, model)

        def project(a: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
            LEDGER.add(4 * a.numel() * basis.shape[1])
            return project_out(a, basis.to(a.dtype))

        layers = range(model.layers) if self.layers is None else self.layers
        for layer in layers:
            resid_post(model, layer)  # says so if the layer does not exist
        return [(f"blocks.{layer}.{site}", project) for layer in layers for site in READ_AND_WRITTEN]


READ_AND_WRITTEN = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")
"""A block's input, and what its two parts add to the stream."""

SiteMeans = Float[Tensor, "block site d_model"]
"""What passes the three sites of every block on average, over prompts."""


def project_towards(
    a: Float[Tensor, "*batch d_model"],
    basis: Float[Tensor, "d_model k"],
    centre: Float[Tensor, " d_model"],
    scale: float = 1.0,
) -> Float[Tensor, "*batch d_model"]:
    """a - s D^T D (a - c): the components along the columns of `basis`, D^T, moved to those of `centre`, c, or with a
    scale s below 1 a part of the way. With a centre of zero and s = 1 this is `project_out`."""
    return a - scale * ((a - centre) @ basis) @ basis.T


@dataclass(frozen=True)
class AblateAffine:
    """Move what every block reads and writes, along `directions`, to what it is on average after harmless prompts.

    Affine ablation (Marshall et al., arXiv 2411.09003), at the sites of `Ablate`: zero need not be where harmless
    prompts lie. A `scale` below 1 goes a part of the way, one above 1 beyond it; without `centre` the way is to zero.
    """

    directions: Float[Tensor, "k d_model"]
    centre: SiteMeans | None = None
    scale: float = 1.0

    def hooks(self, model: Model) -> list[Hook]:
        _check_directions(self.directions, model)
        centre = _centre(self.centre, model)
        basis = _basis(self.directions, model)

        def at(layer: int, site: int) -> Any:
            def move(a: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
                LEDGER.add(4 * a.numel() * basis.shape[1])
                return project_towards(a, basis.to(a.dtype), centre[layer, site].to(a.dtype), self.scale)

            return move

        return [(point, at(*place)) for point, place in _sites(model)]


@dataclass(frozen=True)
class AblateRows:
    """`Ablate` with directions of its own for every sequence: row i of a batch loses `bases[of[batch.rows[i]]]`.

    Many ablated models are read in one pass. A basis of no rows leaves a sequence as it is. With `centres`, one for
    each basis, the ablation is affine; `scales`, one for each basis, are those of `AblateAffine`.
    """

    bases: tuple[Float[Tensor, "_ d_model"], ...]
    of: tuple[int, ...]
    centres: tuple[SiteMeans | None, ...] | None = None
    scales: tuple[float, ...] | None = None

    def hooks(self, model: Model) -> list[Hook]:
        for directions in self.bases:
            _check_directions(directions, model)
        given = len(self.bases)
        if any(extra is not None and len(extra) != given for extra in (self.centres, self.scales)):
            raise ValueError(f"There are {given} sets of directions; give each one centre and one scale, or give none.")
        parts = [_basis(directions, model) for directions in self.bases]
        together = torch.cat(parts, 1)
        counts = torch.tensor([part.shape[1] for part in parts], device=model.device)
        owner = torch.arange(given, device=model.device).repeat_interleave(counts)
        scales = torch.tensor(self.scales or [1.0] * given, device=model.device)
        along = torch.zeros(model.layers, len(READ_AND_WRITTEN), together.shape[1], device=model.device)
        if self.centres is not None:  # each direction's component that is left, at every site
            each = [_centre(c, model) @ part for c, part in zip(self.centres, parts, strict=True)]
            along = torch.cat(each, -1)
            LEDGER.add(2 * along.numel() * model.width)

        def at(layer: int, site: int) -> Any:
            def project(a: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
                assert model.current is not None, "rows are told apart by the batch that is read"
                LEDGER.add(4 * a.numel() * together.shape[1])
                d, of = together.to(a.dtype), torch.tensor([self.of[row] for row in model.current.rows]).to(a.device)
                share = (owner == of[:, None]) * scales[owner]  # [row, k]
                return a - ((a @ d - along[layer, site].to(a.dtype)) * share.to(a.dtype)[:, None]) @ d.T

            return project

        return [(point, at(*place)) for point, place in _sites(model)]


def _sites(model: Model) -> list[tuple[str, tuple[int, int]]]:
    """Every hook point at which is read and written, with its block and the number of its site."""
    return [
        (f"blocks.{layer}.{name}", (layer, site))
        for layer in range(model.layers)
        for site, name in enumerate(READ_AND_WRITTEN)
    ]


def _check_directions(directions: Float[Tensor, ...], model: Model) -> None:
    if directions.ndim != 2 or directions.shape[1] != model.width:
        raise ValueError(f"Directions have shape {tuple(directions.shape)}; {model.name} needs (k, {model.width}).")


def _centre(centre: Float[Tensor, ...] | None, model: Model) -> SiteMeans:
    """A centre on the model's device; zero for none."""
    shape = (model.layers, len(READ_AND_WRITTEN), model.width)
    if centre is None:
        return torch.zeros(shape, device=model.device)
    if centre.shape != shape:
        raise ValueError(f"A centre has shape {tuple(centre.shape)}; {model.name} needs {shape}.")
    return centre.float().to(model.device)


def _basis(directions: Float[Tensor, "k d_model"], model: Model) -> Float[Tensor, "d_model rank"]:
    """Orthonormal columns with the span of directions that may depend on each other."""
    if not len(directions):
        return torch.zeros(model.width, 0, device=model.device)
    left, size, _ = torch.linalg.svd(directions.float().T.to(model.device), full_matrices=False)
    return left[:, size > 1e-5 * size.max()]


def alike(interventions: Iterable[Intervention], count: int) -> list[int] | None:
    """A number for each of `count` rows, the same for rows in which the same is done at every position.

    None if what is done depends on positions, so that a beginning cannot be read before the rest of a sequence.
    """
    keys: list[tuple[int, ...]] = [()] * count
    for intervention in interventions:
        if isinstance(intervention, AblateRows):
            keys = [(*key, of) for key, of in zip(keys, intervention.of, strict=True)]
        elif not (
            isinstance(intervention, Ablate | AblateAffine)
            or (isinstance(intervention, Steer) and intervention.where == "all")
        ):
            return None
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


EditMode = Literal["neutralise", "attenuate", "amplify"]


def edit_component(
    gradient: Float[Tensor, "*batch d_model"],
    direction: Float[Tensor, " d_model"],
    mode: EditMode,
) -> Float[Tensor, "*batch d_model"]:
    """Replace the component of a gradient along a direction, leaving the rest alone.

    Descent moves activations along minus the gradient. `neutralise` removes the component; `attenuate` makes it
    +|g.v|, so that descent lowers the activation along v; `amplify` makes it -|g.v|. The three modes are the
    paper's (Fig. 15, Table 1 of arXiv 2604.16423); the magnitude rule is a reconstruction.
    """
    unit = (direction / direction.norm()).to(gradient)
    along = (gradient @ unit)[..., None]
    target = {
        "neutralise": torch.zeros_like(along),
        "attenuate": along.abs(),
        "amplify": -along.abs(),
    }
    if mode not in target:
        raise ValueError(f"Unknown mode '{mode}': use neutralise, attenuate or amplify.")
    return gradient + (target[mode] - along) * unit


@dataclass(frozen=True)
class EditGradient:
    """Edit dL/dh along `direction` after block `layer` in the backward pass; the forward pass is untouched."""

    layer: int
    direction: Float[Tensor, " d_model"]
    mode: EditMode

    def hooks(self, model: Model) -> list[Hook]:
        direction = self.direction.to(model.device)
        edit_component(
            torch.zeros(1, model.width, device=model.device), direction, self.mode
        )  # a wrong mode stops here

        def watch(h: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            if h.requires_grad:
                h.register_hook(lambda g: edit_component(g, direction, self.mode))

        return [(resid_post(model, self.layer), watch)]
