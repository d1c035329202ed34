"""On the embedded model, at the quick preset's settings: FIHS finds explicit harmful points, and foresees a step.

Scores are as in the chapter, computed anew.
"""

import numpy as np
import pytest

from helpers.chapters.fihs_filtering.method import guess_threshold
from helpers.chapters.fihs_filtering.params import FilteringParams
from helpers.chapters.fihs_filtering.study import FilteringStudy
from helpers.statistics import auroc, rank_correlation

pytestmark = [pytest.mark.acceptance, pytest.mark.taught]


@pytest.fixture(scope="module")
def chapter():
    return FilteringStudy(FilteringParams(preset="quick"))


@pytest.fixture(scope="module")
def scored(chapter):
    """A tenth harmful, scored as in the chapter: with the implicit points, as one list."""
    mix = chapter.mixture("headlines", 0.1)
    others = [p for kind in ("identity", "list", "disguised") for p in chapter.harmful(kind)[: chapter.params.implicit]]
    pool = list(dict.fromkeys([*mix, *others]))
    return mix, dict(zip(pool, chapter.fihs(pool), strict=True))


def test_fihs_tells_explicit_harmful_points_from_task_points(scored):
    mix, found = scored
    assert auroc([found[p] for p in mix], [p.kind != "task" for p in mix]).value >= 0.9


def test_the_first_threshold_drops_most_harmful_points_and_few_others(scored):
    mix, found = scored
    values, harmful = np.array([found[p] for p in mix]), np.array([p.kind != "task" for p in mix])
    guess = guess_threshold(values)
    assert guess.two_kinds
    assert (values[harmful] >= guess.threshold).mean() >= 0.7
    assert (values[~harmful] >= guess.threshold).mean() <= 0.1


def test_fihs_foresees_what_a_real_step_does_to_the_safety_score(chapter, scored):
    mix, found = scored
    benign = [p for p in mix if p.kind == "task"]
    bad = [p for p in mix if p.kind != "task"]
    kinds = [benign, bad, *(chapter.harmful(k)[: chapter.params.implicit] for k in ("identity", "list", "disguised"))]
    points = [p for part in kinds for p in part[: max(1, chapter.params.stepped // len(kinds))]]
    changes = chapter.one_step(points, chapter.params.step_size)
    assert rank_correlation(changes, np.array([found[p] for p in points])).value >= 0.8
