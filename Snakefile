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

from sphinx_external_toc.parsing import parse_toc_yaml

from helpers import building
from helpers.console import Console
from helpers.params import ParameterError
from snakemake.logging import logger

PAGES = [str(page) for page in parse_toc_yaml("_toc.yml")]
CHAPTERS = [Path(page).name for page in PAGES if page.startswith("notebooks/")]

try:
    PRESET, GIVEN = building.chosen(config, CHAPTERS)
    RESOLVED = {chapter: building.resolved(chapter, PRESET, GIVEN[chapter]) for chapter in CHAPTERS}
    INPUTS = {chapter: building.inputs(chapter) for chapter in CHAPTERS}
    TREE = building.tree_of(PRESET)
    LOCK = None if workflow.output_settings.dryrun else building.begin(TREE, PAGES)
except (building.BuildError, ParameterError) as error:
    sys.exit(str(error))

AT_ONCE = (workflow.cores or 1) if PRESET == "tiny" else 1  # a tiny model is done sooner beside another than on all cores
STEP = f"exec {shlex.quote(sys.executable)} -m helpers.steps --tree {TREE} --builder {os.getpid()} --log"
CHAPTER, SITE = building.mark(TREE, "{chapter}"), building.mark(TREE, "site")


def due():
    """The chapters that will be run."""
    return [job.wildcards.chapter for job in workflow.dag.needrun_jobs() if job.rule.name == "execute"]


if LOCK:
    for handler in [handler for handler in logger.handlers if handler.name == "DefaultStreamHandler"]:
        logger.removeHandler(handler)
    logger.addHandler(Console(TREE, due, AT_ONCE))


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
        sorted(str(path) for path in Path("book/reference").glob("*.json")),
        building.sources(["pages"]),
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
    threads: 1 if PRESET == "tiny" else workflow.cores or 1
    shell:
        "{STEP} {log} {wildcards.chapter} --given {params.given:q} > {log} 2>&1"
