"""The book as a graph of files: notebook + parameters -> executed notebook + findings -> pages -> HTML.

    snakemake --cores 2 --config preset=quick
    snakemake --cores 2 --config preset=quick 'parameters={"steps": 30}'

Everything made lies in book/executed/{preset}/, a complete Jupyter Book source tree. A finished step is not made again
unless its notebook, its parameters, a data file or a helper it uses changed, so an interrupted run resumes.
"""

import json
import os
import shlex
import sys
from pathlib import Path

from helpers.building import plan as building
from helpers.building.console import Console
from helpers.params import ParameterError
from snakemake.logging import logger

try:
    PAGES = building.pages()
    CHAPTERS = [Path(page).name for page in PAGES if page.startswith("notebooks/")]
    PRESET, GIVEN = building.chosen(config, CHAPTERS, workflow.resource_settings.cores)
    RESOLVED = {chapter: building.resolved(chapter, PRESET, GIVEN[chapter]) for chapter in CHAPTERS}
    INPUTS = {chapter: building.inputs(chapter) for chapter in CHAPTERS}
    TREE = building.tree_of(PRESET)
    LOCK = None if workflow.output_settings.dryrun else building.begin(TREE, PAGES)
except (building.BuildError, ParameterError) as error:
    sys.exit(str(error))

# Chapters run side by side where one alone leaves the machine idle: with a tiny model, or on a GPU
BESIDE = PRESET == "tiny" or Path("/dev/nvidiactl").exists()
STEP = f"exec {shlex.quote(sys.executable)} -m helpers.building.steps --tree {TREE} --builder {os.getpid()} --log"
CHAPTER, SITE = building.mark(TREE, "{chapter}"), building.mark(TREE, "site")


def plan():
    """The chapters that will be run, and how many of them side by side."""
    due = [job.wildcards.chapter for job in workflow.dag.needrun_jobs() if job.rule.name == "execute"]
    return sorted(due), workflow.cores if BESIDE else 1


if LOCK:
    for handler in [handler for handler in logger.handlers if handler.name == "DefaultStreamHandler"]:
        logger.removeHandler(handler)
    logger.addHandler(Console(TREE, plan))


wildcard_constraints:
    chapter="|".join(CHAPTERS),


rule site:
    input:
        building.prose(),
        building.helper_files(),  # the reference pages show their docstrings
        building.mark(TREE, "pages"),
        expand(CHAPTER, chapter=CHAPTERS),
    output:
        SITE,
    log:
        f"logs/{PRESET}/site.log",
    shell:
        "{STEP} {log} site > {log} 2>&1"


rule pages:
    input:
        "book/claims.yml",
        "book/map.yml",
        "_toc.yml",
        sorted(str(path) for path in Path("book/reference").glob("*/*")),
        building.sources(["book.pages"]),
        expand(CHAPTER, chapter=CHAPTERS),
    output:
        building.mark(TREE, "pages"),
    log:
        f"logs/{PRESET}/pages.log",
    shell:
        "{STEP} {log} pages > {log} 2>&1"


rule execute:
    input:
        lambda wildcards: INPUTS[wildcards.chapter],
    output:
        CHAPTER,
    log:
        f"logs/{PRESET}/{{chapter}}.log",
    params:
        resolved=lambda wildcards: RESOLVED[wildcards.chapter],
        given=lambda wildcards: json.dumps({"preset": PRESET, **GIVEN[wildcards.chapter]}),
    # Snakemake sets OMP_NUM_THREADS to this
    threads: 1 if BESIDE else lambda wildcards: workflow.cores
    shell:
        "{STEP} {log} {wildcards.chapter} --given {params.given:q} > {log} 2>&1"
