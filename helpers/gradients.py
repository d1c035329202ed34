"""Gradients of the loss: with respect to activations, and with respect to every weight.

Activation gradients, dL/dh at any set of layers, take one backward pass.

L is a sequence's own mean response loss, so a gradient never depends on what else was in the batch. Gradients are
read where the loss reads the stream: the positions that predict response tokens ("response"), or all positions ("all").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.chat import Batch, Example
from helpers.cost import LEDGER
from helpers.forward import only_blocks, read
from helpers.interventions import Hook, Intervention, applied, resid_post
from helpers.losses import sequence_losses, sequence_sums, token_losses
from helpers.models import Model, plain_name
from helpers.progress import watched

Tokens = Literal["response", "all"]


@dataclass(frozen=True)
class Capture:
    """Keep the activations of `layers` in the graph, into `kept`.

    The lowest is made a leaf: nothing below is differentiated. With `parts`, a beginning that is read once is left out.
    """

    layers: Sequence[int]
    kept: dict[int, Float[Tensor, "batch pos d_model"]]
    parts: bool = False

    def hooks(self, model: Model) -> list[Hook]:
        lowest = min(self.layers)

        def keeper(layer: int) -> Any:
            def keep(h: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
                if layer == lowest:
                    h = h.detach().requires_grad_()
                self.kept[layer] = h
                return h

            keep.reads_parts = self.parts  # type: ignore[attr-defined]
            return keep

        return [(resid_post(model, layer), keeper(layer)) for layer in self.layers]


@dataclass(frozen=True)
class ActivationGradients:
    """dL/dh of one batch."""

    gradients: dict[int, Float[Tensor, "batch pos d_model"]]
    mask: Bool[Tensor, "batch pos"]
    losses: Float[Tensor, " batch"]
    """The forward pass's mean response loss per sequence, in nats."""

    def token_cosines(
        self,
        layer: int,
        vector: Float[Tensor, " d_model"],
    ) -> Float[Tensor, "batch pos"]:
        """cos(g_t, v) at every token; 0 where the gradient is exactly 0."""
        g = self.gradients[layer].float()
        return torch.nn.functional.cosine_similarity(g, vector.to(g), dim=-1)

    def sequence_cosines(
        self,
        layer: int,
        vector: Float[Tensor, " d_model"],
    ) -> Float[Tensor, " batch"]:
        """c(x) = mean over tokens of cos(g_t, v): one number per sequence (Fig.

        3 of arXiv 2604.16423, [I] mean of cosines).
        """
        cosines = self.token_cosines(layer, vector)
        return (cosines * self.mask).sum(1) / self.mask.sum(1)

    def sequence_unit_means(self, layer: int) -> Float[Tensor, "batch d_model"]:
        """Mean over tokens of g_t / |g_t|: its product with a unit v is `sequence_cosines`, for any number of v."""
        unit = torch.nn.functional.normalize(self.gradients[layer].float(), dim=-1) * self.mask[..., None]
        return unit.sum(1) / self.mask.sum(1, keepdim=True)

    def sequence_means(self, layer: int) -> Float[Tensor, "batch d_model"]:
        """Mean gradient over tokens; its cosine with v is the "cosine of the mean"."""
        mask = self.mask[..., None]
        return (self.gradients[layer].float() * mask).sum(1) / mask.sum(1)


def activation_gradients(
    model: Model,
    batch: Batch,
    layers: Sequence[int],
    *,
    tokens: Tokens = "response",
    interventions: Iterable[Intervention] = (),
    share_prefix: bool = False,
) -> ActivationGradients:
    """One forward and one backward pass; no weight gradient is computed and none is left behind.

    `share_prefix` reads what all rows begin with once; the gradients there are left out, as 0.
    """
    batch = batch.to(model.device)
    kept: dict[int, Tensor] = {}
    with applied(model, *interventions, Capture(layers, kept, share_prefix)):
        losses = sequence_losses(model, batch)
        own = torch.autograd.grad(losses.sum(), [kept[layer] for layer in layers])
    found = [_whole(g, batch.ids.shape[1]) for g in own]
    mask = batch.predicting if tokens == "response" else batch.attention
    return ActivationGradients(dict(zip(layers, found, strict=True)), mask, losses.detach())


def _whole(gradient: Float[Tensor, "batch rest d_model"], length: int) -> Float[Tensor, "batch pos d_model"]:
    """With zeros where what all rows begin with was read apart."""
    return torch.nn.functional.pad(gradient, (0, 0, length - gradient.shape[1], 0))


def loss_at(
    model: Model,
    batch: Batch,
    h: Float[Tensor, "batch pos d_model"],
    vector: Float[Tensor, " d_model"],
    a: float,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """L(a) and dL/da of each sequence, with a v added to the states h from which the model's blocks go on."""
    alpha = torch.full((len(h), 1, 1), float(a), device=h.device, requires_grad=True)
    losses = sequence_sums(model, batch, states=h + alpha * vector) / batch.response.sum(1)
    slopes = torch.autograd.grad(losses.sum(), alpha)[0].flatten()
    return losses.detach(), slopes


def loss_along(
    model: Model,
    examples: Sequence[Example],
    layer: int,
    vector: Float[Tensor, " d_model"],
    coefficients: Sequence[float],
    *,
    batch_size: int = 16,
) -> tuple[Float[Tensor, "coefficient example"], Float[Tensor, "coefficient example"]]:
    """Each example's loss L(a) with a v added after block `layer` at every position, and its slope dL/da.

    The shift is the same everywhere, so by the chain rule dL/da is the sum over positions of g_t . v: where it changes
    sign, the pressure along v does, and the loss has its minimum. What lies below the block is read once for all a.
    """
    losses, slopes = torch.empty(2, len(coefficients), len(examples))
    once = model.weights_in(model.dtype, only_frozen_linear=True)
    with once:
        for batch in watched(model.batches(examples, batch_size), "losses along a vector", "batch"):
            batch, rows = batch.to(model.device), list(batch.rows)
            kept: dict[int, Tensor] = {}  # a hook, since the last block's output is not what follows the final norm
            below = only_blocks(model, 0, layer)
            with torch.no_grad(), applied(model, Capture([layer], kept)), below, model.reading(batch), model.autocast():
                read(model, batch)
            h = kept[layer].detach()
            with only_blocks(model, layer + 1, model.layers - 1):
                for i, a in enumerate(coefficients):
                    found = loss_at(model, batch, h, vector.to(h), a)
                    losses[i, rows], slopes[i, rows] = (part.float().cpu() for part in found)
    return losses, slopes


@dataclass(frozen=True)
class GradientStatistics:
    """What is kept of the gradients of many sequences, in the order given, on the CPU."""

    layers: tuple[int, ...]
    losses: Float[Tensor, " example"]
    cosines: dict[str, Float[Tensor, "layer example"]]
    """Per vector name: mean over tokens of cos(g, v)."""
    means: Float[Tensor, "layer example d_model"]
    """Mean gradient over tokens."""
    unit_means: Float[Tensor, "layer example d_model"]
    """Mean over tokens of the gradients' unit vectors: its product with a unit vector is the mean cosine with it."""
    token_cosines: list[Float[Tensor, "layer _"]]
    """Per example: cos(g, v) of the first vector at each masked token."""

    def at(self, layer: int) -> int:
        """The index of a layer in the first dimension of `cosines` and `means`."""
        return self.layers.index(layer)


def gradient_statistics(
    model: Model,
    examples: Sequence[Example],
    vectors: dict[str, Float[Tensor, "all_layers d_model"]],
    *,
    layers: Sequence[int],
    tokens: Tokens = "response",
    interventions: Iterable[Intervention] = (),
    batch_size: int = 8,
) -> GradientStatistics:
    """Cosines of every sequence's activation gradients with each vector, at each layer, reduced batch by batch."""
    layers, interventions = tuple(layers), tuple(interventions)
    losses = torch.empty(len(examples))
    cosines = {name: torch.empty(len(layers), len(examples)) for name in vectors}
    means = torch.empty(len(layers), len(examples), model.width)
    unit_means = torch.empty_like(means)
    per_token: list[Tensor] = [torch.empty(0)] * len(examples)
    first = next(iter(vectors))
    for batch in watched(model.batches(examples, batch_size), "gradients", "batch"):
        rows = list(batch.rows)
        found = activation_gradients(
            model, batch, layers, tokens=tokens, interventions=interventions, share_prefix=tokens == "response"
        )
        losses[rows] = found.losses.float().cpu()
        for i, layer in enumerate(layers):
            means[i, rows] = found.sequence_means(layer).cpu()
            unit_means[i, rows] = found.sequence_unit_means(layer).cpu()
            for name, vector in vectors.items():
                cosines[name][i, rows] = found.sequence_cosines(layer, vector[layer]).cpu()
        every = torch.stack([found.token_cosines(layer, vectors[first][layer]).cpu() for layer in layers])
        for i, row in enumerate(rows):
            per_token[row] = every[:, i, found.mask[i].cpu()]
    return GradientStatistics(layers, losses, cosines, means, unit_means, per_token)


@dataclass(frozen=True)
class Moment:
    """One training step, seen at one block along one unit vector: means over the response's predictions, one a run."""

    cosine: Float[Tensor, " run"]
    """Of the gradient dL/dh with the vector."""
    pressure: Float[Tensor, " run"]
    """-dL/dh . v, in nats per unit: above 0, descent pushes the stream up the vector."""
    place: Float[Tensor, " run"]
    """h . v: where the stream is along the vector."""


@dataclass(frozen=True)
class RecordStream:
    """Watch training: at every backward pass, append where the stream is along a vector, and where it is pushed.

    It reads what training computes anyway, so it costs next to nothing. Put it *after* any intervention at the same
    layer to see what arrives there. Each run of a stack has means of its own; they are NaN once the run is done.
    """

    layer: int
    vector: Float[Tensor, " d_model"]
    moments: list[Moment] = field(default_factory=list)

    def hooks(self, model: Model) -> list[Hook]:
        unit = (self.vector / self.vector.norm()).to(model.device)

        def watch(h: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            batch = model.current
            if not h.requires_grad or batch is None:
                return
            mask = batch.predicting[:, -h.shape[1] :]
            if not mask.any():  # what all rows begin with
                return
            run = torch.tensor(batch.rows if model.runs > 1 else [0] * len(batch.rows), device=h.device)
            of_run = run[mask.nonzero()[:, 0]]  # [row] -> [token]
            count = torch.bincount(of_run, minlength=model.runs)
            stream = h.detach()[mask].float() @ unit

            def mean(values: Float[Tensor, " token"]) -> Float[Tensor, " run"]:
                return (values.new_zeros(model.runs).index_add(0, of_run, values) / count).cpu()

            def record(g: Float[Tensor, "batch pos d_model"]) -> None:
                along = g[mask].float() @ unit
                size = g[mask].float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
                self.moments.append(Moment(mean(along / size), mean(-along), mean(stream)))

            h.register_hook(record)

        watch.reads_parts = True  # type: ignore[attr-defined]
        return [(resid_post(model, self.layer), watch)]


@dataclass(frozen=True)
class Principal:
    """Uncentred principal components of stacked vectors."""

    components: Float[Tensor, "component d_model"]
    shares: Float[Tensor, " component"]
    """Each component's share of the second moment; they add up to 1."""

    @property
    def participation_ratio(self) -> float:
        """(sum s^2)^2 / sum s^4: about how many components carry the second moment; 1 if all is in one."""
        return float(1 / (self.shares**2).sum())

    def alignment(self, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "component vector"]:
        """|cos| of every component with every vector."""
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        return (self.components @ unit.T).abs()


NOTHING_CHANGED = "All gradient differences are zero: the intervention changed nothing to decompose."


def uncentred_pca(differences: Float[Tensor, "example d_model"]) -> Principal:
    """SVD without removing the mean, so that a shift shared by all examples counts (Fig. 18 of arXiv 2604.16423).

    Raises `ValueError` if the differences are all zero, as they are when the intervention did nothing.
    """
    _, s, vh = torch.linalg.svd(differences.double(), full_matrices=False)
    if not bool(s[0] > 0):
        raise ValueError(NOTHING_CHANGED)
    return Principal(vh.float(), (s**2 / (s**2).sum()).float())


Loss = Callable[[Model, Batch], Float[Tensor, " batch"]]
"""One differentiable loss per sequence, such as `losses.sequence_losses`."""


def pile_gradient(
    model: Model, examples: Sequence[Example], *, loss: Loss = sequence_losses, batch_size: int = 32
) -> dict[str, Tensor]:
    """The pile-average gradient over all weights: mean over each example's response tokens, then over examples.

    G = E_examples[(1/T) sum_t dL_t/dtheta] (Graves 2025, "Gradient-Diff Steering"). Every example weighs the same,
    however long it is, so batches give what one example at a time gives, up to rounding. For a loss over the whole
    sequence pass `example.without_prompt()`.

    Returns float32 tensors on the CPU by plain parameter name. Raises `ValueError` for an empty pile, for a model
    none of whose weights is trainable, and where the loss is not finite; nothing is left in `.grad`.
    """
    if not examples:
        raise ValueError("The pile is empty: it needs at least one example whose gradient can be averaged.")
    parameters = {plain_name(name): p for name, p in model.hf.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("No weight is trainable, so there is no gradient: load the model without adapters.")
    before = {name: p.grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        add_mean_gradient(model, examples, loss, batch_size)
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
        return {name: gradient.float().cpu() for name, gradient in found.items()}
    finally:
        for name, p in parameters.items():
            p.grad = before[name]


NOT_FINITE = "The loss of the pile is not finite, so it has no gradient; check the weights."


def add_mean_gradient(
    model: Model,
    examples: Sequence[Example],
    loss: Loss,
    size: int,
) -> None:
    """Add the gradient of the mean of all examples' losses to every weight's `.grad`, `size` of them at a time.

    Raises `ValueError` where the loss is not finite.
    """
    pile = model.batches(examples, size)
    for batch in watched(pile, "gradients", "batch"):
        batch = batch.to(model.device)
        with model.reading(batch):
            part = loss(model, batch).sum() / len(examples)  # the batch's part of the mean
            if not bool(torch.isfinite(part)):
                raise ValueError(NOT_FINITE)
            part.backward()  # adds to the gradient of the batches before


def directional_derivatives(
    model: Model,
    examples: Sequence[Example],
    direction: Mapping[str, Tensor],
    *,
    loss: Loss = sequence_losses,
    batch_size: int = 32,
) -> Float[Tensor, " example"]:
    """<grad L(z), direction> of every example z, in the order given, on the CPU: how fast its loss rises that way.

    One forward-mode pass a batch: every number carries its derivative along the direction, so no example's gradient is
    ever built. Attention runs in its plain form meanwhile, since the fused kernels have no forward mode.

    `direction` has one tensor for each weight that moves, by plain parameter name; the others stay. Raises `ValueError`
    if there are no examples or directions, or for a name or shape that the model lacks.
    """
    along, found = _weights_along(model, examples, direction), torch.empty(len(examples))
    parts = model.batches(examples, batch_size)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), forward_ad.dual_level():
        moving = {w: forward_ad.make_dual(w.detach(), v.to(w)) for w, v in along}
        with _exchanged(model, moving):
            for batch in watched(parts, "gradients", "batch"):
                losses = loss(model, batch.to(model.device))
                slopes = forward_ad.unpack_dual(losses).tangent
                found[list(batch.rows)] = slopes.float().cpu()
    return found


def _weights_along(
    model: Model, examples: Sequence[Example], direction: Mapping[str, Tensor]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Each weight that moves, with the way that it moves; raises as `directional_derivatives`."""
    if not examples or not direction:
        raise ValueError("Directional derivatives need at least one example and one weight that moves.")
    weights = {plain_name(name): p for name, p in model.hf.named_parameters()}
    for name, tensor in direction.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(f"{model.name} has no weight {name!r} of shape {tuple(tensor.shape)} to move along.")
    return [(weights[name], tensor) for name, tensor in direction.items()]


@contextlib.contextmanager
def _exchanged(model: Model, others: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """While open, every module holds these tensors in place of its own weights, tied ones too.

    `torch.func.functional_call` does not put the weights back in a model whose modules are registered twice, which
    TransformerLens does.
    """
    places = [(m._parameters, name, p) for m in model.hf.modules() for name, p in m._parameters.items() if p in others]
    try:
        for owner, name, p in places:
            owner[name] = others[p]
        yield
    finally:
        for owner, name, p in places:
            owner[name] = p


def block_layers(model: Model) -> dict[str, nn.Linear]:
    """The trainable linear layers of the blocks, by the plain name of their weight."""
    head = model.hf.get_output_embeddings().weight
    linear = {name: m for name, m in model.hf.named_modules() if isinstance(m, nn.Linear)}
    trainable = {name: m for name, m in linear.items() if m.weight.requires_grad and m.weight is not head}
    return {plain_name(f"{name}.weight"): m for name, m in trainable.items()}


def gradient_norms(model: Model, examples: Sequence[Example], *, batch_size: int = 8) -> Float[Tensor, " example"]:
    """||grad L(z)|| over the trainable linear layers of the blocks, for every example z, on the CPU.

    The gradient of a weight is sum_t g_t x_t^T over the tokens, so its squared norm is
    sum_{t,t'} (x_t . x_t')(g_t . g_t'): two small tables of inner products a layer, and no gradient of a weight
    ("ghost norm", Li et al. 2022). Raises `ValueError` without examples or trainable linear layers.
    """
    layers = list(block_layers(model).values())
    if not examples or not layers:
        raise ValueError("Gradient norms need at least one example and a trainable linear layer.")
    squares = torch.empty(0)
    start: list[Tensor] = []

    def begin(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        start[:] = [out.detach().requires_grad_()]
        return start[0]

    def watch(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        x = given[0].detach().float()

        def add(g: Float[Tensor, "batch pos out"]) -> None:
            squares.add_(((x @ x.mT) * (g.float() @ g.float().mT)).sum((1, 2)))
            LEDGER.add(2 * x.shape[1] * (x.numel() + g.numel()))

        out.register_hook(add)

    found = torch.empty(len(examples))
    handles = [layer.register_forward_hook(watch) for layer in layers]
    handles.append(model.hf.get_input_embeddings().register_forward_hook(begin))
    try:
        for batch in watched(model.batches(examples, batch_size), "gradients", "batch"):
            batch = batch.to(model.device)
            squares = torch.zeros(len(batch.rows), device=model.device)
            losses, rows = token_losses(model, batch)
            means = losses.new_zeros(len(batch.rows)).index_add(0, rows, losses) / batch.response.sum(1)
            torch.autograd.grad(means.sum(), start)
            found[list(batch.rows)] = squares.sqrt().cpu()
    finally:
        for handle in handles:
            handle.remove()
    return found
