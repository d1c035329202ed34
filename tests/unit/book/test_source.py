"""A listing is the source of what is run, without its docstring, and links to the file that it is from."""

import ast
import inspect
from pathlib import Path

import pytest

from helpers.activations import PersonaVector
from helpers.book import source
from helpers.book.source import LONGEST, WIDEST, show_source
from helpers.chapters.looking_inside.method import PlantedStream
from helpers.chapters.refusal_redistribution.attack import iterated_ablation
from helpers.gradients import ActivationGradients
from helpers.interventions import Ablate, Steer, edit_component
from helpers.studies.ablation_scores import choose

PROJECT = Path(__file__).resolve().parents[3]


def code(shown):
    """The lines of a listing's first block."""
    return shown.data.split("```python\n")[1].split("\n```")[0]


def documented():
    """A docstring, then a comment and a blank line within the body.

    More of it.
    """

    # a comment
    first = 1

    return first + 1


@pytest.fixture
def here(monkeypatch):
    """Functions of this file count as the package's."""
    monkeypatch.setattr(source, "PACKAGE", Path(__file__).resolve().parent)


def test_a_listing_is_the_source_without_its_docstring():
    shown = ast.parse(code(show_source(edit_component))).body[0]
    (run,) = ast.parse(inspect.getsource(edit_component)).body
    assert ast.get_docstring(run) is not None and ast.get_docstring(shown) is None
    assert ast.dump(ast.Module(run.body[1:], [])) == ast.dump(ast.Module(shown.body, []))
    assert ast.dump(run.args) == ast.dump(shown.args)


@pytest.mark.usefixtures("here")
def test_comments_and_blank_lines_of_the_body_stay():
    wanted = ["def documented():", "    # a comment", "    first = 1", "", "    return first + 1"]
    assert code(show_source(documented)).splitlines() == wanted


@pytest.mark.parametrize(
    ("method", "first"),
    [
        (ActivationGradients.sequence_cosines, "def sequence_cosines("),
        (PlantedStream.auroc, "@property"),
        (PersonaVector.load, "@classmethod"),
        (PlantedStream().fitted_cosine, "def fitted_cosine(self, count: int) -> float:"),
    ],
)
def test_methods_begin_at_the_left_margin(method, first):
    assert code(show_source(method)).splitlines()[0] == first


def test_several_functions_are_several_listings_in_the_order_given():
    data = show_source(choose, edit_component).data
    assert data.count("```python\n") == 2
    assert data.index("def choose") < data.index("def edit_component")


def test_the_link_leads_to_the_file_from_wherever_the_notebook_is(monkeypatch):
    for folder, back in ((PROJECT, ""), (PROJECT / "notebooks", "../")):
        monkeypatch.chdir(folder)
        link = f"[`helpers/interventions.py`]({back}helpers/interventions.py#edit_component)"
        assert show_source(edit_component).data.endswith(f"*From* {link}")
        assert (folder / back / "helpers" / "interventions.py").is_file()


@pytest.mark.parametrize("thing", [len, Steer, Path.exists])
def test_what_has_no_source_here_is_one_sentence(thing):
    with pytest.raises(ValueError, match="so it has no lines to show") as refused:
        show_source(thing)
    assert "\n" not in str(refused.value)


def test_a_function_too_long_for_a_page_is_one_sentence():
    with pytest.raises(ValueError, match=f"iterated_ablation has .* at most {LONGEST}: split out") as refused:
        show_source(iterated_ablation)
    assert "\n" not in str(refused.value)


def test_a_line_too_wide_for_a_page_is_one_sentence():
    with pytest.raises(ValueError, match=f"Ablate.hooks is wider than the page's {WIDEST} characters") as refused:
        show_source(Ablate.hooks)
    assert "\n" not in str(refused.value)
