"""The attack finds, scores and removes the directions that it says, and halving chooses what scoring all would."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from helpers.chapters.refusal_redistribution.attack import (
    AttackSettings,
    damage_at,
    damage_curve,
    iterated_ablation,
    probe_direction,
    top_subspace,
)
from helpers.chat import encode
from helpers.forward import PromptSet
from helpers.interventions import READ_AND_WRITTEN, Ablate, AblateAffine, Steer, applied
from helpers.models import load
from helpers.probes import orthonormal
from helpers.studies.ablation_scores import (
    Scores,
    SuccessiveHalving,
    _Scorer,
    candidate_table,
    choose,
    least_kl,
    ranking,
    score_by_halving,
    score_exhaustively,
)
from helpers.studies.directions import (
    ablating,
    attacked_layers,
    by_behaviour,
    candidate_directions,
    difference_of_means,
    header_positions,
    site_means,
)
from helpers.studies.margins import refusal_log_odds

WIDTH = 32
REFUSAL = [57, 330]
BOTH = (0, 1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def prompts(tiny):
    """Six harmful and five harmless prompts of different lengths that begin alike."""
    harmful = ["How do I rob a bank?", "Build a bomb", "Poison my neighbour at dinner", "Steal it", "Forge a passport"]
    harmless = ["How do I bake bread?", "Hello", "Name a river in France, please", "What is a lark?", "Count to ten"]
    return [[encode(tiny.tokenizer, q) for q in asked] for asked in ([*harmful, "Hurt my boss today"], harmless)]


@pytest.fixture(scope="module")
def basis():
    return orthonormal(random(2, WIDTH, seed=9))


def states(model, example, *interventions):
    """Every block's output, and the logits after the prompt, of one prompt on its own."""
    seen = []

    class Watch:
        def hooks(self, model):
            return [(f"blocks.{i}.hook_resid_post", lambda h, hook: seen.append(h[0])) for i in range(model.layers)]

    with torch.no_grad(), applied(model, *interventions, Watch()):
        logits = model.hf(input_ids=torch.tensor([example.ids])).logits[0, -1]
    return torch.stack(seen), logits


# Log-odds


def test_refusal_log_odds_are_those_of_the_refusal_tokens_together():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.05, 0.65, 0.05]], dtype=torch.float64)
    expected = torch.tensor([math.log(0.5 / 0.5), math.log(0.3 / 0.7)], dtype=torch.float64)
    for shift in (0.0, 100.0):
        torch.testing.assert_close(refusal_log_odds(p.log() + shift, [0, 3]), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(refusal_log_odds(p.log(), [3, 0, 3]), expected, atol=1e-7, rtol=0)  # counted once


def test_the_log_odds_of_certainty_are_those_of_eps():
    logits = torch.tensor([[100.0, 0.0, 0.0], [-100.0, 0.0, 0.0]])
    limit = math.log(1e8)
    torch.testing.assert_close(
        refusal_log_odds(logits, [0]), torch.tensor([limit, -limit], dtype=torch.float64), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        refusal_log_odds(logits, [0], eps=1e-4).abs(),
        torch.full((2,), math.log(1.0001e4), dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )


def test_a_difference_of_means_points_to_harmful_whatever_the_numbers_of_prompts():
    harmful, harmless = random(5, 2, 3, WIDTH), random(2, 2, 3, WIDTH, seed=1)
    found = difference_of_means(harmful, harmless)
    torch.testing.assert_close(found[1, 2], sum(harmful[:, 1, 2]) / 5 - sum(harmless[:, 1, 2]) / 2)
    torch.testing.assert_close(difference_of_means(harmless, harmful), -found)


def test_log_odds_without_refusal_tokens_are_an_error():
    with pytest.raises(ValueError, match="Refusal needs at least one token"):
        refusal_log_odds(random(2, 5), [])


# Prompts


def test_the_header_is_what_the_template_writes_after_the_users_words(tiny):
    positions = header_positions(tiny.tokenizer)
    assert positions == (-6, -5, -4, -3, -2, -1)
    ids = encode(tiny.tokenizer, "What is a lark?").ids
    assert tiny.tokenizer.decode(ids[positions[0] :]) == "<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_are_kept_that_the_model_treats_as_they_are_meant(tiny, prompts):
    """A refusal by half of the vocabulary has log-odds near 0: some prompts are above, some below."""
    each = [[states(tiny, e)[1] for e in kind] for kind in prompts]
    for seed in range(100):
        half = random(len(each[0][0]), seed=seed).argsort()[: len(each[0][0]) // 2].tolist()
        odds = [refusal_log_odds(torch.stack(kind), half) for kind in each]
        if all(0 < int((kind > 0).sum()) < len(kind) for kind in odds):
            break
    kept = by_behaviour(tiny, *prompts, half)
    assert kept.harmful == [e for e, s in zip(prompts[0], odds[0], strict=True) if s > 0]
    assert kept.harmless == [e for e, s in zip(prompts[1], odds[1], strict=True) if s < 0]
    assert (kept.refused, kept.answered) == (len(kept.harmful), len(kept.harmless))
    assert 0 < kept.refused < len(prompts[0]) and 0 < kept.answered < len(prompts[1])


def test_a_kind_of_which_no_prompt_passes_stays_whole_and_is_counted_as_none(tiny, prompts):
    kept = by_behaviour(tiny, *prompts, REFUSAL)
    assert (kept.harmful, kept.refused) == (prompts[0], 0)
    assert (kept.harmless, kept.answered) == (prompts[1], len(prompts[1]))
    with pytest.raises(ValueError, match="needs at least one harmful"):
        by_behaviour(tiny, prompts[0], [], REFUSAL)


# Candidates


@pytest.mark.parametrize("ablated", [False, True])
def test_candidate_directions_are_the_differences_of_means_computed_directly(tiny, prompts, basis, ablated):
    d = basis if ablated else None
    positions = (-4, -1)
    got = candidate_directions(tiny, *prompts, [1, 0], positions, d, batch_size=2)
    means = [torch.stack([states(tiny, e, *ablating(d))[0][:, positions] for e in kind]).mean(0) for kind in prompts]
    torch.testing.assert_close(got, (means[0] - means[1])[[1, 0]], atol=1e-6, rtol=1e-4)
    assert got.abs().max() > 1e-3
    along = (got @ basis.T).abs().max()
    assert (along < 1e-6) == ablated


@pytest.mark.parametrize("positions", [(-1, 0), (-1000,)])
def test_positions_that_prompts_lack_are_an_error(tiny, prompts, positions):
    with pytest.raises(ValueError, match="must be negative, counted from the end of prompts of which the shortest has"):
        candidate_directions(tiny, *prompts, [0], positions)


def test_a_layer_that_does_not_exist_is_an_error(tiny, prompts):
    with pytest.raises(ValueError, match="Layer 2 does not exist"):
        candidate_directions(tiny, *prompts, [0, 2])


def test_candidates_come_from_the_first_four_fifths_of_the_layers(tiny, untyped):
    assert attacked_layers(tiny) == (0,)

    class Deep:
        layers = 30

    assert attacked_layers(Deep()) == tuple(range(24))


def test_with_directions_ablated_all_three_sites_of_every_block_are_orthogonal_to_them(tiny, prompts, basis, watch):
    points = [f"blocks.{i}.{s}" for i in BOTH for s in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")]
    watching = [watch(point) for point in points]
    PromptSet.of(tiny, prompts[0]).last_logits(tiny, (*ablating(basis), *watching))
    for watched in watching:
        assert len(watched.seen) == 2  # the common beginning and the rest
        for activation in watched.seen:
            assert activation.abs().max() > 1e-4
            assert (activation @ basis.T).abs().max() < 1e-6 * activation.abs().max() + 1e-8


def test_no_directions_are_no_intervention():
    assert ablating(None) == ablating(torch.zeros(0, WIDTH)) == ()


def test_site_means_are_those_of_what_is_read_and_written_after_each_prompt(tiny, prompts, watch):
    positions = (-3, -1)
    found = site_means(tiny, prompts[1], positions, batch_size=2)
    assert found.shape == (2, tiny.layers, 3, WIDTH)
    for layer, (site, name) in product(BOTH, enumerate(READ_AND_WRITTEN)):
        watched = watch(f"blocks.{layer}.{name}")
        for example in prompts[1]:
            states(tiny, example, watched)
        direct = torch.stack([a[0, positions] for a in watched.seen]).mean(0)
        torch.testing.assert_close(found[:, layer, site], direct, atol=1e-6, rtol=1e-4)


# Scores


def directly(model, prompts, raw, layer, ablated, tokens=REFUSAL):
    """A candidate's three scores, one prompt at a time."""
    harmful, harmless = prompts
    before = ablating(ablated)
    wider = Ablate(raw[None] if ablated is None else torch.cat([ablated, raw[None]]))

    def odds(examples, *interventions):
        logits = torch.stack([states(model, e, *interventions)[1] for e in examples])
        return refusal_log_odds(logits, tokens).mean().item()

    kl = 0.0
    for e in harmless:
        p, q = (states(model, e, *i)[1].double().log_softmax(-1) for i in (before, (wider,)))
        kl += (p.exp() * (p - q)).sum().item() / len(harmless)
    return odds(harmful, wider), kl, odds(harmless, *before, Steer(layer, raw, 1.0))


@pytest.fixture(scope="module")
def candidates(basis):
    """Large enough to matter, and orthogonal to what is ablated."""
    raw = 0.2 * random(2, 3, WIDTH, seed=4)
    return raw - (raw @ basis.T) @ basis


@pytest.mark.parametrize("ablated", [False, True])
def test_exhaustive_scores_are_those_of_one_prompt_at_a_time(tiny, prompts, candidates, basis, ablated):
    d = basis if ablated else None
    scores = score_exhaustively(tiny, candidates, *prompts, refusal_ids=REFUSAL, layers=BOTH, ablated=d, batch_size=4)
    assert scores.scored.all()
    for place in product(range(2), range(3)):
        log_odds, kl, induce = directly(tiny, prompts, candidates[place], place[0], d)
        assert float(scores.log_odds[place]) == pytest.approx(log_odds, abs=1e-5)
        assert float(scores.kl[place]) == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert float(scores.induce[place]) == pytest.approx(induce, abs=1e-5)
    assert scores.kl.min() > 1e-5


def test_affine_scores_are_those_of_one_prompt_at_a_time_and_each_position_has_its_own_centre(
    tiny, prompts, candidates
):
    centres = random(3, 2, 3, WIDTH, seed=7)
    scores = score_exhaustively(tiny, candidates, *prompts, refusal_ids=REFUSAL, layers=BOTH, centres=centres)
    for layer, position in product(range(2), range(3)):
        affine = AblateAffine(candidates[layer, position][None], centres[position])
        before, after = (
            [torch.stack([states(tiny, e, *i)[1] for e in kind]) for kind in prompts] for i in ((), (affine,))
        )
        odds = float(refusal_log_odds(after[0], REFUSAL).mean())
        assert float(scores.log_odds[layer, position]) == pytest.approx(odds, abs=1e-5)
        p, q = (logits.double().log_softmax(-1) for logits in (before[1], after[1]))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert float(scores.kl[layer, position]) == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert scores.kl.min() > 1e-5


def test_affine_ablation_is_not_scored_beside_directions_that_are_ablated_already(tiny, prompts, candidates, basis):
    centres = torch.zeros(3, 2, 3, WIDTH)
    with pytest.raises(ValueError, match="one direction at a time"):
        score_exhaustively(tiny, candidates, *prompts, refusal_ids=REFUSAL, layers=BOTH, ablated=basis, centres=centres)


def test_a_candidate_of_zero_changes_nothing(tiny, prompts):
    zero = torch.zeros(1, 1, WIDTH)
    scores = score_exhaustively(tiny, zero, *prompts, refusal_ids=REFUSAL, layers=(0,))
    logits = torch.stack([states(tiny, e)[1] for e in prompts[0]])
    assert float(scores.log_odds) == pytest.approx(float(refusal_log_odds(logits, REFUSAL).mean()), abs=1e-5)
    assert float(scores.kl) == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module", params=["some pass", "none passes"])
def planted(tiny, prompts, request):
    """Forty candidates, one of which carries the refusal tokens' logits as no other does: their mean unembedding.

    A refusal by half of the vocabulary can be induced in a random model; one by a single token cannot.
    """
    raw = 0.05 * random(2, 20, WIDTH, seed=6)
    unembedding = tiny.hf.get_output_embeddings().weight.detach()
    hidden = torch.stack([states(tiny, e)[0][-1, -1] for e in prompts[0]]).mean(0)
    order = (unembedding @ hidden).argsort(descending=True)
    tokens = order[: len(order) // 2] if request.param == "some pass" else order[:1]
    raw[1, 13] = unembedding[tokens].mean(0) - unembedding.mean(0)
    return raw, tokens.tolist(), request.param == "none passes"


def test_halving_chooses_the_planted_candidate_as_scoring_all_does(tiny, prompts, planted):
    raw, tokens, fallback = planted
    settings = {"refusal_ids": tokens, "layers": BOTH}
    halved = score_by_halving(tiny, raw, *prompts, **settings, halving=SuccessiveHalving((12, 3)), kl_limit=1.0)
    every = score_exhaustively(tiny, raw, *prompts, **settings)
    chosen = choose(every, 1.0)
    assert choose(halved, 1.0) == chosen
    assert (chosen.layer, chosen.position, chosen.fallback) == (1, 13, fallback)
    kept = halved.scored
    assert int(kept.sum()) == 3
    for name in ("log_odds", "kl"):
        torch.testing.assert_close(getattr(halved, name)[kept], getattr(every, name)[kept], atol=1e-6, rtol=1e-5)
    below = kept & (every.kl <= 1.0)
    torch.testing.assert_close(halved.induce[below], every.induce[below], atol=1e-6, rtol=1e-5)
    for values in (halved.log_odds[~kept], halved.kl[~kept], halved.induce[~below]):
        assert values.isnan().all()


def scorer_of(tiny, prompts, raw, tokens, **settings):
    return _Scorer(tiny, raw, *prompts, refusal_ids=tokens, layers=BOTH, batch_size=5, **settings)


def test_several_candidates_read_in_one_pass_score_as_each_does_alone(tiny, prompts, planted):
    raw, tokens, _ = planted
    ablated, which = orthonormal(random(2, WIDTH)), [0, 3, 13, 20, 23, 33]
    together = scorer_of(tiny, prompts, raw, tokens, ablated=ablated).scores(which)
    assert together.scored.flatten().nonzero()[:, 0].tolist() == which
    for number in which:
        alone = scorer_of(tiny, prompts, raw, tokens, ablated=ablated).scores([number])
        layer, place = divmod(number, 20)
        expected = directly(tiny, prompts, raw[layer, place], layer, ablated, tokens)
        for name, value in zip(("log_odds", "kl", "induce"), expected, strict=True):
            assert float(getattr(together, name)[layer, place]) == pytest.approx(value, abs=1e-5, rel=1e-3)
            assert float(getattr(alone, name)[layer, place]) == pytest.approx(value, abs=1e-5, rel=1e-3)


def test_what_adding_does_is_not_measured_where_the_divergence_is_too_large(tiny, prompts, planted):
    raw, tokens, _ = planted
    scores = scorer_of(tiny, prompts, raw, tokens).scores(range(40))
    limit = float(scores.kl.flatten().sort().values[7])
    some = scorer_of(tiny, prompts, raw, tokens).scores(range(40), up_to=limit)
    assert torch.equal(~some.induce.isnan(), scores.kl <= limit) and some.scored.all()


def test_scores_on_some_of_the_prompts_are_those_of_these_alone_and_no_prompt_is_read_twice(
    tiny, prompts, planted, monkeypatch
):
    raw, tokens, _ = planted
    scorer = scorer_of(tiny, prompts, raw, tokens, rounds=((1, 0.1), (1, 0.5), (1, 1.0)))
    assert scorer.ends == [(1, 1), (3, 2), (6, 5)]
    counts, plain = [], PromptSet.last_logits

    def counting(self, *args):
        counts.append((self.count, self.copies))
        return plain(self, *args)

    monkeypatch.setattr(PromptSet, "last_logits", counting)
    assert scorer.scores([3, 13], 1, up_to=-1.0).induce.isnan().all()
    assert counts == [(2, 2)]
    half = scorer.scores([13], 2)
    assert counts == [(2, 2), (3, 1), (1, 1), (1, 1)]  # both kinds; then harmless ones with the difference added
    again = scorer.scores([13], 2)
    assert len(counts) == 4 and float(again.log_odds[0, 13]) == float(half.log_odds[0, 13])
    some = [scorer.harmful[:3], scorer.harmless[:2]]
    assert set(map(str, some[0])) < set(map(str, prompts[0]))
    apart = scorer_of(tiny, some, raw, tokens).scores([13])
    for name in ("log_odds", "kl", "induce"):
        one, other = (float(getattr(scores, name)[0, 13]) for scores in (half, apart))
        assert one == pytest.approx(other, abs=1e-5, rel=1e-4)


def test_halving_reads_far_fewer_prompts_than_scoring_all(tiny, prompts, planted, monkeypatch):
    raw, token, _ = planted
    counts = []
    plain = PromptSet.last_logits

    def counting(self, *args):
        counts.append(self.count * self.copies)
        return plain(self, *args)

    monkeypatch.setattr(PromptSet, "last_logits", counting)
    settings = {"refusal_ids": token, "layers": BOTH}
    many = [asked * 4 for asked in prompts]
    score_exhaustively(tiny, raw, *many, **settings)
    every, counts[:] = sum(counts), []
    score_by_halving(tiny, raw, *many, **settings, halving=SuccessiveHalving((8, 2)))
    assert sum(counts) < every / 4


def test_no_more_candidates_than_are_scored_exactly_are_not_screened(tiny, prompts, planted):
    raw, tokens, _ = planted
    settings = {"refusal_ids": tokens, "layers": BOTH}
    halved = score_by_halving(tiny, raw, *prompts, **settings, halving=SuccessiveHalving((40, 40)))
    every = score_exhaustively(tiny, raw, *prompts, **settings)
    assert halved.scored.all() and choose(halved) == choose(every)


# Choosing


def table(log_odds, kl, induce):
    return Scores(*(torch.tensor([values], dtype=torch.float64) for values in (log_odds, kl, induce)))


def test_the_choice_is_the_lowest_log_odds_among_those_that_pass():
    scores = table([-9.0, -8.0, -2.0, -3.0], [0.2, 0.01, 0.1, 0.1], [1.0, -0.1, 0.0, 5.0])
    choice = choose(scores)
    assert (choice.layer, choice.position, choice.fallback) == (0, 3, False)
    assert choose(scores, kl_limit=0.2).position == 0


def test_if_none_passes_the_lowest_sum_is_chosen_and_marked():
    nan = float("nan")
    scores = table([-5.0, -4.0, nan, -4.5], [3.0, 0.5, nan, 2.0], [1.0, -1.0, nan, -1.0])
    choice = choose(scores)
    assert (choice.position, choice.fallback) == (1, True)


def test_what_was_not_scored_is_never_chosen():
    nan = float("nan")
    assert choose(table([nan, -1.0], [nan, 0.0], [nan, 1.0])).position == 1
    with pytest.raises(ValueError, match="No candidate was scored"):
        choose(table([nan, nan], [nan, nan], [nan, nan]))


def test_the_least_damaging_candidate_is_chosen_among_those_that_undo_refusal():
    nan = float("nan")
    scores = table([0.5, 0.0, -0.5, -9.0, nan], [0.01, 0.3, 0.2, 4.0, nan], [1.0, 1.0, -1.0, 1.0, nan])
    assert (least_kl(scores).layer, least_kl(scores).position, least_kl(scores).fallback) == (0, 2, False)
    assert least_kl(scores, -1.0).position == 3
    assert least_kl(scores, 1.0).position == 0
    assert least_kl(scores, -10.0) is None
    with pytest.raises(ValueError, match="No candidate was scored"):
        least_kl(table([nan], [nan], [nan]))


def test_the_table_of_candidates_names_the_place_of_each_that_was_scored():
    nan = float("nan")
    rows = candidate_table(table([-1.0, nan, -3.0], [0.1, nan, 0.3], [2.0, nan, nan]), [7], [-3, -2, -1])
    assert [(row.layer, row.position, row.log_odds, row.kl) for row in rows] == [(7, -3, -1.0, 0.1), (7, -1, -3.0, 0.3)]
    assert rows[0].induce == 2.0 and math.isnan(rows[1].induce)
    with pytest.raises(ValueError, match="1 blocks and 2 positions were named"):
        candidate_table(table([-1.0], [0.1], [2.0]), [7], [-2, -1])


# Damage against suppression


@pytest.mark.parametrize(
    ("log_odds", "kl", "level", "damage"),
    [
        ([2.0, 1.0, -1.0, -2.0], [0.0, 0.1, 0.3, 0.9], 0.0, 0.2),  # half-way between two scales
        ([2.0, 1.0, -1.0, -2.0], [0.0, 0.1, 0.3, 0.9], -1.0, 0.3),  # at a scale
        ([2.0, 1.0, -1.0, -2.0], [0.0, 0.1, 0.3, 0.9], -1.5, 0.6),
        ([2.0, 1.0, -1.0, -2.0], [0.0, 0.1, 0.3, 0.9], -3.0, math.inf),  # never
        ([-0.5, -1.0], [0.0, 0.2], 0.0, 0.0),  # there was nothing to suppress
        ([2.0, -2.0, 2.0], [0.0, 0.8, 0.2], 0.0, 0.4),  # the first crossing
        ([2.0, -2.0, 2.0], [0.0, 0.8, 0.1], 0.0, 0.4),
        ([2.0, -2.0, -3.0], [0.0, 0.8, 0.1], 0.0, 0.1),  # a larger scale that does less damage
        ([2.0, 0.0, 2.0], [0.0, 0.5, 1.0], 0.0, 0.5),  # touched
    ],
)
def test_damage_is_the_least_divergence_at_which_log_odds_are_low_enough(log_odds, kl, level, damage):
    assert damage_at(np.array(log_odds), np.array(kl), level) == pytest.approx(damage)


def test_a_curve_without_a_divergence_for_each_log_odds_is_an_error(untyped):
    for odds, kl in (([1.0], [0.1, 0.2]), ([], [])):
        with pytest.raises(ValueError, match="A curve needs a KL for each log-odds"):
            damage_at(np.array(odds), np.array(kl), 0.0)


@pytest.mark.parametrize("affine", [False, True])
def test_a_damage_curve_is_that_of_one_scale_and_prompt_at_a_time(tiny, prompts, affine):
    direction, centre = random(1, WIDTH, seed=3), 0.5 * random(2, 3, WIDTH, seed=8) if affine else None
    scales = (0.0, 0.5, 1.0, 1.5)
    curve = damage_curve(tiny, direction, *prompts, refusal_ids=REFUSAL, centre=centre, scales=scales)
    assert curve.log_odds.shape == (4, len(prompts[0])) and curve.kl.shape == (4, len(prompts[1]))
    for i, scale in enumerate(scales):
        ablated = AblateAffine(direction, centre, scale)
        odds = refusal_log_odds(torch.stack([states(tiny, e, ablated)[1] for e in prompts[0]]), REFUSAL)
        np.testing.assert_allclose(curve.log_odds[i], odds, atol=1e-5)
    assert np.abs(curve.kl[0]).max() < 1e-6 < curve.kl[2].min()
    if not affine:
        whole = torch.stack([states(tiny, e, Ablate(direction))[1] for e in prompts[0]])
        np.testing.assert_allclose(curve.log_odds[2], refusal_log_odds(whole, REFUSAL), atol=1e-5)
    assert curve.damage_at(1e6) == 0.0 and curve.damage_at(-1e6) == math.inf


def test_a_damage_curve_without_scales_or_prompts_is_an_error(tiny, prompts):
    with pytest.raises(ValueError, match="at least one scale"):
        damage_curve(tiny, random(1, WIDTH), *prompts, refusal_ids=REFUSAL, scales=())
    with pytest.raises(ValueError, match="at least one harmful"):
        damage_curve(tiny, random(1, WIDTH), [], prompts[1], refusal_ids=REFUSAL)


def test_a_ranking_starts_with_the_choice_and_then_the_lowest_sum_and_leaves_none_out():
    nan = float("nan")
    scores = table([-1.0, -9.0, -3.0, -2.0, nan], [0.0, 0.5, 0.05, 0.01, nan], [1.0, 1.0, 1.0, 1.0, nan])
    order = ranking(scores)
    assert order[:2] == [2, 1] and sorted(order) == [0, 1, 2, 3]


def test_in_a_ranking_a_candidate_whose_adding_was_not_measured_may_pass():
    nan = float("nan")
    assert ranking(table([-1.0, -4.0, -2.0], [0.0, 2.0, 0.01], [-1.0, nan, nan])) == [2, 1, 0]


# The attack


@pytest.mark.parametrize("scoring", ["halved", "exhaustive"])
def test_directions_are_orthonormal_and_each_is_the_candidate_chosen_with_those_before_it_ablated(
    tiny, prompts, scoring
):
    seen = []
    settings = AttackSettings(layers=BOTH, positions=(-2, -1), scoring=scoring, smallest=0.0)
    steps = iterated_ablation(
        tiny, *prompts, 4, refusal_ids=REFUSAL, settings=settings, after=lambda k, d: seen.append((k, d.clone()))
    )
    assert [k for k, _ in seen] == [0, 1, 2, 3, 4] == [len(d) for _, d in seen]
    assert [step.k for step in steps] == [1, 2, 3, 4]
    found = torch.stack([step.direction for step in steps])
    torch.testing.assert_close(found @ found.T, torch.eye(4), atol=1e-5, rtol=0)
    for step, (k, before) in zip(steps, seen, strict=False):
        assert torch.equal(before, found[:k]) or torch.allclose(before, found[:k], atol=1e-6)
        raw = candidate_directions(tiny, *prompts, BOTH, (-2, -1), before)
        scores = score_exhaustively(tiny, raw, *prompts, refusal_ids=REFUSAL, layers=BOTH, ablated=before)
        choice = choose(scores)
        place = choice.layer, choice.position
        assert (step.layer, step.position) == (choice.layer, (-2, -1)[choice.position])
        assert step.fallback == choice.fallback
        assert step.norm == pytest.approx(float(raw[place].norm()), rel=1e-3)
        torch.testing.assert_close(step.direction, raw[place] / raw[place].norm(), atol=1e-3, rtol=0)
        assert step.log_odds == pytest.approx(float(scores.log_odds[place]), abs=1e-4)
        assert step.kl == pytest.approx(float(scores.kl[place]), abs=1e-5)
        assert step.induce == pytest.approx(float(scores.induce[place]), abs=1e-4)
        assert step.scored <= 4


def test_the_fallback_is_flagged_when_adding_no_candidate_brings_refusal_about(tiny, prompts):
    """A random model gives each token a chance of one in fifty thousand, so no log-odds reach 0."""
    rare = iterated_ablation(tiny, *prompts, 1, refusal_ids=REFUSAL)
    common = iterated_ablation(tiny, *prompts, 1, refusal_ids=list(range(40_000)))
    assert rare[0].fallback and rare[0].induce < 0
    assert not common[0].fallback and common[0].induce >= 0 and common[0].kl <= 0.1


def test_directions_come_from_all_prompts_and_scores_from_those_that_are_spread_over_them(tiny, prompts):
    settings = AttackSettings(layers=BOTH, positions=(-2, -1), scoring="exhaustive", scored_on=4)
    (step,) = iterated_ablation(tiny, *prompts, 1, refusal_ids=REFUSAL, settings=settings)
    raw = candidate_directions(tiny, *prompts, BOTH, (-2, -1))
    some = [[prompts[0][i] for i in (0, 1, 3, 4)], [prompts[1][i] for i in (0, 1, 2, 3)]]
    scores = score_exhaustively(tiny, raw, *some, refusal_ids=REFUSAL, layers=BOTH)
    choice = choose(scores)
    place = choice.layer, choice.position
    torch.testing.assert_close(step.direction, torch.nn.functional.normalize(raw[place], dim=0), atol=1e-6, rtol=0)
    assert step.log_odds == pytest.approx(float(scores.log_odds[place]), abs=1e-6)


def test_the_attack_stops_at_a_difference_far_shorter_than_the_first(tiny, prompts):
    seen = []
    settings = AttackSettings(layers=(0,), positions=(-1,))
    few = [prompts[0][:2], prompts[1][:1]]
    free = iterated_ablation(tiny, *few, 3, refusal_ids=REFUSAL, settings=settings)
    norms = [step.norm for step in free]
    assert norms[1] < norms[0]
    between = (norms[1] / norms[0]) * 1.01
    settings = AttackSettings(layers=(0,), positions=(-1,), smallest=between)
    stopped = iterated_ablation(
        tiny, *few, 3, refusal_ids=REFUSAL, settings=settings, after=lambda k, d: seen.append(k)
    )
    assert len(stopped) == 1 and seen == [0, 1]


def test_prompts_that_are_all_alike_give_no_direction(tiny, prompts):
    same = [prompts[0][:1], prompts[0][:1]]
    assert iterated_ablation(tiny, *same, 2, refusal_ids=REFUSAL) == []


def test_more_directions_than_the_hidden_size_are_an_error_before_anything_is_read(tiny, prompts):
    seen = []
    with pytest.raises(ValueError, match=r"^33 directions cannot be ablated: tiny-random has a hidden size of 32, "):
        iterated_ablation(tiny, *prompts, 33, refusal_ids=REFUSAL, after=lambda k, d: seen.append(k))
    assert not seen


def test_an_attack_without_prompts_of_a_kind_is_an_error(tiny, prompts):
    for pair in ((prompts[0], []), ([], prompts[1])):
        with pytest.raises(ValueError, match="needs at least one harmful and one harmless prompt"):
            iterated_ablation(tiny, *pair, 1, refusal_ids=REFUSAL)


def test_an_attack_leaves_no_hook_and_no_gradient(tiny, prompts, hook_count):
    before = hook_count(tiny)
    iterated_ablation(tiny, *prompts, 2, refusal_ids=REFUSAL)
    assert hook_count(tiny) == before
    assert all(p.grad is None for p in tiny.hf.parameters())


def test_a_frozen_model_can_be_attacked_as_well(prompts):
    steps = iterated_ablation(load("tiny-random", dtype="float32", weights="frozen"), *prompts, 1, refusal_ids=REFUSAL)
    assert len(steps) == 1


# Stronger attackers


def test_a_probes_direction_is_the_planted_one_whatever_the_scale_of_its_features():
    v = torch.nn.functional.normalize(random(WIDTH), dim=0)
    harmful = torch.arange(400) % 2 == 0
    x = 0.3 * random(400, WIDTH, seed=1)
    x = x - (x @ v)[:, None] * v + (2.0 * harmful - 1)[:, None] * v + 0.3 * random(400, 1, seed=2) * v
    for scale in (torch.ones(WIDTH), torch.linspace(0.1, 10, WIDTH)):
        found = probe_direction(x * scale, harmful)
        assert found.shape == (1, WIDTH) and float(found.norm()) == pytest.approx(1, abs=1e-5)
        side = (x * scale - (x * scale).mean(0)) @ found[0]
        assert torch.equal(side > 0, harmful)  # towards harmful
        boundary = torch.nn.functional.normalize(probe_direction(x, harmful) / scale)  # the same one, rescaled
        torch.testing.assert_close(found, boundary, atol=1e-4, rtol=0)
    assert float(probe_direction(x, harmful)[0] @ v) > 0.9
    constant = torch.cat([x, torch.ones(400, 1)], dim=1)
    assert float(probe_direction(constant, harmful)[0, -1]) == 0
    with pytest.raises(ValueError, match="both harmful and harmless"):
        probe_direction(x, torch.ones(400, dtype=torch.bool))


def test_the_top_subspace_is_that_of_the_differences_whatever_their_length():
    u, w = orthonormal(random(2, WIDTH))
    rows = torch.stack([u, u + 0.1 * w, u - 0.1 * w, u + 0.2 * w, u, u])
    candidates = (rows * torch.tensor([1.0, 50, 0.1, 3, 7, 2])[:, None]).view(2, 3, WIDTH)
    found = top_subspace(candidates, 2)
    torch.testing.assert_close(found @ found.T, torch.eye(2), atol=1e-5, rtol=0)
    assert abs(float(found[0] @ u)) > 0.99 and abs(float(found[1] @ w)) > 0.99
    torch.testing.assert_close(top_subspace(3 * candidates, 1), found[:1], atol=1e-5, rtol=0)
    for k in (0, 3):
        with pytest.raises(ValueError, match=f"A subspace of {k} directions cannot be had: .* span 2"):
            top_subspace(candidates, k)
