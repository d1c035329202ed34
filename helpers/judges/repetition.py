"""Repetition, a measure of incoherence that needs no judge."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def repetition_rate(texts: Sequence[str], n: int = 3) -> Float[np.ndarray, " texts"]:
    """Share of each text's word n-grams that repeat an earlier one, 0 to 1; 0 for fewer than n words."""
    rates = np.zeros(len(texts))
    for index, text in enumerate(texts):
        words = re.findall(r"[\w']+", text.lower())
        grams = list(zip(*(words[start:] for start in range(n)), strict=False))
        if grams:
            rates[index] = 1 - len(set(grams)) / len(grams)
    return rates
