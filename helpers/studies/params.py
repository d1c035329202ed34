"""Parameters that chapters share: those that train a trait into a model, and those that start from an aligned one."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from helpers import corpora
from helpers.params import (
    BATCH,
    EACH,
    ONCE,
    TIME,
    Coefficient,
    Layer,
    ParameterError,
    Params,
    check_count,
    check_layer,
    check_trait,
)

StartLevel = Literal["none", "normal", "mild", "strong"]

TrainLevel = Literal["normal", "mild", "strong"]

TRAITS_WITH_MILD = ("evil",)


class TraitParams(Params):
    """Parameters of the chapters that train one trait into a model."""

    trait: str = Field(description="trait that the finetuning data carry; a file in data/traits")
    other_traits: tuple[str, ...] = Field(
        min_length=1, description="traits for cross-trait comparisons", json_schema_extra=EACH
    )
    layer: Layer = Field(description="block after which the model is steered and measured, counted from 0")
    coefficient: Coefficient = Field(
        description="working intensity, in units of a*: the raw vector's multiple at which the pressure turns"
    )
    coefficients: tuple[Coefficient, ...] = Field(
        min_length=1, description="intensities of the sweep, in units of a*", json_schema_extra=EACH
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
            check_trait(trait)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "TraitParams":
        rows = corpora.split(corpora.load_trait(self.trait), "eval")
        check_count("sequences", self.sequences, len(rows), f"questions to measure {self.trait!r} on")
        if self.trait in self.other_traits:
            raise ParameterError(f"Parameter 'other_traits' contains the trait itself, {self.trait!r}: leave it out.")
        for name, layers in (("layer", (self.layer,)), ("layers", getattr(self, "layers", ()))):
            for layer in layers:
                check_layer(self.model, name, layer)
        return self


class AlignedParams(Params):
    """Parameters of the chapters that begin with an aligned start model."""

    start: Literal["taught", "as it is"] = Field(
        description="whether the model is first taught to refuse, which the embedded one cannot, or taken as it is"
    )
    align_steps: int = Field(ge=1, le=10_000, description="optimizer steps of teaching refusal", json_schema_extra=ONCE)
