"""The import rule: a module of helpers imports from its own layer and from those below, a chapter from no other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "helpers"
LAYERS = {
    "ground": [
        "params",
        "machine",
        "files",
        "progress",
        "cost",
        "artifacts",
        "dependencies",
        "statistics",
        "verdicts",
        "corpora",
        "chat",
        "cues",
        "checking",
        "quantized",
        "registry",
        "fetching",
    ],
    "models": ["flop", "rehearsal", "stacks", "models", "interventions", "probes", "judges"],
    "running": ["forward", "losses", "generation", "gradients", "activations", "training"],
    "studies": ["studies"],
    "chapters": ["chapters"],
    "book": ["book"],
    "building": ["building"],
    "cli": ["cli", "__main__"],
}
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS.values()) for room in rooms}
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
)


def imported(module):
    """The modules of helpers that a module imports anywhere in it, below `helpers`."""
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports {node.module} by its place: name it from helpers on"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.removeprefix("helpers.") for name in found if name.startswith("helpers.")}
    return {name if name in MODULES else name.rpartition(".")[0] for name in below} - {""}


def test_every_module_has_a_layer():
    assert {module.split(".")[0] for module in MODULES} == LAYER_OF.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_layer_and_below(module):
    room = module.split(".")
    for other in imported(module):
        there = other.split(".")
        assert LAYER_OF[there[0]] <= LAYER_OF[room[0]], f"{module} imports {other}, which is in a layer above it"
        if room[0] == there[0] == "chapters" and len(room) > 1 and len(there) > 1:
            assert room[1] == there[1], f"{module} imports {other}: what two chapters need belongs into studies"


def test_the_rule_finds_a_chapter_that_another_imports(monkeypatch):
    monkeypatch.setitem(globals(), "imported", lambda module: {"chapters.fihs_filtering.method"})
    with pytest.raises(AssertionError, match="belongs into studies"):
        test_a_module_imports_from_its_layer_and_below("chapters.ip_loss_reduction.study")
    with pytest.raises(AssertionError, match="a layer above it"):
        test_a_module_imports_from_its_layer_and_below("training")
