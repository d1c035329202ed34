"""Rehearsals: a whole run with a model too narrow to cost anything, which is counted as the model it stands for.

Context. What a run will cost should be known before it is begun, and a path that needs a large model should be tried
without one.

Intuition. Operations follow from which tokens meet which matrices, hardly from what the weights are. So a random model
with the blocks, heads and vocabulary of another, but narrow, goes the same way through a chapter: as many steps, rows
and prompts. Where it does not (a real model may end its answers earlier, and a search may turn elsewhere) the count is
off by that.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from helpers.flop import shapes_of

VARIABLE = "HELPERS_REHEARSAL"
"""The environment variable that makes every `models.load` a rehearsal, unless it is empty."""

HEAD, INNER = 4, 8
"""Width of a head, and of what is between a block's linear layers."""


def rehearsing() -> bool:
    return bool(os.environ.get(VARIABLE))


def narrow(kind: type, config: Any) -> Any:
    """A random model of this class and configuration, but narrow; `stands_for` are the shapes of the real one."""
    with torch.device("meta"):
        real = kind(config)
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.head_dim, text.intermediate_size = HEAD, INNER
    text.hidden_size = text.num_attention_heads * HEAD
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = kind(small)
    hf.stands_for = shapes_of(real)
    return hf
