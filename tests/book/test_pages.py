"""The map and the tables of parameters say what the notebooks, the presets and the runs say."""

import json
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import yaml

from helpers.book.pages import MAP, chapter_map, chapters, cost, exercise_minutes, parameters, readable_type
from helpers.chapters import CHAPTERS, params_of
from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.chapters.weight_diff_steering.params import WeightSteeringParams

PROJECT = Path(__file__).resolve().parents[2]
CONTENTS = chapters()
NOTEBOOKS = {name: nbformat.read(PROJECT / "notebooks" / f"{name}.ipynb", as_version=4) for name in CONTENTS}
DESCRIBED = yaml.safe_load(MAP.read_text("utf-8"))
RERUN = (PROJECT / "book" / "how-to-rerun.md").read_text("utf-8")


def rows(page, start):
    return [line for line in page.splitlines() if line.startswith(start)]


def given(words):
    """The parameters of a papermill command, or of the book's own: name -> text."""
    taken = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word in ("-p", "-r")}
    return taken | {words[i][2:]: words[i + 1] for i, word in enumerate(words) if word in ("--preset", "--results")}


def commands(text):
    """Every command of a page that runs a notebook, as words."""
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in blocks.splitlines() if "notebooks/" in line]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", CONTENTS)
def test_the_map_describes_every_chapter_of_the_contents(name):
    said = DESCRIBED["chapters"][name]
    assert said["finding"].endswith(".") and said["inspect"]
    if "change" in said:
        option = {said["change"]["parameter"]: str(said["change"]["value"])}
        chosen = params_of(name).from_strings(option)
        usual = getattr(params_of(name)(), said["change"]["parameter"])
        assert getattr(chosen, said["change"]["parameter"]) != usual


def test_the_map_describes_no_chapter_that_nobody_writes():
    assert set(DESCRIBED["chapters"]) - {"00_looking_inside"} <= set(CONTENTS)


@pytest.mark.parametrize("path", DESCRIBED["paths"], ids=lambda path: path["title"])
def test_a_reading_path_names_chapters_and_exercises_that_are_there(path):
    for session in path["sessions"]:
        named = {*session.get("chapters", []), *session.get("exercises", {})}
        assert named <= set(DESCRIBED["chapters"])
        for chapter, numbers in session.get("exercises", {}).items():
            if chapter in NOTEBOOKS:
                assert set(numbers) <= set(exercise_minutes(NOTEBOOKS[chapter])), chapter
        if "run" in session:
            words = given(shlex.split(session["run"]))
            assert words
            candidates = [params_of(c) for c in CONTENTS if set(words) <= set(params_of(c).model_fields)]
            assert candidates and candidates[0].from_strings(words)


def test_there_are_paths_for_two_hours_a_week_and_a_semester():
    titles = " ".join(path["title"] for path in DESCRIBED["paths"])
    assert all(length in titles for length in ("two hours", "week", "semester"))
    minutes = [int(re.match(r"\d+", s["when"])[0]) for s in DESCRIBED["paths"][0]["sessions"]]
    assert sum(minutes) == 120


def test_the_minutes_of_the_map_are_those_of_the_runs():
    runs = {name: {"minutes": 10 + i / 2, "preset": "quick", "device": "cpu"} for i, name in enumerate(CONTENTS)}
    page = chapter_map(DESCRIBED, NOTEBOOKS, runs)
    for i, name in enumerate(CONTENTS):
        (row,) = rows(page, f"| {{doc}}`../notebooks/{name}` | {DESCRIBED['chapters'][name]['finding']}")
        assert f"| {10 + i / 2:.1f} |" in row
        assert f"| {sum(exercise_minutes(NOTEBOOKS[name]).values())} |" in row
    assert "`quick` on cpu" in page


def test_a_chapter_that_the_contents_leave_out_is_nowhere_on_the_map():
    fewer = {name: notebook for name, notebook in NOTEBOOKS.items() if not name.startswith("02")}
    page = chapter_map(DESCRIBED, fewer, {})
    assert "02_ip" not in page and "01_pps" in page and "not run" in page


def test_every_command_of_the_map_can_be_run():
    page = chapter_map(DESCRIBED, NOTEBOOKS, {})
    found = commands(page)
    assert len(found) == len(CONTENTS)
    for words, name in zip(found, CONTENTS, strict=True):
        assert f"notebooks/{name}.ipynb" in words
        assert params_of(name).from_strings(given(words))
        change = DESCRIBED["chapters"][name].get("change")
        assert change is None or given(words)[change["parameter"]] == str(change["value"])


def test_every_command_on_how_to_rerun_has_parameters_that_its_chapter_takes():
    found = [words for words in commands(RERUN) if "preset" not in words or "tiny" not in words]
    assert len([words for words in found if "papermill" in words]) >= 8
    for words in commands(RERUN):
        (notebook,) = [word for word in words if word.startswith("notebooks/")]
        assert (PROJECT / notebook).is_file()
        options = given(words)
        assert params_of(Path(notebook).stem).from_strings(options)


def test_the_book_s_own_options_in_commands_exist():
    parameters_given = re.search(r"'parameters=(\{.*?\})'", RERUN)[1]
    assert all(name in PreventativeSteeringParams.model_fields for name in json.loads(parameters_given))


def test_every_chapter_is_in_the_contents():
    assert set(NOTEBOOKS) == set(CHAPTERS)


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_table_has_every_parameter_of_a_chapter_with_its_value_in_each_preset(name):
    page = parameters({name: NOTEBOOKS[name]})
    model = params_of(name)
    for parameter, field in model.model_fields.items():
        if parameter == "preset":
            continue
        (row,) = rows(page, f"| `{parameter}` |")
        assert field.description.replace("|", r"\|") in row
        assert (cost(field) or "| - |") in row


def test_values_and_types_of_the_table_can_be_read():
    page = parameters({name: NOTEBOOKS[name] for name in [PreventativeSteeringParams.chapter]})
    (row,) = rows(page, "| `layers` |")
    assert "| list of: whole number, at least 0, at most 200 | 0, 1 | 3, 9, 15, 21, 27 | 0 to 29 | 0 to 27 |" in row
    fields = WeightSteeringParams.model_fields
    assert readable_type(fields["harm_data"]) == "one of `impolite`, `toxic-chat`"
    assert readable_type(fields["judge_url"]) == "text, or nothing"
    assert readable_type(fields["shares"]) == "list of: number, above 0, at most 0.5"
    assert readable_type(fields["prompts"]) == "whole number, at least 2, at most 50"


@pytest.mark.parametrize("name", CHAPTERS)
def test_what_decides_the_time_says_so(name):
    fields = params_of(name).model_fields
    driving = [n for n in ("steps", "seeds", "max_new_tokens", "model", "batch_size") if n in fields]
    assert driving and all(cost(fields[n]) for n in driving)
