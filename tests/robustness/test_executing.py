"""What `python -m helpers execute` says to bad input and to kernels that end: one sentence, nothing half-written."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from filelock import FileLock

from helpers import cli, machine
from helpers.building.execution import execute
from helpers.chapters import CHAPTERS
from helpers.chapters.ip_loss_reduction.params import InoculationParams
from helpers.params import PROJECT

CHAPTER = InoculationParams.chapter


def write(folder, *codes, chapter=CHAPTER, tag=True, before=()):
    """A chapter in small: parameters, the cell that reads them, and more."""
    params = CHAPTERS[chapter]
    parameters = nbformat.v4.new_code_cell("preset = 'tiny'\nlayer = None\nresults = None")
    parameters.metadata.tags = ["parameters"] if tag else []
    read = f"from {params.__module__} import {params.__name__}\nparams = {params.__name__}.from_notebook()"
    cells = [*map(nbformat.v4.new_code_cell, before), parameters, *map(nbformat.v4.new_code_cell, [read, *codes])]
    path = folder / f"{chapter}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))


def refused(*arguments):
    """The sentence that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["execute", *map(str, arguments)])
    sentence = stopped.value.code
    assert isinstance(sentence, str) and "\n" not in sentence and len(sentence) < 900
    assert sentence.endswith((".", "?")), sentence
    return sentence


PARAMETERS = {
    "a name one letter off": (["layr", "1"], "did you mean 'layer'"),
    "a name that is near none": (["lr", "0.1"], "choose from preset, model"),
    "an empty name": (["", "1"], "There is no parameter ''"),
    "a name of 5,000 letters": (["x" * 5000, "1"], r"\(5002 characters\)"),
    "a name with a newline": (["lay\ner", "1"], "did you mean 'layer'"),
    "text for a number": (["steps", "many"], "valid integer"),
    "an empty number": (["steps", ""], "valid integer"),
    "a fraction": (["steps", "1.5"], "integer"),
    "zero": (["steps", "0"], "greater than or equal to 1"),
    "a negative number": (["steps", "-1"], "greater than or equal to 1"),
    "a number of 5,000 digits": (["steps", "9" * 5000], r"\(5002 characters\)"),
    "more than a processor's integer": (["seeds", "99999999999999999999"], "less than 2147483648"),
    "NaN": (["learning_rate", "nan"], "finite|greater"),
    "infinity": (["coefficient", "inf"], "finite|less"),
    "an overflow": (["coefficient", "1e999"], "finite|less"),
    "a list for a number": (["steps", "[1]"], "valid integer"),
    "an empty list": (["seeds", "[]"], r"is \[\], but it should have at least 1 item"),
    "an empty text for a list": (["seeds", ""], "valid integer"),
    "half a list": (["seeds", "[1, 2"], r"write it as \[0, 1\]"),
    "half a tuple": (["seeds", "(1, 2"], r"write it as \[0, 1\]"),
    "a list of lists": (["seeds", "[[1]]"], "'seeds' .item 0."),
    "a list in a list 100,000 deep": (["seeds", "[" * 100_000], r"is no list.*|100002 characters"),
    "a list with a number of 5,000 digits": (["seeds", f"[{'1' * 5000}]"], "is no list"),
    "a list with null": (["seeds", "[null]"], "'seeds' .item 0."),
    "a list with infinity": (["coefficients", "[1e999]"], "finite|less"),
    "a list with text": (["seeds", '["a"]'], "'seeds' .item 0."),
    "a list of 2,000 values with one wrong": (["seeds", str([*range(2000), "x"])], "is no list"),
    "a seed twice": (["seeds", "0,0"], "'seeds' .* name each value once"),
    "a count of prompts twice": (["prompt_counts", "1,1"], "'prompt_counts' .* name each value once"),
    "a coefficient twice, in two spellings": (["coefficients", "4,4.0"], "'coefficients' .* name each value once"),
    "a trait twice": (["other_traits", "pirate,pirate"], "'other_traits' .* name each value once"),
    "more sequences than there are": (["sequences", "10000"], "'sequences' is 10000, but there are 64"),
    "one sequence more than there are": (["sequences", "65"], "take at most 64"),
    "a trait one letter off": (["trait", "evill"], "did you mean 'evil'"),
    "a trait that is a path": (["trait", "../traits/evil"], "There is no trait"),
    "a trait compared with itself": (["other_traits", "evil"], "contains the trait itself"),
    "a layer that the model lacks": (["layer", "2"], "has 0 to 1"),
    "a device that is none": (["device", "gpu"], "should be auto, cpu, mps, cuda or cuda:N"),
    "a GPU that is not there": (["device", "cuda:99"], "this machine has"),
    "a number format that is none": (["dtype", "float16"], "'auto', 'float32' or 'bfloat16'"),
    "an empty model": (["model", ""], "at least 1 letter"),
    "a registered model one letter off": (["model", "smollm2-135m-instuct"], "did you mean 'smollm2-135m-instruct'"),
    "a registered model in capitals": (["model", "Tiny-Random"], "did you mean 'tiny-random'"),
    "a model that is not in the cache": (["model", "no-such-model"], "not in the local cache"),
    "a model of the hub that is not in the cache": (["model", "owner/none"], "not in the local cache"),
    "a model that the hub cannot name": (["model", "a b"], "write OWNER/NAME"),
    "a folder that is not there": (["model", "./no/folder"], "there is no such folder"),
    "a folder of the root that is not there": (["model", "/no/folder"], "there is no such folder"),
    "a folder at home": (["model", "~/no"], "there is no such folder"),
    "a folder without a model": (["model", str(PROJECT / "data")], "holds no config.json"),
    "a model of 5,000 letters": (["model", "m" * 5000], r"\(5002 characters\)"),
    "a model with a null byte": (["model", "a\0b"], "'model'"),
    "empty results": (["results", ""], "'results' is empty"),
    "blank results": (["results", "  "], "'results' is empty"),
    "results in a file": (["results", "README.md"], "README.md is no folder"),
    "results below a file": (["results", "README.md/a/b"], "README.md is no folder"),
    "results with a null byte": (["results", "a\0b"], "null"),
    "results with a name of 300 letters": (["results", "r" * 300], "name that is too long"),
    "results where nobody may write": (["results", "/proc/none"], "cannot be written"),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_bad_parameter_is_one_sentence_before_a_kernel_starts(case, tmp_path, no_kernel, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (name, text), sentence = PARAMETERS[case]
    said = refused(write(tmp_path), "--output", tmp_path / "out.ipynb", "--preset", "tiny", "-p", name, text)
    assert re.search(sentence, said), said
    assert [path.name for path in tmp_path.iterdir()] == [f"{CHAPTER}.ipynb"]


@pytest.mark.parametrize(
    ("chapter", "name", "text", "sentence"),
    [
        ("04_refusal_redistribution", "requests", "61", "there are 60 bundled requests"),
        ("04_refusal_redistribution", "prompts", "1000", "there are 293 bundled requests"),
        ("04_refusal_redistribution", "batch_size", "5", "multiple of 2"),
        ("04_refusal_redistribution", "sentiment_model", "no-such-model", "not in the local cache"),
        ("05_fihs_filtering", "tasks", "headlines,headlines", "each value once"),
        ("05_fihs_filtering", "filters", "randm", "should be"),
        ("06_prompt_only_steering", "concepts", "evil,pirat", "did you mean 'pirate'"),
        ("06_prompt_only_steering", "places", "end 2 2", "There is no place"),
        ("06_prompt_only_steering", "means_of", "1000", "'means_of' is 1000, but there are"),
        ("06_prompt_only_steering", "data", "hub", "'bundled' or 'axbench'"),
    ],
)
def test_each_chapter_asks_for_no_more_than_there_is(chapter, name, text, sentence, tmp_path, no_kernel, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = write(tmp_path, chapter=chapter)
    assert sentence in refused(path, "--output", tmp_path / "o.ipynb", "--preset", "tiny", "-p", name, text)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-p", "layer", "1", "-p", "layer", "0"], "'layer' is given twice"),
        (["--preset", "tiny", "-p", "preset", "quick"], "'preset' is given twice"),
        (["--results", "results/a", "-p", "results", "results/b"], "'results' is given twice"),
        (["--preset", ""], "There is no preset ''"),
        (["--preset", "tiny x"], "did you mean 'tiny'"),
        (["--preset", "quik"], "did you mean 'quick'"),
    ],
)
def test_options_that_contradict_or_name_nothing_are_one_sentence(options, sentence, tmp_path, no_kernel):
    assert sentence in refused(write(tmp_path), "--output", tmp_path / "out.ipynb", *options)


@pytest.mark.parametrize(
    "options", [["-p", "layer"], ["-p", "coefficients", "-4,4"], ["--presets", "x"], ["--output"], ["-x"]]
)
def test_a_command_line_that_cannot_be_read_is_one_line(options, tmp_path, no_kernel, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["execute", str(write(tmp_path)), *options])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


OUTPUTS = {
    "the notebook itself": (f"{CHAPTER}.ipynb", "is the notebook itself"),
    "the notebook by another way": (f"folder/../{CHAPTER}.ipynb", "is the notebook itself"),
    "a link to the notebook": ("link.ipynb", "is the notebook itself"),
    "another notebook that was not executed": ("other.ipynb", "not made by executing"),
    "a notebook that is none": ("half.ipynb", "not made by executing"),
    "a folder": ("folder", "should name a notebook"),
    "a folder called a notebook": ("folder.ipynb", "is there and is no file"),
    "a folder in the failed notebook's place": ("bad.ipynb", "is there and is no file"),
    "here": (".", "should name a notebook"),
    "nothing": ("", "should name a notebook"),
    "no notebook's name": ("mine.txt", "should name a notebook"),
    "below a file": ("half.ipynb/out.ipynb", "is no folder"),
    "below a link that leads nowhere": ("nowhere/out.ipynb", "is no folder"),
    "a name of 260 letters": (f"{'o' * 254}.ipynb", "too long"),
    "a name that leaves no room for a part": (f"{'o' * 240}.ipynb", "too long"),
    "a name with a null byte": ("a\0.ipynb", "null"),
    "a device": ("/dev/null/x.ipynb", "is no folder"),
    "where nobody may write": ("/proc/out.ipynb", "cannot be written"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_cannot_be_written_is_refused_first_and_nothing_is_overwritten(case, tmp_path, no_kernel):
    source = write(tmp_path)
    for name in ("folder", "folder.ipynb", "bad.failed.ipynb"):
        (tmp_path / name).mkdir()
    (tmp_path / "other.ipynb").write_text(source.read_text())
    (tmp_path / "half.ipynb").write_text("{")
    (tmp_path / "link.ipynb").symlink_to(source)
    (tmp_path / "nowhere").symlink_to("/no/where")
    before = {path: path.read_text() for path in tmp_path.rglob("*.ipynb") if path.is_file()}
    name, sentence = OUTPUTS[case]
    output = name if name in ("", ".") else tmp_path / name
    assert sentence in refused(source, "--output", output, "--preset", "tiny")
    assert {path: path.read_text() for path in tmp_path.rglob("*.ipynb") if path.is_file()} == before


NOTEBOOKS = {
    "not there": (None, "There is no notebook"),
    "empty": (b"", "is no notebook that Jupyter could open"),
    "half": (b'{"cells": [', "is no notebook that Jupyter could open"),
    "a list": (b"[]", "is no notebook that Jupyter could open"),
    "JSON of something else": (b'{"a": 1}', "is no notebook that Jupyter could open"),
    "cells that are none": (b'{"cells": 3, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', "is no notebook"),
    "bytes": (b"\xff\xfe\x00", "is no notebook that Jupyter could open"),
    "without a cell": (b'{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}', "is tagged `parameters`"),
}


@pytest.mark.parametrize("case", NOTEBOOKS)
def test_a_file_that_is_no_notebook_is_one_sentence(case, tmp_path, no_kernel):
    content, sentence = NOTEBOOKS[case]
    path = tmp_path / f"{CHAPTER}.ipynb"
    if content is not None:
        path.write_bytes(content)
    assert sentence in refused(path, "--output", tmp_path / "out.ipynb", "--preset", "tiny")


def test_a_folder_or_an_unknown_chapter_is_no_notebook(tmp_path, no_kernel):
    assert "There is no notebook" in refused(tmp_path, "--output", tmp_path / "out.ipynb")
    other = write(tmp_path).rename(tmp_path / "02_ip_loss.ipynb")
    assert f"did you mean '{CHAPTER}'" in refused(other, "--output", tmp_path / "out.ipynb")


def test_a_notebook_that_does_not_read_its_parameters_is_refused(tmp_path, no_kernel):
    path = write(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    del notebook.cells[1]
    nbformat.write(notebook, path)
    said = refused(path, "--output", tmp_path / "out.ipynb", "--preset", "tiny")
    assert "params = InoculationParams.from_notebook()" in said


def test_a_parameters_cell_that_lost_its_tag_is_refused_by_us_and_by_plain_papermill(tmp_path):
    path = write(tmp_path, "print(params.layer)", tag=False)
    assert "tagged `parameters`" in refused(path, "--output", tmp_path / "out.ipynb", "-p", "layer", "0")
    with pytest.raises(papermill.PapermillExecutionError, match=r"'layer' was given as 0, but a later cell sets it"):
        papermill.execute_notebook(
            path, None, {"layer": 0}, kernel_name="python3", language="python", progress_bar=False, cwd=PROJECT
        )


def test_a_second_run_into_one_output_or_one_results_folder_says_so(tmp_path, no_kernel):
    path, output = write(tmp_path), tmp_path / "out.ipynb"
    options = ["--preset", "tiny", "--results", tmp_path / "results"]
    for held in (output, tmp_path / "results"):
        with FileLock(held.with_name(f".{held.name}.lock")):
            assert "Another run is writing to" in refused(path, "--output", output, *options)


def test_two_runs_at_once_into_one_output_are_one_run_and_a_refusal(tmp_path):
    path = write(tmp_path, "import time\ntime.sleep(4)")
    command = [sys.executable, "-m", "helpers", "execute", path, "--output", tmp_path / "out.ipynb"]
    command += ["--results", tmp_path / "results"]
    runs = [subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1]
    assert sum("Another run is writing to" in text for text in said) == 1
    assert {path.name for path in tmp_path.iterdir()} == {path.name, "out.ipynb"}


ENDS = {
    "sys.exit(0)": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "raise SystemExit": ("raise SystemExit", "SystemExit"),
    "a kernel that is killed": ("import os\nos.kill(os.getpid(), 9)", "the end of its kernel.* memory"),
    "an error of many lines": ("raise ValueError('one\\ntwo\\n' * 3)", "ValueError: one two"),
    "a disk that is full": ("raise OSError(28, 'No space left on device', 'x')", "OSError: .*No space left on device"),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_cell_that_ends_its_run_is_a_sentence_and_keeps_what_was_done(case, tmp_path):
    code, sentence = ENDS[case]
    said = refused(write(tmp_path, "print('so far')", code), "--output", tmp_path / "out.ipynb", "--preset", "tiny")
    assert re.search(rf"stopped at \[5\] with {sentence}", said), said
    assert {path.name for path in tmp_path.iterdir()} == {f"{CHAPTER}.ipynb", "out.failed.ipynb"}
    assert "so far" in (tmp_path / "out.failed.ipynb").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_leaves_no_kernel_and_no_part(number, tmp_path):
    begun = tmp_path / "begun"
    code = f"import os, pathlib, time\npathlib.Path({str(begun)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    command = [sys.executable, "-m", "helpers", "execute", write(tmp_path, code), "--output", tmp_path / "out.ipynb"]
    run = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: begun.exists() and begun.read_text())
    run.send_signal(number)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 1
    assert "Traceback" not in said and "stopped at [3] with a signal to end; see" in said
    assert {path.name for path in tmp_path.iterdir()} == {f"{CHAPTER}.ipynb", "begun", "out.failed.ipynb"}
    wait_for(lambda: not Path(f"/proc/{begun.read_text()}").exists())


def test_a_run_that_is_killed_takes_its_kernel_with_it_and_the_next_run_is_whole(tmp_path):
    begun = tmp_path / "begun"
    code = f"import os, pathlib, time\npathlib.Path({str(begun)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    command = [sys.executable, "-m", "helpers", "execute", write(tmp_path, code), "--output", tmp_path / "out.ipynb"]
    run = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL)
    wait_for(lambda: begun.exists() and begun.read_text())
    run.kill()
    run.wait()
    assert not (tmp_path / "out.ipynb").exists()
    wait_for(lambda: not Path(f"/proc/{begun.read_text()}").exists())
    execute(write(tmp_path), tmp_path / "out.ipynb", {})
    assert {path.name for path in tmp_path.iterdir()} == {f"{CHAPTER}.ipynb", "begun", "out.ipynb"}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_kernel_is_of_this_python_whatever_comes_first(tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    (tmp_path / "{}{x}").mkdir()
    output = tmp_path / "{}{x}" / "{y}.ipynb"
    before = os.umask(0o022)
    try:
        execute(write(tmp_path, "import sys\nprint(sys.executable)"), output, {})
    finally:
        os.umask(before)
    assert output.stat().st_mode & 0o777 == 0o644
    assert nbformat.read(output, as_version=4).cells[-1].outputs[0].text.strip() == sys.executable.removeprefix(
        f"{PROJECT}/"
    )


def test_what_a_cell_prints_is_kept_however_much_it_is_and_progress_is_not(tmp_path, capfd):
    code = (
        "from helpers.progress import watched\nimport time\n"
        "for _ in watched(range(8), 'training'):\n    time.sleep(0.3)\nprint('x' * 30_000_000)"
    )
    execute(write(tmp_path, code), tmp_path / "out.ipynb", {}, lines=True)
    (output,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs
    assert output.output_type == "stream" and len(output.text) == 30_000_001
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"{CHAPTER}: done in ")


def test_a_variable_before_the_parameters_stops_nothing_unless_it_is_a_near_miss(tmp_path):
    fine = write(tmp_path, before=["REPO = 'x'\nfolder = '/content/drive'"])
    for _ in range(2):  # what was executed before may be made again
        execute(fine, tmp_path / "out.ipynb", {"layer": "1"})
    near = write(tmp_path, before=["layr = 1"])
    assert "There is no parameter 'layr': did you mean 'layer'?" in refused(near, "--output", tmp_path / "out.ipynb")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("GatedRepoError", "accept its terms"),
        ("RepositoryNotFoundError", "the hub has no such model"),
        ("EntryNotFoundError", "holds no config.json"),
        ("ConnectionError", "the hub does not answer"),
    ],
)
def test_what_the_hub_answers_is_one_sentence(name, sentence, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    kind = {"ConnectionError": ConnectionError}.get(name) or getattr(errors, name)

    def answer(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    with pytest.raises(ValueError, match=sentence):
        machine.check_machine(InoculationParams(preset="tiny", model="owner/none"))
