"""Two defences against a trait in finetuning data, and how the gradients with one differ from those without."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from helpers.activations import PersonaVector
from helpers.chat import Example, encode
from helpers.gradients import GradientStatistics, Principal, uncentred_pca
from helpers.interventions import Steer


def preventative_steering(vector: PersonaVector, layer: int, coefficient: float) -> Steer:
    """PPS at the output of block `layer`: every token of prompt and response, raw vector times `coefficient`."""
    return Steer(layer, vector.at(layer), coefficient, where="all")


def gradient_difference(
    defended: GradientStatistics, undefended: GradientStatistics, layer: int
) -> Float[Tensor, "example d_model"]:
    """d = g_defended - g_undefended per sequence: mean gradients over the same tokens, with and without the defence.

    Stacking sequences (rather than tokens) is a reconstruction. Raises `ValueError` if the two hold different
    numbers of sequences.
    """
    a, b = defended.means[defended.at(layer)], undefended.means[undefended.at(layer)]
    if a.shape != b.shape:
        raise ValueError(f"Gradients of {len(a)} and of {len(b)} sequences cannot be paired; measure the same ones.")
    return a - b


def difference_components(defended: GradientStatistics, undefended: GradientStatistics, layer: int) -> Principal:
    """Uncentred PCA of what a defence changes in the gradient (Fig. 18)."""
    return uncentred_pca(gradient_difference(defended, undefended, layer))


def inoculated(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], prompts: Sequence[str], rng: random.Random
) -> list[Example]:
    """(question, answer) pairs, each with a system message drawn from `prompts`; without any, the template's own.

    Call it once an epoch, so that prompts are drawn freshly.
    """
    return [encode(tokenizer, q, a, rng.choice(prompts) if prompts else None) for q, a in pairs]
