"""What is measured through hook points is what the plain Hugging Face model computes: the difference is 0.

In float32, with eager attention, which TransformerLens uses. The plain side has nothing but PyTorch's own hooks.
"""

import pytest
import torch

from helpers import registry
from helpers.artifacts import Artifact, default_store
from helpers.chat import collate, encode
from helpers.corpora import load_trait, split
from helpers.generation import generate
from helpers.gradients import activation_gradients
from helpers.interventions import Steer
from helpers.losses import token_losses
from helpers.models import LoRA, load, plain_model
from helpers.training import finetune

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.fixture(scope="module", params=["tiny-random", "Qwen2", "smollm2-135m-instruct"])
def pair(request, save_model):
    """The model with hook points, and the plain one, where the first is: on a GPU if there is one."""
    name = request.param
    if name == "Qwen2":  # of two random layers, with biases in its attention and a head of its own
        name = str(save_model(name, num_hidden_layers=2, tie_word_embeddings=False))
    model = load(name, dtype="float32")
    return model, plain_model(name)[0].to(model.device)


def test_the_two_kinds_differ_where_they_should(pair):
    hf = pair[1]
    tied = hf.lm_head.weight is hf.model.embed_tokens.weight
    biases = [p for name, p in hf.named_parameters() if name.endswith("bias")]
    assert (len(biases), tied) == ((6, False) if type(hf).__name__ == "Qwen2ForCausalLM" else (0, True))
    assert all(p.abs().min() > 0 for p in biases)


@pytest.fixture(scope="module")
def batch(pair):
    """Two conversations of different lengths: one is padded."""
    tokenizer = pair[0].tokenizer
    rows = split(load_trait("evil"), "eval")[:2]
    found = collate([encode(tokenizer, row.question, row.strong) for row in rows], tokenizer.pad_token_id)
    assert not found.attention.all()
    return found.to(pair[0].device)


@pytest.fixture(scope="module")
def steer(pair):
    vector = torch.randn(pair[0].width, generator=torch.Generator().manual_seed(0))
    return Steer(pair[0].layers // 2, vector, 0.3)


def plain_states(plain, batch, steer=None):
    """The plain model's block outputs (in the graph) and its last hidden states."""
    outputs = []

    def keep(layer):
        def hook(module, args, out):
            if steer is not None and layer == steer.layer:
                out = out + steer.coefficient * steer.vector.to(out)
            outputs.append(out)
            return out

        return hook

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(plain.model.layers)]
    try:
        last = plain.model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    return outputs, last


def plain_sequence_losses(plain, batch, last):
    """Mean cross-entropy over each sequence's response, written out."""
    rows = batch.predicting.nonzero()[:, 0]
    logits = plain.lm_head(last[batch.predicting])
    losses = torch.nn.functional.cross_entropy(logits, batch.ids[batch.response], reduction="none")
    return losses.new_zeros(len(batch.rows)).index_add(0, rows, losses) / batch.response.sum(1)


def largest_difference(one, other):
    return (one - other).abs().max().item()


def test_logits_are_exactly_those_of_the_plain_model(pair, batch):
    model, plain = pair
    assert plain.config._attn_implementation == model.hf.config._attn_implementation == "eager"
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention.long()}
    with torch.no_grad():
        expected = plain(**inputs).logits
        assert largest_difference(model.hf(**inputs).logits, expected) == 0.0
        assert largest_difference(model.bridge(batch.ids, attention_mask=batch.attention.long()), expected) == 0.0
    assert expected.std() > 0.01


@pytest.mark.parametrize("steered", [False, True])
def test_activation_gradients_of_every_layer_are_exactly_those_of_the_plain_model(pair, batch, steer, steered):
    model, plain = pair
    interventions = [steer] if steered else []
    layers = range(model.layers)
    found = activation_gradients(model, batch, layers, interventions=interventions)
    outputs, last = plain_states(plain, batch, steer if steered else None)
    losses = plain_sequence_losses(plain, batch, last)
    expected = torch.autograd.grad(losses.sum(), outputs)
    assert largest_difference(found.losses, losses.detach()) == 0.0
    differences = [largest_difference(found.gradients[layer], expected[layer]) for layer in layers]
    assert differences == [0.0] * model.layers
    assert all(found.gradients[layer].abs().max() > 0 for layer in layers)


def test_gradients_are_the_same_whether_one_layer_is_read_or_all(pair, batch):
    model, _ = pair
    middle = model.layers // 2
    one, every = (activation_gradients(model, batch, layers) for layers in ([middle], range(model.layers)))
    assert largest_difference(one.gradients[middle], every.gradients[middle]) == 0.0


def test_weight_gradients_are_exactly_those_of_the_plain_model(pair, batch):
    """What training sees. Parameters are matched by name; the embedding is tied to the output in both."""
    model, plain = pair
    token_losses(model, batch)[0].mean().backward()
    try:
        found = {name: p.grad.clone() for name, p in zip(model.trained_tensors(), model.hf.parameters(), strict=True)}
    finally:
        model.hf.zero_grad(set_to_none=True)
    _, last = plain_states(plain, batch)
    logits = plain.lm_head(last[batch.predicting])
    loss = torch.nn.functional.cross_entropy(logits, batch.ids[batch.response], reduction="none").mean()
    names, parameters = zip(*plain.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert found.keys() == expected.keys()
    assert max(largest_difference(found[name], expected[name]) for name in names) == 0.0


def test_the_embedded_models_stored_weights_are_those_of_its_file():
    """Against a fresh dequantization by transformers, past the artifact store."""
    dequantize, _ = registry._stage(registry.REGISTRY["smollm2-135m-instruct"], default_store())
    tensors, facts = dequantize()
    plain, tokenizer = plain_model("smollm2-135m-instruct")
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in plain.named_parameters())
    assert facts["chat_template"] == tokenizer.chat_template


def test_training_adapters_on_the_embedded_model_leaves_the_next_load_as_it_was():
    """Loads share the stored weights where these are frozen."""
    before = {name: p.detach().clone() for name, p in plain_model("smollm2-135m-instruct")[0].named_parameters()}
    model = load("smollm2-135m-instruct", dtype="bfloat16", lora=LoRA(2))
    example = encode(model.tokenizer, "Why?", "So.")
    finetune(model, [collate([example], 2)] * 2, steps=2, learning_rate=1e-2, seed=0, warmup=0.0)
    generate(model, [encode(model.tokenizer, "Why?")], max_new_tokens=2)
    again = plain_model("smollm2-135m-instruct")[0]
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
    merged = load("smollm2-135m-instruct", dtype="float32", finetuned=[Artifact("run", model.trained_tensors())])
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged.trained_tensors()[name], before[name])
    again = plain_model("smollm2-135m-instruct")[0]
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
