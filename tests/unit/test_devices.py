"""What runs on other devices than this machine's: no 64-bit numbers on Apple's, one sentence for one that is absent."""

import pytest
import torch

from helpers.activations import PersonaVectorFitter
from helpers.chapters.refusal_redistribution.attack import probe_direction, top_subspace
from helpers.chat import encode
from helpers.models import load
from helpers.probes import orthonormal
from helpers.studies.ablation_scores import score_exhaustively


class Apple(torch.Tensor):
    """Stands in for a tensor on Apple's graphics processor: no float64 there, and only `cpu` leads away."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return out.as_subclass(torch.Tensor)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return out


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_stand_in_is_as_strict_as_the_device():
    with pytest.raises(TypeError, match="float64"):
        (random(2).as_subclass(Apple) + 1).double()
    assert type(random(2).as_subclass(Apple).cpu()) is torch.Tensor


def test_persona_vectors_are_fitted_from_activations_on_a_device_without_float64():
    fitters = PersonaVectorFitter("evil"), PersonaVectorFitter("evil")
    for shows in (True, False):
        activations = random(2, 3, 4, seed=int(shows))
        fitters[0].update(activations, shows_trait=shows)
        fitters[1].update(activations.as_subclass(Apple), shows_trait=shows)
    assert torch.equal(fitters[0].fit().vectors, fitters[1].fit().vectors)


@pytest.mark.parametrize(
    "function",
    [orthonormal, lambda x: top_subspace(x[None], 2), lambda x: probe_direction(x, torch.tensor([True, False] * 2))],
    ids=["orthonormal", "top_subspace", "probe_direction"],
)
def test_directions_are_made_from_states_on_a_device_without_float64(function):
    states = random(4, 6)
    found = function(states.as_subclass(Apple))
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, function(states))


def test_the_attack_scores_logits_on_a_device_without_float64(tiny):
    prompts = [[encode(tiny.tokenizer, text) for text in two] for two in (("Why?", "How?"), ("Who?", "Where?"))]
    candidates = random(1, 2, tiny.width)

    def scores():
        return score_exhaustively(tiny, candidates, *prompts, refusal_ids=[5, 6], layers=(0,))

    expected = scores()
    head = tiny.hf.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, given, logits: logits.as_subclass(Apple))
    try:
        found = scores()
    finally:
        handle.remove()
    for name in ("log_odds", "kl", "induce"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_one_sentence_before_anything_is_read(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("helpers.models._plain", lambda *_: pytest.fail("a model was read"))
    with pytest.raises(ValueError, match=f"There is no device '{device}' here") as error:
        load("tiny-random", device=device)
    assert "\n" not in str(error.value)


def test_of_one_card_the_second_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"There is no device 'cuda:1' here \(the last one is cuda:0\)"):
        load("tiny-random", device="cuda:1")
