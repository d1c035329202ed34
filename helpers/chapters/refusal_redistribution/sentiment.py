"""Mean matching against concept erasure, on sentiment: the source's proof of concept (chapter 4).

A model goes on reading reviews as language, each with the question of its sentiment behind it, and is trained to have
equal mean states for both sentiments where the answer would be, or equal covariances. Can a probe still tell them
apart? Beside it stand erasers of the states that the same training without matching leaves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from helpers import corpora
from helpers.artifacts import Artifact
from helpers.chapters.refusal_redistribution.method import PoolShares, Redistribution
from helpers.chapters.refusal_redistribution.params import RefusalParams
from helpers.chat import Example, balanced_batches
from helpers.losses import evaluate_losses
from helpers.models import Model, release_memory
from helpers.studies.directions import prompt_states
from helpers.studies.study import Finetuning, Study

Matched = Literal["mean", "covariance"]

ASKED = "\nSentiment:"
"""Stands behind each review: at its last token the model is about to name the sentiment."""

LONGEST = 256
"""Tokens of a review that are read."""


@dataclass(frozen=True)
class ReviewStates:
    """What a model makes of the reviews: states of its last block at the last token of what is asked."""

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

    def states(self, weight: float | None, match: Matched = "mean") -> ReviewStates:
        """The model as it is (None), or finetuned with means (L1) or covariances matched at this weight (0: on language
        alone)."""
        p = self.params
        recipe = Finetuning(p.sentiment_steps, p.batch_size, p.learning_rate, p.seed, p.lora_rank)
        artifact = self.stage(
            "review-states",
            lambda: review_states(self, recipe, weight, match),
            {"train": self.train, "test": self.test, "weight": weight, "match": match, "recipe": asdict(recipe)},
        )
        train, test, losses = (artifact.tensors[name].numpy() for name in ("train", "test", "losses"))
        return ReviewStates(train, test, losses, tuple(artifact.facts["training"]))

    def texts(self, reviews: Sequence[str]) -> list[Example]:
        """Plain text without a chat template; padding carries no loss (in the source's code it does)."""
        tokenizer = self.base.tokenizer
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        asked = tokenizer(ASKED, add_special_tokens=False)["input_ids"]
        kept = [tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST] for text in reviews]
        return [Example((begin, *ids, *asked), 1) for ids in kept]


def review_states(
    study: SentimentStudy, recipe: Finetuning, weight: float | None, match: Matched
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Stage "review-states": what a model makes of the reviews, after finetuning unless the weight is None."""
    release_memory()
    model, training = (study.base, ()) if weight is None else finetuned(study, recipe, weight, match)
    read = {name: study.texts(reviews) for name, reviews in (("train", study.train), ("test", study.test))}
    last = [model.layers - 1]
    states = {name: prompt_states(model, texts, last, (-1,))[:, 0, 0] for name, texts in read.items()}
    return {**states, "losses": evaluate_losses(model, read["test"], batch_size=32)}, {"training": training}


def finetuned(
    study: SentimentStudy, recipe: Finetuning, weight: float, match: Matched
) -> tuple[Model, tuple[float, ...]]:
    """The base model trained to read the reviews as language, and to have equal means or covariances for both
    sentiments at the last token."""
    examples = study.texts(study.train)
    good, bad = (
        [e for e, label in zip(examples, study.train_labels, strict=True) if label == which] for which in (True, False)
    )
    loss = Redistribution(
        match=match if weight else "none",
        norm="L1" if match == "mean" else "L2",
        weight=weight,
        kd_weight=0.0,
        shares=PoolShares(1.0, 0.0, 0.0, 0.0),
        relative=True,
        unbiased=match == "covariance",
    )
    extra = loss.extra_loss(lambda row: row < len(good), teacher=None, seed=recipe.seed)
    pad = study.base.tokenizer.pad_token_id
    model, log = study.finetune(
        recipe,
        balanced_batches(good, bad, recipe.steps, recipe.batch_size, recipe.seed, pad),
        interventions=extra.interventions if weight else (),
        extra_loss=extra if weight else None,
        label=f"matching a {match}, weight {weight:g}",
    )
    # its digest names no stage: these weights are used here and not kept
    return study.load([Artifact("matching reviews", model.trained_tensors())], weights="cast"), log.losses


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
