"""Counts a model's floating point operations where they happen.

A product of an m x k matrix with a k x n matrix takes 2 m k n of them. Going back takes as many again for each of the
two whose gradient is asked for.

What is counted are the matrix products of models: linear layers (adapters too) and attention. Norms, activations and
what NumPy and scikit-learn compute are not, as in `torch.utils.flop_counter`; unlike that counter this one looks at
modules and not at every operation, so that it may stay on always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from helpers.cost import LEDGER


@dataclass(frozen=True)
class Shapes:
    """What decides the operations of a model's pass over given tokens."""

    linear: Mapping[str, tuple[int, int]]
    """Each linear layer -> the shape of its weight, out and in, under its name in the plain model."""
    attention: int
    """Heads times their width."""


def shapes_of(hf: Any) -> Shapes:
    """A plain model's, which may be one without weights (on torch's device "meta")."""
    config = hf.config.get_text_config()
    wide = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = {n: (m.out_features, m.in_features) for n, m in hf.named_modules() if isinstance(m, nn.Linear)}
    return Shapes(linear, config.num_attention_heads * wide)


def count(hf: Any) -> None:
    """Have a model that TransformerLens has wrapped add its operations to `LEDGER`, whatever reads it.

    A model that stands for a wider one (`helpers.rehearsal`) has that one's shapes as `stands_for`.
    """
    real: Shapes | None = getattr(hf, "stands_for", None)
    for name, module in hf.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(partial(_linear, _shape(module, name, real)))
    width = (real or shapes_of(hf)).attention
    for number, block in enumerate(hf.base_model.layers):
        plain = getattr(block, "_original_component", block)  # what an intervention cuts off after it is not gone back
        plain.register_forward_hook(partial(_attention, number, width), with_kwargs=True)


def _shape(module: nn.Linear, name: str, real: Shapes | None) -> tuple[int, int]:
    """What a layer's weight is counted as; the factors of an adapter keep their rank."""
    own = (module.out_features, module.in_features)
    if real is None:
        return own
    around, adapter, factor = name.replace("._original_component", "").removesuffix(".base_layer").partition(".lora_")
    out, given = real.linear[around]
    return (out, given) if not adapter else (own[0], given) if factor.startswith("A") else (out, own[1])


def _linear(shape: tuple[int, int], module: nn.Linear, given: tuple[Tensor, ...], out: Tensor) -> None:
    count_product(out, (given[0], module.weight), 2 * (out.numel() // out.shape[-1]) * shape[0] * shape[1])


def count_product(out: Tensor, sides: tuple[Tensor, Tensor], operations: int) -> None:
    """Count a matrix product that gave `out`, and when gradients go back through it, those for its two sides."""
    LEDGER.add(operations * (1 + sum(map(_moves, sides))))
    if out.requires_grad:
        # nodes of the graph, not tensors: a frozen layer's input must not be kept for this
        nodes = [get_gradient_edge(side).node for side in sides if side.requires_grad]
        out.register_hook(lambda _: LEDGER.add(operations * sum(map(_is_asked_for, nodes))))


def _attention(
    number: int, width: int, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any
) -> None:
    """Scores and their mix of values: two products over all pairs of positions."""
    states = out if isinstance(out, Tensor) else out[0]
    rows, queries = states.shape[:2]
    cache = named.get("past_key_values")
    keys = queries if cache is None else cache.get_seq_length(number)
    products = 2 * 2 * rows * queries * keys * width
    LEDGER.add(products * (3 if _moves(states) else 1))
    if states.requires_grad:
        states.register_hook(lambda _: LEDGER.add(2 * products))


def _moves(x: Tensor) -> bool:
    """Whether a tensor carries a derivative along with it: forward-mode differentiation multiplies that as well."""
    return forward_ad.unpack_dual(x).tangent is not None


def _is_asked_for(node: Any) -> bool:
    """Whether the backward pass that runs now goes on to this node."""
    try:
        return bool(torch._C._will_engine_execute_node(node))  # what torch's own hooks over many tensors ask
    except RuntimeError:  # it is what `torch.autograd.grad` was asked for
        return True
