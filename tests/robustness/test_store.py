"""A store that is damaged, cannot be written, or is full: computed again, kept in memory, or one sentence."""

import json
import os
import shutil
import subprocess

import nbformat
import pytest
import torch

from helpers import artifacts, files
from helpers.artifacts import Store, StoreError
from helpers.book.findings import Findings, provenance
from helpers.building.execution import ExecutionError, execute
from helpers.chapters.ip_loss_reduction.params import InoculationParams
from helpers.files import file_digest


class Compute:
    """Counts how often it is called."""

    def __init__(self, size=3):
        self.calls, self.size = 0, size

    def __call__(self):
        self.calls += 1
        return {"x": torch.arange(float(self.size))}, {"auroc": 0.5}


def get(store, compute):
    return store.get("stage", compute, parameters={"layer": 1})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def nothing_in_memory(monkeypatch):
    monkeypatch.setattr(artifacts, "_UNSTORED", {})


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode:
        pytest.skip("no disk may be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk):
    with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08" + bytes(20), b"\xff" * 64, b"\x02" + bytes(7) + b"{}"])
def test_garbage_that_agrees_with_its_digest_is_damaged_and_computed_again(store, content):
    compute = Compute()
    key = get(store, compute).key
    tensors, sidecar = (store.root / "stage" / f"{key}{end}" for end in (".safetensors", ".json"))
    tensors.write_bytes(content)
    record = json.loads(sidecar.read_text())
    del record["digest"]
    record["sha256"] = file_digest(tensors)
    record["digest"] = artifacts._digest(record)
    sidecar.write_text(json.dumps(record))
    if content.startswith(b"\x02"):  # a file of no tensors is whole: the digest is all that says so
        assert get(store, compute).tensors == {}
        return
    with pytest.warns(UserWarning, match=r"is damaged \(its tensors cannot be read\) and is computed again"):
        assert torch.equal(get(store, compute).tensors["x"], torch.arange(3.0))
    assert compute.calls == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"x"', "{}", '{"digest": 1}', "\0", '{"digest": "", "inputs": 3}']
)
def test_a_sidecar_that_is_garbage_is_damaged_and_computed_again(store, content):
    compute = Compute()
    key = get(store, compute).key
    (store.root / "stage" / f"{key}.json").write_text(content)
    with pytest.warns(UserWarning, match="is damaged"):
        get(store, compute)
    assert compute.calls == 2


def one_sentence(store, compute):
    with pytest.raises(StoreError) as stopped:
        get(store, compute)
    (line,) = stopped.value._render_traceback_()
    assert "\n" not in line and line.endswith("HELPERS_STORE.")
    assert compute.calls == 0
    return line


@pytest.mark.parametrize("end", [".safetensors", ".json"])
def test_a_folder_in_place_of_a_file_is_a_sentence_before_anything_is_computed(store, end):
    key = get(store, Compute()).key
    path = store.root / "stage" / f"{key}{end}"
    path.unlink()
    path.mkdir()
    assert "is a folder where a file belongs" in one_sentence(store, Compute())


@pytest.mark.parametrize("place", ["store", "store/stage", "store/locks", "."])
def test_a_file_in_place_of_a_folder_is_a_sentence_before_anything_is_computed(tmp_path, place):
    root = tmp_path / "store"
    if place == ".":
        root = tmp_path / "file" / "store"
        (tmp_path / "file").touch()
    else:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    one_sentence(Store(root), Compute())


def test_a_read_only_store_gives_what_it_has_and_says_what_it_lacks(disk):
    store = Store(disk)
    get(store, Compute())
    shutil.rmtree(disk / "locks")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    compute = Compute()
    assert get(store, compute).facts == {"auroc": 0.5}
    assert compute.calls == 0
    with pytest.raises(StoreError, match=r"stage is not in the store .* cannot be written"):
        store.get("stage", compute, parameters={"layer": 2})
    assert compute.calls == 0


def test_a_result_that_a_full_disk_cannot_keep_serves_the_run_and_leaves_nothing_half_written(disk):
    store, compute = Store(disk), Compute(500_000)
    with pytest.warns(UserWarning, match="cannot be kept in the store .* serves this run, and the next will compute"):
        first = get(store, compute)
    assert len(first.tensors["x"]) == 500_000
    assert get(Store(disk), compute).tensors["x"] is first.tensors["x"]
    assert compute.calls == 1
    assert list((disk / "stage").iterdir()) == []


def test_a_sidecar_that_a_full_disk_cannot_keep_leaves_no_half_result(store, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "replace_text", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        get(store, Compute())
    assert list((store.root / "stage").iterdir()) == []


def test_findings_are_whole_or_as_they_were_on_a_full_disk_and_as_open_as_the_umask_says(disk):
    class Model:
        name, digest, device, dtype = "tiny-random", "0", "cpu", "float32"

    params = InoculationParams(preset="tiny", results=str(disk / "results"))
    findings = Findings(params, provenance(params, Model()))
    before = os.umask(0o027)
    try:
        folder = findings.save()
    finally:
        os.umask(before)
    assert folder == params.folder
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    fill(disk)
    findings.glued["long"] = {"text/plain": "x" * 100_000}
    with pytest.raises(OSError, match="No space"):
        findings.save()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def notebook(folder, code):
    parameters = nbformat.v4.new_code_cell("preset = 'tiny'")
    parameters.metadata.tags = ["parameters"]
    read = "from helpers.chapters.ip_loss_reduction.params import InoculationParams as P\nparams = P.from_notebook()"
    cells = [parameters, *map(nbformat.v4.new_code_cell, [read, code])]
    path = folder / f"{InoculationParams.chapter}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize(
    ("code", "said"), [("print('x' * 2_000_000)", "kept as"), ("print('x' * 2_000_000)\n1 / 0", "see")]
)
def test_a_notebook_that_a_full_disk_cannot_hold_is_kept_elsewhere(code, said, disk, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = notebook(tmp_path, code)
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    with pytest.raises(ExecutionError, match=f"{said} .*elsewhere") as stopped:
        execute(path, disk / "out.ipynb", {"results": str(tmp_path / "results")})
    assert "\n" not in str(stopped.value)
    assert list(disk.iterdir()) == []
    (kept,) = elsewhere.iterdir()
    assert "x" * 2_000_000 in kept.read_text()


def test_a_write_that_fails_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "a.json"
    files.replace_text(path, "old")

    def half(part):
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, half)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
