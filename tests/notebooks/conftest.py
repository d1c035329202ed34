"""The notebooks as they are committed, and the editions made of them."""

from pathlib import Path

import nbformat
import pytest

from helpers.book.editions import EDITIONS, write_edition

PROJECT = Path(__file__).resolve().parents[2]
STEMS = sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Where the notebooks are: as committed, and by edition."""
    made = tmp_path_factory.mktemp("editions")
    for edition in EDITIONS:
        write_edition(edition, made / edition)
    return {"committed": PROJECT / "notebooks", **{edition: made / edition for edition in EDITIONS}}


@pytest.fixture(params=STEMS)
def stem(request):
    """A chapter, by the name of its notebook."""
    return request.param


@pytest.fixture
def committed(stem):
    """The chapter's notebook as it is committed."""
    return nbformat.read(PROJECT / "notebooks" / f"{stem}.ipynb", as_version=4)
