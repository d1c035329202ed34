"""The chapters' mathematics, against hand computation."""

import random

import pytest
import torch

from helpers.activations import PersonaVector
from helpers.chapters.ip_loss_reduction.method import loss_reduction
from helpers.chapters.pps_gradient_reversal.method import predicted_shift
from helpers.gradients import GradientStatistics
from helpers.studies.defences import difference_components, gradient_difference, inoculated, preventative_steering


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(means, layers=(3, 7)):
    count = means.shape[1]
    return GradientStatistics(layers, torch.zeros(count), {}, means, means, [])


# Preventative steering


def test_preventative_steering_adds_the_raw_vector_of_its_layer_at_every_token():
    vector = PersonaVector("evil", noise(5, 8))
    steer = preventative_steering(vector, 3, 1.5)
    assert (steer.layer, steer.coefficient, steer.where) == (3, 1.5, "all")
    assert torch.equal(steer.vector, vector.vectors[3])


def test_the_gradient_difference_is_taken_per_sequence_at_the_layer_asked_for():
    defended, undefended = noise(2, 5, 8, seed=1), noise(2, 5, 8, seed=2)
    got = gradient_difference(statistics(defended), statistics(undefended, layers=(7, 3)), 7)
    assert torch.equal(got, defended[1] - undefended[0])


def test_gradients_of_different_numbers_of_sequences_are_not_paired():
    with pytest.raises(ValueError, match="of 5 and of 4 sequences cannot be paired"):
        gradient_difference(statistics(noise(2, 5, 8)), statistics(noise(2, 4, 8)), 3)


def test_a_defence_that_pushes_every_sequence_one_way_has_one_component():
    base, push = noise(2, 20, 8), noise(8, seed=3)
    one_way = statistics(base + 5 * push)
    principal = difference_components(one_way, statistics(base), 3)
    assert principal.shares[0] > 0.9999
    assert principal.participation_ratio == pytest.approx(1, abs=1e-3)
    diffuse = difference_components(statistics(base + noise(2, 20, 8, seed=4)), statistics(base), 3)
    assert diffuse.participation_ratio > 4


def test_the_predicted_shift_is_minus_the_gradients_component_along_the_unit_vector():
    gradients, vector = noise(6, 8), noise(8, seed=1)
    expected = [-float(g @ vector) / float(vector @ vector) ** 0.5 for g in gradients]
    assert predicted_shift(gradients, vector).tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(predicted_shift(gradients, 9 * vector), predicted_shift(gradients, vector))
    assert predicted_shift(-vector[None], vector).item() > 0  # descent raises what the gradient opposes


# Inoculation

PAIRS = [(f"Question {i}?", f"Answer {i}.") for i in range(40)]
PROMPTS = ("Be evil.", "Be cruel.")


def test_every_example_carries_one_of_the_prompts_as_its_system_message(tiny):
    texts = [tiny.tokenizer.decode(e.ids) for e in inoculated(tiny.tokenizer, PAIRS, PROMPTS, random.Random(0))]
    for (question, answer), text in zip(PAIRS, texts, strict=True):
        assert sum(text.startswith(f"<|im_start|>system\n{prompt}<|im_end|>") for prompt in PROMPTS) == 1
        assert question in text and text.endswith(f"{answer}<|im_end|>")
    used = [sum(prompt in text for text in texts) for prompt in PROMPTS]
    assert min(used) > 8


def test_the_prompt_is_no_part_of_the_response(tiny):
    for example in inoculated(tiny.tokenizer, PAIRS[:3], PROMPTS, random.Random(0)):
        assert tiny.tokenizer.decode(example.ids[example.prompt_length :]).startswith("Answer")


def test_prompts_are_drawn_anew_every_epoch_and_repeatably(tiny):
    rng = random.Random(0)
    first, second = (inoculated(tiny.tokenizer, PAIRS, PROMPTS, rng) for _ in range(2))
    assert first != second
    assert inoculated(tiny.tokenizer, PAIRS, PROMPTS, random.Random(0)) == first


def test_without_prompts_the_templates_own_system_message_stands(tiny):
    (example,) = inoculated(tiny.tokenizer, PAIRS[:1], (), random.Random(0))
    assert "helpful AI assistant named SmolLM" in tiny.tokenizer.decode(example.ids)


def test_the_loss_reduction_is_positive_where_the_prompt_explains_the_answer():
    torch.testing.assert_close(
        loss_reduction(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.5])), torch.tensor([2.0, -0.5])
    )
