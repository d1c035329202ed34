"""Parameters of the chapter on vectors at the prompt's ends."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from helpers import corpora
from helpers.params import (
    BATCH,
    EACH,
    MORE,
    TIME,
    Layer,
    ParameterError,
    Params,
    check_count,
    check_layer,
    nearest,
    shortened,
)

TOPICS, STYLES = ("bridge", "recipe"), ("weather", "legal")


class PromptOnlyParams(Params):
    """Chapter 6: steering vectors on a prompt's first and last tokens."""

    chapter = "06_prompt_only_steering"

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
        check_layer(self.model, "layer", self.layer)
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
                raise ParameterError(f"There is no concept {shortened(concept)}{nearest(concept, known)}")
            check_count("means_of", self.means_of, rows, f"training pairs of {concept!r}")
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


def _concept_rows(concept: str) -> int:
    """How many training pairs a bundled concept of chapter 6 has; 0 for one that there is not."""
    if concept in corpora.available_traits():
        return len(corpora.split(corpora.load_trait(concept), "train"))
    if concept in TOPICS:
        return sum(row.topic == concept for row in corpora.load_topics("train"))
    return len(corpora.load_style(concept, "train")) if concept in STYLES else 0  # type: ignore[arg-type]
