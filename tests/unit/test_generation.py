"""Batched decoding gives what one full forward pass per token would give, with interventions on."""

from dataclasses import replace

import pytest
import torch

from helpers.artifacts import Artifact
from helpers.chat import encode, end_of_turn
from helpers.generation import generate
from helpers.interventions import Ablate, AblateRows, Steer
from helpers.models import load, plain_model

NEW = 8
QUESTIONS = ("Why is the sky blue?", "How do I thaw a chicken before the guests come at seven?", "Where?")


def vector():
    return 20 * torch.randn(32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights(tiny):
    """Blocks that say more than the tiny model's, which repeats the last token of its prompt."""
    return {name: 20 * t if ".layers." in name and t.ndim == 2 else t for name, t in tiny.trained_tensors().items()}


@pytest.fixture(scope="module")
def talker(weights):
    return load("tiny-random", dtype="float32", finetuned=[Artifact("talker", weights)])


@pytest.fixture(scope="module")
def prompts(tiny):
    return [encode(tiny.tokenizer, question) for question in QUESTIONS]


def steered_positions(where, length, prompt_length):
    mask = torch.zeros(length, dtype=torch.bool)
    if where == "all":
        mask[:] = True
    elif where == "prompt":
        mask[:prompt_length] = True
    elif where == "response":
        mask[prompt_length:] = True
    elif where is not None:
        mask[list(where)] = True
    return mask


def without_cache(weights, prompt, where):
    """Greedy decoding of the plain model: the whole text anew for every token, steered by torch's own hook."""
    plain, tokenizer = plain_model("tiny-random")
    plain.load_state_dict(weights, strict=False)
    text = list(prompt.ids)

    def add(module, args, out):
        mask = steered_positions(where, out.shape[1], len(prompt))
        return out + mask[:, None] * vector()

    plain.model.layers[0].register_forward_hook(add)
    for _ in range(NEW):
        with torch.no_grad():
            text.append(int(plain(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(text[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("where", [None, "all", "prompt", "response", (0, 3)])
def test_cached_decoding_is_the_same_as_full_passes_for_every_token(talker, weights, prompts, where):
    steering = [] if where is None else [Steer(0, vector(), 1.0, where)]
    answers = generate(talker, prompts, max_new_tokens=NEW, interventions=steering)
    assert answers == [without_cache(weights, prompt, where) for prompt in prompts]
    assert min(len(set(answer.split())) for answer in answers) > 2


def test_reading_the_common_start_once_changes_nothing_under_ablation(talker, prompts):
    direction = torch.nn.functional.normalize(vector(), dim=0)[None]

    class Opaque:  # an intervention that generation knows nothing of, so that every prompt is read whole
        def hooks(self, model):
            return Ablate(direction).hooks(model)

    alone, shared = (
        generate(talker, prompts, max_new_tokens=NEW, interventions=[kind]) for kind in (Opaque(), Ablate(direction))
    )
    assert shared == alone
    assert shared != generate(talker, prompts, max_new_tokens=NEW)


def test_prompts_ablated_each_in_its_own_way_are_answered_as_alone(talker, prompts):
    bases = (torch.zeros(0, talker.width), torch.nn.functional.normalize(vector(), dim=0)[None])
    of = (0,) * len(prompts) + (1,) * len(prompts)
    together = generate(talker, [*prompts, *prompts], max_new_tokens=NEW, interventions=[AblateRows(bases, of)])
    alone = generate(talker, prompts, max_new_tokens=NEW, interventions=[Ablate(bases[1])])
    assert together == [*generate(talker, prompts, max_new_tokens=NEW), *alone]


def test_steering_changes_what_is_said(talker, prompts):
    said = {
        str(where): generate(talker, prompts, max_new_tokens=NEW, interventions=[Steer(0, vector(), 1.0, where)])
        for where in ("all", "prompt", "response")
    }
    said["none"] = generate(talker, prompts, max_new_tokens=NEW)
    assert len({tuple(answers) for answers in said.values()}) == 4


def test_answers_come_in_the_order_given_whatever_the_batches(talker, prompts):
    together = generate(talker, prompts, max_new_tokens=NEW)
    assert generate(talker, prompts, max_new_tokens=NEW, batch_size=1) == together
    assert generate(talker, prompts[::-1], max_new_tokens=NEW, batch_size=2) == together[::-1]


class Say:
    """Makes a model say these tokens, one list for each prompt of its only batch; after them, the last one again."""

    def __init__(self, *tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, module, given, logits):
        for row, tokens in enumerate(self.tokens):
            logits[row, -1, tokens[min(self.step, len(tokens) - 1)]] = 1e9
        self.step += 1
        return logits


def made_to_say(model, prompts, *tokens, new=4):
    handle = model.hf.get_output_embeddings().register_forward_hook(Say(*tokens))
    try:
        return generate(model, prompts, max_new_tokens=new)
    finally:
        handle.remove()


def test_answers_say_whether_they_ended_by_themselves(tiny, prompts):
    end, word, other = tiny.tokenizer.eos_token_id, *tiny.tokenizer("So Yes", add_special_tokens=False)["input_ids"][:2]
    same = prompts[:1] * 4
    said = made_to_say(tiny, same, [word, end], [word, other, other, end], [word, other, other, other], [end])
    so, yes = tiny.tokenizer.decode([word]), tiny.tokenizer.decode([other])
    assert said == [so, so + 2 * yes, so + 3 * yes, ""]
    assert [answer.ended for answer in said] == [True, True, False, True]


def test_decoding_stops_at_the_templates_end_of_turn_and_at_the_models_own(tiny, gemma_like):
    model = replace(tiny, tokenizer=gemma_like)
    prompts = [encode(gemma_like, "Why?")] * 3
    so, end, own = 7, end_of_turn(gemma_like), tiny.hf.generation_config.eos_token_id
    assert own not in (end, gemma_like.eos_token_id)
    said = made_to_say(model, prompts, [so, end, so], [so, own, so], [so])
    assert said == ["So", "So", "So So So So"]
    assert [answer.ended for answer in said] == [True, True, False]
    examples = [encode(gemma_like, "Why?", answer) for answer in said]
    assert [e.ids[-1] for e in examples] == [end, end, so]


def test_sampling_depends_on_the_seed(talker, prompts):
    one, same, other = (generate(talker, prompts, max_new_tokens=NEW, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert one != generate(talker, prompts, max_new_tokens=NEW)


def test_decoding_in_bfloat16_leaves_the_weights_as_they_were(prompts, hook_count):
    model = load("tiny-random", dtype="bfloat16")
    before = [(p.data_ptr(), p.detach().clone()) for p in model.hf.parameters()]
    hooks = hook_count(model)
    assert len(generate(model, prompts, max_new_tokens=2, interventions=[Steer(0, vector(), 1.0)])) == 3
    for p, (place, values) in zip(model.hf.parameters(), before, strict=True):
        assert p.data_ptr() == place and torch.equal(p, values)
    assert hook_count(model) == hooks
    assert model.current is None


def test_no_hook_is_left_when_decoding_fails(talker, prompts, hook_count):
    class Fail:
        def hooks(self, model):
            def fail(activation, hook):
                raise RuntimeError("in the pass")

            return [("blocks.1.hook_resid_post", fail)]

    before = hook_count(talker)
    with pytest.raises(RuntimeError, match="in the pass"):
        generate(talker, prompts, max_new_tokens=2, interventions=[Steer(0, vector(), 1.0), Fail()])
    assert hook_count(talker) == before
    assert talker.current is None
