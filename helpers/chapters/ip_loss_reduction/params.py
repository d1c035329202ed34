"""Parameters of the chapter on inoculation prompting."""

from typing import Annotated

from pydantic import Field

from helpers.params import EACH, TIME
from helpers.studies.params import TraitParams


class InoculationParams(TraitParams):
    """Chapter 2: an inoculation prompt lowers the loss."""

    chapter = "02_ip_loss_reduction"

    per_kind: int = Field(ge=1, le=5, description="prompts of each kind that are trained with", json_schema_extra=TIME)
    prompt_counts: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(
        min_length=1,
        description="how many different inoculation prompts the training data share",
        json_schema_extra=EACH,
    )
