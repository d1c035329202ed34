"""A content-addressed store for expensive stages.

Context: a notebook is run again and again; most of its minutes go into stages whose inputs did not change.
Intuition: the key of a result is the digest of everything that went into it - the stage's parameters, the
model, the data, the versions of the libraries that compute, and the helper code (as a syntax tree, so comments,
docstrings and layout do not count). The same key is the same result.

Which code that is, the store finds by itself: the module of the function that computes, and every module of helpers
which that imports.

A result is two files: `{stage}/{key}.safetensors`, and beside it `{key}.json`, which says where it came from and holds
digests of both. The second is written last, so a result without it was interrupted. Its time of change is when the
result was last used.
"""

import ast
import contextlib
import hashlib
import inspect
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.cost import LEDGER
from helpers.dependencies import PACKAGE, helper_sources
from helpers.files import check_writable, file_digest, replace, replace_text
from helpers.progress import progress

Compute = Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
"""Gives a stage's tensors, and its facts, which JSON must be able to hold."""

LIBRARIES = ("numpy", "peft", "torch", "transformer-lens", "transformers")
"""What computes: results of other versions of these are other results."""

NO_CODE = ("params.py", "machine.py", "progress.py", "cost.py", "flop.py")
"""What decides no result. Presets are of all chapters, and a stage takes what it needs of them as parameters: as code,
one changed number would compute every chapter anew. The others check, say how far a stage is, and count."""

DEADLINE = "HELPERS_DEADLINE"
"""The environment variable that says until when stages may be begun, in seconds since 1970."""

LEFTOVER = 3600
"""Seconds after which a file that belongs to no result is no longer being written."""


class StoreError(OSError):
    """A store that cannot be used; the message is one sentence."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class OutOfTime(StoreError):
    """A stage that was not begun, since the time that was given is over."""


@dataclass(frozen=True)
class Artifact:
    """What a stage made, and the key it is stored under."""

    key: str
    """SHA-256 of everything that went into it."""

    tensors: dict[str, Tensor]
    """On the CPU, whatever device computed them."""

    facts: dict[str, Any] = field(default_factory=dict)
    """What else the stage has to say, as JSON."""


@dataclass(frozen=True)
class Usage:
    """What a stage takes in a store."""

    stage: str
    results: int
    size: int
    """Bytes of all its results."""
    used: datetime
    """When one of them was last read or written."""


_UNSTORED: dict[Path, Artifact] = {}
"""By their place in a store, results that could not be written there: this process computes them once."""


class Store:
    """A folder of artifacts. Several processes may share it: each result is computed once."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def get(
        self,
        stage: str,
        compute: Compute,
        *,
        parameters: Mapping[str, Any],
        model: str = "",
        data: Mapping[str, str] | None = None,
    ) -> Artifact:
        """The stored result of a stage, or the result of `compute`, which is then stored.

        A store that nobody may write to serves as well, as long as every result is in it. A result that cannot be
        written once it is computed (a full disk) is given all the same, with a warning.

        Args:
            stage: name of the stage and of its folder.
            compute: gives tensors and facts (which JSON must be able to hold). It decides the key by its code: the
                module that it is defined in, and every module of helpers which that imports, directly or through
                others. From outside helpers, modules that are not of helpers do not count.
            parameters: everything that decides the result and is not named below, as JSON.
            model: digest of the model.
            data: name of each data file -> its digest.

        Raises:
            ValueError: if the stage's name is no file name, parameters or facts are no JSON, or `compute` is defined in
                no file (in a notebook).
            StoreError: if the result has to be computed and the store cannot be written.
            OutOfTime: if it has to be computed and the time that `HELPERS_DEADLINE` gives is over.
        """
        inputs = _inputs(stage, compute, parameters, model, data)
        key = _digest(inputs)
        stored = self._read(stage, key)
        if stored is not None:
            return stored
        with self._locked(stage, key):
            stored = self._read(stage, key, warn=True)  # another process may have been faster
            if stored is not None:
                return stored
            if time.time() > float(os.environ.get(DEADLINE, "inf")):
                raise OutOfTime("The time is over: what is done is stored, and the same command goes on from there.")
            start = time.perf_counter()
            with LEDGER.stage(stage, key) as costs:
                tensors, facts = compute()
            took = {"seconds": round(time.perf_counter() - start, 3), "cost": costs}
            return self._write(stage, key, inputs, tensors, facts, took)

    def key(
        self,
        stage: str,
        compute: Compute,
        *,
        parameters: Mapping[str, Any],
        model: str = "",
        data: Mapping[str, str] | None = None,
    ) -> str:
        """The key that `get` stores this result under; nothing is computed or read."""
        return _digest(_inputs(stage, compute, parameters, model, data))

    def has(self, stage: str, key: str) -> bool:
        """Whether a result is there, damaged or not; nothing is read."""
        paths = self._paths(stage, key)
        return paths[0] in _UNSTORED or all(path.exists() for path in paths)

    def usage(self) -> list[Usage]:
        """What each stage takes, by name."""
        found: dict[str, list[os.stat_result]] = {}
        for tensors, sidecar in self._results():
            with contextlib.suppress(FileNotFoundError):  # another process may be pruning
                found.setdefault(sidecar.parent.name, []).extend([sidecar.stat(), tensors.stat()])
        return [
            Usage(
                stage,
                len(of) // 2,
                sum(stat.st_size for stat in of),
                datetime.fromtimestamp(max(stat.st_mtime for stat in of[::2]), UTC),
            )
            for stage, of in sorted(found.items())
        ]

    def prune(self, days: float) -> tuple[int, int]:
        """Delete results that were not used for this many days, and what interrupted runs left behind.

        Returns how many results went, and the bytes that are free now.

        Raises:
            OSError: if the store cannot be written.
        """
        now, freed = time.time(), 0
        old = [pair for pair in self._results() if now - pair[1].stat().st_mtime >= 86_400 * days]
        for tensors, sidecar in old:
            freed += _delete(sidecar) + _delete(tensors)
        whole = {path for pair in self._results() for path in pair}
        for folder in self._stages():
            for path in {*folder.glob("*.safetensors"), *folder.glob(".*"), *folder.glob("*.json")} - whole:
                if now - path.stat().st_mtime >= LEFTOVER:
                    freed += _delete(path)
        return len(old), freed

    def _stages(self) -> list[Path]:
        """The folders of stages: those that hold tensors, or parts of them."""
        folders = [path for path in self.root.iterdir() if path.is_dir()] if self.root.is_dir() else []
        return sorted(path for path in folders if any(path.glob("*.safetensors*")) or any(path.glob(".*.safetensors*")))

    def _results(self) -> Iterator[tuple[Path, Path]]:
        """The two files of each whole result."""
        for folder in self._stages():
            for sidecar in sorted(folder.glob("*.json")):
                tensors = sidecar.with_suffix(".safetensors")
                if tensors.exists():
                    yield tensors, sidecar

    def _paths(self, stage: str, key: str) -> tuple[Path, Path]:
        return self.root / stage / f"{key}.safetensors", self.root / stage / f"{key}.json"

    @contextlib.contextmanager
    def _locked(self, stage: str, key: str) -> Iterator[None]:
        """While open, no other process computes the result, which can be written once it is there."""
        try:
            for path in self._paths(stage, key):
                if path.is_dir():
                    raise IsADirectoryError(f"{path} is a folder where a file belongs")
            check_writable(self.root / stage)
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "locks" / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                with progress(None, f"waiting for another process, which makes {stage}", "") as waiting:
                    while not lock.is_locked:
                        waiting.update()
                        with contextlib.suppress(Timeout):
                            lock.acquire(timeout=1)
        except OSError as error:
            raise StoreError(
                f"{stage} is not in the store {self.root} and cannot be written there, since {error}: mend that, or "
                "name another folder by HELPERS_STORE."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _read(self, stage: str, key: str, *, warn: bool = False) -> Artifact | None:
        """The stored artifact, used now; None if it must be computed, with a warning if asked and something is there.

        Without the lock half of a result may be there because another process is writing the other half.
        """
        tensors, sidecar = self._paths(stage, key)
        if tensors in _UNSTORED:
            return _UNSTORED[tensors]
        if not tensors.exists() and not sidecar.exists():
            return None
        try:
            record = json.loads(sidecar.read_text("utf-8"))
            written = record.pop("digest")
            if _digest(record["inputs"]) != key:
                raise ValueError("its inputs are not those of its key")
            if _digest(record) != written:
                raise ValueError("its facts are not those that were written")
            if record["sha256"] != file_digest(tensors):
                raise ValueError("its tensors are not those that were written")
            artifact = Artifact(key, load_file(tensors), record["facts"])
            costs = {key: (str(name), int(operations)) for key, (name, operations) in record.get("cost", {}).items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as damage:
            if warn:
                reason = {
                    FileNotFoundError: "a half of it is missing",
                    SafetensorError: "its tensors cannot be read",
                    ValueError: str(damage),
                }.get(type(damage), "its sidecar is not what was written")
                warnings.warn(f"Artifact {stage}/{key[:12]} is damaged ({reason}) and is computed again.", stacklevel=3)
            return None
        LEDGER.read(costs)
        with contextlib.suppress(OSError):  # a store that nobody may write to does not know what is used
            os.utime(sidecar)
        return artifact

    def _write(
        self,
        stage: str,
        key: str,
        inputs: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        took: Mapping[str, Any],
    ) -> Artifact:
        facts = json.loads(_json(facts, f"the facts of stage {stage!r}"))  # what a later load will give
        tensors = _apart(tensors)
        artifact = Artifact(key, tensors, dict(facts))
        path, sidecar = self._paths(stage, key)
        try:
            replace(path, lambda part: save_file(tensors, part))
            record: dict[str, Any] = {
                "key": key,
                "inputs": inputs,
                "facts": facts,
                "sha256": file_digest(path),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                **took,
            }
            record["digest"] = _digest(record)
            replace_text(sidecar, json.dumps(record, indent=1) + "\n")
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                path.unlink()
            _UNSTORED[path] = artifact
            warnings.warn(
                f"{stage} was computed but cannot be kept in the store {self.root} ({error}): it serves this run, and "
                "the next will compute it again.",
                stacklevel=3,
            )
        return artifact


def default_store() -> Store:
    """The store that the notebooks share: $HELPERS_STORE, or `artifacts` beside the package."""
    return Store(os.environ.get("HELPERS_STORE") or PACKAGE.parent / "artifacts")


def _inputs(
    stage: str, compute: Compute, parameters: Mapping[str, Any], model: str, data: Mapping[str, str] | None
) -> dict[str, Any]:
    """Everything that decides a result, as JSON gives it back."""
    if not stage.replace("-", "_").isidentifier():
        raise ValueError(f"A stage cannot be called {stage!r}: use letters, digits, - and _.")
    module = _module_of(compute)
    if module.partition(".")[0] != "helpers" and not getattr(sys.modules.get(module), "__file__", None):
        raise ValueError(
            f"The function that computes stage {stage!r} is defined in no file, so its code cannot be part of a key: "
            "put it into a module and import it."
        )
    inputs = {
        "stage": stage,
        "parameters": parameters,
        "model": model,
        "data": dict(data or {}),
        "code": _code(module),
        "versions": _versions(),
    }
    found: dict[str, Any] = json.loads(_json(inputs, f"the parameters of stage {stage!r}"))
    return found


def _module_of(compute: Any) -> str:
    """The name of the module that defines a function, a method, a partial application of one, or a callable's class."""
    while True:
        inner = compute.func if isinstance(compute, partial) else getattr(compute, "__func__", compute)
        inner = inspect.unwrap(inner)
        if inner is compute:
            return str(compute.__module__)
        compute = inner


@cache
def _code(module: str) -> dict[str, str]:
    """The digest of a module's file and of each helper file that it uses, by name.

    Read once a process, whose code does not change either.
    """
    found, used = {}, module
    if module.partition(".")[0] != "helpers":
        path = Path(str(sys.modules[module].__file__))
        found, used = {module: code_digest(path)}, f"{path.read_text('utf-8')}\n"
    paths = [path for path in helper_sources([used]) if path.name not in NO_CODE]
    return found | {path.relative_to(PACKAGE).as_posix(): code_digest(path) for path in paths}


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def code_digest(path: Path) -> str:
    """SHA-256 of a Python file's syntax tree without its docstrings."""
    tree = ast.parse(path.read_text("utf-8"), path.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(_json(value, "this").encode()).hexdigest()


def _delete(path: Path) -> int:
    """Delete a file; the bytes that are free now."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:  # another process was faster
        return 0
    return size


def _json(value: Any, what: str) -> str:
    """Canonical JSON: sorted keys, no NaN."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"JSON cannot hold {what}: {error}.") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, of which no two share memory (safetensors refuses those)."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart
