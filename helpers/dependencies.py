"""Which helper modules a piece of code uses, found by reading its imports and never by running it.

The artifact store puts the digest of these files into its keys; the Snakefile makes them inputs of a chapter.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent


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
            waiting += _imported(ast.parse(name), package="")
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            package = ".".join(path.relative_to(PACKAGE).parent.parts)
            waiting += _imported(ast.parse(path.read_text("utf-8"), path.name), package)
    return sorted(found)


def notebook_sources(notebook: str | Path) -> list[Path]:
    """The files of helpers that a notebook uses, directly or through other helper modules, sorted."""
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
    return helper_sources(["\n".join(["", *lines, ""])])


def _imported(tree: ast.AST, package: str) -> Iterator[Path]:
    """The files that the imports of a module in helpers' (sub)package `package` stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "helpers":
                    yield from _files(alias.name.removeprefix("helpers").removeprefix("."))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".") if package else []
                base = ".".join([*above[: len(above) - node.level + 1], *([module] if module else [])])
            elif module.split(".")[0] == "helpers":
                base = module.removeprefix("helpers").removeprefix(".")
            else:
                continue
            yield from _files(base)
            for alias in node.names:
                yield from _files(f"{base}.{alias.name}".lstrip("."))


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
