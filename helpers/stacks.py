"""Many LoRA runs in one pass: their factors are stacked, and each run has its own rows of a batch.

Context. A small model leaves a GPU idle: most of a training step is the launching of kernels. Runs that share a base
model differ in their adapters alone, so they can share the base model's pass (PLoRA, arXiv 2508.02932).

Intuition. A batch holds as many rows for every run, run after run. The base model's product is one for all rows; the
adapters' are two batched products, run k's rows with run k's factors. Nothing else mixes rows, so a run trained beside
others is the run trained alone, but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers.flop import count_product


class StackedLinear(nn.Module):
    """A frozen linear layer under the adapters of R runs: y = W x + s B_k A_k x in the rows of run k."""

    def __init__(
        self,
        base_layer: nn.Linear,
        a: Float[Tensor, "run rank in"],
        b: Float[Tensor, "run out rank"],
        scale: float,
    ) -> None:
        super().__init__()
        self.base_layer, self.scale = base_layer, scale
        self.lora_A, self.lora_B = (nn.ModuleDict({"default": _Factor(factor)}) for factor in (a, b))

    @property
    def weight(self) -> Tensor:
        """The base layer's, as PEFT's layers have it."""
        return self.base_layer.weight

    def forward(self, x: Float[Tensor, "row pos in"]) -> Float[Tensor, "row pos out"]:
        out: Tensor = self.base_layer(x)
        a, b = (cast(Tensor, factors["default"].weight) for factors in (self.lora_A, self.lora_B))
        if len(x) % len(a):
            raise ValueError(f"{len(x)} rows cannot be dealt to {len(a)} runs; give every run as many.")
        grouped = x.reshape(len(a), -1, x.shape[-1])  # [row, pos, in] -> [run, row pos, in]
        low = torch.bmm(grouped, a.mT)
        count_product(low, (grouped, a), 2 * low.numel() * a.shape[2])
        high = torch.bmm(low, b.mT)  # [run, row pos, out]
        count_product(high, (low, b), 2 * high.numel() * b.shape[2])
        return out + high.view_as(out) * self.scale


class _Factor(nn.Module):
    """Holds a factor under the name that PEFT gives it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def runs_at_once(hf: Any, device: torch.device, tokens: int, rank: int) -> int:
    """How many LoRA runs a device's free memory holds in a stack, each with `tokens` tokens a step; 1 on a CPU.

    A CPU has work enough with one run. Elsewhere a token keeps, for the way back, about sixteen vectors of the stream,
    five of the MLP's inside and its logits, in float32 thrice; a run has its factors four times (with their gradient
    and what AdamW keeps). That is an upper estimate, and a fifth of the memory stays free.
    """
    if device.type != "cuda":
        return 1
    config = hf.config.get_text_config()
    token = 4 * (config.num_hidden_layers * (16 * config.hidden_size + 5 * config.intermediate_size))
    token += 3 * 4 * config.vocab_size
    linear = [m for m in hf.modules() if isinstance(m, nn.Linear)]
    factors = sum(4 * 4 * rank * (m.in_features + m.out_features) for m in linear)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(0.8 * free) // (tokens * token + factors))


def stack_adapters(hf: Any, runs: Sequence[Mapping[str, Tensor]], scale: float) -> None:
    """Put the factors of several runs on a plain model's linear layers, and freeze all else.

    `runs` are in PEFT's saved format, `{layer}.lora_A.default.weight` and `...lora_B...`: what `trained_tensors` gives
    of a run, and `run_tensors` of a stack. Raises `ValueError` for factors that are not all of the same layers and
    shapes.
    """
    hf.requires_grad_(False)
    names = sorted({name.partition(".lora_")[0] for name in runs[0]})
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError("The runs of a stack adapt different layers; stack runs of one base model and recipe.")
    for name in names:
        try:
            a, b = (torch.stack([run[f"{name}.lora_{factor}.default.weight"] for run in runs]) for factor in "AB")
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"The factors of {name} cannot be stacked ({error}); give runs of one rank.") from None
        around, _, own = name.rpartition(".")
        layer = hf.get_submodule(name)
        place = layer.weight.device
        setattr(hf.get_submodule(around), own, StackedLinear(layer, a.to(place), b.to(place), scale))


def run_tensors(tensors: Mapping[str, Tensor], run: int) -> dict[str, Tensor]:
    """One run's factors out of a stack's `trained_tensors`, in PEFT's saved format."""
    return {name: stacked[run].clone() for name, stacked in tensors.items()}
