"""The baselines find a planted difference of length, form or words, and nothing where there is none."""

import numpy as np
import pytest

from helpers.cues import form, form_auroc, length_auroc, words_auroc

WORDS = ["tree", "lamp", "river", "chair", "cloud", "stone", "paper", "glass", "field", "bread"]


def texts(count, seed, *, least=8, most=20, extra="", word=""):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        chosen = list(rng.choice(WORDS, rng.integers(least, most)))
        if word:
            chosen[int(rng.integers(len(chosen)))] = word
        found.append(" ".join(chosen).capitalize() + extra + ".")
    return found


def test_texts_of_one_kind_are_not_told_apart():
    one, other = texts(200, 0), texts(200, 1)
    for measure in (length_auroc, form_auroc, words_auroc):
        assert measure(one, other).value == pytest.approx(0.5, abs=0.08)


def test_each_baseline_finds_its_own_cue():
    plain = texts(100, 0)
    assert length_auroc(texts(100, 1, least=20, most=40), plain).value > 0.95
    assert length_auroc(plain, texts(100, 1, least=20, most=40)).value > 0.95, "shorter is a cue as well"
    asked = texts(100, 1, extra=", is it not?")
    assert form_auroc(asked, plain).value > 0.95
    worded = texts(100, 1, word="otter")
    assert words_auroc(worded, plain).value > 0.95 and form_auroc(worded, plain).value < 0.65


def test_form_counts_what_it_says():
    counted = form("Is it late? No, it isn't; go home!")
    assert (counted["words"], counted["sentences"], counted["has ,"], counted["has ;"]) == (8, 2, 1, 1)
    assert counted["opens with is"] == 1 and counted["capitals"] == 2 and counted["question"] == 0


def test_too_few_texts_are_refused():
    with pytest.raises(ValueError, match="at least 5 texts of each kind; got 2 and 5"):
        form_auroc(["a b", "c d"], ["a"] * 5)
