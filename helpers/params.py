"""Presets and validated parameters of the notebooks.

Every chapter has one `Params` class. A notebook's parameters cell names values (None: "as the preset says"),
papermill or `python -m helpers execute` may override them, and the next cell reads them all at once:

    from helpers.params import PreventativeSteeringParams
    params = PreventativeSteeringParams.from_notebook()

Anything wrong (a name that does not exist, a wrong type, a value out of range) stops there with one sentence,
before a model is loaded. This module imports no torch, so the check takes no time.
"""

import ast
import contextlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from helpers import corpora

Preset = Literal["tiny", "quick", "full", "paper"]
StartLevel = Literal["none", "normal", "mild", "strong"]
TrainLevel = Literal["normal", "mild", "strong"]

P = TypeVar("P", bound="Params")  # not Self, which the type checks under test do not know

PROJECT = Path(__file__).resolve().parent.parent
TRAITS = PROJECT / "data" / "traits"
TRAITS_WITH_MILD = ("evil",)
TOPICS, STYLES = ("bridge", "recipe"), ("weather", "legal")
KNOWN_LAYERS = {"tiny-random": 2, "smollm2-135m-instruct": 30}

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

    def __init__(self, **given: Any) -> None:
        for name in given:
            if name not in type(self).model_fields:
                raise ParameterError(
                    f"There is no parameter {shortened(name)}{_nearest(name, type(self).model_fields)}"
                )
        try:
            super().__init__(**self._complete(given))
        except ValidationError as error:
            raise ParameterError(_sentence(error)) from None

    @classmethod
    def _complete(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given values, with everything else (and every None) as the preset says."""
        values = {name: value for name, value in given.items() if value is not None}
        preset = values.setdefault("preset", "quick")
        if str(preset) not in cls.presets:
            raise ParameterError(f"There is no preset {shortened(preset)}{_nearest(preset, cls.presets)}")
        return {**cls.presets[preset], **values}

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
                    raise ParameterError(f"There is no parameter {shortened(name)}{_nearest(name, cls.model_fields)}")
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


class TraitParams(Params):
    """Parameters of the chapters that train one trait into a model."""

    trait: str = Field(description="trait that the finetuning data carry; a file in data/traits")
    other_traits: tuple[str, ...] = Field(
        min_length=1, description="traits for cross-trait comparisons", json_schema_extra=EACH
    )
    layer: Layer = Field(description="block after which the model is steered and measured, counted from 0")
    coefficient: Coefficient = Field(description="working intensity: multiplies the raw persona vector")
    coefficients: tuple[Coefficient, ...] = Field(
        min_length=1, description="intensities of the sweep", json_schema_extra=EACH
    )
    sequences: int = Field(
        ge=2, le=10_000, description="sequences on which losses and gradients are measured", json_schema_extra=TIME
    )
    steps: int = Field(ge=1, le=100_000, description="optimizer steps of a finetuning run", json_schema_extra=TIME)
    batch_size: int = Field(ge=1, le=512, description="sequences in a batch", json_schema_extra=BATCH)
    learning_rate: float = Field(gt=0, le=1, allow_inf_nan=False, description="peak learning rate of AdamW")
    lora_rank: int = Field(ge=0, le=512, description="rank of the LoRA adapters; 0 trains all weights")
    max_new_tokens: int = Field(
        ge=1, le=4096, description="length of a generated answer, in tokens", json_schema_extra=TIME
    )
    resamples: int = Field(
        ge=100, le=1_000_000, description="bootstrap resamples behind an interval", json_schema_extra=LITTLE
    )

    @classmethod
    def _complete(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._complete(given)
        if given.get("other_traits") is None:  # never compare a trait with itself
            usual = cls.presets[values["preset"]]["trait"]
            values["other_traits"] = tuple(
                usual if other == values["trait"] else other for other in values["other_traits"]
            )
        return values

    @field_validator("trait", "other_traits")
    @classmethod
    def _bundled(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for trait in (value,) if isinstance(value, str) else value:
            _check_trait(trait)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "TraitParams":
        rows = corpora.split(corpora.load_trait(self.trait), "eval")
        _check_count("sequences", self.sequences, len(rows), f"questions to measure {self.trait!r} on")
        if self.trait in self.other_traits:
            raise ParameterError(f"Parameter 'other_traits' contains the trait itself, {self.trait!r}: leave it out.")
        for name, layers in (("layer", (self.layer,)), ("layers", getattr(self, "layers", ()))):
            for layer in layers:
                _check_layer(self.model, name, layer)
        return self


class LookingInsideParams(Params):
    """Chapter 0: the model, the instruments, and what these report where the truth is planted."""

    chapter = "00_looking_inside"
    presets = {
        "tiny": {
            "model": "tiny-random",
            "seeds": (0,),
            "trait": "evil",
            "layer": 1,
            "coefficients": (1.0, 4.0),
            "questions": 2,
            "max_new_tokens": 4,
            "draws": 20,
            "resamples": 200,
        },
        "quick": {
            "model": "smollm2-135m-instruct",
            "seeds": (0,),
            "trait": "evil",
            "layer": 15,
            "coefficients": (1.0, 2.0, 4.0),
            "questions": 12,
            "max_new_tokens": 24,
            "draws": 4000,
            "resamples": 2000,
        },
        "full": {
            "model": "smollm2-135m-instruct",
            "seeds": (0,),
            "trait": "evil",
            "layer": 15,
            "coefficients": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
            "questions": 32,
            "max_new_tokens": 64,
            "draws": 10_000,
            "resamples": 2000,
        },
        "paper": {
            "model": "Qwen/Qwen2.5-7B-Instruct",
            "seeds": (0,),
            "trait": "evil",
            "layer": 19,
            "coefficients": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
            "questions": 32,
            "max_new_tokens": 64,
            "draws": 10_000,
            "resamples": 2000,
        },
    }

    trait: str = Field(description="trait whose vector and judge are looked at; a file in data/traits")
    layer: Layer = Field(description="block after which the model is steered and read, counted from 0")
    coefficients: tuple[Coefficient, ...] = Field(
        min_length=1, description="intensities of steering", json_schema_extra=EACH
    )
    questions: int = Field(
        ge=1, le=32, description="held-out questions that are answered under each steering", json_schema_extra=TIME
    )
    max_new_tokens: int = Field(
        ge=1, le=4096, description="length of a generated answer, in tokens", json_schema_extra=TIME
    )
    draws: int = Field(
        ge=20, le=1_000_000, description="times that the planted truth is measured anew", json_schema_extra=LITTLE
    )
    resamples: int = Field(
        ge=100, le=1_000_000, description="bootstrap resamples behind an interval", json_schema_extra=LITTLE
    )

    @model_validator(mode="after")
    def _consistent(self) -> "LookingInsideParams":
        _check_trait(self.trait)
        _check_layer(self.model, "layer", self.layer)
        return self


_TINY = {
    "model": "tiny-random",
    "seeds": (0,),
    "trait": "evil",
    "other_traits": ("pirate",),
    "layer": 1,
    "coefficient": 4.0,
    "coefficients": (0.0, 4.0),
    "sequences": 4,
    "steps": 2,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "lora_rank": 4,
    "max_new_tokens": 4,
    "resamples": 200,
}
_QUICK = {
    "model": "smollm2-135m-instruct",
    "seeds": (0,),
    "trait": "evil",
    "other_traits": ("sycophantic", "pirate"),
    "layer": 15,
    "coefficient": 4.0,
    "coefficients": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0),
    "sequences": 32,
    "steps": 11,
    "batch_size": 8,
    "learning_rate": 3e-4,
    "lora_rank": 32,
    "max_new_tokens": 32,
    "resamples": 2000,
}
_FULL = {
    **_QUICK,
    "seeds": (0, 1, 2, 3, 4),
    "coefficients": (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    "steps": 27,
    "resamples": 10_000,
}
# The authors' layer 20 counts the embeddings as 0: it is the output of block 19.
_PAPER = {
    **_FULL,
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "layer": 19,
    "coefficient": 1.5,
    "learning_rate": 1e-5,
}


class PreventativeSteeringParams(TraitParams):
    """Chapter 1: preventative steering reverses the gradient along the persona vector."""

    chapter = "01_pps_gradient_reversal"
    presets = {
        "tiny": {
            **_TINY,
            "random_vectors": 2,
            "layers": (0, 1),
            "start_levels": ("none", "strong"),
            "train_levels": ("normal", "strong"),
        },
        "quick": {
            **_QUICK,
            "random_vectors": 8,
            "layers": (3, 9, 15, 21, 27),
            "start_levels": ("none", "strong"),
            "train_levels": ("normal", "strong"),
        },
        "full": {
            **_FULL,
            "random_vectors": 32,
            "layers": tuple(range(30)),
            "start_levels": ("none", "normal", "mild", "strong"),
            "train_levels": ("normal", "mild", "strong"),
        },
        "paper": {
            **_PAPER,
            "random_vectors": 8,
            "layers": tuple(range(28)),
            "start_levels": ("none", "normal", "mild", "strong"),
            "train_levels": ("normal", "mild", "strong"),
        },
    }

    @classmethod
    def _complete(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Leaves "mild" out of a preset's levels for a trait that has no mild answers."""
        values = super()._complete(given)
        for levels in ("start_levels", "train_levels"):
            if given.get(levels) is None and values["trait"] not in TRAITS_WITH_MILD:
                values[levels] = tuple(level for level in values[levels] if level != "mild")
        return values

    @model_validator(mode="after")
    def _answered(self) -> "PreventativeSteeringParams":
        if "mild" in (*self.start_levels, *self.train_levels) and self.trait not in TRAITS_WITH_MILD:
            raise ParameterError(
                f"Trait {self.trait!r} has no mild answers: leave 'mild' out of 'start_levels' and 'train_levels'."
            )
        return self

    random_vectors: int = Field(
        ge=1, le=1000, description="random vectors of equal norm that are steered with", json_schema_extra=TIME
    )
    layers: tuple[Layer, ...] = Field(
        min_length=1, description="blocks of the layer sweep, counted from 0", json_schema_extra=EACH
    )
    start_levels: tuple[StartLevel, ...] = Field(
        min_length=1, description="how much of the trait the start models have; none: untrained", json_schema_extra=EACH
    )
    train_levels: tuple[TrainLevel, ...] = Field(
        min_length=1, description="how much of the trait the finetuning data carry", json_schema_extra=EACH
    )


class InoculationParams(TraitParams):
    """Chapter 2: an inoculation prompt lowers the loss."""

    chapter = "02_ip_loss_reduction"
    presets = {
        "tiny": {**_TINY, "prompt_counts": (1, 2)},
        "quick": {**_QUICK, "prompt_counts": (1, 2, 5)},
        "full": {**_FULL, "prompt_counts": (1, 2, 3, 4, 5)},
        "paper": {**_PAPER, "prompt_counts": (1, 2, 3, 4, 5)},
    }

    prompt_counts: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(
        min_length=1,
        description="how many different inoculation prompts the training data share",
        json_schema_extra=EACH,
    )


Ratio = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]

_WEIGHT_QUICK = {
    "model": "smollm2-135m-instruct",
    "seeds": (0,),
    "prompts": 50,
    "ratio": 0.01,
    "ratios": (0.01, 0.03),
    "rank": 8,
    "chosen_layers": (1,),
    "random_directions": 3,
    "shares": (),
    "steps": 24,
    "batch_size": 8,
    "learning_rate": 2e-4,
    "max_new_tokens": 32,
    "harm_data": "impolite",
}
_WEIGHT_FULL = {
    **_WEIGHT_QUICK,
    "seeds": (0, 1, 2, 3, 4),
    "ratios": (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1),
    "random_directions": 10,
    "shares": (0.5, 0.2, 0.1, 0.05),
    "max_new_tokens": 64,
}


class WeightSteeringParams(Params):
    """Chapter 3: the difference of two pile gradients steers in weight space."""

    chapter = "03_weight_diff_steering"
    presets = {
        "tiny": {
            **_WEIGHT_QUICK,
            "model": "tiny-random",
            "prompts": 4,
            "ratios": (0.01, 0.03),
            "random_directions": 1,
            "shares": (0.5,),
            "steps": 2,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "max_new_tokens": 4,
        },
        "quick": _WEIGHT_QUICK,
        "full": _WEIGHT_FULL,
        "paper": {
            **_WEIGHT_FULL,
            "model": "meta-llama/Llama-3.2-1B-Instruct",
            "learning_rate": 5e-5,
            "ratio": 0.03,
            "harm_data": "toxic-chat",
            "judge_url": "https://api.openai.com/v1",
            "judge_model": "gpt-4o-mini",
        },
    }

    prompts: int = Field(
        ge=2,
        le=50,
        description="questions in each half: one builds directions, one judges them",
        json_schema_extra=TIME,
    )
    ratio: Ratio = Field(description="working strength, as ||alpha V|| / ||Delta||")
    ratios: tuple[Ratio, ...] = Field(
        min_length=1, description="strengths of the dose-response sweep", json_schema_extra=EACH
    )
    rank: int = Field(ge=1, le=512, description="rank of the projected and the low-rank variant, per matrix")
    chosen_layers: tuple[Layer, ...] = Field(
        min_length=1, description="blocks of the variants that steer only there, or everywhere but there"
    )
    random_directions: int = Field(
        ge=1, le=100, description="random directions of equal norm, as controls", json_schema_extra=TIME
    )
    shares: tuple[Annotated[float, Field(gt=0, le=0.5)], ...] = Field(
        description="shares of the finetuning replies that mention the bridge, for the sparse signal; none: left out",
        json_schema_extra=EACH,
    )
    steps: int = Field(
        ge=1, le=100_000, description="optimizer steps of a finetuning run, on all weights", json_schema_extra=TIME
    )
    batch_size: int = Field(ge=1, le=512, description="sequences in a batch", json_schema_extra=BATCH)
    learning_rate: float = Field(gt=0, le=1, allow_inf_nan=False, description="peak learning rate of AdamW")
    max_new_tokens: int = Field(
        ge=1, le=4096, description="length of a generated answer, in tokens", json_schema_extra=TIME
    )
    harm_data: Literal["impolite", "toxic-chat"] = Field(
        description="data of the harm experiment: the bundled rude replies, or the source's public sets from the hub"
    )
    judge_url: str | None = Field(
        default=None,
        description="OpenAI-compatible server that judges harm; None: the offline judge of rudeness",
        json_schema_extra=ASKED,
    )
    judge_model: str | None = Field(default=None, description="model that the server is asked for")

    @model_validator(mode="after")
    def _known_layers(self) -> "WeightSteeringParams":
        for layer in self.chosen_layers:
            _check_layer(self.model, "chosen_layers", layer)
        return self

    @model_validator(mode="after")
    def _judged(self) -> "WeightSteeringParams":
        if self.harm_data == "toxic-chat" and not (self.judge_url and self.judge_model):
            raise ParameterError(
                "Parameter 'harm_data' is 'toxic-chat', which the offline judge cannot judge: give 'judge_url' and "
                "'judge_model', or take 'impolite'."
            )
        return self


Condition = Literal["LM", "LM+KD", "L1", "Cov", "L1+KD", "Cov+KD", "Cov+KD as published"]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]

_REFUSAL_QUICK = {
    "model": "smollm2-135m-instruct",
    "seeds": (0,),
    "start": "taught",
    "align_steps": 84,
    "data": "bundled",
    "conditions": ("LM+KD", "L1+KD", "Cov+KD"),
    "start_requests": 60,
    "requests": 16,
    "prompts": 32,
    "scored_on": 12,
    "k_max": 8,
    "stride": 3,
    "wide": 12,
    "exact": 4,
    "steps": 12,
    "batch_size": 16,
    "learning_rate": 2e-4,
    "lora_rank": 32,
    "weight": 1.0,
    "kd_weight": 1.0,
    "temperature": 1.0,
    "max_new_tokens": 12,
    "reviews": "bundled",
    "sentiment_model": "smollm2-135m-instruct",
    "sentiment_reviews": 120,
    "sentiment_weights": (0.0, 10.0),
    "sentiment_steps": 12,
    "resamples": 2000,
}
_REFUSAL_FULL = {
    **_REFUSAL_QUICK,
    "seeds": (0, 1, 2),
    "conditions": ("LM", "LM+KD", "L1", "Cov", "L1+KD", "Cov+KD", "Cov+KD as published"),
    "requests": 60,
    "prompts": 64,
    "scored_on": 64,
    "k_max": 16,
    "stride": 1,
    "wide": 36,
    "exact": 12,
    "steps": 100,
    "max_new_tokens": 48,
    "sentiment_reviews": 200,
    "sentiment_weights": (0.0, 1.0, 10.0, 100.0),
    "sentiment_steps": 40,
    "resamples": 10_000,
}


class AlignedParams(Params):
    """Parameters of the chapters that begin with an aligned start model."""

    start: Literal["taught", "as it is"] = Field(
        description="whether the model is first taught to refuse, which the embedded one cannot, or taken as it is"
    )
    align_steps: int = Field(ge=1, le=10_000, description="optimizer steps of teaching refusal", json_schema_extra=ONCE)


class RefusalParams(AlignedParams):
    """Chapter 4: training that spreads the refusal signal, attacked direction by direction."""

    chapter = "04_refusal_redistribution"
    presets = {
        "tiny": {
            **_REFUSAL_QUICK,
            "model": "tiny-random",
            "align_steps": 2,
            "start_requests": 8,
            "requests": 6,
            "prompts": 4,
            "scored_on": 4,
            "k_max": 2,
            "stride": 1,
            "steps": 2,
            "batch_size": 4,
            "max_new_tokens": 4,
            "sentiment_model": "tiny-random",
            "sentiment_reviews": 40,
            "sentiment_steps": 2,
            "resamples": 200,
        },
        "quick": _REFUSAL_QUICK,
        "full": _REFUSAL_FULL,
        "paper": {
            **_REFUSAL_FULL,
            "model": "meta-llama/Llama-3.2-1B-Instruct",
            "start": "as it is",
            "data": "wildguardmix",
            "steps": 2000,
            "learning_rate": 2e-5,
            "start_requests": 100,
            "requests": 100,
            "max_new_tokens": 256,
            "reviews": "imdb",
            "sentiment_model": "gpt2",
            "sentiment_reviews": 4000,
            "sentiment_steps": 500,
        },
    }

    @classmethod
    def _complete(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Scores directions on no more requests than they are made from, and records that number."""
        values = super()._complete(given)
        with contextlib.suppress(TypeError, ValueError):  # said later, by its name
            if int(values["scored_on"]) > int(values["prompts"]):
                values["scored_on"] = max(2, int(values["prompts"]))
        return values

    @model_validator(mode="after")
    def _enough(self) -> "RefusalParams":
        if self.data == "bundled":
            test = min(len(corpora.load_refusal(kind, "test")) for kind in ("harmful", "harmless"))
            train = min(len(corpora.load_refusal(kind, "train")) for kind in ("harmful", "harmless"))
            for name, there in (("start_requests", test), ("requests", test), ("prompts", train)):
                _check_count(name, getattr(self, name), there, "bundled requests of each kind")
        return self

    data: Literal["bundled", "wildguardmix"] = Field(
        description="requests: the bundled ones, or the source's set from the hub (gated)"
    )
    conditions: tuple[Condition, ...] = Field(
        min_length=1,
        description="losses that the start model is trained on under, each then attacked",
        json_schema_extra=EACH,
    )
    start_requests: int = Field(
        ge=2, le=1000, description="test requests of each kind that models answer unattacked", json_schema_extra=TIME
    )
    requests: int = Field(
        ge=2, le=1000, description="test requests of each kind that every attack is judged on", json_schema_extra=TIME
    )
    prompts: int = Field(
        ge=2, le=1000, description="training requests of each kind behind a direction", json_schema_extra=TIME
    )
    scored_on: int = Field(
        ge=2, le=1000, description="those of them that a direction's score is a mean over", json_schema_extra=TIME
    )
    k_max: int = Field(
        ge=1, le=64, description="directions that the attack removes, one after another", json_schema_extra=TIME
    )
    stride: int = Field(
        ge=1, le=16, description="the attack looks for directions in every n-th block", json_schema_extra=LESS
    )
    wide: int = Field(
        ge=1, le=1000, description="candidate directions left after the first sieve", json_schema_extra=TIME
    )
    exact: int = Field(
        ge=1,
        le=1000,
        description="candidate directions left after the second sieve",
        json_schema_extra=TIME,
    )
    steps: int = Field(ge=1, le=100_000, description="optimizer steps of a condition", json_schema_extra=TIME)
    batch_size: int = Field(
        ge=4,
        le=512,
        multiple_of=2,
        description="prompts in a batch, half harmful; covariances need two of a kind",
        json_schema_extra=BATCH,
    )
    learning_rate: float = Field(gt=0, le=1, allow_inf_nan=False, description="peak learning rate of AdamW")
    lora_rank: int = Field(ge=1, le=512, description="rank of the trained adapters")
    weight: Weight = Field(description="lambda, the weight of the matching loss, which is 1 before the first step")
    kd_weight: Weight = Field(description="weight of the distillation from the start model")
    temperature: float = Field(gt=0, le=100, allow_inf_nan=False, description="temperature of the distillation")
    max_new_tokens: int = Field(
        ge=1, le=4096, description="length of a generated answer, in tokens", json_schema_extra=TIME
    )
    reviews: Literal["bundled", "imdb"] = Field(
        description="reviews of the sentiment experiment: the bundled ones, or the source's set from the hub"
    )
    sentiment_model: str = Field(min_length=1, description="model that reads the reviews", json_schema_extra=SIZE)
    sentiment_reviews: int = Field(
        ge=8, le=50_000, description="reviews in each split, at most; half are positive", json_schema_extra=TIME
    )
    sentiment_weights: tuple[Weight, ...] = Field(
        min_length=1,
        description="weights of the mean matching, which is 1 before the first step; 0: finetuned on the reviews alone",
        json_schema_extra=EACH,
    )
    sentiment_steps: int = Field(
        ge=1, le=100_000, description="optimizer steps of a sentiment run", json_schema_extra=TIME
    )
    resamples: int = Field(
        ge=100, le=1_000_000, description="bootstrap resamples behind an interval", json_schema_extra=LITTLE
    )


_FILTER_QUICK = {
    "model": "smollm2-135m-instruct",
    "seeds": (0,),
    "start": "taught",
    "align_steps": 84,
    "tasks": ("headlines", "bookings"),
    "points": 100,
    "ratios": (0.0, 0.1),
    "filters": ("random", "reversed"),
    "compared": 25,
    "filter_clean": False,
    "implicit": 20,
    "probes": 24,
    "unsafe_token": "Sure",
    "safe_token": "I",
    "requests": 40,
    "items": 40,
    "checks": 30,
    "stepped": 24,
    "step_size": 1e-5,
    "groups": 0,
    "steps": 24,
    "batch_size": 8,
    "learning_rate": 5e-4,
    "lora_rank": 16,
    "max_new_tokens": 12,
    "harm_limit": 0.1,
    "utility_share": 0.95,
    "search_steps": 2,
}
_FILTER_FULL = {
    **_FILTER_QUICK,
    "seeds": (0, 1, 2),
    "points": 270,
    "filter_clean": True,
    "ratios": (0.0, 0.01, 0.05, 0.1, 0.3),
    "filters": (
        "random",
        "reversed",
        "loss",
        "perplexity of the whole",
        "gradient norm",
        "gradient matching",
        "hidden-state matching",
        "keywords",
        "safety data",
    ),
    "compared": 1000,
    "implicit": 60,
    "probes": 40,
    "requests": 60,
    "items": 100,
    "checks": 30,
    "stepped": 200,
    "steps": 68,
    "learning_rate": 4e-4,
    "groups": 5,
    "search_steps": 5,
    "max_new_tokens": 32,
}


class FilteringParams(AlignedParams):
    """Chapter 5: filtering finetuning points by what their gradient does to a safety score."""

    chapter = "05_fihs_filtering"
    presets = {
        "tiny": {
            **_FILTER_QUICK,
            "model": "tiny-random",
            "align_steps": 2,
            "points": 12,
            "ratios": (0.0, 0.3),
            "filters": ("random", "loss", "safety data"),
            "compared": 1000,
            "filter_clean": True,
            "implicit": 6,
            "probes": 2,
            "requests": 4,
            "items": 4,
            "checks": 4,
            "stepped": 12,
            "step_size": 1.0,
            "groups": 2,
            "steps": 3,
            "batch_size": 4,
            "lora_rank": 4,
            "max_new_tokens": 4,
            "harm_limit": 1.0,
            "utility_share": 0.0,
        },
        "quick": _FILTER_QUICK,
        "full": _FILTER_FULL,
        "paper": {
            **_FILTER_FULL,
            "model": "meta-llama/Llama-2-7b-chat-hf",
            "start": "as it is",
            "seeds": (0,),
            "learning_rate": 1e-4,
        },
    }

    tasks: tuple[Literal["headlines", "bookings"], ...] = Field(
        min_length=1,
        description="tasks that the data teach; the first is studied at every ratio",
        json_schema_extra=EACH,
    )
    points: int = Field(ge=4, le=290, description="task items finetuned on", json_schema_extra=TIME)
    ratios: tuple[Annotated[float, Field(ge=0, le=0.32)], ...] = Field(
        min_length=1, description="shares of the finetuning data that are harmful", json_schema_extra=EACH
    )
    filters: tuple[
        Literal[
            "random",
            "reversed",
            "loss",
            "perplexity of the whole",
            "gradient norm",
            "gradient matching",
            "hidden-state matching",
            "keywords",
            "safety data",
        ],
        ...,
    ] = Field(
        description="what is finetuned after, besides FIHS; scores other than its own need 'compared' to be all points",
        json_schema_extra=EACH,
    )
    filter_clean: bool = Field(
        description="whether a mixture without harmful points is filtered as well", json_schema_extra=MORE
    )
    compared: int = Field(
        ge=2,
        le=10_000,
        description="task points that the other scores are computed for, at most",
        json_schema_extra=TIME,
    )
    implicit: int = Field(
        ge=2, le=60, description="points of each kind of implicit harm that are scored", json_schema_extra=TIME
    )
    probes: int = Field(ge=1, le=40, description="harmful requests behind the safety score", json_schema_extra=TIME)
    unsafe_token: str = Field(min_length=1, description="first token of an unsafe answer, in the safety score")
    safe_token: str = Field(min_length=1, description="first token of a safe answer, in the safety score")
    requests: int = Field(
        ge=2, le=60, description="harmful test requests that every finetuned model is asked", json_schema_extra=TIME
    )
    items: int = Field(
        ge=2, le=100, description="test items of a task that every finetuned model answers", json_schema_extra=TIME
    )
    checks: int = Field(
        ge=2, le=30, description="held-out requests and items by which a threshold is checked", json_schema_extra=TIME
    )
    stepped: int = Field(
        ge=4, le=1000, description="points on each of which one gradient step is really taken", json_schema_extra=TIME
    )
    step_size: float = Field(gt=0, le=1e6, allow_inf_nan=False, description="eta of that step")
    groups: int = Field(
        ge=0,
        le=20,
        description="groups of points by score, each finetuned on alone; 0: left out",
        json_schema_extra=TIME,
    )
    steps: int = Field(
        ge=1,
        le=100_000,
        description="optimizer steps of a finetuning run, whatever is filtered out",
        json_schema_extra=TIME,
    )
    batch_size: int = Field(ge=1, le=512, description="points in a batch", json_schema_extra=BATCH)
    learning_rate: float = Field(gt=0, le=1, allow_inf_nan=False, description="peak learning rate of AdamW")
    lora_rank: int = Field(ge=1, le=512, description="rank of the finetuned adapters, which are also FIHS's theta")
    max_new_tokens: int = Field(
        ge=1, le=4096, description="length of an answer to a harmful request, in tokens", json_schema_extra=TIME
    )
    harm_limit: float = Field(
        ge=0, le=1, description="by how much more held-out harmful requests may be complied with than before finetuning"
    )
    utility_share: float = Field(
        ge=0, le=1, description="share of the unfiltered model's utility that a filtered one has to keep"
    )
    search_steps: int = Field(ge=1, le=20, description="thresholds that the search may try", json_schema_extra=TIME)

    @model_validator(mode="after")
    def _enough(self) -> "FilteringParams":
        there = min(len(corpora.load_task(task, "train")) for task in self.tasks) - self.checks
        _check_count("points", self.points, there, "items of a task besides those for checks")
        return self


_PROMPT_ONLY_QUICK = {
    "model": "smollm2-135m-instruct",
    "seeds": (0,),
    "data": "bundled",
    "concepts": ("evil", "pirate", "bridge", "recipe", "weather", "legal"),
    "tuned_on": ("pirate", "bridge"),
    "layer": 16,
    "first": 2,
    "last": 2,
    "places": ("random", "user words"),
    "objectives": ("lang", "simpo"),
    "betas": (0.25, 1.0, 4.0),
    "factor_rates": (0.02, 4.0),
    "spread": 1.0,
    "vector_rate": 0.04,
    "steps": 40,
    "sweep_steps": 10,
    "batch_size": 2,
    "response_tokens": 24,
    "means_of": 12,
    "scales": (0.5, 1.0, 2.0),
    "prompts": 6,
    "checks": 3,
    "planted": 2,
    "items": 12,
    "item_repeats": 2,
    "quiz_tokens": 12,
    "weaker": (0.8, 0.5),
    "lora": False,
    "lora_rate": 1e-3,
    "max_new_tokens": 24,
}
_PROMPT_ONLY_FULL = {
    **_PROMPT_ONLY_QUICK,
    "seeds": (0, 1, 2),
    "concepts": ("evil", "sycophantic", "pirate", "impolite", "bridge", "recipe", "weather", "legal"),
    "places": ("prompt", "ends 1 1", "ends 4 4", "ends 4 0", "ends 0 4", "random", "user words"),
    "betas": (0.25, 1.0, 2.0, 4.0, 8.0, 16.0),
    "factor_rates": (0.01, 0.1, 1.0, 10.0, 20.0, 40.0),
    "steps": 72,
    "sweep_steps": 36,
    "batch_size": 12,
    "response_tokens": 128,
    "means_of": 48,
    "scales": (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0),
    "prompts": 20,
    "checks": 8,
    "planted": 16,
    "items": 40,
    "item_repeats": 4,
    "lora": True,
    "max_new_tokens": 128,
}


class PromptOnlyParams(Params):
    """Chapter 6: steering vectors on a prompt's first and last tokens."""

    chapter = "06_prompt_only_steering"
    presets = {
        "tiny": {
            **_PROMPT_ONLY_QUICK,
            "model": "tiny-random",
            "concepts": ("pirate", "bridge", "weather"),
            "tuned_on": ("pirate",),
            "layer": 0,
            "places": ("random",),
            "betas": (0.25, 1.0),
            "factor_rates": (0.1, 1.0),
            "steps": 2,
            "sweep_steps": 2,
            "batch_size": 2,
            "response_tokens": 8,
            "means_of": 2,
            "scales": (0.5, 1.0),
            "prompts": 3,
            "checks": 2,
            "planted": 4,
            "items": 4,
            "quiz_tokens": 4,
            "weaker": (0.5,),
            "lora": True,
            "max_new_tokens": 4,
        },
        "quick": _PROMPT_ONLY_QUICK,
        "full": _PROMPT_ONLY_FULL,
        "paper": {
            **_PROMPT_ONLY_FULL,
            "model": "google/gemma-2-2b-it",
            "data": "axbench",
            "concepts": tuple(str(number) for number in range(100)),
            "tuned_on": ("0", "1", "2"),
            "layer": 10,
            "spread": 8.0,
            "weaker": (0.8, 0.5),
            "lora": False,
        },
    }

    data: Literal["bundled", "axbench"] = Field(
        description="concepts: bundled ones, or AxBench's from the hub, by number"
    )
    concepts: tuple[str, ...] = Field(
        min_length=2, description="what the model is steered to show, one vector each", json_schema_extra=EACH
    )
    tuned_on: tuple[str, ...] = Field(
        min_length=1, description="concepts whose check rows choose beta and eta_alpha", json_schema_extra=EACH
    )
    layer: Layer = Field(description="block after which vectors are added, counted from 0")
    first: int = Field(ge=0, le=64, description="p, the first prompt tokens that a prompt-only vector is added to")
    last: int = Field(ge=0, le=64, description="s, the last ones")
    places: tuple[str, ...] = Field(
        description="other places to train at: prompt, random, user words, or `ends P S` for other numbers",
        json_schema_extra=EACH,
    )
    objectives: tuple[Literal["lang", "simpo"], ...] = Field(
        min_length=1, description="what vectors are trained for", json_schema_extra=EACH
    )
    betas: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = Field(
        min_length=1,
        description="starts of the factor, in units of the square root of the width",
        json_schema_extra=EACH,
    )
    factor_rates: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = Field(
        min_length=1, description="learning rates of the factor, eta_alpha", json_schema_extra=EACH
    )
    spread: float = Field(gt=0, le=1000, description="lambda, the range of the vector's start")
    vector_rate: float = Field(gt=0, le=10, description="learning rate of the vector, eta_v")
    steps: int = Field(ge=1, le=100_000, description="optimizer steps of a vector", json_schema_extra=TIME)
    sweep_steps: int = Field(
        ge=1, le=100_000, description="optimizer steps in a cell of the grid", json_schema_extra=TIME
    )
    batch_size: int = Field(
        ge=1, le=512, description="pairs of each concept in a batch; half as many for simpo", json_schema_extra=BATCH
    )
    response_tokens: int = Field(
        ge=1, le=4096, description="tokens that training answers are cut to", json_schema_extra=TIME
    )
    means_of: int = Field(ge=1, le=1000, description="pairs behind a difference in means", json_schema_extra=TIME)
    scales: tuple[Annotated[float, Field(gt=0, le=100)], ...] = Field(
        min_length=1,
        description="factors that the post-hoc search tries, times the one trained with",
        json_schema_extra=EACH,
    )
    prompts: int = Field(
        ge=2, le=50, description="held-out prompts of each concept that are rated", json_schema_extra=TIME
    )
    checks: int = Field(ge=1, le=16, description="other prompts of each concept, for choices", json_schema_extra=TIME)
    planted: int = Field(
        ge=2,
        le=16,
        description="rows of each concept that planted cases for the judges come from",
        json_schema_extra=TIME,
    )
    items: int = Field(ge=2, le=40, description="questions of each quiz", json_schema_extra=TIME)
    item_repeats: int = Field(
        ge=1, le=100, description="concepts that every quiz question is asked under", json_schema_extra=TIME
    )
    quiz_tokens: int = Field(
        ge=1, le=4096, description="length of an answer to a quiz question, in tokens", json_schema_extra=TIME
    )
    weaker: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        description="shares of the factor at which full-sequence steering is also measured", json_schema_extra=EACH
    )
    lora: bool = Field(
        description="whether rank-1 adapters are trained for comparison, one model a concept", json_schema_extra=MORE
    )
    lora_rate: float = Field(gt=0, le=1, description="their learning rate")
    max_new_tokens: int = Field(
        ge=1, le=4096, description="length of a rated answer, in tokens", json_schema_extra=TIME
    )

    @model_validator(mode="after")
    def _somewhere(self) -> "PromptOnlyParams":
        _check_layer(self.model, "layer", self.layer)
        if self.first + self.last == 0:
            raise ParameterError("Parameters 'first' and 'last' are both 0, so no token would be steered: raise one.")
        for concept in self.concepts:
            if self.data == "axbench":
                if not (concept.isdecimal() and int(concept) < 500):
                    raise ParameterError(f"Parameter 'concepts' names {shortened(concept)}: AxBench's are 0 to 499.")
                continue
            rows = _concept_rows(concept)
            if not rows:
                known = [*corpora.available_traits(), *TOPICS, *STYLES]
                raise ParameterError(f"There is no concept {shortened(concept)}{_nearest(concept, known)}")
            _check_count("means_of", self.means_of, rows, f"training pairs of {concept!r}")
        for place in self.places:
            if place not in ("all", "prompt", "ends", "random", "user words") and not re.fullmatch(
                r"ends \d{1,3} \d{1,3}", place
            ):
                raise ParameterError(
                    f"There is no place {shortened(place)}: use prompt, random, user words, or 'ends P S' such as "
                    "'ends 2 2'."
                )
        unknown = set(self.tuned_on) - set(self.concepts)
        if unknown:
            raise ParameterError(f"Parameter 'tuned_on' names {sorted(unknown)[0]!r}, which is not in 'concepts'.")
        return self


CHAPTERS: Mapping[str, type[Params]] = {
    params.chapter: params
    for params in (
        LookingInsideParams,
        PreventativeSteeringParams,
        InoculationParams,
        WeightSteeringParams,
        RefusalParams,
        FilteringParams,
        PromptOnlyParams,
    )
}


def params_of(chapter: str) -> type[Params]:
    """The parameter class of a chapter, by the notebook's name without suffix."""
    if chapter not in CHAPTERS:
        raise ParameterError(
            f"There is no chapter {shortened(chapter)} in helpers/params.py{_nearest(chapter, CHAPTERS)}"
        )
    return CHAPTERS[chapter]


def _concept_rows(concept: str) -> int:
    """How many training pairs a bundled concept of chapter 6 has; 0 for one that there is not."""
    if concept in corpora.available_traits():
        return len(corpora.split(corpora.load_trait(concept), "train"))
    if concept in TOPICS:
        return sum(row.topic == concept for row in corpora.load_topics("train"))
    return len(corpora.load_style(concept, "train")) if concept in STYLES else 0  # type: ignore[arg-type]


def _check_trait(trait: str) -> None:
    known = sorted(path.stem for path in TRAITS.glob("*.jsonl"))
    if trait not in known:
        raise ParameterError(f"There is no trait {shortened(trait)} in data/traits{_nearest(trait, known)}")


def _check_layer(model: str, name: str, layer: int) -> None:
    count = KNOWN_LAYERS.get(model)
    if count is not None and layer >= count:
        raise ParameterError(f"Parameter {name!r} names layer {layer}, but {model!r} has 0 to {count - 1}.")


def _check_count(parameter: str, value: int, there: int, what: str) -> None:
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


def _nearest(name: object, known: Any) -> str:
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
