"""What is read of one model, as arrays: from the stages that read it to the measurements, which see no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from helpers.studies.alignment import Behaviour

Means = Float[np.ndarray, "sequence d_model"]
Margins = Float[np.ndarray, "_ pair"]
Curves = Float[np.ndarray, "place scale pair"]


@dataclass(frozen=True)
class Gradients:
    """Mean activation gradients of held-out trait answers at one block, and the persona vector there."""

    plain: Means
    pps: Means
    """With the persona vector added at the intensity a*."""
    ip: Means
    """With an eliciting system message."""
    vector: Float[np.ndarray, " d_model"]


@dataclass(frozen=True)
class States:
    """The stream at the last token of harmful requests (label 1) and paired ones (0), and their lengths in tokens."""

    train: Float[np.ndarray, "train d_model"]
    train_harmful: Float[np.ndarray, " train"]
    test: Float[np.ndarray, "test d_model"]
    test_harmful: Float[np.ndarray, " test"]
    train_lengths: Float[np.ndarray, "train 1"]
    test_lengths: Float[np.ndarray, "test 1"]


@dataclass(frozen=True)
class Readings:
    """All that is read of one model."""

    slopes: Float[np.ndarray, "coefficient sequence"]
    """dL/da along the persona vector."""
    gradients: Gradients
    margins: Mapping[str, Margins]
    """By what is asked: "none", "eliciting", "placebo"."""
    steering: Mapping[str, Curves]
    """By place (the prompt's tokens, all) and scale: "gain" in margin, and "kl" elsewhere."""
    card: Mapping[str, Behaviour]
    """What the start model does with test requests, by kind."""
    attacked: Mapping[str, Behaviour]
    """The same without one direction."""
    states: States
