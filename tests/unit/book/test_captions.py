"""Captions, numbers and data of figures are put where the page shows them."""

import base64

import nbformat
import pytest

from helpers.book.captions import FigureError, by_chapter, drawn, figures_of, with_captions

PNG = base64.b64encode(b"picture").decode()


@pytest.fixture
def notebook():
    output = nbformat.v4.new_output("display_data", {"image/png": PNG})
    figure = nbformat.v4.new_code_cell("plt.show()", outputs=[output])
    figure.metadata["figure"] = {"name": "fig-a", "source": "Fig. 3", "data": ["a", "left-out"]}
    caption = nbformat.v4.new_markdown_cell("**A.** Look\nat it.", metadata={"tags": ["caption"]})
    data = nbformat.v4.new_markdown_cell("All numbers:", metadata={"tags": ["data"]})
    return nbformat.v4.new_notebook(cells=[figure, caption, data])


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "01_a"
    run.mkdir()
    for name in ("a.csv", "findings.json"):
        (run / name).touch()
    return run


def test_a_caption_moves_to_its_figure_with_the_source_s_figure_and_the_data_that_are_there(notebook, folder):
    figure, data = with_captions(notebook, folder).cells
    caption = figure.metadata["mystnb"]["figure"]["caption"]
    assert figure.metadata["mystnb"]["figure"]["name"] == "fig-a"
    assert caption.startswith("**A.** Look at it. It corresponds to the source's Fig. 3.\n\nData: {download}`a.csv")
    assert "left-out" not in caption, "a table that this run did not make has no link"
    assert data.source == "All numbers: {download}`a.csv <01_a/a.csv>`, {download}`findings.json <01_a/findings.json>`."


def test_a_figure_of_the_book_s_own_names_no_source(notebook, folder):
    del notebook.cells[0].metadata.figure["source"]
    assert "source" not in with_captions(notebook, folder).cells[0].metadata["mystnb"]["figure"]["caption"]


def test_a_figure_without_a_caption_beneath_is_an_error_that_names_it(notebook):
    del notebook.cells[1]
    with pytest.raises(FigureError, match="beneath the figure 'fig-a'"):
        figures_of(notebook)


def test_the_picture_of_a_cell_is_what_its_run_left_behind(notebook):
    assert drawn(notebook.cells[0]) == PNG
    assert drawn(notebook.cells[1]) is None


def test_figures_are_numbered_within_their_chapter_in_the_order_of_the_page():
    through = {"notebooks/04_d": {"figure": {"b": (13,), "a": (12,)}}, "book/map": {"figure": {"c": (1,)}}}
    assert by_chapter(through) == {"notebooks/04_d": {"figure": {"a": (4, 1), "b": (4, 2)}}}
