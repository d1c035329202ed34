"""Parameters of the page that measures several models."""

from pydantic import Field, model_validator

from helpers import corpora
from helpers.params import EACH, TIME, Coefficient, ParameterError, check_count, check_trait
from helpers.registry import ORIGINAL
from helpers.studies.params import AlignedParams


class ThreeSizesParams(AlignedParams):
    """Chapter 8: what needs no training, on models of several sizes."""

    chapter = "08_three_sizes"

    others: tuple[str, ...] = Field(
        description="further models, measured after the first; one at a time is in memory", json_schema_extra=EACH
    )
    trait: str = Field(description="trait whose vector, gradients and prompts are measured; a file in data/traits")
    concept: str = Field(description="trait that answers are steered to; a file in data/traits")
    depth: float = Field(ge=0, lt=1, description="where a model is steered and read, as a share of its blocks")
    coefficients: tuple[Coefficient, ...] = Field(
        min_length=2, description="multiples of the persona vector at which slopes are taken", json_schema_extra=EACH
    )
    sequences: int = Field(
        ge=2, description="held-out trait answers whose slopes and gradients are taken", json_schema_extra=TIME
    )
    pairs: int = Field(ge=2, description="held-out pairs of answers whose margins are taken", json_schema_extra=TIME)
    per_kind: int = Field(
        ge=1, le=5, description="eliciting prompts, and placebos, that are tried", json_schema_extra=EACH
    )
    scales: tuple[Coefficient, ...] = Field(
        min_length=1, description="multiples of the concept's vector that are added", json_schema_extra=EACH
    )
    divergence: float = Field(
        gt=0, le=10, description="divergence at which places to steer are held side by side, in nats per token"
    )
    prompts: int = Field(
        ge=2, le=148, description="training requests of a kind that directions are made from", json_schema_extra=TIME
    )
    scored_on: int = Field(
        ge=1, le=148, description="those of a kind that a direction is scored on", json_schema_extra=TIME
    )
    blocks: int = Field(
        ge=1, le=200, description="blocks at which directions are looked for, evenly spread", json_schema_extra=TIME
    )
    probed: int = Field(
        ge=4, le=297, description="training requests of a kind that a probe learns from", json_schema_extra=TIME
    )
    requests: int = Field(
        ge=2, le=60, description="test requests of each kind that a model is asked", json_schema_extra=TIME
    )
    max_new_tokens: int = Field(
        ge=1, le=4096, description="length of an answer to a request, in tokens", json_schema_extra=TIME
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ThreeSizesParams":
        for trait in (self.trait, self.concept):
            check_trait(trait)
            rows = len(corpora.split(corpora.load_trait(trait), "eval"))
            check_count("pairs", self.pairs, rows, f"held-out pairs of {trait!r}")
            check_count("sequences", self.sequences, rows, f"held-out answers of {trait!r}")
        if self.model in self.others:
            raise ParameterError(f"Parameter 'others' names {self.model!r}, which is measured anyway: leave it out.")
        if self.coefficients[0] != 0 or list(self.coefficients) != sorted(self.coefficients):
            raise ParameterError("Parameter 'coefficients' must begin with 0 and rise, so that a sign can turn.")
        if list(self.scales) != sorted(self.scales) or self.scales[0] <= 0:
            raise ParameterError("Parameter 'scales' must be above 0 and rise.")
        return self

    def of(self, name: str) -> "ThreeSizesParams":
        """The same parameters for one of its models alone, started as that model is."""
        start = self.start if name == self.model else self._complete({"preset": self.preset, "model": name})["start"]
        return self.model_copy(update={"model": name, "others": (), "start": start})

    @property
    def models(self) -> tuple[str, ...]:
        """What is measured, in order."""
        return (self.model, *self.others)


def family(model: str) -> str:
    """Models of one family were built and tuned alike: "qwen2.5-coder" of "qwen2.5-coder-0.5b-instruct"."""
    return "-".join(model.removesuffix(ORIGINAL).split("-")[:-2]) or model
