"""What judges get wrong: tables of their errors, and of simpler judges that they should beat."""

import random
from collections.abc import Mapping, Sequence
from typing import Protocol, get_args, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Bool

from helpers.corpora import (
    ReplyLabel,
    ReplyRow,
    available_traits,
    load_refusal,
    load_reviews,
    load_style,
    load_topics,
    load_trait,
    split,
)
from helpers.cues import form_auroc, length_auroc, words_auroc
from helpers.judges.classifier import STYLES, ConceptJudge
from helpers.judges.refusal import is_compliance, is_refusal
from helpers.judges.scores import Scorer
from helpers.statistics import auroc, share


@runtime_checkable
class Contrast(Protocol):
    """A question's plain answer and one that shows something."""

    @property
    def normal(self) -> str: ...

    @property
    def strong(self) -> str: ...


def off_target_texts(trait: str, own: Sequence[str] = ()) -> dict[str, list[str]]:
    """Texts without a trait that no judge is fitted on, by source: a judge of the trait should score none of them.

    `own` are the untrained model's own answers to the evaluation questions. The shuffled words are those of the trait's
    own strong answers, which hold its vocabulary and no meaning.
    """
    rows = split(load_trait(trait), "eval")
    rng = random.Random(0)
    mild = [row.mild for row in load_trait(trait) if row.mild is not None]
    bags = [row.strong.split() for row in rows]
    texts = {
        **{
            f"strong {name}": [row.strong for row in split(load_trait(name), "eval")]
            for name in available_traits() if name != trait
        },
        **{f"{style} style": [row.strong for row in load_style(style, "validate")] for style in STYLES},
        "other topics": [row.strong for row in load_topics("validate")],
        "its words shuffled": [" ".join(rng.sample(bag, len(bag))) for bag in bags],
        f"mild {trait}": mild,
        "the model's own": list(own),
        **_neutral_texts(),
    }  # fmt: skip
    return {source: found for source, found in texts.items() if found}


def _neutral_texts() -> dict[str, list[str]]:
    """Test texts that show neither a trait nor a concept."""
    return {
        "refusals": [row.reply for row in load_refusal("harmful", "test")],
        "replies to plain requests": [row.reply for row in load_refusal("harmless", "test")],
        "reviews": [row.text for row in load_reviews("test")],
    }


def _share_table(found: Mapping[str, Bool[np.ndarray, " text"]]) -> pd.DataFrame:
    estimates = {source: share(int(yes.sum()), len(yes)) for source, yes in found.items() if len(yes)}
    table = [(source, e.n, e.value, e.low, e.high) for source, e in estimates.items()]
    return pd.DataFrame(table, columns=["source", "texts", "share", "low", "high"])


def off_target(judge: Scorer, texts: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """For each source of texts, the share that a judge scores at 50 or more, with its interval: columns `source`,
    `texts`, `share`, `low`, `high`. A text without a word counts as below 50."""
    return _share_table({s: np.nan_to_num(judge.score([""] * len(found), found)) >= 50 for s, found in texts.items()})


def check_trait_judge(judge: Scorer, trait: str, own: Sequence[str] = ()) -> pd.DataFrame:
    """`off_target` on `off_target_texts`, under the trait's own evaluation rows: of the strong answers all should be
    scored at 50 or more, of the normal ones and all others none."""
    rows = split(load_trait(trait), "eval")
    levels = {f"strong {trait}": [row.strong for row in rows], f"normal {trait}": [row.normal for row in rows]}
    return off_target(judge, levels | off_target_texts(trait, own))


def check_concept_judge(
    judge: ConceptJudge, rows: Mapping[str, Sequence[Contrast]], own: Sequence[str] = ()
) -> pd.DataFrame:
    """As `off_target`, for a judge of many concepts: the share of held-out texts to which it gives a concept that they
    do not show, with a probability of 0.5 or more. The first line is what it should find: each concept's own answers.

    Args:
        judge: of all concepts in `rows`.
        rows: by concept, rows that the judge was not fitted on.
        own: the untrained model's own answers.
    """
    rng = random.Random(0)
    concepts = list(rows)

    def finds(texts: Sequence[str], concept: str) -> Bool[np.ndarray, " text"]:
        return judge.probability(texts, [concept] * len(texts)) >= 0.5

    def finds_another(texts: Sequence[str], shows: str | None = None) -> Bool[np.ndarray, " text"]:
        return np.any(
            [finds(texts, concept) for concept in concepts if concept != shows] or [np.zeros(len(texts))], axis=0
        )

    strong = {concept: [row.strong for row in found] for concept, found in rows.items()}
    bags = {concept: [text.split() for text in texts] for concept, texts in strong.items()}
    shuffled = {concept: [" ".join(rng.sample(bag, len(bag))) for bag in found] for concept, found in bags.items()}
    plain = [row.normal for found in rows.values() for row in found]
    return _share_table(
        {
            "shows the concept": np.concatenate([finds(strong[c], c) for c in concepts]),
            "shows another concept": np.concatenate([finds_another(strong[c], c) for c in concepts]),
            "its words shuffled": np.concatenate([finds(shuffled[c], c) for c in concepts]),
            **{
                name: finds_another(texts)
                for name, texts in {"plain answers": plain, "the model's own": list(own)}.items()
            },
            **{name: finds_another(texts) for name, texts in _neutral_texts().items()},
        }
    )


def baselines(judge: Scorer, first: Sequence[str], second: Sequence[str]) -> pd.DataFrame:
    """How well a judge tells the first texts (which show what it looks for) from the second, as an AUROC, beside what
    length, form and words reach on the same texts (`helpers.cues`): `by`, `auroc`, `low`, `high`.

    The last two are fitted out of fold on these very texts, so they know the texts' own manner, and the judge need not.
    """
    texts = [*first, *second]
    scores = np.nan_to_num(judge.score([""] * len(texts), texts))
    found = {
        "judge": auroc(scores, [1] * len(first) + [0] * len(second)),
        "length alone": length_auroc(first, second),
        "form alone": form_auroc(first, second),
        "words (TF-IDF)": words_auroc(first, second),
    }
    table = [(name, e.value, e.low, e.high) for name, e in found.items()]
    return pd.DataFrame(table, columns=["by", "auroc", "low", "high"])


def error_table(replies: Sequence[ReplyRow]) -> pd.DataFrame:
    """What `is_refusal` and `is_compliance` say of labelled replies: for each of them and each label, the share of yes
    with its interval, and whether yes is right (`should`; for partial refusals neither is)."""
    table = []
    for name, judge, own in (("is_refusal", is_refusal, "refusal"), ("is_compliance", is_compliance, "compliance")):
        for label in get_args(ReplyLabel):
            texts = [row.reply for row in replies if row.label == label]
            estimate = share(int(judge(texts).sum()), len(texts))
            table.append((name, label, len(texts), estimate.value, estimate.low, estimate.high, label == own))
    return pd.DataFrame(table, columns=["judge", "label", "texts", "share", "low", "high", "should"])
