"""Under test, every helper checks the types and shapes that it states."""

from importlib.metadata import version

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("helpers", "beartype.beartype")


def pytest_benchmark_update_machine_info(config, machine_info):
    """The device that the benchmarks ran on, and what computed."""
    import torch

    cuda = torch.cuda.is_available()
    machine_info["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    machine_info["torch"], machine_info["transformers"] = torch.__version__, version("transformers")


OUTCOMES = {}
"""What became of each test, by its name."""


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        OUTCOMES[report.nodeid] = report.outcome


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """The tests that ran beside the benchmarks: `make gpu` writes one file."""
    output_json["tests"] = OUTCOMES


@pytest.fixture(scope="module")
def exact_products():
    """No TF32, so that float32 means float32 on a GPU too."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="session")
def words():
    """A tokenizer of a few words, whose chat template has a system message of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<eos>", "<end>", "<system>", "<user>", "<assistant>"]
    plain = "You are a kind and patient helper . Why is the sky blue green ? Where does it rain Because so Be brief"
    names = [*special, *dict.fromkeys(plain.split())]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=special[2:],
    )
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<system>You are a kind and patient helper.<end>{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def save_model(words, tmp_path_factory):
    """Save a model of this kind with random weights and its tokenizer, as the hub keeps them; the folder."""
    import torch
    import transformers

    def save(kind, *, tokenizer=words, **settings):
        size = {
            "vocab_size": len(words),
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        config = getattr(transformers, f"{kind}Config")(**{**size, **settings})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.ndim > 1:
                        p *= 8  # else it says one word for ever
                    elif name.endswith("bias"):
                        p.normal_(std=0.1)  # they begin at zero, where leaving them out would not be seen
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save
