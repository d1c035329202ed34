"""The lines that compute an equation, shown on the page from their source.

A page that copies code drifts away from it. `show_source` reads what is run: a notebook calls it beneath an equation,
in a cell tagged `remove-input`, so that the page shows the lines and not the call. As a Sphinx extension this module
leads the link beneath them to the page of the whole module.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

from IPython.display import Markdown

LONGEST = 22
"""Lines of a listing, its signature among them."""

WIDEST = 92
"""Characters of a line: what a page's column shows."""

PACKAGE = Path(__file__).resolve().parents[1]


def show_source(*functions: Callable[..., Any] | property) -> Markdown:
    """Functions' or methods' own lines without docstrings, highlighted, each with a link to the file that it is from.

    Raises `ValueError` for what has no source in this package, and for a function too long or too wide for a page:
    split the lines that decide out of it.
    """
    return Markdown("\n\n".join(_listing(function) for function in functions))


def _listing(function: Callable[..., Any] | property) -> str:
    lines, name, file = _source(function)
    if len(lines) > LONGEST:
        raise ValueError(
            f"{name} has {len(lines)} lines and a page shows at most {LONGEST}: split out the function that decides."
        )
    if widest := next((line for line in lines if len(line) > WIDEST), None):
        raise ValueError(
            f"A line of {name} is wider than the page's {WIDEST} characters, so break it: {widest.strip()}"
        )
    path = file.relative_to(PACKAGE.parent).as_posix()
    there = Path(os.path.relpath(file)).as_posix()
    return "\n".join(["```python", *lines, "```", "", f"*From* [`{path}`]({there}#{name})"])


def _source(function: Callable[..., Any] | property) -> tuple[list[str], str, Path]:
    """Its lines without docstring, its name within its module, and the module's file."""
    plain = function.fget if isinstance(function, property) else function
    plain = inspect.unwrap(getattr(plain, "__func__", plain))  # type: ignore[arg-type]
    try:
        if not inspect.isfunction(plain):
            raise TypeError
        text, file = dedent(inspect.getsource(plain)), Path(inspect.getfile(plain)).resolve()
        if not file.is_relative_to(PACKAGE):
            raise TypeError
    except (TypeError, OSError):
        raise ValueError(
            f"{function!r} is no function or method of this package, so it has no lines to show."
        ) from None
    (defined,) = ast.parse(text).body
    assert isinstance(defined, ast.FunctionDef)
    lines, first = text.splitlines(), defined.body[0]
    if ast.get_docstring(defined) is not None:
        below = lines[first.end_lineno :]
        while below and not below[0].strip():
            del below[0]
        lines = [*lines[: first.lineno - 1], *below]
    return lines, plain.__qualname__, file


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("doctree-read", _own_links)
    app.connect("missing-reference", _module_page)
    return {"parallel_read_safe": True}


FILE = re.compile(rf"(?:\.\./)*({PACKAGE.name}/[\w/]+)\.py#(.+)")
"""The address beneath a listing."""


def _own_links(app: Any, tree: Any) -> None:
    """Take the links to files of this package out of MyST's hands, which look for them among the book's pages."""
    from sphinx.addnodes import pending_xref

    for node in tree.findall(pending_xref):
        if node["reftype"] == "myst" and FILE.fullmatch(node["reftarget"]):
            node.update_all_atts({"refdomain": "", "reftype": "listing", "refwarn": True}, replace=True)


def _module_page(app: Any, env: Any, node: Any, shown: Any) -> Any:
    """A link to the listing's place on the module's page by `sphinx.ext.viewcode`; None where there is no such page."""
    from sphinx.util.nodes import make_refnode

    found = FILE.fullmatch(node.get("reftarget", ""))
    if node["reftype"] != "listing" or found is None:
        return None
    module, name = found[1].replace("/", "."), found[2]
    entry = getattr(env, "_viewcode_modules", {}).get(module)
    if not entry:
        return None
    parts = name.split(".")
    within = [".".join(parts[:size]) for size in range(len(parts), 0, -1)]  # `Ablate.hooks`, then `Ablate`
    place = next((part for part in within if part in entry[2]), None)
    return make_refnode(app.builder, node["refdoc"], f"_modules/{found[1]}", place, shown)
