"""What publishes the book: workflows, licences, versions, and a launch button only where it leads somewhere."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return yaml.safe_load(request.param.read_text("utf-8"))


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_is_a_workflow_for_the_tests_and_one_for_the_book():
    assert {path.stem for path in WORKFLOWS} == {"test", "book"}


def test_every_make_command_of_a_workflow_is_a_target(workflow):
    called = [words.split()[1:] for step in steps(workflow) if (words := step.get("run", "")).startswith("make ")]
    assert called
    assert {target for targets in called for target in targets} <= TARGETS


def test_actions_are_pinned_by_major_version(workflow):
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in used)


def test_a_workflow_may_read_and_a_job_that_may_write_runs_no_code_of_the_book(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 360
        if "permissions" in job:
            assert job["permissions"] == {"contents": "write"}
            assert not any("make" in step.get("run", "") for step in job["steps"])


def test_the_site_is_put_where_its_version_says(tmp_path):
    script = next(
        step["run"] for step in steps(yaml.safe_load(WORKFLOWS[0].read_text())) if "pages/" in step.get("run", "")
    )
    origin, work = tmp_path / "origin.git", tmp_path / "work"
    for arguments in (["init", "--bare", "-b", "main", origin], ["clone", "--quiet", origin, work]):
        subprocess.run(["git", *arguments], check=True, capture_output=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(
        ["git", *author, "commit", "--allow-empty", "-m", "start"], cwd=work, check=True, capture_output=True
    )
    (work / "site").mkdir()

    def publish(ref, kind, text):
        (work / "site" / "index.html").write_text(text)
        (work / "site" / f"{text}.html").write_text(text)
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), "REF": ref, "KIND": kind}
        done = subprocess.run(["bash", "-e", "-c", script], cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        subprocess.run(["git", "worktree", "remove", "--force", "pages"], cwd=work, check=True)
        (work / "site" / f"{text}.html").unlink()

    publish("main", "branch", "one")
    publish("v1.2.0", "tag", "two")
    publish("main", "branch", "three")
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "gh-pages"], cwd=origin, capture_output=True, text=True
    )
    assert set(listed.stdout.split()) == {
        ".nojekyll",
        "index.html",
        "latest/index.html",
        "latest/three.html",
        "v1.2/index.html",
        "v1.2/two.html",
    }


def test_package_citation_and_changelog_name_one_version():
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((PROJECT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (PROJECT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
    assert newest == version


def test_every_version_of_the_changelog_says_whether_metrics_stay_comparable():
    entries = re.split(r"^## (?=\d)", (PROJECT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert re.search(r"^Metrics: .*compar", entry, flags=re.MULTILINE), entry.splitlines()[0]


def test_each_part_has_a_licence_that_is_named_where_it_is_looked_for():
    for name, licence in (("LICENSE", "MIT License"), ("LICENSE-TEXT", "CC-BY-4.0"), ("LICENSE-DATA", "CC-BY-4.0")):
        assert licence in (PROJECT / name).read_text()
        assert name in (PROJECT / "README.md").read_text() and name in (PROJECT / "book" / "licences.md").read_text()
    assert "LICENSE-DATA" in (PROJECT / "data" / "README.md").read_text()


@pytest.mark.parametrize(("address", "buttons"), [("", 0), ("https://github.com/someone/book", 1)])
def test_a_chapter_has_a_colab_button_if_and_only_if_the_repository_has_an_address(tmp_path, address, buttons):
    """A book of one notebook with the book's own settings."""
    settings = yaml.safe_load((PROJECT / "_config.yml").read_text())
    settings["repository"]["url"] = address
    settings.pop("bibtex_bibfiles")
    settings["sphinx"]["config"].pop("bibtex_reference_style")
    settings["sphinx"]["config"]["extensions"].remove("sphinxcontrib.bibtex")
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(settings))
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: notebooks/01_small\n")
    shutil.copytree(PROJECT / "book" / "_static", tmp_path / "book" / "_static")
    (tmp_path / "notebooks").mkdir()
    cells = [nbformat.v4.new_markdown_cell("# Small"), nbformat.v4.new_code_cell("1 + 1")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "01_small.ipynb")
    done = subprocess.run(
        [Path(sys.executable).with_name("jupyter-book"), "build", tmp_path, "-W"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    page = (tmp_path / "_build" / "html" / "notebooks" / "01_small.html").read_text()
    links = re.findall(r'href="(https://colab[^"]*)"', page)
    assert (
        links == ["https://colab.research.google.com/github/someone/book/blob/main/notebooks/01_small.ipynb"] * buttons
    )
