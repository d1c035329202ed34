"""Mean matching against concept erasure, on sentiment: the source's proof of concept (chapter 4).

A model goes on reading reviews as language, and is trained to have equal mean states for both sentiments. Can a probe
still tell them apart? Beside it stand erasers of the states that the same training without matching leaves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import corpora
from helpers.activations import ReadMean, mean_activations
from helpers.artifacts import Artifact
from helpers.chapters.refusal_redistribution.method import PoolShares, Redistribution
from helpers.chapters.refusal_redistribution.params import RefusalParams
from helpers.chat import Example, balanced_batches
from helpers.interventions import applied
from helpers.losses import sequence_losses
from helpers.models import Model, release_memory
from helpers.studies.study import Finetuning, Study


@dataclass(frozen=True)
class ReviewStates:
    """What a model makes of the reviews: mean states of its last block, over each review's tokens."""

    train: Float[np.ndarray, "train d_model"]
    test: Float[np.ndarray, "test d_model"]
    losses: Float[np.ndarray, " test"]
    """Of each test review as language, in nats per token."""
    training: tuple[float, ...] = ()
    """Language loss of each step of the finetuning; none for the model as it is."""


class SentimentStudy(Study[RefusalParams]):
    """Reviews of two sentiments, and one model for each weight of the mean matching."""

    def __init__(self, params: RefusalParams) -> None:
        super().__init__(params, model=params.sentiment_model, weights="cast")
        self.train, self.train_labels = _reviews(params, "train")
        self.test, self.test_labels = _reviews(params, "test")

    def states(self, weight: float | None) -> ReviewStates:
        """The model as it is (None), or finetuned with the mean matching at this weight (0: on language alone)."""
        p = self.params
        recipe = Finetuning(p.sentiment_steps, p.batch_size, p.learning_rate, p.seed, p.lora_rank)
        artifact = self.stage(
            "review-states",
            lambda: review_states(self, recipe, weight),
            {"train": self.train, "test": self.test, "weight": weight, "recipe": asdict(recipe)},
        )
        train, test, losses = (artifact.tensors[name].numpy() for name in ("train", "test", "losses"))
        return ReviewStates(train, test, losses, tuple(artifact.facts["training"]))

    def texts(self, reviews: Sequence[str]) -> list[Example]:
        """Plain text without a chat template; padding carries no loss (in the source's code it does)."""
        tokenizer = self.base.tokenizer
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        kept = [tokenizer(text, add_special_tokens=False)["input_ids"][:256] for text in reviews]
        return [Example((begin, *ids), 1) for ids in kept]


def review_states(
    study: SentimentStudy, recipe: Finetuning, weight: float | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "review-states": what a model makes of the reviews, after finetuning unless the weight is None."""
    release_memory()
    model, training = (study.base, ()) if weight is None else finetuned(study, recipe, weight)
    test, losses = states_and_losses(model, study.texts(study.test))
    train = mean_activations(model, study.texts(study.train), layers=[model.layers - 1])[0]
    return {"train": train, "test": test, "losses": losses}, {"training": training}


def finetuned(study: SentimentStudy, recipe: Finetuning, weight: float) -> tuple[Model, tuple[float, ...]]:
    """The base model trained to read the reviews as language, and to have equal means for both sentiments."""
    examples = study.texts(study.train)
    good, bad = (
        [e for e, label in zip(examples, study.train_labels, strict=True) if label == which] for which in (True, False)
    )
    loss = Redistribution(
        match="mean" if weight else "none",
        norm="L2",
        weight=weight,
        kd_weight=0.0,
        shares=PoolShares(0.0, 0.0, 0.0, 1.0),
        relative=True,
    )
    extra = loss.extra_loss(lambda row: row < len(good), teacher=None, seed=recipe.seed)
    pad = study.base.tokenizer.pad_token_id
    model, log = study.finetune(
        recipe,
        balanced_batches(good, bad, recipe.steps, recipe.batch_size, recipe.seed, pad),
        interventions=extra.interventions if weight else (),
        extra_loss=extra if weight else None,
        label=f"matching means, weight {weight:g}",
    )
    # its digest names no stage: these weights are used here and not kept
    return study.load([Artifact("matching means", model.trained_tensors())], weights="cast"), log.losses


@torch.no_grad()
def states_and_losses(
    model: Model, examples: Sequence[Example]
) -> tuple[Float[Tensor, "example d_model"], Float[Tensor, " example"]]:
    """Mean states of the last block and response losses, from one pass."""
    last, means = model.layers - 1, dict[int, Tensor]()
    states, losses = torch.empty(len(examples), model.width), torch.empty(len(examples))
    with applied(model, ReadMean([last], "response", means)):
        for batch in model.batches(examples, 32):
            losses[list(batch.rows)] = sequence_losses(model, batch).cpu()
            states[list(batch.rows)] = means[last].cpu()
    return states, losses


def _reviews(params: RefusalParams, split: Literal["train", "test"]) -> tuple[list[str], Bool[np.ndarray, " review"]]:
    """Texts, and whether each is positive; both labels equally often."""
    if params.reviews == "bundled":
        rows = [(row.text, row.label == "positive") for row in corpora.load_reviews(split)]
    else:
        rows = corpora.load_imdb(split)
        random.Random(42).shuffle(rows)
    half = params.sentiment_reviews // 2
    chosen = [[row for row in rows if row[1] == label][:half] for label in (True, False)]
    size = min(map(len, chosen))
    kept = [row for part in chosen for row in part[:size]]
    return [text for text, _ in kept], np.array([label for _, label in kept])
