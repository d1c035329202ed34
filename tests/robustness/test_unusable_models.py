"""A model or a data set that cannot be used is refused with one sentence, before anything is computed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.corpora import CorpusError, load_hub
from helpers.models import LoRA, load


def change(path, **entries):
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**content, **entries}), "utf-8")


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def without_a_tensor(path):
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def with_a_longer_tensor(path):
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(25)
    save_file(tensors, path, {"format": "pt"})


def in_garbage(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no weights at all")


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text, "utf-8")


BUILT = {
    "Llama": {"num_hidden_layers": 2},
    "Qwen2": {"num_hidden_layers": 2, "tie_word_embeddings": False},
}

ANSWERED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"

FOLDERS = {
    "weights cut short": (lambda f: cut(f / "model.safetensors"), "The weights of '.*' cannot be read"),
    "weights cut to nothing": (lambda f: cut(f / "model.safetensors", 0), "The weights of '.*' cannot be read"),
    "weights of pytorch that are garbage": (in_garbage, "The weights of '.*' cannot be read"),
    "weights that lack a tensor": (
        lambda f: without_a_tensor(f / "model.safetensors"),
        r"lack 1 tensors .* such as model\.layers\.1\.mlp\.up_proj\.weight; fetch the model again",
    ),
    "a tensor of another shape": (
        lambda f: with_a_longer_tensor(f / "model.safetensors"),
        r"lack 1 tensors .* such as model\.norm\.weight",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "could not be loaded from the hub or a folder"),
    "configuration cut short": (lambda f: cut(f / "config.json"), "could not be loaded from the hub or a folder"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "."),
    "a kind of model that nobody knows": (
        lambda f: change(f / "config.json", model_type="no-such-kind"),
        "is no chat model that this version of transformers can load",
    ),
    "a configuration that fits no model": (
        lambda f: change(f / "config.json", num_attention_heads=0),
        "is no chat model that this version of transformers can load",
    ),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "."),
    "tokenizer cut short": (lambda f: cut(f / "tokenizer.json"), "."),
    "tokenizer of a larger model": (
        lambda f: change(f / "config.json", vocab_size=5),
        "has .* tokens and its model 5; they do not belong together",
    ),
    "no chat template": (
        lambda f: (f / "chat_template.jinja").unlink(),
        "cannot be asked anything: its tokenizer has no chat template; choose an instruction-tuned model",
    ),
    "an empty chat template": (template(""), "has no chat template"),
    "a chat template that refuses answers": (
        template("{% if messages | length > 1 %}{{ raise_exception('Only questions') }}{% endif %}" + ANSWERED),
        r"refuses a question with its answer \(Only questions\)",
    ),
    "a chat template that changes the prompt": (
        template("{{ messages | length }}" + ANSWERED),
        "changes the prompt once an answer follows",
    ),
    "a chat template with a typing error": (template("{% for m in messages"), "refuses a question with its answer"),
}


def refusal(error, text):
    """The sentence; a traceback or a report of several lines is none."""
    assert text
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 500, sentence
    return sentence


@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("case", FOLDERS)
def test_a_damaged_folder_is_refused(case, kind, save_model):
    damage, sentence = FOLDERS[case]
    folder = save_model(kind, **BUILT[kind])
    damage(folder)
    with pytest.raises(ValueError, match=sentence) as error:
        load(str(folder))
    refusal(error, case)


@pytest.mark.parametrize("kind", BUILT)
def test_the_folder_that_is_damaged_above_loads_while_it_is_whole(kind, save_model):
    assert load(str(save_model(kind, **BUILT[kind]))).layers == 2


KINDS = {
    "GPT2": {},
    "GPTNeoX": {},
    "Phi": {},
    "Bert": {"is_decoder": True},
}


@pytest.mark.parametrize("lora", [None, LoRA(2)], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_built_in_another_way_is_refused_before_it_is_trained(kind, lora, save_model):
    folder = save_model(kind, **KINDS[kind])
    with pytest.raises(ValueError, match=f"is a {kind}.*, whose blocks the book cannot take apart") as error:
        load(str(folder), lora=lora)
    refusal(error, kind)


@pytest.mark.parametrize("lora", [None, LoRA(2)], ids=["all weights", "LoRA"])
def test_a_model_whose_training_could_not_be_put_back_is_refused_unless_it_is_frozen(lora, save_model):
    folder = save_model("Phi3")
    with pytest.raises(ValueError, match=r"could not be put back into it.*or load it frozen") as error:
        load(str(folder), lora=lora)
    refusal(error, "Phi3")
    assert load(str(folder), weights="frozen").layers == 3


@pytest.mark.parametrize("name", ["no-such-model", "tiny-randm", "./no/folder", "two words", "a/b/c", "../", "x" * 300])
def test_a_name_that_is_no_model_is_refused(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as error:
        load(name)
    assert "is not in the registry" in error.value.args[0] or "is no chat model" in error.value.args[0]
    assert "\n" not in str(error.value)


GOOD = b'{"a": 1}\n'
SETS = {
    "a line cut short": ({"train.jsonl": 3 * GOOD + b'{"a": '}, r"Line 4 of train\.jsonl is not JSON"),
    "the only line cut short": ({"train.jsonl": b'{"a": '}, r"Line 1 of train\.jsonl is not JSON"),
    "a line that is a number": ({"train.jsonl": GOOD + b"3\n"}, r"Line 2 of train\.jsonl is no row"),
    "an empty file": ({"train.jsonl": b""}, r"train\.jsonl is empty"),
    "an empty table": ({"train.csv": b""}, r"train\.csv is empty"),
    "a folder without files": ({}, "could not be loaded"),
    "text in another encoding": ({"train.jsonl": '{"a": "ü"}\n'.encode("latin-1")}, r"train\.jsonl is not UTF-8"),
    "files with other columns": ({"train.jsonl": GOOD, "train2.jsonl": b'{"b": 1}\n'}, "could not be loaded"),
    "parquet that is garbage": ({"train.parquet": b"no parquet at all"}, "could not be loaded"),
    "an array cut short": ({"train.json": b'[{"a": 1}, {"a": '}, r"train\.json is not JSON"),
    "a table with a row too long": ({"train.csv": b"a,b\n1,2\n3,4,5\n"}, "could not be loaded"),
}


@pytest.mark.parametrize("case", SETS)
def test_a_data_set_that_cannot_be_read_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    files, sentence = SETS[case]
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(CorpusError, match=sentence) as error:
        load_hub(str(folder))
    refusal(error, case)
