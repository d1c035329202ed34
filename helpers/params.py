"""Presets and validated parameters of the notebooks.

Every chapter has one `Params` class. A notebook's parameters cell names values (None: "as the preset says"),
papermill or `python -m helpers execute` may override them, and the next cell reads them all at once:

    from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
    params = PreventativeSteeringParams.from_notebook()

Anything wrong (a name that does not exist, a wrong type, a value out of range) stops there with one sentence,
before a model is loaded. This module imports no torch, so the check takes no time.
"""

import ast
import contextlib
import inspect
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from helpers import corpora
from helpers.registry import ORIGINAL, REGISTRY

Preset = Literal["tiny", "quick", "full", "paper"]

P = TypeVar("P", bound="Params")  # not Self, which the type checks under test do not know

PROJECT = Path(__file__).resolve().parent.parent
TRAITS = PROJECT / "data" / "traits"
KNOWN_LAYERS = {card.name: card.layers for card in REGISTRY.values()}

Layer = Annotated[int, Field(ge=0, le=200)]
Coefficient = Annotated[float, Field(ge=-64, le=64, allow_inf_nan=False)]

# What a larger value costs, for the table of parameters; a field without one costs next to nothing.
EVERYTHING: dict[str, Any] = {"cost": "everything"}
TIME: dict[str, Any] = {"cost": "time grows with it"}
EACH: dict[str, Any] = {"cost": "time for each value"}
MORE: dict[str, Any] = {"cost": "more time if true"}
LESS: dict[str, Any] = {"cost": "less time the larger"}
ONCE: dict[str, Any] = {"cost": "time, once: the result is stored"}
LITTLE: dict[str, Any] = {"cost": "a little time"}
SIZE: dict[str, Any] = {"cost": "time and memory grow with its size"}
BATCH: dict[str, Any] = {"cost": "memory, and the time of a training step"}
MEMORY: dict[str, Any] = {"cost": "memory: bfloat16 takes half of float32"}
ASKED: dict[str, Any] = {"cost": "a request to the server for each answer"}


UNTAGGED = "tag the cell with the parameters `parameters`, as an editor that forgets tags may have lost that."


class ParameterError(ValueError):
    """A parameter that cannot be used; the message is one sentence saying what was wrong and what to do."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook instead of a traceback."""
        return [f"ParameterError: {self}"]


class Params(BaseModel):
    """Parameters that every chapter has; immutable, and closed to names it does not know.

    Raises:
        ParameterError: for any name, type or value that cannot be used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    chapter: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    for_models: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By model, what a preset's values become for it: each for all presets, or in a table with the preset's name."""

    preset: Preset = Field(default="quick", description="how much work is done", json_schema_extra=EVERYTHING)
    model: str = Field(
        min_length=1, description="registered model or name on the Hugging Face hub", json_schema_extra=SIZE
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        min_length=1,
        description="seeds of training and sampling; several give intervals over seeds",
        json_schema_extra=EACH,
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="number format of the forward and backward pass", json_schema_extra=MEMORY
    )
    results: str | None = Field(
        default=None,
        description="folder for findings, figure data and vectors; None: results/PRESET/CHAPTER",
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """A chapter's presets are in `presets.toml`, beside the module of its class."""
        file = Path(inspect.getfile(cls)).with_name("presets.toml")
        if "chapter" in vars(cls) and file.is_file():
            cls.presets, cls.for_models = read_presets(file)

    def __init__(self, **given: Any) -> None:
        for name in given:
            if name not in type(self).model_fields:
                raise ParameterError(f"There is no parameter {shortened(name)}{nearest(name, type(self).model_fields)}")
        try:
            super().__init__(**self._complete(given))
        except ValidationError as error:
            raise ParameterError(_sentence(error)) from None

    @classmethod
    def _complete(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given values, with everything else (and every None) as the preset says, for the chosen model."""
        values = {name: value for name, value in given.items() if value is not None}
        preset = values.setdefault("preset", "quick")
        if str(preset) not in cls.presets:
            raise ParameterError(f"There is no preset {shortened(preset)}{nearest(preset, cls.presets)}")
        usual = cls.presets[preset]
        model = str(values.get("model", usual["model"])).removesuffix(ORIGINAL)
        fitting = cls.for_models.get(model, {})
        everywhere = {name: value for name, value in fitting.items() if name not in cls.presets}
        return {**usual, **everywhere, **fitting.get(preset, {}), **values}

    @property
    def seed(self) -> int:
        """The first seed, for what is done once."""
        return self.seeds[0]

    @property
    def folder(self) -> Path:
        """Where the run's findings, figure data and vectors go; a relative path starts at the project."""
        return PROJECT / (self.results or f"results/{self.preset}/{self.chapter}")

    @classmethod
    def from_notebook(cls: type[P]) -> P:
        """The parameters in the running notebook: call it in the first cell after the parameters cell.

        papermill injects a mistyped name without an error, and above everything where no cell is tagged `parameters`,
        so the cell that it injected is looked at. Of the other variables only near misses are errors, such as `layr`.
        When the cell is run again in a kernel that has already gone through the notebook, other variables are
        expected and left alone.
        """
        from IPython import get_ipython  # only a notebook has it at hand

        from helpers.machine import check_machine

        shell = get_ipython()
        if shell is None:
            raise ParameterError(f"{cls.__name__}.from_notebook() works in a notebook only: use {cls.__name__}().")
        hidden = shell.user_ns_hidden
        params = cls.from_namespace(
            {name: value for name, value in shell.user_ns.items() if hidden.get(name, hidden) is not value},
            _injected(shell.user_ns.get("In", ())),
        )
        check_machine(params)
        return params

    @classmethod
    def from_namespace(cls: type[P], namespace: Mapping[str, Any], injected: Mapping[str, Any] | None = None) -> P:
        """Parameters from a namespace, and the values that papermill put there, by name."""
        used_before = any(isinstance(value, Params) for value in namespace.values())
        if not used_before:
            for name, value in (injected or {}).items():
                if name not in cls.model_fields:
                    raise ParameterError(f"There is no parameter {shortened(name)}{nearest(name, cls.model_fields)}")
                if name in namespace and namespace[name] != value:
                    raise ParameterError(
                        f"Parameter {name!r} was given as {shortened(value)}, but a later cell sets it to "
                        f"{shortened(namespace[name])}: {UNTAGGED}"
                    )
            for name, value in namespace.items():
                if name.startswith("_") or inspect.ismodule(value) or callable(value) or name in cls.model_fields:
                    continue
                if near := get_close_matches(name.lower(), cls.model_fields, n=1, cutoff=0.8):
                    raise ParameterError(f"There is no parameter {shortened(name)}: did you mean {near[0]!r}?")
        return cls(**{name: namespace[name] for name in cls.model_fields if name in namespace})

    @classmethod
    def from_strings(cls: type[P], texts: Mapping[str, str]) -> P:
        """Parameters from a command line's text: `[0, 1]` is a list, `None` means as the preset says."""
        return cls(**{name: None if text == "None" else text for name, text in texts.items()})

    @field_validator("*", mode="before")
    @classmethod
    def _from_papermill(cls, value: Any, info: Any) -> Any:
        """Take what papermill makes of text: lists arrive as text, `001` as 1."""
        annotation = cls.model_fields[info.field_name].annotation
        if get_origin(annotation) is tuple:
            return _listed(value)
        if isinstance(value, bool) and annotation is not bool:
            raise ParameterError(f"Parameter {info.field_name!r} is {value}, but it takes no yes or no.")
        texts = annotation is str or (get_origin(annotation) is not None and str in get_args(annotation))
        if texts and isinstance(value, int | float):
            raise ParameterError(
                f"Parameter {info.field_name!r} takes text, but arrived as the number {value}: "
                f"with papermill write `-r {info.field_name} TEXT` instead of `-p`."
            )
        return value

    @field_validator("*")
    @classmethod
    def _distinct(cls, value: Any, info: Any) -> Any:
        """What is listed twice would be done twice, and averaged as if it were two."""
        if isinstance(value, tuple) and len(set(value)) < len(value):
            raise ParameterError(
                f"Parameter {info.field_name!r} is {shortened(list(value))}, but should name each value once."
            )
        return value

    @field_validator("results")
    @classmethod
    def _named(cls, results: str | None) -> str | None:
        if results is not None and not results.strip():
            raise ParameterError("Parameter 'results' is empty: name a folder, or leave it out.")
        return results


def read_presets(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Presets by name from a TOML file, and what it says of models by name, in its table `models`.

    A preset that is `like` another has its values, but for those that it gives.
    """
    read = tomllib.loads(file.read_text("utf-8"))
    for_models = read.pop("models", {})
    presets: dict[str, dict[str, Any]] = {}
    for name, values in read.items():
        presets[name] = {**presets.get(values.pop("like", ""), {}), **values}
    return {name: presets[name] for name in sorted(presets, key=get_args(Preset).index)}, for_models


def check_trait(trait: str) -> None:
    known = sorted(path.stem for path in TRAITS.glob("*.jsonl"))
    if trait not in known:
        raise ParameterError(f"There is no trait {shortened(trait)} in data/traits{nearest(trait, known)}")


def check_layer(model: str, name: str, layer: int) -> None:
    count = KNOWN_LAYERS.get(model)
    if count is not None and layer >= count:
        raise ParameterError(f"Parameter {name!r} names layer {layer}, but {model!r} has 0 to {count - 1}.")


def check_count(parameter: str, value: int, there: int, what: str) -> None:
    """More than there is would silently be all there is, and the record would name a number that nobody used."""
    if value > there:
        raise ParameterError(f"Parameter {parameter!r} is {value}, but there are {there} {what}: take at most {there}.")


def _injected(cells: Iterable[str]) -> dict[str, Any]:
    """What papermill's cell, among the cells that were run, set: it begins with a comment of its own."""
    source = next((cell for cell in reversed(list(cells)) if cell.startswith("# Parameters\n")), "")
    found = {}
    with contextlib.suppress(SyntaxError, ValueError):  # a reader may have changed it
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def nearest(name: object, known: Any) -> str:
    """How a sentence about an unknown name goes on: the nearest valid name, or all of them."""
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f": did you mean {near[0]!r}?" if near else f": choose from {', '.join(known)}."


def shortened(value: object, length: int = 60) -> str:
    """A value as it stands in a sentence."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def _listed(value: Any) -> Any:
    """A list from what a command line makes of one: JSON, values with commas between, or a single value."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith(("[", "(")):
            return [part.strip() for part in text.split(",")]
        try:
            if text.startswith("(") and text.endswith(")"):
                text = f"[{text[1:-1].rstrip().removesuffix(',')}]"
            return json.loads(text)
        except (ValueError, RecursionError):  # besides bad JSON: numbers of thousands of digits, and deep nesting
            raise ParameterError(f'{shortened(value)} is no list: write it as [0, 1] or ["a", "b"].') from None
    return [value] if isinstance(value, int | float) else value


def _sentence(error: ValidationError) -> str:
    """The first thing that pydantic found, as one sentence with the name and the value."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ParameterError | corpora.CorpusError):
        return str(cause)
    name = str(first["loc"][0])
    place = f"{name!r} (item {first['loc'][1]})" if len(first["loc"]) > 1 else repr(name)
    if first["type"] == "missing":
        return f"Parameter {place} has no value: give one."
    if first["type"] in ("too_short", "string_too_short"):
        what = "item(s)" if first["type"] == "too_short" else "letter(s)"
        least = first["ctx"]["min_length"]
        return f"Parameter {place} is {shortened(first['input'])}, but it should have at least {least} {what}."
    demand = re.sub("^(Input|String|Value|Tuple) ", "", first["msg"]).splitlines()[0]
    if first["type"] == "string_pattern_mismatch":
        demand = f"should be {Params.model_fields['device'].description}"
    return f"Parameter {place} is {shortened(first['input'])}, but it {demand}."
