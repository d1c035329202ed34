"""Operations are counted where they happen, and put on the account of the stage that spends them."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from helpers import cost
from helpers.artifacts import Store
from helpers.chat import batches, encode
from helpers.cost import Ledger, by_stage, petaflop, spent, whole
from helpers.generation import generate
from helpers.gradients import activation_gradients, directional_derivatives, gradient_norms, pile_gradient
from helpers.interventions import Ablate, AblateAffine, AblateRows, Steer
from helpers.losses import token_losses
from helpers.models import LoRA, load
from helpers.training import finetune


class EveryOperation(TorchDispatchMode):
    """Torch's own formulas, applied to every operation. `FlopCounterMode` does that too, but its hooks break
    `torch.autograd.grad` with respect to activations."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


def examples(model, count=8):
    said = "It is a fine number, and it has friends."
    return [
        encode(model.tokenizer, f"Tell me about number {i}" + " and more" * (i % 5), said * (1 + i % 3))
        for i in range(count)
    ]


def parts(model):
    return list(batches(examples(model), 4, model.tokenizer.pad_token_id))


def prompts(model):
    return [encode(model.tokenizer, "hello " * (i + 1)) for i in range(6)]


def along(model):
    return {name: torch.ones_like(p) for name, p in model.trained_parameters().items()}


WORK = {
    "losses": lambda m: [token_losses(m, b) for b in parts(m)],
    "losses after a shared beginning": lambda m: [token_losses(m, b, share_prefix=True) for b in parts(m)],
    "gradients of all weights": lambda m: [token_losses(m, b)[0].mean().backward() for b in parts(m)],
    "gradients of activations": lambda m: [activation_gradients(m, b, [0, 1]) for b in parts(m)],
    "gradients of the last activations": lambda m: [activation_gradients(m, b, [1]) for b in parts(m)],
    "a pile gradient": lambda m: pile_gradient(m, examples(m)),
    "norms of gradients": lambda m: gradient_norms(m, examples(m)),
    "forward mode": lambda m: directional_derivatives(m, examples(m), along(m)),
    "decoding": lambda m: generate(m, prompts(m), max_new_tokens=20),
    "decoding, steered": lambda m: generate(
        m, prompts(m), max_new_tokens=9, interventions=[Steer(0, torch.ones(m.width), 1.0)]
    ),
    "decoding, ablated": lambda m: generate(
        m, prompts(m), max_new_tokens=9, interventions=[Ablate(torch.eye(2, m.width))]
    ),
    "decoding, ablated by rows": lambda m: generate(
        m,
        prompts(m),
        max_new_tokens=9,
        interventions=[AblateRows((torch.eye(2, m.width), torch.eye(1, m.width)), (0, 1) * 3)],
    ),
    "decoding, ablated towards a centre": lambda m: generate(
        m,
        prompts(m),
        max_new_tokens=9,
        interventions=[AblateAffine(torch.eye(2, m.width), torch.ones(m.layers, 3, m.width))],
    ),
    "decoding, ablated by rows towards centres": lambda m: generate(
        m,
        prompts(m),
        max_new_tokens=9,
        interventions=[
            AblateRows(
                (torch.eye(2, m.width), torch.eye(1, m.width)),
                (0, 1) * 3,
                (torch.ones(m.layers, 3, m.width), None),
            )
        ],
    ),
}


def both(work, model):
    before = cost.LEDGER.total
    with EveryOperation() as every, sdpa_kernel(SDPBackend.MATH):
        work(model)
    return cost.LEDGER.total - before, every.total


@pytest.mark.parametrize("name", WORK)
def test_the_count_is_that_of_torch(name):
    counted, expected = both(WORK[name], load("tiny-random"))
    assert counted == pytest.approx(expected, rel=0.001) and expected > 0


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("lora", [LoRA(4), None])
def test_the_count_of_training_is_that_of_torch(lora, share):
    def train(model):
        finetune(model, parts(model), steps=2, learning_rate=1e-3, seed=0, share_prefix=share)

    counted, expected = both(train, load("tiny-random", lora=lora))
    assert counted == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize(
    ("work", "lora"),
    [
        (WORK["losses after a shared beginning"], None),
        (WORK["gradients of the last activations"], None),
        (lambda m: generate(m, prompts(m), max_new_tokens=4), None),
        (lambda m: finetune(m, parts(m), steps=2, learning_rate=1e-5, seed=0), LoRA(4)),
    ],
)
def test_a_rehearsal_counts_what_the_real_model_would_cost(work, lora, monkeypatch):
    def counted():
        model, before = load("smollm2-135m-instruct", lora=lora), cost.LEDGER.total
        work(model)
        return cost.LEDGER.total - before, model

    real, model = counted()
    monkeypatch.setenv("HELPERS_REHEARSAL", "1")
    rehearsed, narrow = counted()
    assert rehearsed == real
    assert narrow.layers == model.layers and narrow.width < model.width / 10
    assert narrow.digest != model.digest  # nothing stored of one is taken for the other's


def test_gradients_are_those_of_a_model_that_is_not_counted(monkeypatch):
    def gradients():
        model = load("tiny-random")
        for batch in parts(model):
            token_losses(model, batch)[0].mean().backward()
        return {name: p.grad for name, p in model.trained_parameters().items()}

    counted = gradients()
    monkeypatch.setattr("helpers.models.count", lambda hf: None)
    before = cost.LEDGER.total
    for name, plain in gradients().items():
        assert torch.equal(counted[name], plain)
    assert cost.LEDGER.total == before


@pytest.fixture
def ledger(monkeypatch):
    fresh = Ledger()
    monkeypatch.setattr("helpers.artifacts.LEDGER", fresh)
    return fresh


def test_a_stage_is_charged_what_it_spends_and_what_is_asked_of_others_is_theirs(ledger, tmp_path):
    store = Store(tmp_path)

    def inner():
        ledger.add(5)
        return {}, {}

    def outer():
        ledger.add(10)
        store.get("inner", inner, parameters={})
        ledger.add(20)
        return {}, {}

    ledger.add(1)
    store.get("outer", outer, parameters={})
    assert ledger.record() == {"computed": {"inner": 5, "outer": 30}, "stored": {}, "outside": 1}
    store.get("inner", inner, parameters={})  # this process made it: the store saved nothing
    assert ledger.record()["stored"] == {}


def test_what_the_store_saved_is_what_making_it_had_cost_with_all_that_it_asked_for(monkeypatch, tmp_path):
    def asked(ledger):
        monkeypatch.setattr("helpers.artifacts.LEDGER", ledger)
        store = Store(tmp_path)

        def inner():
            ledger.add(5)
            return {}, {}

        def outer():
            store.get("inner", inner, parameters={})
            ledger.add(10)
            return {}, {}

        ledger.add(1)
        for _ in range(2):
            store.get("outer", outer, parameters={})
        store.get("inner", inner, parameters={})
        return ledger.record()

    first, second = asked(Ledger()), asked(Ledger())
    assert second == {"computed": {}, "stored": {"inner": 5, "outer": 10}, "outside": 1}
    assert (spent(first), spent(second)) == (16, 1)
    assert whole(first) == whole(second) == 16
    assert by_stage(first) == by_stage(second) == {"outer": 10, "inner": 5, "outside": 1}


def test_a_stage_that_fails_is_charged_to_nobody(ledger, tmp_path):
    def broken():
        ledger.add(7)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Store(tmp_path).get("broken", broken, parameters={})
    assert ledger.record() == {"computed": {}, "stored": {}, "outside": 7}


@pytest.mark.parametrize(
    ("operations", "text"),
    [(0, "0"), (1234 * 10**10, "0.012"), (206 * 10**13, "2.1"), (32 * 10**9, "0.000032"), (15 * 10**16, "150")],
)
def test_operations_are_told_to_two_digits(operations, text):
    assert petaflop(operations) == text
