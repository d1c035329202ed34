"""Parameters of the chapter on steering with weights."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from helpers.params import ASKED, BATCH, EACH, TIME, Layer, ParameterError, Params, check_layer

Ratio = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]


class WeightSteeringParams(Params):
    """Chapter 3: the difference of two pile gradients steers in weight space."""

    chapter = "03_weight_diff_steering"

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
            check_layer(self.model, "chosen_layers", layer)
        return self

    @model_validator(mode="after")
    def _judged(self) -> "WeightSteeringParams":
        if self.harm_data == "toxic-chat" and not (self.judge_url and self.judge_model):
            raise ParameterError(
                "Parameter 'harm_data' is 'toxic-chat', which the offline judge cannot judge: give 'judge_url' and "
                "'judge_model', or take 'impolite'."
            )
        return self
