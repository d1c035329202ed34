"""What is read of a model is what plain computation gives, and each model has the parameters that it needs."""

import numpy as np
import pytest
import torch

from helpers import corpora
from helpers.chapters.three_sizes.params import ThreeSizesParams, family
from helpers.chapters.three_sizes.study import KINDS, SizeStudy, along_normal
from helpers.interventions import Steer
from helpers.params import ParameterError
from helpers.studies.directions import ablating
from helpers.studies.margins import behaviour_margins, opening_log_odds


@pytest.fixture(scope="module")
def exp(store):
    return SizeStudy(ThreeSizesParams(preset="tiny", dtype="float32", start="as it is"))


def test_a_vector_that_is_not_added_changes_nothing_and_one_on_more_tokens_more(exp):
    rows = exp.rows("pirate", "eval", 3)
    examples = exp.encoded([row.question for row in rows], [row.normal for row in rows])
    vector = 20 * exp.vector("pirate")
    steers = [Steer(exp.layer, vector, scale, where) for scale in (0.0, 1.0) for where in ("prompt", "all")]
    losses, kl = along_normal(exp.base, examples, steers)
    assert torch.allclose(losses[1:3], losses[:1].expand(2, -1), atol=1e-5) and kl[:2].abs().max() < 1e-5
    assert (kl[2:] > 0).all() and kl[3].mean() > kl[2].mean()
    for i, steer in enumerate(steers, 1):
        other = behaviour_margins(exp.base, rows, interventions=[steer]).other
        np.testing.assert_allclose(losses[i].numpy(), other, atol=1e-4)


def test_gains_are_those_of_the_margin(exp):
    rows, p = exp.rows("pirate", "eval", exp.params.pairs), exp.params
    before = behaviour_margins(exp.base, rows).margin
    after = behaviour_margins(exp.base, rows, interventions=[Steer(exp.layer, exp.vector("pirate"), p.scales[1])])
    np.testing.assert_allclose(exp.steered()["gain"][1, 1], after.margin - before, atol=1e-4)


def test_the_direction_is_of_unit_length_and_the_card_without_it_is_the_ablated_model_s(exp):
    found = exp.direction()
    assert found.vector.norm().item() == pytest.approx(1, abs=1e-5)
    assert found.layer in {candidate.layer for candidate in found.candidates}
    prompts = exp.encoded(exp.asked["paired"])
    expected = opening_log_odds(exp.base, prompts, exp.openers, interventions=ablating(found.vector))
    np.testing.assert_allclose(exp.attacked()["paired"].log_odds, expected, atol=1e-4)
    assert exp.card().keys() == exp.attacked().keys() == set(KINDS)


def test_no_request_that_a_direction_or_a_probe_is_made_from_is_judged(exp):
    asked = {text for texts in exp.asked.values() for text in texts}
    used = {row.request for row in corpora.load_refusal(split="train")}
    assert asked and not asked & used


def test_probes_read_harmful_and_paired_requests(exp):
    found = exp.states()
    assert found.train.shape == (12, 32) and found.test.shape == (12, 32)
    assert found.train_harmful.tolist() == [1.0] * 6 + [0.0] * 6
    assert (found.test_lengths > 5).all()


def test_every_model_starts_as_it_is_made_to():
    params = ThreeSizesParams(preset="full", requests=7)
    of = [params.of(name) for name in params.models]
    assert [one.start for one in of] == ["taught", "as it is", "as it is"]
    assert all(one.models == (name,) and one.requests == 7 for one, name in zip(of, params.models, strict=True))
    assert ThreeSizesParams(start="as it is").of("smollm2-135m-instruct").start == "as it is"


def test_families_are_known_by_name():
    names = ThreeSizesParams(preset="full").models
    assert [family(name) for name in names] == ["smollm2", "qwen2.5-coder", "qwen2.5-coder"]
    assert family("qwen2.5-coder-0.5b-instruct-original") == "qwen2.5-coder"
    assert family("tiny-random") == "tiny-random"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"others": ["smollm2-135m-instruct"]}, "which is measured anyway"),
        ({"coefficients": [0.5, 1.0]}, "begin with 0 and rise"),
        ({"scales": [2.0, 1.0]}, "above 0 and rise"),
        ({"concept": "pirat"}, "did you mean 'pirate'"),
        ({"pairs": 1000}, "held-out pairs"),
    ],
)
def test_parameters_that_cannot_be_used_are_told_in_a_sentence(given, sentence):
    with pytest.raises(ParameterError, match=sentence):
        ThreeSizesParams(**given)
