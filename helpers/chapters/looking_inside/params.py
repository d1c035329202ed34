"""Parameters of the primer."""

from pydantic import Field, model_validator

from helpers.params import EACH, LITTLE, TIME, Coefficient, Layer, Params, check_layer, check_trait


class LookingInsideParams(Params):
    """Chapter 0: the model, the instruments, and what these report where the truth is planted."""

    chapter = "00_looking_inside"

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

    @model_validator(mode="after")
    def _consistent(self) -> "LookingInsideParams":
        check_trait(self.trait)
        check_layer(self.model, "layer", self.layer)
        return self
