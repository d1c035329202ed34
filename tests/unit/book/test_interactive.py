"""What can be looked at closer says what it was given, where it is drawn, and asks nothing of the network."""

import re
from xml.etree import ElementTree

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.book import figures, interactive
from helpers.statistics import Estimate


@pytest.fixture
def figure():
    """Two series on axes that fill the figure, so that a coordinate is a share of it."""
    with plt.rc_context():
        figures.style()
        figure, ax = plt.subplots(layout="none")
        line = [Estimate(0.75, 0.7, 0.8, 9), Estimate(0.5, 0.4, 0.6, 9)]
        figures.curves(ax, [0.25, 0.5], {"PPS": line, "IP": [0.1, 0.2]})
        ax.set(xlim=(0, 1), ylim=(0, 1), position=[0, 0, 1, 1])
        yield figure
        plt.close(figure)


def page(shown):
    """Also fails if the markup is not well formed; HTML's empty attributes and tags apart."""
    html = shown.data.replace(" checked>", ' checked="">')
    return ElementTree.fromstring(re.sub(r"(<input[^>]*)>", r"\1/>", html))


def notes(tree):
    return {span.find("b").text: span for span in tree.iter("span") if span.find("b") is not None}


def test_a_note_lies_where_its_point_is_drawn(figure):
    found = notes(page(interactive.chart(figure, "closer", [{"PPS": ["one", "two <b>"], "IP": ["three", "four"]}])))
    places = {text: span.find("i").get("style") for text, span in found.items()}
    assert places == {
        "one": "left:25.00%;top:25.00%",
        "two <b>": "left:50.00%;top:50.00%",
        "three": "left:25.00%;top:90.00%",
        "four": "left:50.00%;top:80.00%",
    }
    assert all(span.get("tabindex") == "0" for span in found.values()), "a note can be reached by keyboard"


def test_a_series_is_switched_with_its_band_and_its_notes(figure):
    tree = page(interactive.chart(figure, "closer", [{"PPS": ["one", "two"], "IP": ["three", "four"]}]))
    boxes = [node.get("class") for node in tree.iter("input")]
    assert boxes == ["s0", "s1"]
    drawn = [group.get("class") for group in tree.iter("g") if group.get("class")]
    assert sorted(drawn) == ["s0", "s0", "s1"], "PPS is a line and a band, IP a line"
    assert all(f"input.{name}:not(:checked)) .{name}" in tree.find("style").text for name in boxes)


def test_a_scatter_has_a_note_on_every_dot():
    figure, ax = plt.subplots()
    figures.paired_scatter(ax, [1, 2, 3], [3, 2, 1], label="PPS")
    assert list(notes(page(interactive.chart(figure, "closer", [{"PPS": ["a", "b", "c"]}])))) == ["a", "b", "c"]
    plt.close(figure)


def test_nothing_is_loaded_from_anywhere(figure):
    html = interactive.chart(figure, "closer", [{"PPS": ["one", "two"]}]).data
    html += interactive.tokens("closer", [["a"]], {"PPS": [np.array([0.1])]}, "cosine").data
    assert "<script" not in html
    assert set(re.findall(r"https?://[^\"' ]+", html)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "1 axes, but there are notes for 0"),
        ([{"random": ["one", "two"]}], "No line or scatter has the label 'random'"),
        ([{"PPS": ["one"]}], "'PPS' has 2 points, but 1 notes"),
    ],
)
def test_notes_that_do_not_fit_the_figure_are_refused(figure, given, message):
    with pytest.raises(ValueError, match=message):
        interactive.chart(figure, "closer", given)


def test_a_token_shows_its_sign_its_size_and_the_values_of_all_conditions():
    values = {"undefended": [np.array([-0.2, 0.0, 0.1])], "PPS": [np.array([0.4, 0.2, 0.1])]}
    found = page(interactive.tokens("closer", [["<A", " b", " c"]], values, "cosine"))
    spans = [span for span in found.iter("span") if "token" in span.get("class")]
    assert [span.text for span in spans] == ["<A", " b", " c"] * 2
    assert [span.get("class").split()[-1] for span in spans] == ["minus", "none", "plus", "plus", "plus", "plus"]
    assert [span.get("style") for span in spans[:4]] == ["--size:0.30", "--size:0.00", "--size:0.15", "--size:0.60"]
    assert spans[0].find("b").text == '"<A" cosine undefended -0.200, PPS +0.400'


def test_a_token_without_a_value_is_refused():
    with pytest.raises(ValueError, match="'PPS' needs one value for each token"):
        interactive.tokens("closer", [["a", "b"]], {"PPS": [np.array([0.1])]}, "cosine")
