"""Which helper modules and data a piece of code uses, found by reading it and never by running it.

The artifact store puts the digest of the modules into its keys; the build makes them and the data inputs of a chapter.
"""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
DATA = PACKAGE.parent / "data"


def helper_sources(code_or_modules: Iterable[str | ModuleType]) -> list[Path]:
    """The files of helpers that some code uses, directly or through other helper modules, sorted.

    Args:
        code_or_modules: modules of helpers, their names (`"gradients"`, `"helpers.gradients"`), or source.

    Raises:
        ValueError: if a name is not a module of helpers.
    """
    waiting: list[Path] = []
    for item in code_or_modules:
        name = item.__name__ if isinstance(item, ModuleType) else item
        if all(part.isidentifier() for part in name.split(".")):
            waiting += _files(name.removeprefix("helpers.") if name != "helpers" else "", required=True)
        else:
            waiting += _imported(_parsed(name), package="")
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            package = ".".join(path.relative_to(PACKAGE).parent.parts)
            waiting += _imported(_parsed(path.read_text("utf-8"), path.name), package)
    return sorted(found)


def notebook_sources(notebook: str | Path) -> list[Path]:
    """The files of helpers that a notebook uses, directly or through other helper modules, sorted."""
    return helper_sources([_code(notebook)])


def data_sources(notebook: str | Path) -> list[Path]:
    """The bundled data files that a notebook reads, directly or through helpers, sorted.

    Each name in the notebook stands for every function and class of the helpers it uses that is called so, and so on
    with the names in those, whether or not that code is reached: rather a file too many than one too few. A file is
    read by what names it, `"quiz.jsonl"`, or its folder. What a `params.py` looks up does not count: it decides
    parameters, which the build compares by their values.
    """
    trees: list[ast.AST] = [_parsed(_code(notebook))]
    defined: dict[str, list[ast.AST]] = {}
    for path in notebook_sources(notebook):
        if path.name in (
            "params.py",
            "registry.py",
        ):  # what they look up decides parameters and models, not what a run reads
            continue
        for statement in _parsed(path.read_text("utf-8"), path.name).body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                defined.setdefault(statement.name, []).append(statement)
            elif isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if alias.asname:
                        defined.setdefault(alias.asname, []).append(ast.Name(alias.name))
            else:
                trees.append(statement)
    files: set[Path] = set()
    while trees:
        for node in ast.walk(trees.pop()):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                files |= _data(node.value)
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            trees += defined.pop(name, []) if isinstance(name, str) else []
    return sorted(files)


def _data(name: str) -> set[Path]:
    """The data files that a text names: one, or those of a folder."""
    if not name.replace(".jsonl", "").isidentifier():
        return set()
    path = DATA / name
    return {path} if path.is_file() else set(path.glob("*.jsonl"))


def _code(notebook: str | Path) -> str:
    """The Python in a notebook's code cells."""
    import nbformat  # of the extra `book`: the core does without

    cells = nbformat.read(notebook, as_version=4).cells
    # IPython's own lines (%matplotlib, !command, name?) are no Python and import nothing of ours
    lines = [
        line
        for cell in cells
        if cell.cell_type == "code" and not cell.source.startswith("%%")
        for line in cell.source.splitlines()
        if not line.lstrip().startswith(("%", "!")) and not line.rstrip().endswith("?")
    ]
    return "\n".join(["", *lines, ""])


@cache
def _parsed(code: str, name: str = "<code>") -> ast.Module:
    return ast.parse(code, name)


@cache
def _imported(tree: ast.AST, package: str) -> tuple[Path, ...]:
    """The files that the imports of a module in helpers' (sub)package `package` stand for."""
    files: dict[Path, None] = {}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "helpers"]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".") if package else []
                base = ".".join(["helpers", *above[: len(above) - node.level + 1], *([module] if module else [])])
            else:
                base = module
            if base.split(".")[0] == "helpers":
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            files |= dict.fromkeys(_files(name.removeprefix("helpers").removeprefix(".")))
    return tuple(files)


def _files(dotted: str, required: bool = False) -> list[Path]:
    """The file of a module, below helpers, and the `__init__.py` of every package around it."""
    parts = dotted.split(".") if dotted else []
    module, package = PACKAGE.joinpath(*parts).with_suffix(".py"), PACKAGE.joinpath(*parts, "__init__.py")
    around = [PACKAGE.joinpath(*parts[:depth], "__init__.py") for depth in range(len(parts))]
    if parts and module.is_file():
        return [path for path in [*around, module] if path.is_file()]
    if PACKAGE.joinpath(*parts).is_dir():
        return [path for path in [*around, package] if path.is_file()]
    if required:
        raise ValueError(f"There is no module {dotted!r} in helpers: name one of its files, without .py.")
    return []
