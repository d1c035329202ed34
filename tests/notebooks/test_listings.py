"""The mathematics is on the page: every chapter shows the lines of its method from their source."""

import ast
import inspect
from types import FunctionType

from helpers.book.source import show_source

WANTED = {
    "00_looking_inside": {"sequence_losses", "activation_gradients"},
    "01_pps_gradient_reversal": {"PersonaVectorFitter.fit", "ActivationGradients.sequence_cosines", "add_at"},
    "02_ip_loss_reduction": {"loss_reduction"},
    "03_weight_diff_steering": {"add_mean_gradient", "difference", "steered"},
    "04_refusal_redistribution": {
        "mean_loss",
        "covariance_loss",
        "distillation",
        "project_out",
        "difference_of_means",
        "refusal_log_odds",
        "kl_divergence",
        "choose",
    },
    "05_fihs_filtering": {"fihs", "unsafe_over_safe", "standard_threshold", "equal_posterior"},
    "06_prompt_only_steering": {"add_at", "Run.start", "joint_optimizer", "simpo_loss"},
}
"""What a reader of each chapter must see; of another chapter, some function of its own `method.py`."""


def listings_of(notebook, imports):
    """The cells that show a listing, each with the functions that it shows."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("show_source("):
            (call,) = ast.parse(cell.source).body
            yield cell, [eval(ast.unparse(argument), imports) for argument in call.value.args]


def plain(function):
    return function.fget if isinstance(function, property) else function


def test_a_chapter_shows_the_lines_of_its_method(stem, committed, imports):
    listed = [plain(f) for _, functions in listings_of(committed, imports) for f in functions]
    shown = {f.__qualname__ for f in listed}
    own = {f.__qualname__ for f in listed if f.__module__ == f"helpers.chapters.{stem[3:]}.method"}
    assert WANTED[stem] <= shown if stem in WANTED else own


def test_a_listing_is_the_source_and_only_its_call_is_out_of_sight(committed, imports):
    for cell, functions in listings_of(committed, imports):
        assert cell.metadata.tags == ["remove-input"], cell.source
        data = show_source(*functions).data
        for function in map(plain, functions):
            assert isinstance(function, FunctionType)
            last = inspect.getsource(function).splitlines()[-1].strip()
            assert last in data and f"def {function.__name__}(" in data


def test_a_listing_stands_beneath_a_sentence_that_leads_to_it(committed):
    for above, cell in zip(committed.cells, committed.cells[1:], strict=False):
        if cell.source.startswith("show_source("):
            assert above.cell_type == "markdown" and above.source.rstrip()[-1] in ":.", cell.source


def test_every_equation_of_a_chapter_has_code_in_sight_below_it(committed):
    """Before the next equation or the next section, and before the exercises."""
    cells = committed.cells
    end = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    for place, cell in enumerate(cells[:end]):
        if cell.cell_type == "markdown" and "$$" in cell.source:
            below = cells[place + 1]
            assert below.cell_type == "code", cell.source[-200:]
            assert not {"hide-input", "remove-cell"} & set(below.metadata.get("tags", [])), cell.source[-200:]
