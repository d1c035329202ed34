"""Figures show what they were given, and can be read without colour."""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.book.figures import (
    CONDITIONS,
    OTHERS,
    bars_in_pairs,
    bars_with_intervals,
    curves,
    dots,
    heat_map,
    look,
    paired_scatter,
    style,
    token_strip,
)
from helpers.statistics import Estimate


@pytest.fixture
def ax():
    with plt.rc_context():
        style()
        figure, axes = plt.subplots()
        yield axes
        plt.close(figure)


def test_a_condition_looks_the_same_wherever_it_stands_among_the_series():
    assert look("PPS, coefficient 4", 3) == look("PPS", 0) == CONDITIONS["PPS"]
    assert look("ips", 1) == OTHERS[1], "only a whole word is the name of a condition"


def test_series_differ_without_colour():
    for group in (CONDITIONS.values(), OTHERS):
        signs = [(entry.marker, entry.line) for entry in group]
        assert len(set(signs)) == len(signs)


def test_a_scatter_shows_every_pair_and_draws_the_diagonal_once(ax):
    paired_scatter(ax, [1, 2, 3], [3, 2, 1], label="PPS")
    paired_scatter(ax, [0, 1], [0, 1], label="random")
    assert [len(dots.get_offsets()) for dots in ax.collections] == [3, 2]
    assert np.array_equal(ax.collections[0].get_offsets(), [[1, 3], [2, 2], [3, 1]])
    assert len([line for line in ax.lines if line.get_gid() == "diagonal"]) == 1


def test_a_scatter_of_unequal_lengths_is_refused(ax):
    with pytest.raises(ValueError, match="3 x and 2 y"):
        paired_scatter(ax, [1, 2, 3], [1, 2], label="PPS")


def test_bars_stand_at_the_values_and_intervals_reach_their_limits(ax):
    bars_with_intervals(ax, ["undefended", "PPS"], [Estimate(76.0, 70.0, 80.0, 9), Estimate(4.0, 0.0, 9.0, 9)])
    assert [bar.get_height() for bar in ax.patches] == [76, 4]
    reach = [bars.get_segments()[0][:, 1].tolist() for bars in ax.collections]
    assert reach == [[70, 80], [0, 9]]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["undefended", "PPS"]


def test_a_bar_without_an_estimate_is_refused(ax):
    with pytest.raises(ValueError, match="2 labels and 1 estimates"):
        bars_with_intervals(ax, ["a", "b"], [Estimate(1.0, 0.0, 2.0, 3)])


def test_bars_in_pairs_stand_beside_each_other_at_their_values(ax):
    without, with_it = ([Estimate(v, v - 1, v + 2, 9) for v in values] for values in ((3.0, 4.0), (5.0, 6.0)))
    bars_in_pairs(ax, ["IP", "PPS"], {"without": without, "with": with_it}, ylabel="score")
    assert [bar.get_height() for bar in ax.patches] == [3, 4, 5, 6]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert middles == pytest.approx([-0.2, 0.8, 0.2, 1.2])
    reach = [segment[:, 1].tolist() for bars in ax.collections for segment in bars.get_segments()]
    assert reach == [[2, 5], [3, 6], [4, 7], [5, 8]]


def test_a_pair_of_which_one_is_short_is_refused(ax):
    one = Estimate(1.0, 0.0, 2.0, 3)
    with pytest.raises(ValueError, match=r"Two series with 2 estimates each are needed.* 1 of 'with'"):
        bars_in_pairs(ax, ["a", "b"], {"without": [one, one], "with": [one]})


def test_curves_draw_a_band_for_estimates_only(ax):
    curves(ax, [0, 1], {"PPS": [Estimate(1.0, 0.0, 2.0, 5), Estimate(2.0, 1.0, 3.0, 5)], "random": [0.0, 0.1]})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2], [0.0, 0.1]]
    assert len(ax.collections) == 1
    assert ax.get_legend() is not None


def test_a_curve_with_a_missing_point_is_refused(ax):
    with pytest.raises(ValueError, match="'PPS' has 1 points for 2"):
        curves(ax, [0, 1], {"PPS": [1.0]})


def test_lines_on_one_another_are_named_beneath_the_axes_and_others_are_not(ax):
    curves(ax, [0, 1, 2], {"PPS": [0.0, 1.0, 5.0], "IP": [0.0, 1.001, 5.0], "random": [0.0, 3.0, 5.0]})
    assert [text.get_text() for text in ax.texts] == ["on one another: PPS = IP"]


def test_lines_are_compared_as_they_are_drawn(ax):
    curves(ax, [0, 1], {"PPS": [1.0, 2.0], "IP": [2.0, 4.0], "random": [9000.0, 9000.0]}, log=True)
    assert not ax.texts, "far apart on a logarithmic axis, though not on a linear one"
    assert ax.get_yscale() == "log"


def test_every_style_can_be_drawn_to_a_file(ax, tmp_path):
    for position, name in enumerate(CONDITIONS):
        paired_scatter(ax, [0, 1], [1, 0], label=name, position=position, zero=True)
    curves(ax, [0, 1], {name: [0.0, 1.0] for name in [*CONDITIONS, *map(str, range(len(OTHERS)))]})
    ax.figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_token_strip_has_a_box_for_each_token_and_a_legend_entry_for_each_kind(ax):
    token_strip(
        ax, ["<s>", "Why", "?\n", " So", "$x_1$"], ["template", "question", "question", "answer", "answer"], width=12
    )
    assert [text.get_text() for text in ax.texts] == ["<s>", "Why", "?\\n", " So", "$x_1$"]
    assert len(ax.patches) == 5
    assert len({box.get_y() for box in ax.patches}) == 2  # two lines
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["template", "question", "answer"]
    ax.figure.canvas.draw()  # a dollar sign is no formula


def test_a_token_strip_without_a_kind_for_each_token_is_refused(ax):
    with pytest.raises(ValueError, match="2 tokens, 1 kinds"):
        token_strip(ax, ["a", "b"], ["template"])


def test_a_heat_map_writes_every_number_out_and_centres_changes_on_zero(ax):
    heat_map(ax, [[0.5, -1.0]], ["one"], ["a", "b"], largest=1.0)
    assert [text.get_text() for text in ax.texts] == ["+0.50", "-1.00"]
    assert ax.images[0].get_clim() == (-1, 1)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match=r"1 rows and 1 columns are named, but the values have \(1, 2\)"):
        heat_map(ax, [[1, 2]], ["one"], ["a"])


def test_dots_have_the_look_of_their_kind_and_one_legend_entry_each(ax):
    dots(ax, [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], ["IP", "layout", "IP"], filled=[True, True, False])
    assert ax.get_legend_handles_labels()[1] == ["IP", "layout"]
    assert [line.get_color() for line in ax.lines] == [look("IP").colour, look("layout", 1).colour, look("IP").colour]
    assert [line.get_fillstyle() for line in ax.lines] == ["full", "full", "none"]
    dots(ax, [1.0], [0.0], ["IP"], named=True)
    assert [text.get_text() for text in ax.texts] == ["IP"]
    with pytest.raises(ValueError, match="Each of 2 dots needs a y and a kind, but there are 1 and 2"):
        dots(ax, [1.0, 2.0], [0.0], ["a", "b"])
