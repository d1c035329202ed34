"""Acceptance tests compute everything anew: what an earlier run stored could hide that it can no longer be computed."""

import tempfile

import pytest


@pytest.fixture(scope="session")
def fresh_folder():
    """Deleted after the session: it holds gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.fixture(scope="module", autouse=True)
def fresh_store(fresh_folder):
    """One artifact store for all acceptance tests of a session, and for no other test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELPERS_STORE", fresh_folder)
        yield
