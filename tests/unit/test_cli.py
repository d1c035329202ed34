"""The command line executes a chapter whole or not at all, and answers a mistake with one sentence."""

import json
import os

import nbformat
import pytest
import torch

from helpers import cli
from helpers.artifacts import Store
from helpers.building.execution import execute
from helpers.chapters.ip_loss_reduction.params import InoculationParams
from helpers.params import PROJECT, ParameterError

CHAPTER = InoculationParams.chapter


@pytest.fixture
def notebook(tmp_path):
    """A chapter in small: reads its parameters, and fails for layer 0."""
    parameters = nbformat.v4.new_code_cell("preset = None\nlayer = None\nresults = None")
    parameters.metadata.tags = ["parameters"]
    code = (
        "from helpers.chapters.ip_loss_reduction.params import InoculationParams\n"
        "params = InoculationParams.from_notebook()\n"
        "import helpers, json\n"
        "print(json.dumps([params.preset, params.layer, params.results, helpers.__file__]))\n"
        "1 / params.layer"
    )
    path = tmp_path / f"{CHAPTER}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(code)]), path)
    return path


def run(notebook, output, *options):
    cli.main(["execute", str(notebook), "--output", str(output), "--preset", "tiny", *options])


def test_a_notebook_is_executed_with_the_given_parameters_and_names_no_absolute_path(notebook, tmp_path):
    output = tmp_path / "made" / "out.ipynb"
    run(notebook, output, "-p", "layer", "1", "--results", "results/x")
    executed = nbformat.read(output, as_version=4)
    printed = json.loads(executed.cells[-1].outputs[0].text)
    assert printed == ["tiny", 1, "results/x", "helpers/__init__.py"]
    assert str(PROJECT) not in output.read_text()
    assert executed.metadata.papermill.output_path.endswith("made/out.ipynb")
    assert [path.name for path in output.parent.iterdir()] == ["out.ipynb"]


def test_progress_drawn_as_a_widget_is_left_out_since_a_page_would_ask_the_network_for_scripts(notebook, tmp_path):
    drawn = nbformat.read(notebook, as_version=4)
    bar = "from tqdm.notebook import tqdm\nfor _ in tqdm(range(2)):\n    pass\nprint('done')"
    drawn.cells.append(nbformat.v4.new_code_cell(bar))
    nbformat.write(drawn, notebook)
    output = tmp_path / "out.ipynb"
    run(notebook, output, "-p", "layer", "1")
    executed = nbformat.read(output, as_version=4)
    assert [o.output_type for o in executed.cells[-1].outputs] == ["stream"]
    assert "widget" not in output.read_text()


def test_the_cell_that_puts_parameters_in_is_left_out_of_the_page(notebook, tmp_path):
    output = tmp_path / "out.ipynb"
    run(notebook, output, "-p", "layer", "1")
    (injected,) = (c for c in nbformat.read(output, as_version=4).cells if "layer = 1" in c.source)
    assert "remove-cell" in injected.metadata.tags


def test_a_failing_cell_gives_one_sentence_and_keeps_the_partial_notebook(notebook, tmp_path):
    output = tmp_path / "out.ipynb"
    with pytest.raises(SystemExit) as stopped:
        run(notebook, output, "-p", "layer", "0")
    assert "ZeroDivisionError: division by zero" in stopped.value.code
    assert "\n" not in stopped.value.code
    assert not output.exists()
    assert (tmp_path / "out.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("option", "sentence"), [(("layr", "1"), "did you mean 'layer'"), (("layer", "2"), "has 0 to 1")]
)
def test_a_wrong_parameter_stops_before_a_kernel_starts(notebook, tmp_path, monkeypatch, option, sentence):
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    with pytest.raises(SystemExit, match=sentence):
        run(notebook, tmp_path / "out.ipynb", "-p", *option)


def test_a_notebook_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"There is no notebook .*nothing\.ipynb"):
        run(tmp_path / "nothing.ipynb", tmp_path / "out.ipynb")


def test_a_notebook_without_parameter_class_is_named(tmp_path):
    with pytest.raises(ParameterError, match="There is no chapter '03_unknown'"):
        (tmp_path / "03_unknown.ipynb").touch()
        execute(tmp_path / "03_unknown.ipynb", tmp_path / "out.ipynb", {})


def test_the_registered_models_are_listed(capsys):
    cli.main(["models"])
    assert "smollm2-135m-instruct" in capsys.readouterr().out


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with two results, one of which was last used in 1970."""
    monkeypatch.setenv("HELPERS_STORE", str(tmp_path))
    store = Store(tmp_path)
    old, _ = (
        store.get("a-stage", lambda: ({"x": torch.ones(25_000)}, {}), parameters={"number": n}).key for n in (1, 2)
    )
    os.utime(tmp_path / "a-stage" / f"{old}.json", (0, 0))
    return store


def test_the_store_is_listed_by_stage_with_results_size_and_last_use(store, capsys):
    cli.main(["store"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "results", "size", "last", "used"]
    (stage, results, size, unit, *used), last = lines[1].split(), lines[-1].split()
    assert (stage, results, unit, last[:2]) == ("a-stage", "2", "MB", ["all", "2"])
    assert float(size) == pytest.approx(0.2, abs=0.02)
    assert len(used) == 2 and used[0] > "2020"


def test_pruning_says_what_was_freed_and_lists_the_rest(store, capsys):
    cli.main(["store", "--prune", "30"])
    said, *rest = capsys.readouterr().out.splitlines()
    assert said == "Results that were not used for 30 days: 1 deleted, 0.10 MB freed."
    assert rest[-1].split()[:2] == ["all", "1"]
    cli.main(["store", "--prune", "0"])
    assert "There are no results in" in capsys.readouterr().out


@pytest.mark.parametrize("days", ["soon", "-1", "nan", "inf", ""])
def test_a_number_of_days_that_is_none_is_one_sentence_and_deletes_nothing(store, days):
    with pytest.raises(SystemExit, match=f"--prune takes a number of days, such as 30, and not '{days}'"):
        cli.main(["store", f"--prune={days}"])
    assert store.usage()[0].results == 2


def test_a_store_that_cannot_be_written_is_not_pruned_in_one_sentence(store, monkeypatch):
    def refused(self, days):
        raise PermissionError("read-only")

    monkeypatch.setattr(Store, "prune", refused)
    with pytest.raises(SystemExit, match="cannot be written: read-only") as stopped:
        cli.main(["store", "--prune", "1"])
    assert "\n" not in stopped.value.code
