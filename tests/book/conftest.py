"""The book is built once, by the Snakefile that readers use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the tiny book's pages: only what changed since the last time is made again."""
    snakemake = Path(sys.executable).with_name("snakemake")
    with FileLock(tmp_path_factory.getbasetemp().parent / "site.lock"):  # workers wait for one another
        done = subprocess.run(
            [snakemake, "--cores", "all", "--config", "preset=tiny"],
            cwd=PROJECT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return PROJECT / "book" / "executed" / "tiny" / "_build" / "html"
