"""The judges that several files of tests ask, fitted once."""

import pytest

from helpers.corpora import load_trait, split
from helpers.judges.classifier import TraitJudge


@pytest.fixture(scope="session")
def judges():
    traits = ("evil", "impolite", "pirate", "sycophantic")
    return {trait: TraitJudge.fit(split(load_trait(trait), "train")) for trait in traits}
