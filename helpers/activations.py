"""Reading activations: streaming means over tokens, and persona vectors fitted from them.

A persona vector is the mean activation over the response tokens of trait answers minus that of normal answers, at every
layer (Chen et al. 2025, arXiv 2507.21509). Only running sums are kept: memory does not grow with the number of answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.chat import Example, Where
from helpers.forward import only_blocks, read, read_beginning, shareable_beginning
from helpers.interventions import Hook, Intervention, applied, resid_post
from helpers.models import Model


@dataclass(frozen=True)
class ReadMean:
    """Collect each sequence's mean activation over `where` at `layers`, into `means`: layer -> (batch, d_model)."""

    layers: Sequence[int]
    where: Where
    means: dict[int, Float[Tensor, "batch d_model"]]

    def hooks(self, model: Model) -> list[Hook]:
        def reader(layer: int) -> Any:
            def read(h: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
                assert model.current is not None
                mask = model.current.positions(self.where)[:, -h.shape[1] :, None].to(torch.float32)
                self.means[layer] = (h.float() * mask).sum(1) / mask.sum(1)

            read.reads_parts = self.where == "response"  # type: ignore[attr-defined]
            return read

        return [(resid_post(model, layer), reader(layer)) for layer in self.layers]


@torch.no_grad()
def mean_activations(
    model: Model,
    examples: Sequence[Example],
    *,
    layers: Sequence[int] | None = None,
    where: Where = "response",
    interventions: Iterable[Intervention] = (),
    batch_size: int = 32,
) -> Float[Tensor, "layer example d_model"]:
    """Each example's mean residual-stream activation over `where`, at every layer or those named, on the CPU."""
    layers = range(model.layers) if layers is None else layers
    result = torch.empty(len(layers), len(examples), model.width)
    means: dict[int, Tensor] = {}
    once = model.weights_in(model.dtype, only_frozen_linear=True)
    with once, applied(model, *interventions, ReadMean(layers, where, means)), only_blocks(model, 0, max(layers)):
        for batch in model.batches(examples, batch_size):
            batch = batch.to(model.device)
            with model.autocast():
                shared = shareable_beginning(model, batch)
                begun = read_beginning(model, batch.ids[0, :shared].tolist()) if shared else None
                with model.reading(batch):
                    read(model, batch.after(shared), after=begun)
            for i, layer in enumerate(layers):
                result[i, list(batch.rows)] = means[layer].cpu()
    return result


@dataclass(frozen=True)
class PersonaVector:
    """A trait's direction at every layer, as a raw (not normalised) difference of means."""

    trait: str
    vectors: Float[Tensor, "layer d_model"]

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The raw vector at the output of block `layer`."""
        return self.vectors[layer]

    def random_like(self, seed: int) -> PersonaVector:
        """Gaussian vectors of the same norm at every layer: the control for "any push of this size would do"."""
        noise = torch.randn(self.vectors.shape, generator=torch.Generator().manual_seed(seed))
        scale = self.vectors.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        return PersonaVector(f"random-{seed}", noise * scale)

    def projection(self, activations: Float[Tensor, "example d_model"], layer: int) -> Float[Tensor, " example"]:
        """(a . v) / ||v||, in units of the residual stream."""
        return activations @ self.vectors[layer] / self.vectors[layer].norm()

    def save(self, path: Path | str) -> None:
        from safetensors.torch import save_file

        save_file({"vectors": self.vectors.contiguous()}, str(path), metadata={"trait": self.trait})

    @classmethod
    def load(cls, path: Path | str) -> PersonaVector:
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            return cls(file.metadata()["trait"], file.get_tensor("vectors"))


class PersonaVectorFitter:
    """Accumulates sums of response-mean activations; `fit()` gives the frozen `PersonaVector`."""

    def __init__(self, trait: str) -> None:
        self.trait = trait
        self._sums = [torch.zeros(()), torch.zeros(())]
        self._counts = [0, 0]

    def update(
        self,
        activations: Float[Tensor, "layer example d_model"],
        *,
        shows_trait: bool,
    ) -> None:
        """Add answers that show the trait, or answers that do not."""
        self._sums[shows_trait] = self._sums[shows_trait] + activations.cpu().double().sum(1)
        self._counts[shows_trait] += activations.shape[1]

    def fit(self) -> PersonaVector:
        """mean over trait answers - mean over normal answers. Raises `ValueError` if either kind is missing."""
        if 0 in self._counts:
            raise ValueError(
                f"A persona vector needs answers of both kinds; got {self._counts[1]} with the "
                f"trait and {self._counts[0]} without."
            )
        normal, trait = (s / n for s, n in zip(self._sums, self._counts, strict=True))
        return PersonaVector(self.trait, (trait - normal).float())
