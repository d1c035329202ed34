"""The artifact store keeps what was computed, and notices what became wrong."""

import importlib.metadata
import json
import multiprocessing
import os
import shutil
import time
from functools import partial, wraps

import pytest
import torch

from helpers import artifacts, corpora
from helpers.artifacts import LIBRARIES, Store, code_digest, default_store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


class Compute:
    """Counts how often it is called."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"vector": torch.arange(3.0)}, {"layers": (1, 2), "auroc": 0.5}


ASKED = {"parameters": {"layer": 1}, "model": "abc", "data": {"evil": "123"}}


def get(store, compute, stage="vector", **changed):
    return store.get(stage, compute, **{**ASKED, **changed})


def test_a_second_call_loads_what_the_first_computed(store):
    compute = Compute()
    first, second = get(store, compute), get(store, compute)
    assert compute.calls == 1
    assert first.key == second.key
    assert torch.equal(first.tensors["vector"], second.tensors["vector"])
    assert first.facts == second.facts == {"layers": [1, 2], "auroc": 0.5}


@pytest.mark.parametrize(
    "changed",
    [
        {"stage": "other"},
        {"parameters": {"layer": 2}},
        {"model": "abd"},
        {"data": {"evil": "124"}},
    ],
)
def test_a_change_of_any_input_computes_again(store, changed):
    compute = Compute()
    assert get(store, compute).key != get(store, compute, **changed).key
    assert compute.calls == 2


def test_a_key_can_be_known_without_computing(store):
    key = store.key("vector", Compute(), **ASKED)
    assert not list(store.root.iterdir())
    assert get(store, Compute()).key == key


CHANGES = {
    "facts": lambda record: record["facts"].update(auroc=0.9),
    "no facts": lambda record: record.update(facts={}),
    "inputs": lambda record: record["inputs"]["parameters"].update(layer=2),
    "created": lambda record: record.update(created="2020-01-01"),
    "digest": lambda record: record.pop("digest"),
    "all": lambda record: record.clear(),
}


@pytest.mark.parametrize("damage", ["tensors", "sidecar", "no tensors", "no sidecar", "a list", *CHANGES])
def test_a_damaged_artifact_is_recomputed_with_a_warning(store, damage):
    compute = Compute()
    key = get(store, compute).key
    tensors, sidecar = (store.root / "vector" / f"{key}{end}" for end in (".safetensors", ".json"))
    if damage.startswith("no"):
        (tensors if damage == "no tensors" else sidecar).unlink()
    elif damage in CHANGES:
        record = json.loads(sidecar.read_text())
        CHANGES[damage](record)
        sidecar.write_text(json.dumps(record))
    elif damage in ("sidecar", "a list"):
        sidecar.write_text("{" if damage == "sidecar" else "[]")
    else:
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged .* computed again"):
        again = get(store, compute)
    assert compute.calls == 2
    assert again.facts == {"layers": [1, 2], "auroc": 0.5}
    assert torch.equal(again.tensors["vector"], torch.arange(3.0))
    assert torch.equal(get(store, compute).tensors["vector"], torch.arange(3.0))
    assert compute.calls == 2


def test_an_exception_leaves_nothing_behind(store):
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        get(store, fail)
    assert not (store.root / "vector").exists()


def test_facts_that_json_cannot_hold_are_an_error_and_nothing_is_stored(store):
    with pytest.raises(ValueError, match="JSON cannot hold the facts of stage 'vector'"):
        get(store, lambda: ({}, {"auroc": float("nan")}))
    assert not (store.root / "vector").exists()


def test_tensors_that_share_memory_or_need_gradients_are_stored(store):
    weight = torch.ones(2, 3, requires_grad=True)
    artifact = get(store, lambda: ({"tied": weight, "again": weight, "turned": weight.T}, {}))
    loaded = get(store, Compute())
    assert set(loaded.tensors) == {"tied", "again", "turned"}
    assert torch.equal(artifact.tensors["turned"], loaded.tensors["turned"])


def _compute_slowly(root):
    def compute():
        with (root / "calls").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return {"vector": torch.ones(1)}, {}

    get(Store(root), compute)


def test_two_processes_compute_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_compute_slowly, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert (tmp_path / "calls").read_text() == "x"


def test_the_sidecar_says_where_the_artifact_came_from(store):
    key = get(store, Compute()).key
    record = json.loads((store.root / "vector" / f"{key}.json").read_text())
    assert record["inputs"]["parameters"] == {"layer": 1}
    used = {"__init__.py", "artifacts.py", "dependencies.py", "files.py", "corpora.py"}
    assert set(record["inputs"]["code"]) == {__name__, *used}
    assert record["inputs"]["versions"] == {name: importlib.metadata.version(name) for name in LIBRARIES}


# Which code


@pytest.fixture
def forgetful():
    """Code and versions are read once a process; here they change."""
    yield
    artifacts._code.cache_clear()
    artifacts._versions.cache_clear()


@pytest.mark.parametrize("library", ["numpy", "peft", "torch", "transformer-lens", "transformers"])
def test_another_version_of_a_library_that_computes_is_another_key(store, library, monkeypatch, forgetful):
    before, version = store.key("vector", Compute(), **ASKED), artifacts.version
    monkeypatch.setattr(artifacts, "version", lambda name: "0" if name == library else version(name))
    artifacts._versions.cache_clear()
    assert store.key("vector", Compute(), **ASKED) != before


def test_the_code_is_found_behind_lambdas_methods_partial_applications_and_decorators():
    def decorated(function):
        return wraps(function)(lambda: function())

    decorated.__module__ = "elsewhere"
    for compute in (corpora.digest, decorated(corpora.digest), partial(partial(corpora.digest, "evil"))):
        assert artifacts._module_of(compute) == "helpers.corpora"
    assert (
        artifacts._module_of(Store("x").usage) == artifacts._module_of(partial(Store("x").usage)) == "helpers.artifacts"
    )
    assert artifacts._module_of(lambda: None) == artifacts._module_of(Compute()) == __name__


def test_presets_are_no_code(store):
    assert "params.py" in {path.name for path in artifacts.helper_sources(["studies.traits"])}
    code = artifacts._code("helpers.studies.traits")
    assert not any(name.endswith("params.py") for name in code)
    assert {"studies/traits.py", "training.py", "chat.py", "judges/classifier.py", "studies/defences.py"} <= set(code)


def test_a_function_that_is_in_no_file_is_one_sentence(store):
    made = {"__name__": "__main__"}
    exec("def compute():\n    return {}, {}", made)
    for module in ("nowhere", "builtins"):  # a notebook's __main__ has no file either
        made["compute"].__module__ = module
        with pytest.raises(ValueError, match=r"stage 'vector' is defined in no file, .*: put it into a module"):
            get(store, made["compute"])


def test_comments_docstrings_and_layout_do_not_count_as_code(tmp_path):
    one, same, other = (tmp_path / name for name in ("one.py", "same.py", "other.py"))
    one.write_text('def f(x):\n    """Doc."""\n    return x + 1\n')
    same.write_text("def f(x):\n\n    return (x + 1)  # one more\n")
    other.write_text("def f(x):\n    return x + 2\n")
    assert code_digest(one) == code_digest(same) != code_digest(other)


# A store that others may only read, and what it takes


def test_a_store_that_nobody_may_write_to_gives_what_is_in_it(store, monkeypatch):
    get(store, Compute())
    shutil.rmtree(store.root / "locks")

    def refused(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "utime", refused)  # the tests may run as a user whom no mode stops
    monkeypatch.setattr(artifacts, "FileLock", refused)
    compute = Compute()
    assert get(store, compute).facts["auroc"] == 0.5
    assert compute.calls == 0
    assert not (store.root / "locks").exists()
    with pytest.raises(OSError, match="read-only"):
        get(store, compute, model="another")


def test_a_store_s_files_are_open_to_whom_the_umask_opens_them(store):
    before = os.umask(0o022)
    try:
        get(store, Compute())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (store.root / "vector").iterdir()} == {0o644}


def aged(store, artifact, days, stage="vector"):
    then = time.time() - 86_400 * days
    os.utime(store.root / stage / f"{artifact.key}.json", (then, then))


def test_the_usage_counts_results_bytes_and_the_last_use_of_each_stage(store):
    one, other = get(store, Compute()), get(store, Compute(), model="b")
    get(store, Compute(), stage="another-stage")
    aged(store, one, 3)
    aged(store, other, 2)
    (store.root / "judge").mkdir()
    (store.root / "judge" / "judgements.jsonl").write_text("{}\n")
    another, vector = store.usage()
    assert (another.stage, another.results, vector.stage, vector.results) == ("another-stage", 1, "vector", 2)
    assert vector.size == sum(path.stat().st_size for path in (store.root / "vector").iterdir())
    assert time.time() - vector.used.timestamp() == pytest.approx(2 * 86_400, abs=100)
    get(store, Compute())  # read, which is a use
    assert time.time() - store.usage()[1].used.timestamp() < 100
    assert Store(store.root / "nothing").usage() == []


def test_what_was_not_used_for_so_many_days_is_deleted_and_what_was_left_behind(store):
    old, new, read = (get(store, Compute(), model=name) for name in "abc")
    for artifact in (old, read):
        aged(store, artifact, 8)
    get(store, Compute(), model="c")
    folder, judge = store.root / "vector", store.root / "judge"
    judge.mkdir()
    (judge / "judgements.jsonl").write_text("{}\n")
    (folder / ".k.safetensors.writing").write_bytes(b"123")
    for left in (".k.safetensors.abc", ".k.json.abc", "half.safetensors"):
        (folder / left).write_bytes(b"12345")
        os.utime(folder / left, (0, 0))
    size = sum(path.stat().st_size for path in folder.glob(f"{old.key}.*"))
    assert store.prune(7.0) == (1, size + 15)
    kept = {f"{artifact.key}.{end}" for artifact in (new, read) for end in ("json", "safetensors")}
    assert {path.name for path in folder.iterdir()} == {*kept, ".k.safetensors.writing"}
    assert (judge / "judgements.jsonl").exists()
    assert store.prune(7.0) == (0, 0)
    assert store.prune(0.0)[0] == 2
    compute = Compute()
    get(store, compute, model="b")
    assert compute.calls == 1


def test_the_shared_store_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("HELPERS_STORE", str(tmp_path))
    assert default_store().root == tmp_path
