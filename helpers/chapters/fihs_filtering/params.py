"""Parameters of the chapter on filtering data by gradients."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from helpers import corpora
from helpers.params import BATCH, EACH, MORE, TIME, check_count
from helpers.registry import REGISTRY
from helpers.studies.params import AlignedParams


class FilteringParams(AlignedParams):
    """Chapter 5: filtering finetuning points by what their gradient does to a safety score."""

    chapter = "05_fihs_filtering"

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
    safe_token: str = Field(
        min_length=1,
        description="first token of a safe answer, in the safety score; of a registered model, its commonest refusal's",
    )
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

    @classmethod
    def _complete(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._complete(given)
        if given.get("safe_token") is None and values["model"] in REGISTRY:
            values["safe_token"] = REGISTRY[values["model"]].openers[0]
        return values

    @model_validator(mode="after")
    def _enough(self) -> "FilteringParams":
        there = min(len(corpora.load_task(task, "train")) for task in self.tasks) - self.checks
        check_count("points", self.points, there, "items of a task besides those for checks")
        return self
