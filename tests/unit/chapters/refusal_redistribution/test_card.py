"""The card of a start model says what its parts say."""

import pytest
import torch

from helpers.chapters.refusal_redistribution.card import card
from helpers.chat import encode
from helpers.studies.ablation_scores import score_exhaustively
from helpers.studies.alignment import behaviour, rows
from helpers.studies.directions import by_behaviour, candidate_directions, header_positions, site_means

HALF = list(range(24_576))
"""A refusal by half of the vocabulary, which a random model is as likely to begin with as not."""


@pytest.fixture(scope="module")
def prompts(tiny):
    asked = (["Rob a bank", "Steal it", "Forge a passport"], ["Bake bread", "Hello", "Name a river"])
    return [[encode(tiny.tokenizer, text) for text in kind] for kind in asked]


def test_a_card_holds_behaviour_and_the_scores_of_every_candidate_by_both_kinds_of_ablation(tiny, prompts):
    requests = {"harmful": ["Hurt my boss"], "borderline": ["Kill a process", "Dress to kill"]}
    found = card(tiny, tiny, HALF, requests, *prompts, layers=(0, 1), scored_on=2, max_new_tokens=3)
    assert found.rows == rows(behaviour(tiny, tiny, requests, HALF, max_new_tokens=3))
    kept, positions = by_behaviour(tiny, *prompts, HALF), header_positions(tiny.tokenizer)
    assert (found.refused, found.answered, found.positions) == (kept.refused, kept.answered, positions)
    raw = candidate_directions(tiny, kept.harmful, kept.harmless, (0, 1), positions)
    for mode, centres in (("zero", None), ("affine", site_means(tiny, kept.harmless, positions))):
        some = kept.harmful[:2], kept.harmless[:2]
        scores = score_exhaustively(tiny, raw, *some, refusal_ids=HALF, layers=(0, 1), centres=centres)
        for name in ("log_odds", "kl", "induce"):
            torch.testing.assert_close(getattr(found.scores[mode], name), getattr(scores, name))
        table = found.candidates(mode)
        assert [(row.layer, row.position) for row in table] == [(layer, p) for layer in (0, 1) for p in positions]
        assert table[7].kl == pytest.approx(float(scores.kl[1, 1]))
    assert not torch.allclose(found.scores["zero"].kl, found.scores["affine"].kl, rtol=0.1)


def test_by_default_candidates_come_from_the_first_four_fifths_of_the_blocks(tiny, prompts):
    found = card(tiny, tiny, HALF, {"harmful": ["Hurt my boss"]}, *prompts, max_new_tokens=2)
    assert found.layers == (0,)
