"""A Sphinx extension: reference pages from docstrings, and a Colab button where there is something to open.

The docstrings are plain text: single backticks mean code (`default_role` in `_config.yml`), a paragraph that is
indented by four is an example, and bars mean a norm. reStructuredText reads the last two in its own way.
"""

import re
import typing
from typing import Any

from numpy.typing import ArrayLike
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation


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


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx; before any helper is imported, since jaxtyping then prints shapes as they are written."""
    typing.GENERATING_DOCUMENTATION = True  # type: ignore[attr-defined]
    app.setup_extension("sphinx.ext.autodoc")
    app.setup_extension("sphinx.ext.napoleon")
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: as_restructured_text(lines))
    app.connect("autodoc-process-signature", _readable_signature)
    app.connect("config-inited", lambda app, config: only_with_repository(config.html_theme_options))
    return {"parallel_read_safe": True}


def _readable_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Name NumPy's ArrayLike instead of spelling it out, and leave out a chapter's parameters, which have a page."""
    if what == "class" and hasattr(obj, "presets"):
        return "(**given)", None
    spelt_out = stringify_annotation(ArrayLike, "smart")
    return signature and signature.replace(spelt_out, "ArrayLike"), returns
