"""Models built in other ways than the book's own give what the plain model gives, whatever their windows and shapes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.artifacts import Artifact
from helpers.chapters.prompt_only_steering.method import States
from helpers.chat import collate, encode
from helpers.forward import PromptSet, keeps_beginning, only_blocks, read
from helpers.generation import generate
from helpers.losses import evaluate_losses, response_logits, sequence_sums
from helpers.models import LoRA, load

WINDOW = 6  # shorter than what all prompts begin with
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 12}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": False},
    "Gemma": {"head_dim": 12},
    "Gemma2": {**GEMMA, "sliding_window": WINDOW, "final_logit_softcapping": 3.0},
    "Gemma3Text": {**GEMMA, "sliding_window": WINDOW, "layer_types": MIXED},
    "Mistral": {"sliding_window": WINDOW},
    "GptOss": {"head_dim": 12, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Phi3": {"sliding_window": WINDOW},
}
SLIDING = [kind for kind in KINDS if kind not in ("Llama", "Qwen2", "Gemma")]
TRAINED = [kind for kind in KINDS if kind != "Phi3"]
QUESTIONS = ("Why is the sky blue?", "Where does it rain?", "Why is the sky green and where does it rain so?", "Why?")
NEW = 6


@pytest.fixture(scope="module")
def folders(save_model):
    return {kind: save_model(kind, **settings) for kind, settings in KINDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def both(request, folders):
    """The model, and the plain one that transformers loads from the same folder."""
    folder = folders[request.param]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return load(str(folder), dtype="float32", weights="frozen"), plain


@pytest.fixture
def examples(words):
    answers = ("Because it is.", "So it does, and so it is blue.", "Be brief.", "It is blue and green.")
    return [encode(words, *pair) for pair in zip(QUESTIONS, answers, strict=True)]


@torch.no_grad()
def logits_of(plain, ids):
    return plain(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def said_by(plain, prompt, tokenizer):
    """Greedy decoding, the whole text anew for every token."""
    ids = list(prompt.ids)
    for _ in range(NEW):
        ids.append(int(logits_of(plain, ids)[-1].argmax()))
        if tokenizer.convert_ids_to_tokens(ids[-1]) in ("<end>", "<eos>"):
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_answers_of_a_batch_are_those_of_the_plain_model_one_by_one(both):
    model, plain = both
    prompts = [encode(model.tokenizer, question) for question in QUESTIONS]
    sliding = getattr(model.hf.config, "sliding_window", None)
    assert not sliding or min(map(len, prompts)) > 2 * WINDOW
    said = generate(model, prompts, max_new_tokens=NEW)
    assert said == [said_by(plain, prompt, model.tokenizer) for prompt in prompts]
    assert len(set(said)) > 1


def test_losses_of_a_batch_are_those_of_the_plain_model_one_by_one(both, examples):
    model, plain = both
    expected = []
    for example in examples:
        batch = collate([example], model.tokenizer.pad_token_id)
        logits = logits_of(plain, example.ids)[batch.predicting[0]]
        expected.append(torch.nn.functional.cross_entropy(logits, batch.ids[batch.response]))
    torch.testing.assert_close(evaluate_losses(model, examples), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_prompts_read_together_give_the_logits_of_the_plain_model(both):
    model, plain = both
    prompts = [encode(model.tokenizer, question) for question in QUESTIONS]
    found = PromptSet.of(model, prompts).last_logits(model)
    expected = torch.stack([logits_of(plain, prompt.ids)[-1] for prompt in prompts])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_pass_that_starts_in_the_middle_ends_where_a_whole_one_does(both, examples):
    """Each block has the mask and the rotation of its own kind, though those before it are left out."""
    model, _ = both
    batch = collate(examples, model.tokenizer.pad_token_id)
    with torch.no_grad():
        whole = response_logits(model, batch)
        with only_blocks(model, 0, 0):
            states = read(model, batch)
        with only_blocks(model, 1, 2):
            resumed = response_logits(model, batch, states=states)
    torch.testing.assert_close(resumed, whole, atol=1e-4, rtol=1e-4)


def test_losses_from_the_middle_are_the_same_together_and_alone(both, examples):
    model, _ = both
    states = States(model, 0)
    states.read(examples)
    zero = torch.zeros(1, model.width)
    with torch.no_grad():
        with only_blocks(model, 1, 2):
            together = states.losses(examples, zero, [0] * len(examples))
        alone = [sequence_sums(model, collate([e], model.tokenizer.pad_token_id)) for e in examples]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_is_read_once_only_where_no_block_forgets_it(folders, kind):
    model = load(str(folders[kind]), dtype="float32", weights="frozen")
    assert keeps_beginning(model, WINDOW)
    assert keeps_beginning(model, WINDOW + 1) == (kind not in SLIDING)


@pytest.mark.parametrize("lora", [None, LoRA(2)], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_trained_can_be_put_back(folders, examples, kind, lora):
    folder = str(folders[kind])
    trained = load(folder, dtype="float32", lora=lora)
    with torch.no_grad():
        for number, p in enumerate(trained.trained_parameters().values()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    again = load(folder, dtype="float32", finetuned=[Artifact("run", trained.trained_tensors())])
    batch = collate(examples, trained.tokenizer.pad_token_id)
    with torch.no_grad():
        found, expected = response_logits(again, batch), response_logits(trained, batch)
        before = response_logits(load(folder, dtype="float32", weights="frozen"), batch)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, before, atol=1e-2)
