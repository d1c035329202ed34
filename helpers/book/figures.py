"""The book's figure style and its recurring plots.

Every series has a colour, a marker and a line style of its own, so a figure reads in grey print and for
colour-blind readers (colours: Okabe and Ito, 2008). A condition that appears in many figures always looks the
same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.rcsetup import cycler
from numpy.typing import ArrayLike

from helpers.statistics import Estimate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Look:
    """How one series is drawn."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


CONDITIONS: dict[str, Look] = {
    "undefended": Look("#000000", "o", "-"),
    "PPS": Look("#0072B2", "s", "--"),
    "IP": Look("#D55E00", "^", "-."),
    "random": Look("#999999", "x", ":"),
    "placebo": Look("#CC79A7", "D", (0, (3, 1, 1, 1, 1, 1))),
}
"""Looks of the conditions that recur; a label is matched by its beginning, as in "PPS, coefficient 4"."""

OTHERS: tuple[Look, ...] = (
    Look("#009E73", "v", "-"),
    Look("#E69F00", "P", "--"),
    Look("#56B4E9", "*", "-."),
    Look("#CC79A7", "X", ":"),
    Look("#0072B2", "<", "-"),
    Look("#D55E00", ">", "--"),
    Look("#000000", "p", "-."),
)
"""Looks of any other series, by position."""


def look(label: str, position: int = 0) -> Look:
    """The look of a series: that of its condition, or else by its position among the series of the figure."""
    for condition, known in CONDITIONS.items():
        if label.lower().startswith(condition.lower()) and not label[len(condition) :][:1].isalnum():
            return known
    return OTHERS[position % len(OTHERS)]


def style() -> None:
    """Set the book's matplotlib style for every figure that follows."""
    mpl.rcParams.update(
        {
            "figure.figsize": (6.4, 4.0),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 200,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "legend.frameon": False,
            "image.cmap": "cividis",
            "svg.fonttype": "none",
            "svg.hashsalt": "book",
            "axes.prop_cycle": cycler(
                color=[entry.colour for entry in OTHERS],
                marker=[entry.marker for entry in OTHERS],
                linestyle=[entry.line for entry in OTHERS],
            ),
        }
    )


def estimates(table: "pd.DataFrame") -> list[Estimate]:
    """The estimates of a saved table, from its columns `value`, `low`, `high` and `n`."""
    columns = (table[name] for name in ("value", "low", "high", "n"))
    return [Estimate(float(v), float(low), float(high), int(n)) for v, low, high, n in zip(*columns, strict=True)]


def paired_scatter(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    *,
    label: str,
    position: int = 0,
    xlabel: str = "",
    ylabel: str = "",
    zero: bool = False,
) -> None:
    """One dot per sequence: x with the defence, y without. The defence lowers the dots above the diagonal.

    `zero` also draws the axes through zero, for quantities whose sign matters. Call again on the same axes to
    add a condition. Raises ValueError if x and y are not the same length.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if xs.shape != ys.shape:
        raise ValueError(
            f"A paired scatter needs one y for each x, but got {xs.size} x and {ys.size} y; "
            "pass arrays of the same length."
        )
    drawn = look(label, position)
    face = {} if drawn.marker == "x" else {"edgecolors": "white", "linewidths": 0.5}
    ax.scatter(xs, ys, color=drawn.colour, marker=drawn.marker, alpha=0.85, label=label, zorder=3, **face)  # type: ignore[arg-type]
    if not any(line.get_gid() == "diagonal" for line in ax.lines):
        on = float(np.nanmean(xs))  # a point among the dots, since axes widen to hold it
        ax.axline((on, on), slope=1, color="0.35", linestyle="--", linewidth=1, marker="", gid="diagonal")
        if zero:
            ax.axhline(0, color="0.35", linewidth=0.8, linestyle="-", marker="")
            ax.axvline(0, color="0.35", linewidth=0.8, linestyle="-", marker="")
    if xlabel:
        ax.set_xlabel(xlabel)
    if ylabel:
        ax.set_ylabel(ylabel)


def bars_with_intervals(ax: Axes, labels: Sequence[str], estimates: Sequence[Estimate], *, ylabel: str = "") -> None:
    """One bar per label with its interval; hatching tells the bars apart in grey print.

    Raises ValueError if there are not as many estimates as labels.
    """
    if len(labels) != len(estimates):
        raise ValueError(
            f"Each bar needs a label and an estimate, but got {len(labels)} labels and "
            f"{len(estimates)} estimates; pass one for each."
        )
    hatches = ("", "//", "\\\\", "..", "xx", "--", "oo")
    for place, (label, estimate) in enumerate(zip(labels, estimates, strict=True)):
        below, above = estimate.value - estimate.low, estimate.high - estimate.value
        ax.bar(
            place,
            estimate.value,
            color=look(label, place).colour,
            hatch=hatches[place % len(hatches)],
            edgecolor="white",
            width=0.7,
            zorder=2,
        )
        ax.errorbar(
            place,
            estimate.value,
            yerr=[[max(below, 0)], [max(above, 0)]],
            color="0.45",
            marker="",
            capsize=4,
            linewidth=1.5,
            zorder=3,
        )
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(axis="x", visible=False)
    if ylabel:
        ax.set_ylabel(ylabel)


def bars_in_pairs(ax: Axes, labels: Sequence[str], pair: Mapping[str, Sequence[Estimate]], *, ylabel: str = "") -> None:
    """Two bars per label with their intervals, such as without something and with it; the second is hatched.

    Raises ValueError if there are not two series with as many estimates as labels.
    """
    if len(pair) != 2 or any(len(estimates) != len(labels) for estimates in pair.values()):
        counts = ", ".join(f"{len(estimates)} of {name!r}" for name, estimates in pair.items())
        raise ValueError(f"Two series with {len(labels)} estimates each are needed, and these were given: {counts}.")
    looks = (("#56B4E9", "", -0.2), ("#D55E00", "//", 0.2))
    for (name, estimates), (colour, hatch, shift) in zip(pair.items(), looks, strict=True):
        spans = [[max(e.value - e.low, 0) for e in estimates], [max(e.high - e.value, 0) for e in estimates]]
        places = [place + shift for place in range(len(labels))]
        heights = [e.value for e in estimates]
        ax.bar(places, heights, 0.38, yerr=spans, color=colour, hatch=hatch, label=name, capsize=3)
    ax.set_xticks(range(len(labels)), labels)
    ax.tick_params(axis="x", rotation=20)
    ax.set_ylabel(ylabel)


def curves(
    ax: Axes,
    x: ArrayLike,
    lines: Mapping[str, Sequence[Estimate | float] | np.ndarray],
    *,
    xlabel: str = "",
    ylabel: str = "",
    zero: bool = False,
    log: bool = False,
) -> None:
    """One line per label over the same x; estimates also get a band for their interval.

    `zero` also draws a line at zero, and `log` makes the vertical axis logarithmic. Lines that lie on one another are
    named beneath the axes. Raises ValueError if a line has another length than x.
    """
    places = np.asarray(x, dtype=float)
    for position, (label, points) in enumerate(lines.items()):
        if len(points) != places.size:
            raise ValueError(
                f"The line {label!r} has {len(points)} points for {places.size} values of x; pass one point for each x."
            )
        drawn = look(label, position)
        values = [point.value if isinstance(point, Estimate) else float(point) for point in points]
        plot: dict[str, Any] = {
            "color": drawn.colour,
            "marker": drawn.marker,
            "linestyle": drawn.line,
            "label": label,
        }
        ax.plot(places, values, **plot)
        intervals = [point for point in points if isinstance(point, Estimate)]
        if len(intervals) == len(values) and values:
            low, high = [point.low for point in intervals], [point.high for point in intervals]
            ax.fill_between(places, low, high, color=drawn.colour, alpha=0.15, linewidth=0, gid=label)
    if zero:
        ax.axhline(0, color="0.35", linewidth=0.8, linestyle="-", marker="")
    if xlabel:
        ax.set_xlabel(xlabel)
    if ylabel:
        ax.set_ylabel(ylabel)
    if log:
        ax.set_yscale("log")
    if len(lines) > 1:
        ax.legend()
    name_overlaps(ax)


def name_overlaps(ax: Axes) -> None:
    """Name beneath the axes the labelled lines that lie on one another, so that none seems to be missing."""
    groups: list[tuple[np.ndarray, list[str]]] = []
    for line in ax.lines:
        label = str(line.get_label())
        if label.startswith("_") or line.get_transform() != ax.transData:
            continue
        drawn = ax.transAxes.inverted().transform(ax.transData.transform(line.get_xydata()))
        for first, labels in groups:
            if first.shape == drawn.shape and np.allclose(first, drawn, rtol=0, atol=_SAME, equal_nan=True):
                labels.append(label)
                break
        else:
            groups.append((drawn, [label]))
    said = "; ".join(" = ".join(labels) for _, labels in groups if len(labels) > 1)
    if said:
        ax.annotate(f"on one another: {said}", (0.5, 0), xytext=(0, -40), xycoords="axes fraction",
                    textcoords="offset points", ha="center", va="top", fontsize=8)  # fmt: skip


_SAME = 0.01
"""How far two lines may be apart, as a share of the axes' height, and still look like one."""


def dots(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    kinds: Sequence[str],
    *,
    filled: Sequence[bool] | None = None,
    named: bool = False,
) -> None:
    """One dot for each x and y, with the look of its kind; those that are not `filled` are hollow.

    `named` writes the kind beside each dot; else the legend says it. Raises ValueError where the lengths differ.
    """
    full = [True] * len(x) if filled is None else filled
    if len({len(x), len(y), len(kinds), len(full)}) != 1:
        raise ValueError(f"Each of {len(x)} dots needs a y and a kind, but there are {len(y)} and {len(kinds)}.")
    order = list(dict.fromkeys(kinds))
    for i, kind in enumerate(kinds):
        drawn = look(kind, order.index(kind))
        label = kind if kinds.index(kind) == i else None
        style = "full" if full[i] else "none"
        ax.plot(x[i], y[i], color=drawn.colour, marker=drawn.marker, linestyle="", label=label, fillstyle=style)
        if named:
            ax.annotate(kind, (x[i], y[i]), xytext=(6, 4), textcoords="offset points", fontsize=9)


def heat_map(
    ax: Axes,
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    largest: float | None = None,
    spec: str = ".2f",
) -> None:
    """A table of numbers on colours, each written out, so that it reads without them.

    With `largest`, colours go from minus that (blue) over zero (white) to plus that (red), for changes of either sign.
    Raises ValueError where `values` have another shape than the names.
    """
    table = np.asarray(values, dtype=float)
    if table.shape != (len(rows), len(columns)):
        raise ValueError(f"{len(rows)} rows and {len(columns)} columns are named, but the values have {table.shape}.")
    limits = {} if largest is None else {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    ax.imshow(table, aspect="auto", **limits)  # type: ignore[arg-type]
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)
    for (row, column), value in np.ndenumerate(table):
        text = f"{value:{'+' * (largest is not None)}{spec}}"
        ax.text(column, row, text, ha="center", va="center", bbox={"fc": "white", "ec": "none", "pad": 1})


def token_strip(ax: Axes, tokens: Sequence[str], kinds: Sequence[str], *, width: int = 84) -> None:
    """A sequence's tokens as boxes, in lines of `width` characters; each kind has a fill and an edge of its own.

    Raises ValueError if there is not one kind for each token, or for more than four kinds.
    """
    names = list(dict.fromkeys(kinds))
    if len(tokens) != len(kinds) or len(names) > len(_STRIP):
        raise ValueError(
            f"A token strip needs one of at most {len(_STRIP)} kinds for each token, but got {len(tokens)} tokens, "
            f"{len(kinds)} kinds and {len(names)} different ones."
        )
    column, line = 0.0, 0
    for token, kind in zip(tokens, kinds, strict=True):
        shown = token.replace("\n", "\\n")
        wide = len(shown) + 0.6
        if column and column + wide > width:
            column, line = 0.0, line + 1
        box = Rectangle((column + 0.1, -line - 0.8), wide - 0.2, 0.8, linewidth=0.8, **_STRIP[names.index(kind)])
        ax.add_patch(box)
        ax.text(column + wide / 2, -line - 0.42, shown, family="monospace", fontsize=9, ha="center", va="center",
                parse_math=False)  # fmt: skip
        column += wide
    ax.set(xlim=(0, width), ylim=(-line - 1, 0.1))
    ax.axis("off")
    patches = [Patch(label=name, linewidth=0.8, **look) for name, look in zip(names, _STRIP, strict=False)]
    ax.legend(handles=patches, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)


_STRIP: tuple[dict[str, Any], ...] = (
    {"facecolor": "white", "edgecolor": "0.6", "linestyle": ":"},
    {"facecolor": "#D6E8F5", "edgecolor": "0.3", "linestyle": "--"},
    {"facecolor": "#F0A860", "edgecolor": "black", "linestyle": "-"},
    {"facecolor": "#8FBF9F", "edgecolor": "black", "linestyle": "-."},
)
"""Fills and edges of a token strip's kinds: from light to dark, so that they read in grey."""
