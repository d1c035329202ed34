"""The models that `make models` fetches, where they are: held as they are stored, and computing what float32 would.

Each test is skipped where the store has not got the model; neither the book nor its other tests need one.
"""

import json
import subprocess
import sys

import pytest
import torch

from helpers.artifacts import default_store
from helpers.chat import encode
from helpers.losses import evaluate_losses
from helpers.models import LoRA, load, plain_model
from helpers.registry import REGISTRY, is_here

FETCHED = [card for card in REGISTRY.values() if card.fetched]
SMALL = "qwen2.5-coder-0.5b-instruct"
MEASURED = """
import json, resource
from helpers.models import load
model = load({name!r}, weights="frozen", dtype="bfloat16")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([model.layers, model.width, model.digest, peak]))
"""
LIMITS = {24: 3e9, 28: 8e9}
"""Bytes that loading may take, by the number of blocks."""


def needed(name):
    if not is_here(REGISTRY[name], default_store()):
        pytest.skip(f"{name} is not in the store: {REGISTRY[name].remedy}")


@pytest.mark.parametrize("card", FETCHED, ids=lambda card: card.name)
def test_a_model_is_what_its_card_says_and_loads_in_little_memory(card):
    needed(card.name)
    command = [sys.executable, "-c", MEASURED.format(name=card.name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    layers, width, digest, peak = json.loads(done.stdout.splitlines()[-1])
    assert (layers, width, digest) == (card.layers, card.width, card.digest)
    assert peak < LIMITS[card.layers]


def test_weights_held_in_bfloat16_give_what_float32_gives_under_autocast():
    needed(SMALL)
    held = load(SMALL, weights="frozen", dtype="bfloat16")
    linear = held.hf.model.layers[0].mlp.up_proj.weight
    assert linear.dtype == held.hf.lm_head.weight.dtype == torch.bfloat16
    assert held.hf.model.embed_tokens.weight.dtype == torch.float32
    examples = [encode(held.tokenizer, *pair) for pair in (("Why?", "So."), ("What is red?", "A rose."))]
    found = evaluate_losses(held, examples)
    del held
    exact = load(SMALL, dtype="bfloat16")
    assert all(p.dtype == torch.float32 and p.requires_grad for p in exact.hf.parameters())
    assert torch.equal(found, evaluate_losses(exact, examples))


def test_adapters_are_float32_over_weights_that_are_not():
    needed(SMALL)
    model = load(SMALL, dtype="bfloat16", lora=LoRA(2))
    assert {p.dtype for p in model.trained_parameters().values()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in model.hf.parameters()}


def test_the_head_of_a_quantized_model_is_its_own_and_its_template_speaks_for_it():
    needed(SMALL)
    hf, tokenizer = plain_model(SMALL)
    assert hf.lm_head.weight is not hf.model.embed_tokens.weight
    assert not torch.equal(hf.lm_head.weight, hf.model.embed_tokens.weight)
    asked = tokenizer.decode(encode(tokenizer, "Why?").ids)
    assert asked.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    assert asked.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
