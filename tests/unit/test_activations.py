"""Mean activations and persona vectors are what their definitions say, however the data are batched."""

import pytest
import torch

from helpers.activations import PersonaVector, PersonaVectorFitter, mean_activations
from helpers.interventions import Steer

PAD = 2


@pytest.fixture(scope="module")
def means(tiny, examples):
    return mean_activations(tiny, examples)


def test_means_are_over_each_answers_own_response_tokens(tiny, examples, means):
    """Against Hugging Face's own hidden states, one conversation at a time."""
    for i, example in enumerate(examples):
        with torch.no_grad():
            # hidden_states[l + 1] is the output of block l, but the last one comes after the final norm
            hidden = tiny.hf.base_model(input_ids=torch.tensor([example.ids]), output_hidden_states=True).hidden_states
        expected = hidden[1][0, example.prompt_length :].mean(0)
        torch.testing.assert_close(means[0, i], expected, atol=1e-6, rtol=1e-5)


def test_batching_gives_the_same_activations_as_no_batching(tiny, examples, means):
    assert len({len(e) for e in examples}) > 1
    for size in (1, 4):
        torch.testing.assert_close(mean_activations(tiny, examples, batch_size=size), means, atol=1e-6, rtol=1e-5)


def test_only_the_layers_asked_for_are_read_in_the_order_given(tiny, examples, means):
    swapped = mean_activations(tiny, examples, layers=[1, 0])
    assert torch.equal(swapped, means[[1, 0]])
    assert mean_activations(tiny, examples, layers=[1]).shape == (1, len(examples), 32)


def test_prompt_and_response_means_make_up_the_mean_over_all_tokens(tiny, examples, means):
    prompt, whole = (mean_activations(tiny, examples, where=where) for where in ("prompt", "all"))
    share = torch.tensor([e.prompt_length / len(e) for e in examples])[None, :, None]
    torch.testing.assert_close(share * prompt + (1 - share) * means, whole, atol=1e-6, rtol=1e-5)


def test_activations_are_read_after_an_intervention_at_the_same_layer(tiny, examples, means):
    v = torch.ones(32)
    steered = mean_activations(tiny, examples, interventions=[Steer(0, v, 2.0)])
    torch.testing.assert_close(steered[0], means[0] + 2 * v, atol=1e-5, rtol=1e-5)


def test_reading_leaves_no_hook_and_no_graph(tiny, examples, hook_count):
    before = hook_count(tiny)
    assert not mean_activations(tiny, examples[:2]).requires_grad
    assert hook_count(tiny) == before
    assert tiny.current is None


# Persona vectors


def activations(count, seed, layers=3, width=8):
    return 100 + torch.randn(layers, count, width, generator=torch.Generator().manual_seed(seed))


def test_a_vector_fitted_in_pieces_is_the_difference_of_the_means_of_all_data():
    trait, normal = activations(53, 1), activations(31, 2)
    fitter = PersonaVectorFitter("evil")
    for piece in trait.split((7, 1, 45), dim=1):
        fitter.update(piece, shows_trait=True)
    for piece in normal.split((30, 1), dim=1):
        fitter.update(piece, shows_trait=False)
    expected = trait.double().mean(1) - normal.double().mean(1)
    vector = fitter.fit()
    assert vector.trait == "evil"
    torch.testing.assert_close(vector.vectors, expected.float(), atol=1e-6, rtol=0)


def test_sums_are_kept_in_double_precision():
    """In single precision the sum of many large activations would swallow their difference."""
    fitter = PersonaVectorFitter("evil")
    for shows_trait, value in ((False, 10_000.0), (True, 10_000.25)):
        for _ in range(2000):
            fitter.update(torch.full((1, 3, 2), value), shows_trait=shows_trait)
    torch.testing.assert_close(fitter.fit().vectors, torch.full((1, 2), 0.25), atol=1e-6, rtol=0)


def test_a_vector_points_from_normal_answers_to_those_with_the_trait(tiny, examples, means):
    fitter = PersonaVectorFitter("evil")
    fitter.update(means[:, :3], shows_trait=False)
    fitter.update(means[:, 3:], shows_trait=True)
    vector = fitter.fit()
    projected = vector.projection(means[1], 1)
    assert projected[3:].mean() > projected[:3].mean()
    gap = projected[3:].mean() - projected[:3].mean()
    torch.testing.assert_close(gap, vector.at(1).norm(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shows_trait", [True, False])
def test_answers_of_one_kind_only_are_an_error_that_counts_both(shows_trait):
    fitter = PersonaVectorFitter("evil")
    fitter.update(activations(5, 0), shows_trait=shows_trait)
    counts = "5 with the trait and 0 without" if shows_trait else "0 with the trait and 5 without"
    with pytest.raises(ValueError, match=f"answers of both kinds; got {counts}"):
        fitter.fit()


def test_random_control_vectors_have_the_same_norm_at_every_layer_and_another_direction():
    vector = PersonaVector("evil", activations(1, 3, width=512)[:, 0] - 100)
    random = vector.random_like(7)
    torch.testing.assert_close(random.vectors.norm(dim=1), vector.vectors.norm(dim=1))
    cosines = torch.nn.functional.cosine_similarity(random.vectors, vector.vectors)
    assert cosines.abs().max() < 0.2
    assert torch.equal(random.vectors, vector.random_like(7).vectors)
    assert not torch.equal(random.vectors, vector.random_like(8).vectors)
    assert random.trait == "random-7"


def test_a_saved_vector_is_loaded_as_it_was(tmp_path):
    vector = PersonaVector("evil", activations(1, 4)[:, 0])
    vector.save(tmp_path / "evil.safetensors")
    again = PersonaVector.load(tmp_path / "evil.safetensors")
    assert again.trait == "evil"
    assert torch.equal(again.vectors, vector.vectors)
