"""Parameters of the chapter on preventative steering."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from helpers.params import EACH, TIME, Layer, ParameterError
from helpers.studies.params import TRAITS_WITH_MILD, StartLevel, TrainLevel, TraitParams


class PreventativeSteeringParams(TraitParams):
    """Chapter 1: preventative steering reverses the gradient along the persona vector."""

    chapter = "01_pps_gradient_reversal"

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
    relearning: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field(
        min_length=1, description="undefended steps after which relearning is looked at", json_schema_extra=TIME
    )
    relearning_rate: float = Field(gt=0, le=1, allow_inf_nan=False, description="peak learning rate of relearning")
    layers: tuple[Layer, ...] = Field(
        min_length=1, description="blocks of the layer sweep, counted from 0", json_schema_extra=EACH
    )
    start_levels: tuple[StartLevel, ...] = Field(
        min_length=1, description="how much of the trait the start models have; none: untrained", json_schema_extra=EACH
    )
    train_levels: tuple[TrainLevel, ...] = Field(
        min_length=1, description="how much of the trait the finetuning data carry", json_schema_extra=EACH
    )
