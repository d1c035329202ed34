"""What a build does with bad configuration, odd folders, broken environments, kills and company.

The builds are of a book in small: a copy of the project with two chapters of a few cells, which take a second and
save findings as chapters do. Snakefile, Makefile, helpers and Jupyter Book are the real ones.
"""

import contextlib
import json
import logging
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
import psutil
import pytest
import yaml
from filelock import FileLock
from snakemake.cli import parse_config

from helpers.building import plan as building
from helpers.building.console import Console
from helpers.building.plan import BuildError
from helpers.chapters import CHAPTERS
from helpers.cost import by_stage
from helpers.params import ParameterError

PROJECT = Path(__file__).resolve().parents[2]
SMALL = ("02_ip_loss_reduction", "05_fihs_filtering")
TREE = Path("book", "executed", "tiny")
LOOKS_WRONG = re.compile(r"traceback|error|warning|unknown|encryption|not found|exception|killed|%\|", re.IGNORECASE)

COMPUTES = """
import time
from types import SimpleNamespace
from helpers.book.findings import Findings, provenance

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
    module, name = CHAPTERS[chapter].__module__, CHAPTERS[chapter].__name__
    read = f"from {module} import {name}\n\nparams = {name}.from_notebook()"
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


def environment(**more):
    of_make = ("PRESET", "CORES", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # `make test` sets them for its commands
    outer = {name: value for name, value in os.environ.items() if name not in of_make}
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


CONFIGURATIONS = {
    "an empty preset": ("preset=", "There is no preset ''"),
    "a preset with a word too many": ("preset=tiny x", "did you mean 'tiny'"),
    "a preset one letter off": ("preset=quik", "did you mean 'quick'"),
    "a preset in capitals": ("preset=TINY", "There is no preset 'TINY'"),
    "a preset that is a number": ("preset=1", "There is no preset 1"),
    "a preset that is a yes": ("preset=true", "There is no preset 'true'"),
    "a preset that is a list": ("preset=[tiny]", r"There is no preset \['tiny'\]"),
    "a preset that is a path": ("preset=../tiny", "There is no preset"),
    "a preset with an apostrophe": ("preset=it's", "There is no preset"),
    "a preset of 5,000 letters": (f"preset={'x' * 5000}", r"\(5002 characters\)"),
    "a mistyped key": ('paramters={"layer": 1}', "did you mean 'parameters'"),
    "a parameter as a key": ("layer=1", "as 'parameters={\"layer\": VALUE}'"),
    "results as a key": ("results=x", "There is no configuration 'results'"),
    "a key that is near none": ("colour=red", "choose from preset, parameters"),
    "no parameters": ("parameters=", "The configuration 'parameters' is ''"),
    "parameters without a value": ("parameters=layer", "The configuration 'parameters' is 'layer'"),
    "parameters in a list": ("parameters=[layer, 1]", "should name parameters with their values"),
    "parameters that are a number": ("parameters=12", "The configuration 'parameters' is 12"),
    "half a dictionary": ('parameters={"layer": 1', "should name parameters with their values"),
    "results": ('parameters={"results": "x"}', "leave 'results' out"),
    "the preset as a parameter": ('parameters={"preset": "quick"}', "write preset=NAME"),
    "a parameter one letter off": ('parameters={"layr": 1}', "did you mean 'layer'"),
    "a parameter that is near none": ('parameters={"xyz": 1}', "There is no parameter 'xyz': the page .* lists"),
    "a parameter without a name": ('parameters={"": 1}', "There is no parameter ''"),
    "text for a number": ('parameters={"steps": "many"}', "'steps' is 'many'"),
    "an empty number": ('parameters={"steps": ""}', "'steps' is ''"),
    "a dictionary for a number": ('parameters={"steps": {"a": 1}}', "'steps'"),
    "a value out of range": ('parameters={"steps": 0}', "greater than or equal to 1"),
    "NaN": ('parameters={"learning_rate": "nan"}', "'learning_rate'"),
    "an empty list": ('parameters={"seeds": []}', "at least 1 item"),
    "a list with null": ('parameters={"seeds": [null]}', "'seeds'"),
    "a seed twice": ('parameters={"seeds": [1, 1]}', "name each value once"),
    "a layer that the model lacks": ('parameters={"layer": 2}', "has 0 to 1"),
    "a trait one letter off": ('parameters={"trait": "evill"}', "did you mean 'evil'"),
    "a model one letter off": ('parameters={"model": "tiny-randm"}', "did you mean 'tiny-random'"),
    "a folder that is not there": ('parameters={"model": "./none"}', "there is no such folder"),
    "a GPU that is not there": ('parameters={"device": "cuda:99"}', "this machine has"),
}


def sentence_of(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 900 and text.endswith((".", "?")), text
    return text


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_bad_configuration_is_one_sentence(case):
    text, sentence = CONFIGURATIONS[case]
    config = {"preset": "tiny", **parse_config([text])}
    with pytest.raises((BuildError, ParameterError)) as error:
        preset, given = building.chosen(config, list(CHAPTERS))
        for chapter in CHAPTERS:
            building.resolved(chapter, preset, given[chapter])
    assert re.search(sentence, sentence_of(error)), error.value


def test_each_chapter_is_given_the_parameters_that_it_has_and_null_means_as_the_preset_says():
    config = parse_config(["preset=tiny", 'parameters={"concepts": ["evil"], "trait": "pirate", "steps": null}'])
    preset, given = building.chosen(config, list(CHAPTERS))
    assert preset == "tiny" and given["06_prompt_only_steering"] == {"concepts": ["evil"]}
    assert given["02_ip_loss_reduction"] == {"trait": "pirate"} and given["04_refusal_redistribution"] == {}


@pytest.mark.parametrize("cores", [0, -3])
def test_a_build_without_cores_is_refused(cores):
    with pytest.raises(BuildError, match="give 1 or more"):
        building.chosen({}, list(CHAPTERS), cores)


BROKEN = {
    "a notebook that is not there": ("notebooks/02_ip_loss_reduction.ipynb", None, "There is no notebook"),
    "an empty notebook": ("notebooks/02_ip_loss_reduction.ipynb", "", "is no notebook that Jupyter could open"),
    "half a notebook": ("notebooks/02_ip_loss_reduction.ipynb", '{"cells": [', "is no notebook"),
    "a list for a notebook": ("notebooks/02_ip_loss_reduction.ipynb", "[]", "is no notebook"),
    "a notebook of something else": ("notebooks/02_ip_loss_reduction.ipynb", '{"a": 1}', "is no notebook"),
    "a cell that is no Python": ("cell", "x = = 1", r"notebooks/02_ip_loss_reduction.ipynb holds code .*x = = 1"),
    "contents that are not there": ("_toc.yml", None, "_toc.yml is no table of contents"),
    "contents that are no YAML": ("_toc.yml", "a: [", "_toc.yml is no table of contents"),
    "contents that are text": ("_toc.yml", "chapters", "_toc.yml is no table of contents"),
    "contents without a root": ("_toc.yml", "format: jb-book\n", "_toc.yml is no table of contents"),
    "claims that are no YAML": ("book/claims.yml", "- a: [", "book/claims.yml is no list of claims"),
    "claims without a chapter": ("book/claims.yml", "- id: x\n", "book/claims.yml is no list of claims"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_source_is_one_sentence(case, tmp_path, monkeypatch):
    name, text, sentence = BROKEN[case]
    for folder in ("notebooks", "book"):
        (tmp_path / folder).mkdir()
    for kept in ("_toc.yml", "book/claims.yml"):
        shutil.copy(PROJECT / kept, tmp_path / kept)
    write_chapter(tmp_path, SMALL[0], text if name == "cell" else "1 + 1")
    if name != "cell":
        (tmp_path / name).unlink()
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(building, "PROJECT", tmp_path)
    with pytest.raises((BuildError, ParameterError)) as error:
        building.pages()
        building.resolved(SMALL[0], "tiny", {})
        building.inputs(SMALL[0])
    assert re.search(sentence, sentence_of(error)), error.value


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_is_run_again_when_its_own_questions_change(chapter):
    asked = [file for file in building.inputs(chapter) if file.endswith("questions.toml")]
    assert asked == [f"helpers/chapters/{chapter[3:]}/questions.toml"]


def test_an_executed_book_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "PROJECT", tmp_path)
    (tmp_path / "book").write_text("a file")
    with pytest.raises(BuildError, match="Nothing can be written to book/executed/tiny") as error:
        building.begin(str(TREE), [])
    sentence_of(error)


# The environment: `make` with commands that say what they were asked for


STUB = r"""#!/bin/sh
echo made >> "LOG"
mkdir -p .venv/bin
touch .venv/has-pip
for name in python pip snakemake; do
  cat > .venv/bin/$name <<END
#!/bin/sh
# $PWD/.venv/bin/python
echo "$name \$*" >> "LOG"
case "\$*" in *"import pip"*) test -e "$PWD/.venv/has-pip";; esac
END
  chmod +x .venv/bin/$name
done
"""
"""A Python that makes environments of commands that only say that they were called."""


@pytest.fixture
def made(tmp_path):
    """A folder with the Makefile, and how to run `make book` in it: gives what it said, and what was called."""
    folder, log, python = tmp_path / "My Book", tmp_path / "log", tmp_path / "python"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy2(PROJECT / name, folder / name)
    python.write_text(STUB.replace("LOG", str(log)))
    python.chmod(0o755)

    def run(at=folder, **more):
        log.write_text("")
        done = make(at, f"PYTHON={python}", "PRESET=tiny", **more)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, log.read_text()

    return folder, run


def test_an_environment_is_made_once(made):
    _, run = made
    said, log = run()
    assert "made anew" not in said
    assert log.startswith("made\n") and "-m pip install" in log and "snakemake --cores all" in log
    said, log = run()
    assert "made" not in log and "install" not in log and "snakemake --cores all --config preset=tiny" in log


def without_pip(folder):
    (folder / ".venv" / "has-pip").unlink()
    return folder


def interrupted(folder):
    (folder / ".venv" / ".installed").unlink()
    return without_pip(folder)


def without_python(folder):
    (folder / ".venv" / "bin" / "python").unlink()
    (folder / ".venv" / "bin" / "python").symlink_to("/no/such/python3.11")
    return folder


def empty(folder):
    shutil.rmtree(folder / ".venv")
    (folder / ".venv").mkdir()
    return folder


def moved(folder):
    return folder.rename(folder.with_name("Your Book"))


def copied(folder):
    return Path(shutil.copytree(folder, folder.with_name("Your Book")))


@pytest.mark.parametrize("harm", [without_pip, interrupted, without_python, empty, moved, copied])
def test_an_environment_that_does_not_run_is_made_anew(made, harm):
    folder, run = made
    run()
    said, log = run(harm(folder))
    assert "does not run" in said and "it is made anew" in said
    assert "made\n" in log and "-m pip install" in log and "snakemake --cores all --config preset=tiny" in log
    assert folder.exists() or harm is moved


@pytest.mark.parametrize(("home", "kept"), [("/dev/null/home", False), ("", False), ("home", True)])
def test_a_home_that_cannot_be_written_is_replaced_by_a_folder_of_the_project(tmp_path, home, kept):
    shutil.copy2(PROJECT / "Makefile", tmp_path)
    (tmp_path / "more.mk").write_text("include Makefile\nsay:\n\t@echo $$HOME\n")
    home = str(tmp_path / home) if kept else home
    command = ["make", "--no-print-directory", "-f", "more.mk", "say"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(HOME=home), capture_output=True, text=True)
    assert done.stdout.strip() == (home if kept else str(tmp_path / ".home"))


# What a build says


def event(name, **more):
    record = logging.makeLogRecord({"msg": name, "levelno": logging.INFO, **more})
    record.event = name
    return record


def test_a_build_says_which_chapter_of_how_many_and_how_much_time_is_left(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("helpers.building.console.time.monotonic", lambda: now[0])
    monkeypatch.setattr("helpers.building.console.PROJECT", tmp_path)
    (tmp_path / "tree" / "notebooks").mkdir(parents=True)
    (tmp_path / "tree" / "notebooks" / "b.ipynb").write_text('{"metadata": {"papermill": {"duration": 600}}}')
    console = Console("tree", lambda: (["a", "b", "c"], 1))
    log = tmp_path / "c.log"
    log.write_text("papermill's bar\nStopped: It is wrong.\n")
    console.emit(event("run_info"))
    for job, chapter in enumerate("abc"):
        console.emit(event("job_info", jobid=job, wildcards={"chapter": chapter}, rule_name="execute"))
        now[0] += 300
        if chapter != "c":
            console.emit(event("job_finished", job_id=job))
    console.emit(event("job_error", jobid=2, log=[str(log)], levelno=logging.ERROR))
    console.emit(logging.makeLogRecord({"msg": "Exiting because a job failed", "levelno": logging.ERROR}))
    log.write_text("papermill's bar\n")
    console.emit(event("job_error", jobid=2, log=[str(log)], levelno=logging.ERROR))
    assert capsys.readouterr().err.splitlines() == [
        "tree: 3 chapters to run; about 30 minutes, by an earlier build.",
        "a: begun, 1 of 3.",
        "a: done in 5.0 minutes, 1 of 3 done; about 15 minutes left.",
        "b: begun, 2 of 3.",
        "b: done in 5.0 minutes, 2 of 3 done; about 5 minutes left.",
        "c: begun, 3 of 3.",
        f"c: failed. It is wrong. What it said: {log}.",
        f"c: failed. Its process was ended from outside, as a system does whose memory ran out. What it said: {log}.",
    ]


# Builds


def products(project):
    """What a build leaves of each chapter, without what differs between two runs alike."""
    found = {}
    for chapter in SMALL:
        folder = project / TREE / "notebooks" / chapter
        findings = json.loads((folder / "findings.json").read_text())
        provenance = json.loads((folder / "provenance.json").read_text())
        findings["cost"] = by_stage(findings["cost"])  # of what was computed and of what was stored already
        del findings["minutes"]
        cells = nbformat.read(folder.with_suffix(".ipynb"), as_version=4).cells
        printed = [output.text for cell in cells for output in cell.get("outputs", [])]
        parts = {path.name: path.read_text() for path in folder.glob("part_*")}
        found[chapter] = (findings, provenance["parameters"], printed, parts)
    return found


def forget(project):
    """Make every chapter due again, and keep what the last build made."""
    shutil.rmtree(project / TREE / ".made", ignore_errors=True)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The book in small, in a folder with a blank and with a home that cannot be written: its folder, what was said."""
    project = copy(tmp_path_factory.mktemp("builds") / "My Book")
    return project, build(project, HOME="/dev/null/home")


@pytest.fixture
def project(first):
    return first[0]


def test_a_build_in_a_folder_with_a_blank_says_a_line_a_chapter_and_nothing_that_looks_wrong(first):
    project, said = first
    lines = [line for line in said.splitlines() if not line.startswith("Using workflow specific profile")]
    assert lines[0] == f"{TREE}: 2 chapters to run, 2 at a time."
    for chapter in SMALL:
        assert [re.sub(r"[\d.]+ minutes", "N minutes", line).split(",")[0] for line in lines if chapter in line] == [
            f"{chapter}: begun",
            f"{chapter}: done in N minutes",
        ]
    assert len(lines) == 9
    assert (project / TREE / "_build" / "html" / "notebooks" / f"{SMALL[0]}.html").exists()
    findings, parameters, printed, _ = products(project)[SMALL[0]]
    assert findings["parameters"]["results"] == parameters["results"] == f"{TREE}/notebooks/{SMALL[0]}"
    assert printed == [f"{TREE}/notebooks/{SMALL[0]}\n"]
    assert ".making" not in (project / TREE / "notebooks" / f"{SMALL[0]}.ipynb").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["PRESET="], "There is no preset ''"),
        (["PRESET=it's"], 'There is no preset "it\'s"'),
        (["PRESET=tiny", "CORES=many"], "must be integer or 'all'"),
    ],
)
def test_make_answers_what_it_cannot_use_with_one_sentence_and_makes_nothing(project, arguments, sentence):
    done = make(project, *arguments)
    assert done.returncode == 2 and sentence in done.stderr
    assert len([line for line in done.stderr.splitlines() if not line.startswith(("Using workflow", "make: "))]) == 1
    assert [path.name for path in (project / TREE).parent.iterdir()] == ["tiny"]


def test_one_chapter_s_parameters_and_claims_are_that_chapter_s_alone(project):
    presets = project / "helpers" / "chapters" / "fihs_filtering" / "presets.toml"
    claims = project / "book" / "claims.yml"
    text, claimed = presets.read_text(), claims.read_text()
    presets.write_text(text.replace("learning_rate = 0.", "learning_rate = 0.1", 1))
    claims.write_text(claimed.replace("  chapter: 06_prompt_only_steering\n", "  chapter: 05_fihs_filtering\n", 1))
    (project / "data" / "quiz.jsonl").write_text("{}")
    command = [project / ".venv" / "bin" / "snakemake", "--cores", "1", "--config", "preset=tiny", "--summary"]
    try:
        done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True)
        plans = {Path(row.split("\t")[0]).name: row.split("\t")[-1] for row in done.stdout.splitlines()[1:]}
        assert plans["02_ip_loss_reduction"] == "no update" and plans["05_fihs_filtering"] == "update pending"
    finally:
        presets.write_text(text)
        claims.write_text(claimed)


def test_a_chapter_that_fails_is_one_sentence_and_its_earlier_run_stays(project):
    before = products(project)
    page = project / TREE / "_build" / "html" / "notebooks" / f"{SMALL[0]}.html"
    read = page.read_text()
    write_chapter(project, SMALL[0], COMPUTES.format(number=9), "raise ValueError('on purpose')")
    done = make(project, "PRESET=tiny")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "failed" in line]
    failed = f"{TREE}/notebooks/{SMALL[0]}.failed.ipynb"
    assert "with ValueError: on purpose; see " in line and failed in line and f"logs/tiny/{SMALL[0]}.log" in line
    assert "Traceback" not in done.stderr and "rule" not in done.stderr
    assert products(project) == before and page.read_text() == read
    assert (project / failed).exists() and not (project / TREE / ".made" / SMALL[0]).exists()
    write_chapter(project, SMALL[0], COMPUTES.format(number=1))
    assert "less than a minute, by an earlier build" in build(project)
    assert products(project) == before and not (project / failed).exists()


def test_a_site_that_fails_is_one_sentence_and_the_earlier_pages_stay(project):
    intro, page = project / "book" / "intro.md", project / TREE / "_build" / "html" / "book" / "intro.html"
    text, read = intro.read_text(), page.read_text()
    intro.write_text(f"{text}\nSee [nothing](nowhere.md).\n")
    done = make(project, "PRESET=tiny")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "failed" in line]
    assert line.startswith("site: failed. The pages have 1 warning") and "intro.md" in line and "nowhere.md" in line
    assert page.read_text() == read
    intro.write_text(f"{text}\nIts pages are good.\n")
    assert "No chapter has to be run again." in build(project)
    assert "Its pages are good." in page.read_text()


def held(project):
    """Whether a build is going on."""
    with contextlib.suppress(OSError), FileLock(project / TREE / ".lock", timeout=0):
        return False
    return True


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def start(project):
    command = ["make", "--no-print-directory", "book", "PRESET=tiny", "CORES=2"]
    # a file, since what outlives a build that is killed would keep a pipe open
    with (project / "said").open("w") as said:
        return subprocess.Popen(
            command, cwd=project, env=environment(), stdout=said, stderr=said, text=True, start_new_session=True
        )


def test_a_second_build_at_once_is_refused_and_the_first_is_whole(project):
    before = products(project)
    forget(project)
    running = start(project)
    wait_for(lambda: held(project))
    done = make(project, "PRESET=tiny")
    assert done.returncode == 2
    assert re.search(rf"Another build is making {TREE} \(process \d+, since \d\d:\d\d\): wait until", done.stderr)
    assert len(done.stderr.splitlines()) == 3
    assert running.wait(timeout=600) == 0, (project / "said").read_text()
    assert products(project) == before


def test_after_ten_kills_at_random_moments_a_build_gives_what_an_undisturbed_one_gives(project, tmp_path):
    undisturbed = copy(tmp_path / "user's folder")
    for folder in (project, undisturbed):
        for number, chapter in enumerate(SMALL, 3):
            write_chapter(folder, chapter, COMPUTES.format(number=number))
    began = time.monotonic()
    build(undisturbed)
    duration = time.monotonic() - began
    old, new = products(project), products(undisturbed)
    assert old != new
    moments = sorted(random.uniform(0, duration) for _ in range(10))
    random.shuffle(moments)
    for number, moment in enumerate(moments):
        forget(project)
        running = start(project)
        time.sleep(moment)
        if number % 2:
            os.killpg(running.pid, signal.SIGKILL)  # the kernels go on
        else:
            for process in [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    line = " ".join(process.cmdline())
                    if line.startswith("make ") or "/snakemake " in line:  # the steps and their kernels go on
                        process.kill()
        running.wait()
        for chapter, found in products(project).items():
            assert found in (old[chapter], new[chapter]), (number, moments)
        wait_for(lambda: not held(project))
    said = build(project)
    assert products(project) == new, moments
    assert re.search("The site: done.|Nothing has changed", said), moments  # the last kill may have come too late
    assert not list((project / TREE).glob(".making/*"))


# References


STAGED = """
from functools import partial
from types import SimpleNamespace

import staged
from helpers.artifacts import default_store
from helpers.book.findings import Findings, provenance

model = SimpleNamespace(name="none", digest="0" * 64, device="cpu", dtype="torch.float32")
findings = Findings(params, provenance(params, model))
for part in range(4):
    made = default_store().get("part", partial(staged.part, part), parameters={"part": part})
    findings.glued[f"part {part}"] = made.facts
findings.table("numbers", [made.facts])
findings.save()
"""
STAGE = """
import time

from helpers.cost import LEDGER


def part(number):
    time.sleep(0.5)
    LEDGER.add(10)
    return {}, {"part": number}
"""


@pytest.fixture
def staged(tmp_path):
    """Makes copies of the project whose first chapter has four stages and a headline figure."""

    def made(name):
        project = copy(tmp_path / name)
        (project / "staged.py").write_text(STAGE)
        write_chapter(project, SMALL[0], STAGED)
        notebook = nbformat.read(project / "notebooks" / f"{SMALL[0]}.ipynb", as_version=4)
        headline = yaml.safe_load((project / "book" / "map.yml").read_text())["chapters"][SMALL[0]]["figure"]
        notebook.cells[-1].metadata.figure = {"name": headline, "data": ["numbers"]}
        notebook.cells.append(nbformat.v4.new_markdown_cell("**Numbers.**", metadata={"tags": ["caption"]}))
        nbformat.write(notebook, project / "notebooks" / f"{SMALL[0]}.ipynb")
        return project

    return made


def reference(project, *arguments, wait=True):
    command = ["make", "--no-print-directory", "reference", "PRESET=tiny", "CHAPTER=ip_loss_reduction", *arguments]
    with (project / "said").open("w") as said:
        running = subprocess.Popen(
            command, cwd=project, env=environment(), stdout=said, stderr=said, text=True, start_new_session=True
        )
        if wait:
            running.wait()
    return running


def test_a_reference_is_the_same_however_often_it_was_killed_and_with_which_slices_of_time(staged):
    undisturbed, disturbed = staged("undisturbed"), staged("disturbed")
    began = time.monotonic()
    assert reference(undisturbed).returncode == 0, (undisturbed / "said").read_text()
    duration = time.monotonic() - began
    place = Path("book", "reference", SMALL[0])
    for moment in (0.5, 0.8, 0.9):
        running = reference(disturbed, wait=False)
        time.sleep(moment * duration)
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        wait_for(lambda: not held(disturbed))
        shutil.rmtree(disturbed / TREE, ignore_errors=True)  # what it had done is in the store alone
    shutil.rmtree(disturbed / place, ignore_errors=True)
    assert reference(disturbed).returncode == 0, (disturbed / "said").read_text()
    assert f"Kept: {place}" in (disturbed / "said").read_text()
    one, other = ({path.name: path.read_text() for path in (p / place).iterdir()} for p in (undisturbed, disturbed))
    assert one == other and one.keys() == {"findings.json", "numbers.csv"}
    assert json.loads(one["findings.json"])["cost"] == {"computed": {"part": 40}, "stored": {}, "outside": 0}


def test_when_the_time_is_over_no_stage_is_begun_and_the_same_command_goes_on(staged):
    project = staged("sliced")
    done = reference(project, "SECONDS=0.01")
    said = (project / "said").read_text()
    assert done.returncode == 0 and f"Left: {SMALL[0]}; the same command goes on." in said, said
    assert not (project / "book" / "reference" / SMALL[0]).exists() and not LOOKS_WRONG.search(said), said
    assert reference(project).returncode == 0
    assert (project / "book" / "reference" / SMALL[0] / "findings.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["CHAPTER=looking_insid"], "There is no chapter 'looking_insid': did you mean 'looking_inside'?"),
        (["SECONDS=soon"], "--seconds takes a number of seconds, such as 3600, and not 'soon'."),
        (["SECONDS=-1"], "--seconds takes a number of seconds, such as 3600, and not '-1'."),
    ],
)
def test_a_reference_that_cannot_be_made_is_one_sentence(project, arguments, sentence):
    done = reference(project, *arguments)
    assert done.returncode == 2 and (project / "said").read_text().startswith(sentence)


def test_a_reference_takes_other_parameters_and_says_which_it_does_not_know(staged):
    project = staged("other")

    def made(*parameters):
        command = [sys.executable, "-m", "helpers", "reference", "ip_loss_reduction", "--preset", "tiny", *parameters]
        return subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True)

    wrong = made("-p", "stepz", "3")
    assert wrong.returncode == 1 and "There is no parameter 'stepz': did you mean 'steps'?" in wrong.stderr
    done = made("-p", "seeds", "[3, 4]", "-p", "steps", "3")
    assert done.returncode == 0, done.stderr
    kept = json.loads((project / "book" / "reference" / SMALL[0] / "findings.json").read_text())
    assert kept["seeds"] == [3, 4] and kept["parameters"]["steps"] == 3
