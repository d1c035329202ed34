"""What a build does with bad configuration, odd folders, broken environments, kills and company.

The builds are of a book in small: a copy of the project with two chapters of a few cells that compute for a second,
save findings as chapters do, and fail on demand. Snakefile, Makefile, helpers and Jupyter Book are the real ones.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import nbformat
import pytest
from snakemake.cli import parse_config

from helpers import building
from helpers.building import BuildError
from helpers.pages import chapters
from helpers.params import CHAPTERS, ParameterError

PROJECT = Path(__file__).resolve().parents[2]
SMALL = ("02_ip_loss_reduction", "05_fihs_filtering")
TREE = Path("book", "executed", "tiny")
LOOKS_WRONG = re.compile(r"traceback|error|warning|unknown|encryption|not found|exception|killed|%\|", re.IGNORECASE)

COMPUTES = """
import time
from types import SimpleNamespace
from helpers.findings import Findings, provenance

model = SimpleNamespace(name="none", digest="0" * 64, device="cpu", dtype="torch.float32")
findings = Findings(params, provenance(params, model))
findings.glued["number"] = {{"value": params.learning_rate * {number}, "text": "a number"}}
for part in range(4):
    findings.folder.mkdir(parents=True, exist_ok=True)
    (findings.folder / f"part_{{part}}.csv").write_text(f"{{part * {number}}}")
    time.sleep(0.2)
findings.save()
print(params.results)
"""


def write_chapter(project, chapter, *codes):
    parameters = nbformat.v4.new_code_cell("preset = None\nlearning_rate = None\nresults = None")
    parameters.metadata.tags = ["parameters"]
    name = CHAPTERS[chapter].__name__
    read = f"from helpers.params import {name}\n\nparams = {name}.from_notebook()"
    cells = [nbformat.v4.new_markdown_cell(f"# Chapter {chapter[:2]}"), parameters]
    cells += [nbformat.v4.new_code_cell(code) for code in (read, *codes)]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), project / "notebooks" / f"{chapter}.ipynb")


def commands(folder):
    """Put the commands of an environment there that has the packages of the running one, and that nobody shares."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder / ".venv")
    paths = sysconfig.get_paths(vars={"base": str(folder / ".venv"), "platbase": str(folder / ".venv")})
    Path(paths["purelib"], "running.pth").write_text(sysconfig.get_paths()["purelib"])
    python = folder / ".venv" / "bin" / "python"
    for name, code in (("pip", "import pip"), ("snakemake", "from snakemake.cli import main\nmain()")):
        script = python.with_name(name)
        script.write_text(f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\n{code}\n")
        script.chmod(0o755)
    (folder / ".venv" / ".installed").touch()


def copy(folder):
    """The project in small, with an environment of its own."""
    folder.mkdir()
    for name in ("Snakefile", "Makefile", "pyproject.toml", "requirements.lock", "CHANGELOG.md", "_config.yml"):
        shutil.copy2(PROJECT / name, folder / name)
    for name in ("helpers", "data", "profiles", "book"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("executed"))
    (folder / "notebooks").mkdir()
    for number, chapter in enumerate(SMALL, 1):
        write_chapter(folder, chapter, COMPUTES.format(number=number))
    (folder / "book" / "intro.md").write_text("# A book in small\n\nIts pages are few.\n")
    contents = "format: jb-book\nroot: book/intro\nchapters:\n" + "".join(f"- file: notebooks/{c}\n" for c in SMALL)
    (folder / "_toc.yml").write_text(contents)
    commands(folder)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy(tmp_path_factory.mktemp("builds") / "book")


def environment(**more):
    outer = {name: value for name, value in os.environ.items() if name not in ("PRESET", "CORES", "MAKEFLAGS")}
    return {**outer, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def make(project, *arguments, **more):
    command = ["make", "--no-print-directory", "book", *arguments]
    return subprocess.run(command, cwd=project, env=environment(**more), capture_output=True, text=True, timeout=1200)


def build(project, *arguments, **more):
    """A build that must end well; what it printed."""
    done = make(project, "PRESET=tiny", "CORES=2", *arguments, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not LOOKS_WRONG.search(done.stdout + done.stderr), done.stdout + done.stderr
    return done.stderr
