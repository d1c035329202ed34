"""Figures to look closer at: a chart's points with their values and texts, and a text token by token.

Plain HTML, CSS and SVG that stand in the output itself. So they need neither JavaScript nor a network, look the same in
the book and in JupyterLab, and answer to mouse, touch and keyboard. Each is a fold to put beneath its static figure,
which remains what is printed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from IPython.display import HTML
from jaxtyping import Float
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helpers.book.figures import look

_GLYPHS = dict(zip("osx^v<>DdPX*p", "●■✕▲▼◄►◆◆✚✖★⬟", strict=True))

_STYLE = """
.closer {margin: .5em 0 1em}
.closer > summary {cursor: pointer}
.closer .box {margin-top: .5em; padding: .5em .7em 7.5em; border: 1px solid #8888}
.closer .strips {padding-bottom: 3em}
.closer .white {background: #fff; color: #222}
.closer label {display: inline-block; margin-right: 1.2em; cursor: pointer}
.closer .chart, .closer .strip {position: relative}
.closer dl {margin: 0}
.closer .chart {line-height: 0}
.closer .chart svg {width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt}
.closer i {position: absolute; width: 14px; height: 14px; margin: -7px; border-radius: 7px}
.closer .note:hover i, .closer .note:focus i {outline: 2px solid #D55E00}
.closer .note b {display: none; position: absolute; left: 0; right: 0; top: 100%; max-height: 7.4em; overflow: auto;
  line-height: 1.3; font-weight: normal; font-size: .9em; pointer-events: none; white-space: normal}
.closer .note:hover b, .closer .note:focus b {display: block}
.closer .hint {position: absolute; left: 0; top: 100%; margin: 0; line-height: 1.3; font-size: .9em; font-style: italic}
.closer .box:has(.note:hover, .note:focus) .hint {display: none}
.closer .box:has(.note:hover) .note:focus:not(:hover) b {display: none}
.closer .token {padding: 2px 0; white-space: pre-wrap; border: solid transparent; border-width: 3px 0; line-height: 2.1}
.closer .plus {background: rgb(0 114 178 / var(--size)); border-top-color: #0072B2}
.closer .minus {background: rgb(213 94 0 / var(--size)); border-bottom-color: #D55E00}
.closer .token:hover, .closer .token:focus {outline: 2px solid currentColor}
.closer dd {margin: 0 0 .5em}
@media print {.closer {display: none}}
"""

_HINT = '<p class="hint">Point at a mark, touch it, or step from one to the next with the Tab key.</p>'


def chart(figure: Figure, summary: str, notes: Sequence[Mapping[str, Sequence[str]]]) -> HTML:
    """A figure in a fold, with a note on every point and a box to tick for every series.

    `notes` has one mapping for each axes of the figure, from the label of a line or scatter to the texts of its points.
    Give the artists that belong to a series its label as their gid, such as an interval's band, and they are switched
    with it. Raises ValueError if a label is not in the axes, or has another number of points.
    """
    if len(notes) != len(figure.axes):
        raise ValueError(f"The figure has {len(figure.axes)} axes, but there are notes for {len(notes)}.")
    series: dict[str, Line2D | PathCollection] = {}
    noted: list[tuple[str, Line2D | PathCollection, Sequence[str]]] = []
    for ax, texts in zip(figure.axes, notes, strict=True):
        drawn = {str(a.get_label()): a for a in ax.get_children() if isinstance(a, Line2D | PathCollection)}
        for label, of_points in texts.items():
            if label not in drawn:
                raise ValueError(f"No line or scatter has the label {label!r}; there are {', '.join(drawn)}.")
            points = len(_places(drawn[label]))
            if points != len(of_points):
                raise ValueError(f"{label!r} has {points} points, but {len(of_points)} notes; pass one for each.")
            series.setdefault(label, drawn[label])
            noted.append((label, drawn[label], of_points))
        for artist in ax.get_children():
            label = str(artist.get_gid() or artist.get_label())
            if label in texts:
                artist.set_gid(f"series-{list(series).index(label)}")
        if (legend := ax.get_legend()) is not None:
            legend.set_visible(False)  # the boxes to tick are the legend
    svg = _svg(figure)  # also settles where the axes are
    number = {label: i for i, label in enumerate(series)}
    boxes = "".join(
        f'<label><input type="checkbox" class="s{i}" checked> {_swatch(label, artist)} {escape(label)}</label>'
        for i, (label, artist) in enumerate(series.items())
    )
    points_html = []
    for label, artist, of_points in noted:
        for (x, y), text in zip(_places(artist) / figure.bbox.size, of_points, strict=True):
            if 0 <= x <= 1 and 0 <= y <= 1:
                at = f"left:{100 * x:.2f}%;top:{100 * (1 - y):.2f}%"
                points_html.append(
                    f'<span class="note s{number[label]}" tabindex="0"><i style="{at}"></i><b>{escape(text)}</b></span>'
                )
    switches = "".join(
        f".closer .box:has(input.s{i}:not(:checked)) .s{i}:not(input) {{display: none}}\n" for i in number.values()
    )
    return _fold(
        summary,
        f'<div class="box white"><div>{boxes}</div><div class="chart">{svg}{_HINT}{"".join(points_html)}</div></div>',
        switches,
    )


def tokens(
    summary: str, texts: Sequence[Sequence[str]], values: Mapping[str, Sequence[Float[np.ndarray, " token"]]], what: str
) -> HTML:
    """Texts in a fold, every token coloured by a signed value and marked by its sign; one strip a text and condition.

    The mark is a line above a positive and below a negative token. `values` has, for each condition, an array for each
    text; `what` names the value in the notes. Raises ValueError if tokens and values differ in number.
    """
    for label, arrays in values.items():
        if [len(array) for array in arrays] != [len(text) for text in texts]:
            raise ValueError(f"{label!r} needs one value for each token of each text.")
    largest = max((float(np.abs(array).max()) for arrays in values.values() for array in arrays), default=0.0) or 1.0
    blocks = []
    for i, text in enumerate(texts):
        strips = []
        for label, arrays in values.items():
            spans = []
            for j, token in enumerate(text):
                value = float(arrays[i][j])
                sign = "plus" if value > 0 else "minus" if value < 0 else "none"
                all_values = ", ".join(f"{name} {array[i][j]:+.3f}" for name, array in values.items())
                note = f'"{token}" {what} {all_values}'
                spans.append(
                    f'<span class="token note {sign}" tabindex="0" style="--size:{0.6 * abs(value) / largest:.2f}">'
                    f"{escape(token)}<b>{escape(note)}</b></span>"
                )
            strips.append(f"<dt>{escape(label)}</dt><dd>{''.join(spans)}</dd>")
        blocks.append(f'<div class="box strips"><div class="strip"><dl>{"".join(strips)}</dl>{_HINT}</div></div>')
    return _fold(summary, "".join(blocks))


def _places(artist: Line2D | PathCollection) -> Float[np.ndarray, "point 2"]:
    """Where the points are on the canvas, in pixels."""
    if isinstance(artist, Line2D):
        return artist.get_transform().transform(artist.get_xydata())
    return artist.get_offset_transform().transform(artist.get_offsets())


def _swatch(label: str, artist: Line2D | PathCollection) -> str:
    if isinstance(artist, Line2D):
        colour, marker = to_hex(artist.get_color()), str(artist.get_marker())
    else:
        colour, marker = to_hex(np.atleast_2d(artist.get_facecolor())[0].tolist()), look(label).marker
    return f'<span style="color:{colour}">{_GLYPHS[marker]}</span>'


def _svg(figure: Figure) -> str:
    """The figure as SVG to stand within a page: no fixed size, and nothing in it that would act on the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=72, transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    svg = re.sub(r' id="series-(\d+)"', r' class="s\1"', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    return re.sub(r"\n\s*", "\n", svg)


def _fold(summary: str, content: str, style: str = "") -> HTML:
    return HTML(
        f'<details class="closer"><summary>{escape(summary)}</summary><style>{_STYLE}{style}</style>{content}</details>'
    )
