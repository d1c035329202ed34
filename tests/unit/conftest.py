"""One tiny model for all unit tests: tests that train or change weights load their own."""

import pytest

from helpers.chat import encode
from helpers.corpora import load_trait, split
from helpers.models import load


@pytest.fixture(scope="session")
def tiny():
    return load("tiny-random", dtype="float32")


@pytest.fixture(scope="session")
def examples(tiny):
    """Six conversations of different lengths."""
    return [encode(tiny.tokenizer, row.question, row.strong) for row in split(load_trait("evil"), "eval")[:6]]
