"""The same promises on a CUDA device: parity, bfloat16 by autocast, steering during generation.

On the tiny model, and once on the embedded one. Everything here is skipped, and says so, where there is no such device.
"""

import pytest
import torch

from helpers.chat import batches, collate, encode
from helpers.corpora import load_trait, split
from helpers.generation import generate
from helpers.gradients import activation_gradients
from helpers.interventions import Steer
from helpers.losses import evaluate_losses
from helpers.models import LoRA, load, plain_model
from helpers.training import finetune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("exact_products"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]

NAMES = ["tiny-random", "smollm2-135m-instruct"]


def conversations(model, count=4):
    rows = split(load_trait("evil"), "eval")[:count]
    return [encode(model.tokenizer, row.question, row.strong) for row in rows]


def test_the_device_and_its_precision_are_chosen_without_being_named():
    model = load("tiny-random")
    assert model.device.type == "cuda"
    assert all(p.device.type == "cuda" for p in model.hf.parameters())
    assert model.dtype == (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_exactly_those_of_the_plain_model(name):
    model, plain = load(name, dtype="float32"), plain_model(name)[0].cuda()
    batch = collate(conversations(model, 2), model.tokenizer.pad_token_id).to(model.device)
    outputs = []
    for block in plain.model.layers:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    last = plain.model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)[0]
    logits = plain.lm_head(last[batch.predicting])
    losses = torch.nn.functional.cross_entropy(logits, batch.ids[batch.response], reduction="none")
    rows = batch.predicting.nonzero()[:, 0]
    means = torch.zeros(2, device="cuda").index_add(0, rows, losses) / batch.response.sum(1)
    expected = torch.autograd.grad(means.sum(), outputs)
    found = activation_gradients(model, batch, range(model.layers))
    torch.testing.assert_close(found.losses, means.detach())  # the order of a sum on a GPU may vary
    assert all(torch.equal(found.gradients[layer], expected[layer]) for layer in range(model.layers))
    with torch.no_grad():
        inputs = {"input_ids": batch.ids, "attention_mask": batch.attention.long()}
        assert torch.equal(model.hf(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("name", NAMES)
def test_the_device_agrees_with_the_processor(name):
    on_device, on_cpu = load(name, dtype="float32"), load(name, device="cpu", dtype="float32")
    examples = conversations(on_cpu)
    torch.testing.assert_close(
        evaluate_losses(on_device, examples), evaluate_losses(on_cpu, examples), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("lora", [None, LoRA(8)])
def test_bfloat16_training_steered_keeps_float32_weights_and_follows_float32(lora):
    logs = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = load("smollm2-135m-instruct", dtype=dtype, lora=lora)
        vector = torch.randn(model.width, generator=torch.Generator().manual_seed(0))
        given = batches(conversations(model, 8), 4, model.tokenizer.pad_token_id)
        log = finetune(model, given, steps=2, learning_rate=1e-5, seed=0, interventions=[Steer(15, vector, 0.5)])
        logs[dtype] = log.losses
        assert all(p.dtype == torch.float32 for p in model.hf.parameters())
        tensors = model.trained_tensors()
        assert all(t.device.type == "cpu" and t.isfinite().all() for t in tensors.values())
    assert logs["bfloat16"] == pytest.approx(logs["float32"], abs=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_is_steered(dtype):
    model = load("smollm2-135m-instruct", dtype=dtype)
    prompts = [encode(model.tokenizer, question) for question in ("Why is the sky blue?", "How do I boil an egg?")]
    vector = 60 * torch.randn(model.width, generator=torch.Generator().manual_seed(0))
    plain = generate(model, prompts, max_new_tokens=12)
    assert all(plain)
    assert generate(model, prompts, max_new_tokens=12, interventions=[Steer(15, vector, 1.0)]) != plain
    assert generate(model, prompts, max_new_tokens=12) == plain
