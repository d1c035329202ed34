"""What a chapter's parameters accept, and what they say about the rest."""

import nbformat
import papermill
import pytest

from helpers.chapters import CHAPTERS, params_of
from helpers.chapters.ip_loss_reduction.params import InoculationParams
from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.params import PROJECT, ParameterError
from helpers.registry import REGISTRY


@pytest.mark.parametrize("preset", ["tiny", "quick", "full", "paper"])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_preset_of_every_chapter_is_valid(chapter, preset):
    assert params_of(chapter)(preset=preset).preset == preset


LARGER = [card for card in REGISTRY.values() if card.fetched]


@pytest.mark.parametrize("card", LARGER, ids=lambda card: card.name)
@pytest.mark.parametrize("preset", ["tiny", "quick", "full"])
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_chapter_takes_a_registered_model_by_name_alone(chapter, preset, card):
    """Layers that it does not have, or those of another preset's model, would be an error or far from the middle."""
    params = params_of(chapter)(preset=preset, model=card.name)
    for name in ("layer", "layers", "chosen_layers"):
        layers = getattr(params, name, ())
        assert max(layers if isinstance(layers, tuple) else (layers,), default=0) < card.layers
    if hasattr(params, "layer"):
        assert abs(params.layer / card.layers - 0.5) < 0.06
    assert getattr(params, "learning_rate", 0) <= 2e-4
    assert getattr(params, "start", "as it is") == "as it is"


def test_what_is_given_goes_before_what_a_model_needs_and_a_preset_s_own_table_before_that_of_all():
    model = "qwen2.5-coder-0.5b-instruct"
    assert PreventativeSteeringParams(model=model, layer=3, learning_rate=1e-3).layer == 3
    assert PreventativeSteeringParams(model=model, layer=3, learning_rate=1e-3).learning_rate == 1e-3
    assert len(PreventativeSteeringParams(model=model).layers) == 5
    assert PreventativeSteeringParams(model=model, preset="full").layers == tuple(range(24))
    assert PreventativeSteeringParams().layer == 15


def test_none_means_as_the_preset_says():
    params = PreventativeSteeringParams.from_namespace({"preset": "tiny", "layer": None, "steps": 5})
    assert (params.layer, params.steps, params.model) == (1, 5, "tiny-random")


def test_an_unknown_name_is_answered_with_the_nearest_valid_one():
    with pytest.raises(ParameterError, match="did you mean 'coefficient'"):
        PreventativeSteeringParams.from_namespace({"coeficient": 2.0})


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"preset": "quik"}, "did you mean 'quick'"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"steps": "many"}, "valid integer"),
        ({"steps": True}, "takes no yes or no"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"trait": "pirat"}, "did you mean 'pirate'"),
        ({"other_traits": ["evil"]}, "contains the trait itself"),
        ({"seeds": []}, "at least 1 item"),
        ({"seeds": "[0, 0]"}, "name each value once"),
        ({"seeds": "[0, x]"}, r"write it as \[0, 1\]"),
        ({"layer": 30}, "has 0 to 29"),
        ({"model": "tiny-random", "layer": 0}, "names layer 3, but 'tiny-random' has 0 to 1"),
        ({"device": "gpu"}, "auto|cpu"),
        ({"train_levels": ["none"]}, "'normal', 'mild' or 'strong'"),
    ],
)
def test_a_value_that_cannot_be_used_stops_with_one_sentence(given, sentence):
    with pytest.raises(ParameterError, match=sentence) as stopped:
        PreventativeSteeringParams(**given)
    assert "\n" not in str(stopped.value)


def test_text_that_papermill_turned_into_a_number_is_an_error_that_says_what_to_write():
    with pytest.raises(ParameterError, match="-r trait"):
        PreventativeSteeringParams.from_namespace({"trait": 1})


def test_lists_may_arrive_as_text_or_as_a_single_value():
    assert InoculationParams(seeds="[3, 4]").seeds == (3, 4)
    assert InoculationParams(seeds=7).seeds == (7,)
    assert InoculationParams(other_traits="pirate,sycophantic").other_traits == ("pirate", "sycophantic")
    assert InoculationParams.from_strings({"coefficients": "[0, 2]", "trait": "None"}).coefficients == (0, 2)


def test_a_trait_is_never_compared_with_itself():
    assert PreventativeSteeringParams(trait="pirate").other_traits == ("sycophantic", "evil")


def test_parameters_cannot_be_changed():
    params = InoculationParams()
    with pytest.raises(ValueError, match="frozen"):
        params.layer = 3


def test_a_cell_run_again_in_a_used_kernel_ignores_the_notebook_s_own_variables():
    first = InoculationParams(preset="tiny")
    namespace = {"preset": "tiny", "layer": 0, "params": first, "losses": [1.0]}
    assert InoculationParams.from_namespace(namespace).layer == 0


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    path = tmp_path_factory.mktemp("notebook") / "chapter.ipynb"
    parameters = nbformat.v4.new_code_cell("preset = 'tiny'\nlayer = None\nseeds = None")
    parameters.metadata.tags = ["parameters"]
    read = (
        "from helpers.chapters.ip_loss_reduction.params import InoculationParams\n"
        "params = InoculationParams.from_notebook()\n"
        "print(params.layer, params.seeds)"
    )
    cells = [parameters, nbformat.v4.new_code_cell(read)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_notebook_reads_what_papermill_injected(notebook, tmp_path):
    output = tmp_path / "out.ipynb"
    executed = papermill.execute_notebook(
        notebook,
        output,
        {"layer": 0, "seeds": "[1, 2]"},
        kernel_name="python3",
        language="python",
        progress_bar=False,
    )
    assert executed.cells[-1].outputs[0].text.strip() == "0 (1, 2)"


def test_a_mistyped_papermill_parameter_stops_the_notebook_without_a_traceback(notebook, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'layer'") as stopped:
        papermill.execute_notebook(
            notebook,
            tmp_path / "out.ipynb",
            {"layr": 0},
            kernel_name="python3",
            language="python",
            progress_bar=False,
        )
    assert len(stopped.value.traceback) == 1


def test_mild_answers_are_asked_for_only_where_there_are_some():
    assert "mild" in PreventativeSteeringParams(preset="full").start_levels
    assert "mild" not in PreventativeSteeringParams(preset="full", trait="pirate").start_levels
    with pytest.raises(ParameterError, match="no mild answers"):
        PreventativeSteeringParams(trait="pirate", train_levels=("mild",))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_papermill_sees_every_parameter_of_every_notebook(chapter):
    seen = papermill.inspect_notebook(PROJECT / "notebooks" / f"{chapter}.ipynb")
    assert set(seen) == set(params_of(chapter).model_fields)
    assert "None" not in {parameter["inferred_type_name"] for parameter in seen.values()}


def test_variables_that_are_no_near_miss_are_left_alone():
    given = {"REPO": "x", "folder": "/content", "layer": 3}
    assert PreventativeSteeringParams.from_namespace(given).layer == 3
    with pytest.raises(ParameterError, match="no parameter 'LAYER': did you mean 'layer'"):
        PreventativeSteeringParams.from_namespace({"LAYER": 3})


def test_what_papermill_injected_is_known_and_not_set_anew():
    with pytest.raises(ParameterError, match="no parameter 'REPO': choose from preset"):
        PreventativeSteeringParams.from_namespace({"REPO": "x"}, {"REPO": "x"})
    with pytest.raises(ParameterError, match=r"'layer' was given as 0, but a later cell sets it to None: tag"):
        PreventativeSteeringParams.from_namespace({"layer": None}, {"layer": 0})


def test_the_results_folder_is_the_project_s_unless_it_is_given_whole():
    assert InoculationParams(preset="tiny").folder == PROJECT / "results" / "tiny" / InoculationParams.chapter
    assert InoculationParams(results="results/mine").folder == PROJECT / "results" / "mine"
    assert str(InoculationParams(results="/tmp/mine").folder) == "/tmp/mine"


def test_a_direction_is_scored_on_no_more_requests_than_there_are_and_the_record_says_so():
    assert params_of("04_refusal_redistribution")(preset="tiny", prompts=3, scored_on=9).scored_on == 3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"attackers": ["LEACE"]}, "names no difference of means, such as 'means, affine': add one"),
        ({"data": "wildguardmix", "attackers": ["paired, zero"]}, "only the bundled data have paired requests"),
    ],
)
def test_attackers_that_cannot_be_made_are_one_sentence(given, sentence):
    with pytest.raises(ParameterError, match=sentence):
        params_of("04_refusal_redistribution")(preset="tiny", **given)
