"""The book as a graph of files: notebook + parameters -> executed notebook + findings -> pages -> HTML.

    snakemake --cores 2 --config preset=quick
    snakemake --cores 2 --config preset=quick 'parameters={"steps": 30}'

Everything made lies in book/executed/{preset}/, a complete Jupyter Book source tree. A finished output is not made again
unless its notebook, its parameters, a data file or a helper it uses changed, so an interrupted run resumes.
"""

import filecmp
import json
import shlex
import shutil
import sys
from pathlib import Path

from sphinx_external_toc.parsing import parse_toc_yaml

from helpers.dependencies import helper_sources, notebook_sources
from helpers.params import ParameterError, params_of

PRESET = config.get("preset", "quick")
GIVEN = config.get("parameters", {})
TREE = f"book/executed/{PRESET}"
SITE = f"{TREE}/_build/html"
GENERATED = ["book/overview", "book/scoreboard", "book/status", "book/map", "book/parameters"]

PAGES = [str(page) for page in parse_toc_yaml("_toc.yml")]
CHAPTERS = [Path(page).name for page in PAGES if page.startswith("notebooks/")]
PROSE = ["_config.yml", "_toc.yml", "CHANGELOG.md"] + [
    str(path)
    for path in sorted(Path("book").rglob("*"))
    if path.is_file() and path.parts[1] not in ("executed", "reference") and path.suffix != ".yml"
]


def given(chapter):
    """The parameters from the command line that the chapter has."""
    return {name: GIVEN[name] for name in sorted(GIVEN) if name in params_of(chapter).model_fields}


try:
    for chapter in CHAPTERS:
        params_of(chapter)(preset=PRESET, **given(chapter))
    for name in GIVEN:
        if not any(name in given(chapter) for chapter in CHAPTERS):
            params_of(CHAPTERS[0])(**{name: GIVEN[name]})  # says what the nearest name is
except ParameterError as error:
    sys.exit(str(error))

shell.prefix(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; ")


rule site:
    input:
        PROSE,
        sorted(str(path) for path in Path("helpers").rglob("*.py")),  # the reference pages show their docstrings
        expand(f"{TREE}/{{page}}.md", page=GENERATED),
        expand(f"{TREE}/notebooks/{{chapter}}.ipynb", chapter=CHAPTERS),
    output:
        f"{SITE}/index.html",
        [f"{SITE}/{page}.html" for page in PAGES],
    log:
        f"logs/{PRESET}/site.log",
    run:
        newest = max(path.stat().st_mtime for path in Path("helpers").rglob("*.py"))
        for path in PROSE:
            copy = Path(TREE, path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            due = newest if path.startswith("book/api/") else 0  # Sphinx does not see that it depends on docstrings
            if not copy.exists() or copy.stat().st_mtime < due or not filecmp.cmp(path, copy, shallow=False):
                shutil.copy(path, copy)
        # Pages are all written anew, so that every one there is of this build. Sources are read again where they
        # changed; after a build that failed all are, since warnings of those read before would not come again.
        shell(
            "rm -rf {SITE} && jupyter-book build {TREE} -W --keep-going > {log} 2>&1 || "
            "{{ rm -rf {TREE}/_build; grep -E 'WARNING|ERROR|Error' {log}; exit 1; }}"
        )


rule pages:
    input:
        "book/claims.yml",
        "book/map.yml",
        "_toc.yml",
        sorted(str(path) for path in Path("book/reference").glob("*.json")),
        [str(path.relative_to(Path.cwd())) for path in helper_sources(["pages"])],
        expand(f"{TREE}/notebooks/{{chapter}}.ipynb", chapter=CHAPTERS),
        expand(f"{TREE}/notebooks/{{chapter}}/findings.json", chapter=CHAPTERS),
        expand(f"{TREE}/notebooks/{{chapter}}/provenance.json", chapter=CHAPTERS),
    output:
        expand(f"{TREE}/{{page}}.md", page=GENERATED),
        directory(f"{TREE}/book/figures"),
    shell:
        "python -m helpers status --tree {TREE}"


rule execute:
    input:
        "book/claims.yml",
        lambda wildcards: [str(path) for path in Path("book/reference").glob(f"{wildcards.chapter}.json")],
        lambda wildcards: [
            str(path.relative_to(Path.cwd())) for path in notebook_sources(f"notebooks/{wildcards.chapter}.ipynb")
        ],
        sorted(str(path) for path in Path("data").rglob("*.*") if path.suffix != ".md"),
        notebook="notebooks/{chapter}.ipynb",
    output:
        notebook=f"{TREE}/notebooks/{{chapter}}.ipynb",
        findings=f"{TREE}/notebooks/{{chapter}}/findings.json",
        provenance=f"{TREE}/notebooks/{{chapter}}/provenance.json",
    params:
        given=lambda wildcards: json.dumps(given(wildcards.chapter)),
        options=lambda wildcards: " ".join(
            f"-p {name} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
            for name, value in given(wildcards.chapter).items()
        ),
        results=f"{TREE}/notebooks/{{chapter}}",
    # Snakemake sets OMP_NUM_THREADS to this; a tiny model is done sooner beside another than on all cores
    threads: 1 if PRESET == "tiny" else workflow.cores
    shell:
        "rm -rf {params.results} && "
        "python -m helpers execute {input.notebook} --output {output.notebook} "
        "--preset {PRESET} --results {params.results} {params.options}"
