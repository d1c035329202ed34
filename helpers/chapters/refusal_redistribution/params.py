"""Parameters of the chapter on redistributing refusal."""

import contextlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from helpers import corpora
from helpers.params import BATCH, EACH, LESS, LITTLE, SIZE, TIME, ParameterError, check_count
from helpers.studies.params import AlignedParams

Condition = Literal["LM", "LM+KD", "L1", "Cov", "L1+KD", "Cov+KD", "Mean+Cov+KD", "Cov+KD as published"]

Attacker = Literal[
    "means, zero",
    "means, affine",
    "paired, zero",
    "paired, affine",
    "residualised, affine",
    "LEACE",
    "logistic probe",
    "optimised",
    "random",
    "finetuned",
]

Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class RefusalParams(AlignedParams):
    """Chapter 4: training that spreads the refusal signal, attacked direction by direction."""

    chapter = "04_refusal_redistribution"

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
        if not any(name.endswith(("zero", "affine")) for name in self.attackers):
            raise ParameterError(
                "Parameter 'attackers' names no difference of means, such as 'means, affine': add one, from which the "
                "optimised direction starts."
            )
        if self.data != "bundled" and any(name.startswith("paired") for name in self.attackers):
            raise ParameterError(
                f"Parameter 'attackers' names a paired contrast, and only the bundled data have paired requests, not "
                f"{self.data!r}: leave it out."
            )
        if self.data == "bundled":
            test = min(len(corpora.load_refusal(kind, "test")) for kind in ("harmful", "harmless"))
            train = min(len(corpora.load_refusal(kind, "train")) for kind in ("harmful", "harmless"))
            for name, there in (("start_requests", test), ("requests", test)):
                check_count(name, getattr(self, name), there, "bundled requests of each kind")
            left = train - self.batch_size // 2
            check_count("prompts", self.prompts, left, "bundled requests of each kind beside those of a batch")
        return self

    data: Literal["bundled", "wildguardmix"] = Field(
        description="requests: the bundled ones, or the source's set from the hub (gated)"
    )
    conditions: tuple[Condition, ...] = Field(
        min_length=1,
        description="losses that the start model is trained on under, each then attacked",
        json_schema_extra=EACH,
    )
    attackers: tuple[Attacker, ...] = Field(
        min_length=1,
        description="ways to find a direction, whose damage is measured; the first one starts the optimised",
        json_schema_extra=EACH,
    )
    start_requests: int = Field(
        ge=2,
        le=1000,
        description="test requests of each kind that models answer unattacked, and that damage is measured on",
        json_schema_extra=TIME,
    )
    requests: int = Field(
        ge=2, le=1000, description="test requests of each kind that K* is judged on", json_schema_extra=TIME
    )
    prompts: int = Field(
        ge=2,
        le=1000,
        description="the attacker's requests of each kind; conditions train on others",
        json_schema_extra=TIME,
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
    keep: tuple[Annotated[int, Field(ge=1, le=1000)], Annotated[int, Field(ge=1, le=1000)]] = Field(
        description="candidate directions left after the first and the second round of halving", json_schema_extra=TIME
    )
    steps: int = Field(ge=1, le=100_000, description="optimizer steps of a condition", json_schema_extra=TIME)
    batch_size: int = Field(
        ge=8,
        le=512,
        multiple_of=2,
        description="prompts in a batch, half harmful; unbiased covariances need four of a kind",
        json_schema_extra=BATCH,
    )
    learning_rate: float = Field(gt=0, le=1, allow_inf_nan=False, description="peak learning rate of AdamW")
    lora_rank: int = Field(ge=1, le=512, description="rank of the trained adapters")
    weight: Weight = Field(description="lambda, the weight of the matching loss")
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
