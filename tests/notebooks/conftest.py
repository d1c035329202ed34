"""The notebooks as they are committed, and the editions made of them."""

import ast
from pathlib import Path

import nbformat
import pytest

from helpers.book.editions import EDITIONS, part_of, write_edition

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


@pytest.fixture
def imports(committed):
    """A namespace with what the chapter imports, and nothing that it computes."""
    namespace = {}
    for cell in committed.cells:
        if cell.cell_type == "code" and part_of(cell) is None:
            found = [n for n in ast.parse(cell.source).body if isinstance(n, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(found, []), "imports", "exec"), namespace)
    return namespace
