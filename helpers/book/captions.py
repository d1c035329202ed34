"""A Sphinx extension: a chapter's figures get a number, a caption, what the source calls them, and their data.

In a notebook the caption is the Markdown cell beneath the figure, tagged `caption`, so that JupyterLab shows it too.
The figure's cell says the rest in its metadata: `{"figure": {"name": "fig-cosines", "source": "Fig. 3", "data":
["gradient_cosines"]}}`, where `source` is left out of a figure that is the book's own. A Markdown cell tagged `data`
is followed by links to every file of the run.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


class FigureError(ValueError):
    """A figure without name, caption or data; the message says what to do."""


def figures_of(notebook: Any) -> list[tuple[Any, Any]]:
    """The cells that draw a numbered figure, in order, each with the cell of its caption.

    Raises FigureError if the cell beneath a figure isn't its caption.
    """
    found = []
    for cell, below in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        if "figure" not in cell.metadata:
            continue
        if below is None or "caption" not in below.metadata.get("tags", []):
            raise FigureError(f"Put a Markdown cell tagged 'caption' beneath the figure {cell.metadata.figure.name!r}.")
        found.append((cell, below))
    return found


def drawn(cell: Any) -> str | None:
    """The picture that a cell's run left behind, as base64 of a PNG; None if it drew nothing."""
    return next((out.data["image/png"] for out in cell.get("outputs", []) if "image/png" in out.get("data", {})), None)


def with_captions(notebook: Any, folder: Path) -> Any:
    """The notebook with captions moved to where MyST-NB looks for them, and links to the files of its run.

    Args:
        notebook: an executed notebook; it's changed.
        folder: the run's files; it lies beside the notebook.
    """
    moved = []
    for cell, caption in figures_of(notebook):
        about = cell.metadata.figure
        source = f" It corresponds to the source's {about.source}." if about.get("source") else ""
        files = [folder / f"{table}.csv" for table in about.data]
        text = f"{' '.join(caption.source.split())}{source}\n\nData: {links(file for file in files if file.exists())}."
        cell.metadata.setdefault("mystnb", {})["figure"] = {"name": about.name, "caption": text}
        moved.append(caption)
    notebook.cells = [cell for cell in notebook.cells if not any(cell is caption for caption in moved)]
    for cell in notebook.cells:
        if "data" in cell.metadata.get("tags", []):
            cell.source += f" {links(sorted(file for file in folder.iterdir() if file.suffix != '.lock'))}."
    return notebook


def links(files: Iterable[Path]) -> str:
    """Links to files of a run, from the page of its chapter."""
    return ", ".join(f"{{download}}`{file.name} <{file.parent.name}/{file.name}>`" for file in files)


def by_chapter(numbers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Sphinx's numbers of figures, which count through the book, as the chapter's number and one within the chapter."""
    return {
        page: {
            kind: {name: (_number(page), place) for place, name in enumerate(sorted(found, key=found.__getitem__), 1)}
            for kind, found in kinds.items()
        }
        for page, kinds in numbers.items()
        if page.startswith("notebooks/")
    }


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("config-inited", _number_figures)
    app.connect("source-read", _read)
    app.connect("env-get-updated", _renumber, priority=900)  # after Sphinx has given its numbers
    return {"parallel_read_safe": True}


def _number(page: str) -> int:
    return int(page.removeprefix("notebooks/").split("_")[0])


def _number_figures(app: Sphinx, config: Any) -> None:
    config.numfig = True
    config.numfig_format = {"figure": "Figure %s"}


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname.startswith("notebooks/"):
        folder = Path(app.srcdir, docname)
        source[0] = nbformat.writes(with_captions(nbformat.reads(source[0], as_version=4), folder))


def _renumber(app: Sphinx, env: BuildEnvironment) -> list[str]:
    env.toc_fignumbers.update(by_chapter(env.toc_fignumbers))
    return []
