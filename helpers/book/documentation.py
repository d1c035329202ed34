"""A Sphinx extension: reference pages from docstrings, and what a page says of where it is published.

The docstrings are plain text: single backticks mean code (`default_role` in `_config.yml`), a paragraph that is
indented by four is an example, and bars mean a norm. reStructuredText reads the last two in its own way.
"""

import os
import re
import typing
from types import ModuleType
from typing import Any

from numpy.typing import ArrayLike
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.ext.autodoc import DataDocumenter, Documenter, ModuleDocumenter
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.typing import stringify_annotation


class ModuleWithSummary(ModuleDocumenter):
    """A module's section begins with a table of what is in it, and ends with constants and short names of types."""

    def sort_members(self, documenters: list[tuple[Documenter, bool]], order: str) -> list[tuple[Documenter, bool]]:
        """In the order of the source, constants last."""
        members = super().sort_members(documenters, order)
        return sorted(members, key=lambda member: isinstance(member[0], DataDocumenter))


def summary(module: ModuleType) -> list[str]:
    """A table of a module's classes and functions, then of its constants, as lines of reStructuredText."""
    defined = [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and getattr(value, "__doc__", None) and callable(value)
    ]
    constants = [name for scope, name in ModuleAnalyzer.for_module(module.__name__).find_attr_docs() if not scope]
    names = [name for name in dict.fromkeys(defined + constants) if not name.startswith("_")]
    if not names:
        return []
    return ["", ".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in names), ""]


def as_restructured_text(lines: list[str]) -> None:
    """Turn a plain docstring into reStructuredText of the same meaning, in place."""
    written: list[str] = []
    last = ""  # the last line of text outside examples
    example: int | None = None  # how far the text around the example that we are in is indented
    for line in lines:
        indentation, around = (len(text) - len(text.lstrip()) for text in (line, last))
        if example is not None and line.strip() and indentation <= example:
            example = None
        if example is None and last and written[-1] == "" and line.strip() and indentation >= around + 4:
            example = around
            written += [" " * around + "::", ""]
        if example is None and line.strip():
            # an escaped bar is a bar; within backticks it is one already
            line = re.sub(r"`[^`]*`|\|", lambda found: r"\|" if found[0] == "|" else found[0], line)
            last = line
        written.append(line if line.strip() else "")
    lines[:] = written


def only_with_repository(options: dict[str, Any]) -> None:
    """Take the Colab button from the theme's options if no address of a repository is configured, in place."""
    if not options.get("repository_url"):
        options.get("launch_buttons", {}).pop("colab_url", None)


def published_at(config: Config) -> None:
    """Take the book's address from the environment, if it is there, and make cards only with one, in place."""
    config.html_baseurl = os.environ.get("BOOK_ADDRESS", config.html_baseurl)
    config.ogp_site_url = config.html_baseurl
    config.ogp_social_cards = {"enable": bool(config.html_baseurl)}


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx; before any helper is imported, since jaxtyping then prints shapes as they are written."""
    typing.GENERATING_DOCUMENTATION = True  # type: ignore[attr-defined]
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.autosummary")
    app.setup_extension("sphinx.ext.napoleon")
    app.add_autodocumenter(ModuleWithSummary, override=True)
    app.connect("autodoc-process-docstring", _readable_docstring)
    app.connect("autodoc-process-signature", _readable_signature)
    app.connect("config-inited", lambda app, config: only_with_repository(config.html_theme_options))
    app.connect("config-inited", lambda app, config: published_at(config))
    app.connect("html-page-context", _without_empty_address, priority=900)  # after the tags are there
    return {"parallel_read_safe": True}


def _readable_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    as_restructured_text(lines)
    if what == "module":
        lines += summary(obj)


def _without_empty_address(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    if not app.config.html_baseurl:
        context["metatags"] = re.sub(r'<meta property="og:url"[^>]*>\n?', "", context.get("metatags", ""))


def _readable_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Name NumPy's ArrayLike instead of spelling it out, and leave out a chapter's parameters, which have a page."""
    if what == "class" and hasattr(obj, "presets"):
        return "(**given)", None
    spelt_out = stringify_annotation(ArrayLike, "smart")
    return signature and signature.replace(spelt_out, "ArrayLike"), returns
