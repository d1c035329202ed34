"""Repetition is told by words alone."""

import numpy as np

from helpers.judges.repetition import repetition_rate


def test_repetition_is_the_share_of_word_triples_seen_before():
    rates = repetition_rate(["a b c d e", "go go go go go", "A b c, a b C!", "too short", ""])
    np.testing.assert_allclose(rates, [0, 2 / 3, 1 / 4, 0, 0])
