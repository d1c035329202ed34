"""One tiny model for all unit tests: tests that train or change weights load their own."""

import gc
from dataclasses import dataclass, field

import pytest
import torch
from jaxtyping import config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from helpers.artifacts import Store
from helpers.book.findings import load_claims
from helpers.chat import encode
from helpers.corpora import load_trait, split
from helpers.models import load
from helpers.studies import alignment, study
from helpers.verdicts import verdict


@pytest.fixture(scope="session")
def tiny():
    model = load("tiny-random", dtype="float32")
    gc.collect()
    gc.freeze()  # TransformerLens collects garbage at every load: leave out what was there before the first test
    return model


@pytest.fixture(scope="session")
def examples(tiny):
    """Six conversations of different lengths."""
    return [encode(tiny.tokenizer, row.question, row.strong) for row in split(load_trait("evil"), "eval")[:6]]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of the test file's own for every experiment; the embedded model stays where it is."""
    store = Store(tmp_path_factory.mktemp("store"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (alignment, study):
            patch.setattr(module, "default_store", lambda: store)
        yield store


@pytest.fixture(scope="session")
def verdict_of():
    """The verdict on a planted measurement, by the registered claim."""
    claims = load_claims()

    def decided(measured):
        return verdict(claims[measured.claim], measured.estimate, measured.controls, preset="full")[0]

    return decided


@pytest.fixture
def untyped():
    """As in a notebook, where arguments are not type-checked and a helper's own sentence is what the reader sees."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def gemma_like():
    """A tokenizer whose template ends a turn with another token than `eos_token`, as Gemma's does."""
    words = ["<unk>", "<eos>", "<start_of_turn>", "<end_of_turn>", "user", "model", "Why", "So", "Because", "?", "."]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return tokenizer


@dataclass(frozen=True)
class Watch:
    """Keeps what passes a hook point, where it stands among the interventions."""

    point: str
    seen: list = field(default_factory=list)

    def hooks(self, model):
        def keep(activation, hook):
            self.seen.append(activation)

        return [(self.point, keep)]


@pytest.fixture(scope="session")
def watch():
    return Watch


@pytest.fixture(scope="session")
def hook_count():
    """How many hooks hang on a model, TransformerLens' and torch's own."""

    def count(model):
        with torch.no_grad():
            model.hf.base_model(input_ids=torch.tensor([[1]]))  # TransformerLens wires itself up in the first pass
        modules = list(model.bridge.modules())
        ours = sum(len(getattr(m, "fwd_hooks", ())) + len(getattr(m, "bwd_hooks", ())) for m in modules)
        return ours + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)

    return count


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads gain nothing on a tiny model, and wait long for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
