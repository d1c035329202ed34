"""The artifact store keeps what was computed, and notices what became wrong."""

import json
import multiprocessing
import time

import pytest
import torch

from helpers.artifacts import Store, code_digest, default_store


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


def get(store, compute, stage="vector", **changed):
    asked = {"parameters": {"layer": 1}, "uses": ["params"], "model": "abc", "data": {"evil": "123"}}
    return store.get(stage, compute, **{**asked, **changed})


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
        {"uses": ["artifacts"]},
        {"model": "abd"},
        {"data": {"evil": "124"}},
    ],
)
def test_a_change_of_any_input_computes_again(store, changed):
    compute = Compute()
    assert get(store, compute).key != get(store, compute, **changed).key
    assert compute.calls == 2


@pytest.mark.parametrize("damage", ["tensors", "sidecar", "no tensors", "no sidecar"])
def test_a_damaged_artifact_is_recomputed_with_a_warning(store, damage):
    compute = Compute()
    key = get(store, compute).key
    tensors, sidecar = (store.root / "vector" / f"{key}{end}" for end in (".safetensors", ".json"))
    if damage.startswith("no"):
        (tensors if damage == "no tensors" else sidecar).unlink()
    elif damage == "sidecar":
        sidecar.write_text("{")
    else:
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged .* computed again"):
        again = get(store, compute)
    assert compute.calls == 2
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
    assert set(record["inputs"]["code"]) == {"__init__.py", "params.py"}


def test_comments_docstrings_and_layout_do_not_count_as_code(tmp_path):
    one, same, other = (tmp_path / name for name in ("one.py", "same.py", "other.py"))
    one.write_text('def f(x):\n    """Doc."""\n    return x + 1\n')
    same.write_text("def f(x):\n\n    return (x + 1)  # one more\n")
    other.write_text("def f(x):\n    return x + 2\n")
    assert code_digest(one) == code_digest(same) != code_digest(other)


def test_the_shared_store_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("HELPERS_STORE", str(tmp_path))
    assert default_store().root == tmp_path
