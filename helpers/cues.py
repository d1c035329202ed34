"""What gives a contrast away without its meaning: the length of the texts, their form, their words.

A vector, probe, filter or judge that tells two kinds of text apart may have learnt nothing but that one kind is
longer. So beside each stands what these three baselines reach on the same texts, as an AUROC out of fold: features are
fitted on four fifths of the questions and scored on the last, and both texts of a question are in one fold.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from helpers.statistics import Estimate, auroc

FOLDS = 5
COMMON = 3
"""Texts that must share a first word before it counts as an opening."""


def words(text: str) -> int:
    """The number of words between spaces."""
    return len(text.split())


def form(text: str) -> dict[str, float]:
    """What can be counted without reading: sentences, punctuation, length of words, capitals, the first word."""
    count = max(words(text), 1)
    marks = {f"has {mark}": float(text.count(mark)) for mark in ",;:?!-'\"("}
    return {
        "words": float(count),
        "sentences": float(len(re.findall(r"[.!?]+(?:\s|$)", text))),
        "letters a word": sum(c.isalpha() for c in text) / count,
        "capitals": float(sum(word[0] in string.ascii_uppercase for word in text.split())),
        "question": float(text.rstrip().endswith("?")),
        f"opens with {text.split()[0].lower().strip(string.punctuation) if text.split() else ''}": 1.0,
        **marks,
    }


def _out_of_fold(
    pipeline: Any, texts: Sequence[Any], truth: Bool[np.ndarray, " text"], groups: Sequence[str]
) -> Estimate:
    scores = np.empty(len(texts))
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for train, test in folds.split(np.zeros(len(texts)), truth, groups):
        pipeline.fit([texts[i] for i in train], truth[train])
        # Log-odds of one fold and another are on different scales: ranks within a fold are not
        found = pipeline.decision_function([texts[i] for i in test])
        scores[test] = found.argsort().argsort() / len(test)
    return auroc(scores, truth)


def _cases(
    first: Sequence[str], second: Sequence[str], groups: Sequence[str] | None
) -> tuple[list[str], Bool[np.ndarray, " text"], list[str]]:
    if min(len(first), len(second)) < FOLDS:
        raise ValueError(f"A contrast needs at least {FOLDS} texts of each kind; got {len(first)} and {len(second)}.")
    if groups is None:  # paired where they are equally many
        groups = [str(i) for i in range(len(first))] + [
            str(i) if len(first) == len(second) else f"second {i}" for i in range(len(second))
        ]
    return [*first, *second], np.arange(len(first) + len(second)) < len(first), list(groups)


def length_auroc(first: Sequence[str], second: Sequence[str]) -> Estimate:
    """How well the number of words alone tells the first texts from the second: 0.5 is not at all, above or below."""
    texts, truth, _ = _cases(first, second, None)
    found = auroc([words(text) for text in texts], truth)
    if found.value >= 0.5:
        return found
    return Estimate(1 - found.value, 1 - found.high, 1 - found.low, found.n, found.level)


def form_auroc(first: Sequence[str], second: Sequence[str], groups: Sequence[str] | None = None) -> Estimate:
    """How well form (`form`: length, sentences, punctuation, openings) tells them, out of fold.

    `groups` names the question of each text, of the first and then of the second; by default text i of both belongs to
    question i where they are equally many.
    """
    texts, truth, groups = _cases(first, second, groups)
    opens = [next(k for k in form(text) if k.startswith("opens")) for text in texts]
    common = {name for name in set(opens) if opens.count(name) >= COMMON}
    counted = [{k: v for k, v in form(text).items() if not k.startswith("opens") or k in common} for text in texts]
    pipeline = make_pipeline(DictVectorizer(sparse=False), StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
    return _out_of_fold(pipeline, counted, truth, groups)


def words_auroc(first: Sequence[str], second: Sequence[str], groups: Sequence[str] | None = None) -> Estimate:
    """How well the words tell them (TF-IDF of words, logistic regression), out of fold; `groups` as in `form_auroc`."""
    texts, truth, groups = _cases(first, second, groups)
    return _out_of_fold(_by_words(), texts, truth, groups)


def word_scores(
    train: Sequence[str], train_labels: Bool[np.ndarray, " train"], test: Sequence[str]
) -> Float[np.ndarray, " test"]:
    """What the words of each test text say of its label, learnt from other texts: log-odds of true."""
    return np.asarray(_by_words().fit(list(train), train_labels).decision_function(list(test)))


def _by_words() -> Any:
    return make_pipeline(
        FunctionTransformer(list),
        TfidfVectorizer(token_pattern=r"\b\w+\b", min_df=2, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=5000),
    )
