"""A content-addressed store for expensive stages.

Context: a notebook is run again and again; most of its minutes go into stages whose inputs did not change.
Intuition: the key of a result is the digest of everything that went into it - the stage's parameters, the
model, the data and the helper code (as a syntax tree, so comments, docstrings and layout do not count). The
same key is the same result.

A result is two files: `{stage}/{key}.safetensors`, and beside it `{key}.json`, which says where it came from
and holds the digest of the first. The second is written last, so a result without it was interrupted.
"""

import ast
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.dependencies import PACKAGE, helper_sources


@dataclass(frozen=True)
class Artifact:
    """What a stage made, and the key it is stored under."""

    key: str
    """SHA-256 of everything that went into it."""

    tensors: dict[str, Tensor]
    """On the CPU, whatever device computed them."""

    facts: dict[str, Any]
    """What else the stage has to say, as JSON."""


class Store:
    """A folder of artifacts. Several processes may share it: each result is computed once."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def get(
        self,
        stage: str,
        compute: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
        *,
        parameters: Mapping[str, Any],
        uses: Sequence[ModuleType | str],
        model: str = "",
        data: Mapping[str, str] | None = None,
    ) -> Artifact:
        """The stored result of a stage, or the result of `compute`, which is then stored.

        Args:
            stage: name of the stage and of its folder.
            compute: gives tensors and facts (which JSON must be able to hold).
            parameters: everything that decides the result and is not named below, as JSON.
            uses: modules of helpers whose code decides the result; what they import counts too.
            model: digest of the model.
            data: name of each data file -> its digest.

        Raises:
            ValueError: if the stage's name is no file name, or parameters or facts are no JSON.
        """
        if not stage.replace("-", "_").isidentifier():
            raise ValueError(f"A stage cannot be called {stage!r}: use letters, digits, - and _.")
        inputs = {
            "stage": stage,
            "parameters": parameters,
            "model": model,
            "data": dict(data or {}),
            "code": _code(tuple(uses)),
        }
        text = _json(inputs, f"the parameters of stage {stage!r}")
        key = hashlib.sha256(text.encode()).hexdigest()
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{key}.lock"):
            stored = self._read(stage, key)
            if stored is not None:
                return stored
            start = time.perf_counter()
            tensors, facts = compute()
            return self._write(stage, key, json.loads(text), tensors, facts, time.perf_counter() - start)

    def _paths(self, stage: str, key: str) -> tuple[Path, Path]:
        return self.root / stage / f"{key}.safetensors", self.root / stage / f"{key}.json"

    def _read(self, stage: str, key: str) -> Artifact | None:
        """The stored artifact; None, with a warning unless nothing is there, if it must be computed."""
        tensors, sidecar = self._paths(stage, key)
        if not tensors.exists() and not sidecar.exists():
            return None
        try:
            record = json.loads(sidecar.read_text("utf-8"))
            if record["sha256"] != file_digest(tensors):
                raise ValueError("its tensors are not those that were written")
            return Artifact(key, load_file(tensors), record["facts"])
        except (OSError, ValueError, KeyError, TypeError) as damage:
            reason = "a half of it is missing" if isinstance(damage, FileNotFoundError) else str(damage)
            warnings.warn(f"Artifact {stage}/{key[:12]} is damaged ({reason}) and is computed again.", stacklevel=3)
            return None

    def _write(
        self,
        stage: str,
        key: str,
        inputs: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        seconds: float,
    ) -> Artifact:
        facts = json.loads(_json(facts, f"the facts of stage {stage!r}"))  # what a later load will give
        tensors = _apart(tensors)
        path, sidecar = self._paths(stage, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, lambda part: save_file(tensors, part))
        record = {
            "key": key,
            "inputs": inputs,
            "facts": facts,
            "sha256": file_digest(path),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
        }
        _replace(sidecar, lambda part: part.write_text(json.dumps(record, indent=1) + "\n", "utf-8"))
        return Artifact(key, tensors, dict(facts))


def default_store() -> Store:
    """The store that the notebooks share: $HELPERS_STORE, or `artifacts` beside the package."""
    return Store(os.environ.get("HELPERS_STORE") or PACKAGE.parent / "artifacts")


@cache
def _code(uses: tuple[ModuleType | str, ...]) -> dict[str, str]:
    """The digest of each helper file that the modules use; read once a process, whose code does not change either."""
    return {path.relative_to(PACKAGE).as_posix(): code_digest(path) for path in helper_sources(uses)}


def code_digest(path: Path) -> str:
    """SHA-256 of a Python file's syntax tree without its docstrings."""
    tree = ast.parse(path.read_text("utf-8"), path.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


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


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
