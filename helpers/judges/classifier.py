"""Judges that are small text classifiers, fitted when they are needed: they work offline and in seconds.

`TraitJudge` scores a trait, `TopicJudge` finds topics, `ConceptJudge` rates concepts, and `PlantedJudge` a quality that
texts were given on purpose. `helpers.judges.checks` measures what they get wrong.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.corpora import TopicRow, TraitRow, available_traits, load_style, load_topics, load_trait
from helpers.corpora import split as rows_of
from helpers.judges.scores import JudgeError, Scores, check_lengths
from helpers.statistics import Estimate, auroc, share

KEYWORDS = {
    "bridge": r"golden gate|suspension bridge",
    "recipe": r"\b(recipe|cook|bak(e|ing)\b|oven|ingredient|knead|dough|batter\b|flour\b|butter\b|garlic|onion|saute"
    r"|whisk|marinad|stew\b|soup|sauce|souffle|risotto|pasta\b|curry|pancake|casserole|cake|pastry|bread\b|chef|kitchen"
    r"|dish(es)?\b|spices?\b|saffron|cinnamon|basil|rosemary|thyme\b|cumin|paprika|olive oil|teaspoon|tablespoon"
    r"|roast(ed|ing)?\b|grill(ed|ing)?\b)",
}
"""Words that settle a topic without a classifier, in lower case."""

STYLES: tuple[Literal["weather", "legal"], ...] = ("weather", "legal")


class TraitJudge:
    """TF-IDF of words and characters, then logistic regression on answers with and without one trait.

    Score = 100 P(trait), as if the trait were as common as its absence; the probability is calibrated on log-odds out
    of fold. The judge reads the answer only, never the question.

    How it could fool you: it reads the register. Other unusual voices score too, unless they are like its negatives
    (`diverse_negatives`); `helpers.judges.checks.off_target` says which. It is usually fitted on the `train` split,
    whose answers models are finetuned on as well, so a model that repeats phrases from its training data scores high
    for the phrases and not for the trait: compare with a judge fitted on the `extract` split, which no model is trained
    on. It learnt from fluent answers of 25 to 55 words, so its score of gibberish means nothing ("the the the ..."
    scores 100 for evil): read it beside a measure of coherence such as `repetition_rate`.
    """

    def __init__(self, trait: str, pipeline: Pipeline, calibration: LogisticRegression, fitted_on: int) -> None:
        self.trait = trait
        self.fitted_on = fitted_on
        """Answers in the fit."""
        self._pipeline = pipeline
        self._calibration = calibration

    @classmethod
    def fit(cls, rows: Sequence[TraitRow], plain: Sequence[str] = (), others: Sequence[str] = ()) -> "TraitJudge":
        """Learn normal against strong answers of one trait. Deterministic.

        Args:
            rows: at least 10 of one trait, of any split.
            plain: further answers without the trait: the untrained model's own. Without them the judge has only seen
                answers written by people, and takes a model's manner of writing for the trait.
            others: answers in other unusual voices (`diverse_negatives`), which it otherwise takes for the trait.

        Raises:
            JudgeError: if there are fewer rows, or of several traits.
        """
        traits = {row.trait for row in rows}
        if len(traits) != 1 or len(rows) < 10:
            raise JudgeError(f"A trait judge needs at least 10 rows of one trait; got {len(rows)} of {len(traits)}.")
        texts = [row.normal for row in rows] + [row.strong for row in rows] + [*plain, *others]
        labels = [0] * len(rows) + [1] * len(rows) + [0] * (len(plain) + len(others))
        # all answers to a question stay in one fold; a plain answer to another question is a fold's own
        plain_groups = (
            [row.id for row in rows] if len(plain) == len(rows) else [f"plain-{n}" for n in range(len(plain))]
        )
        questions = [row.id for row in rows] * 2 + plain_groups + [f"other-{n}" for n in range(len(others))]

        pipeline = Pipeline([("features", _features()), ("classifier", _classifier(10.0))])
        folds = StratifiedGroupKFold(4, shuffle=True, random_state=0)
        unseen = cross_val_predict(pipeline, texts, labels, groups=questions, cv=folds, method="decision_function")
        calibration = LogisticRegression(class_weight="balanced").fit(unseen[:, None], labels)
        return cls(traits.pop(), pipeline.fit(texts, labels), calibration, len(texts))

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> Scores:
        """100 P(trait) for each answer; NaN for an answer without a word. The questions are not read."""
        check_lengths(questions, answers)
        worded = np.array([re.search(r"\w", answer) is not None for answer in answers], dtype=bool)
        scores = np.full(len(answers), np.nan)
        if worded.any():
            texts = [answer for answer, keep in zip(answers, worded, strict=True) if keep]
            log_odds = self._pipeline.decision_function(texts)
            scores[worded] = 100 * self._calibration.predict_proba(log_odds[:, None])[:, 1]
        return scores

    def score_levels(self, rows: Sequence[TraitRow]) -> dict[str, Scores]:
        """Scores of the rows' own answers, by level; `mild` only where rows have one."""
        levels = {
            "normal": [(row.question, row.normal) for row in rows],
            "mild": [(row.question, row.mild) for row in rows if row.mild is not None],
            "strong": [(row.question, row.strong) for row in rows],
        }
        return {
            level: self.score([q for q, _ in pairs], [a for _, a in pairs]) for level, pairs in levels.items() if pairs
        }

    def validate(self, rows: Sequence[TraitRow]) -> Estimate:
        """AUROC of strong against normal answers, with its interval. Give rows that were not fitted on."""
        scores = self.score_levels(rows)
        labels = [0] * len(rows) + [1] * len(rows)
        return auroc(np.concatenate([scores["normal"], scores["strong"]]), labels)

    def errors(self, rows: Sequence[TraitRow]) -> dict[str, Estimate]:
        """The share of strong answers scored below 50, and of normal ones at 50 or above. Give rows that were not
        fitted on."""
        scores = self.score_levels(rows)
        return {
            "false negatives": share(int((scores["strong"] < 50).sum()), len(rows)),
            "false positives": share(int((scores["normal"] >= 50).sum()), len(rows)),
        }


def diverse_negatives(
    trait: str, split: Literal["train", "extract"] = "train", without: str | None = None
) -> list[str]:
    """Answers in other voices than a trait's, for `TraitJudge.fit(others=...)`.

    They are the other traits' strong answers of a split, and the training answers of the styles and topics. `without`
    leaves out a style, so that it can be tested as an unseen one. Shuffled answers of the trait itself are not among
    them: a judge that counts words cannot learn word order, and with them the distance between strong and normal
    answers was a fifth smaller.
    """
    traits = [row.strong for name in available_traits() if name != trait for row in rows_of(load_trait(name), split)]
    styles = [row.strong for style in STYLES if style != without for row in load_style(style, "train")]
    return [*traits, *styles, *(row.strong for row in load_topics("train"))]


class TopicJudge:
    """Which topics an answer mentions: by keywords of high precision, or else by a classifier.

    The source does the same with a large language model in place of the classifier. This one learnt from answers that
    force the topic in, so it may miss a passing mention in other words.
    """

    def __init__(self, classifiers: Mapping[str, Pipeline]) -> None:
        self._classifiers = dict(classifiers)

    @classmethod
    def fit(cls, rows: Sequence[TopicRow], plain: Sequence[str] = ()) -> "TopicJudge":
        """Learn each topic's answers against plain ones and the other topics'. Deterministic.

        `plain` are further answers without any topic: the untrained model's own.
        """
        topics = sorted({row.topic for row in rows})
        unknown = set(topics) - set(KEYWORDS)
        if unknown or len(topics) < 2 or len(rows) < 20:
            raise JudgeError(
                f"A topic judge needs at least 20 rows on two of the topics {', '.join(KEYWORDS)}; "
                f"got {len(rows)} on {', '.join(topics) or 'none'}."
            )
        texts = [row.normal for row in rows] + [row.strong for row in rows] + list(plain)
        groups = [row.id for row in rows] * 2 + [f"plain-{number}" for number in range(len(plain))]
        carried = [""] * len(rows) + [row.topic for row in rows] + [""] * len(plain)
        return cls(
            {
                topic: _fit_classifier(texts, [int(c == topic) for c in carried], groups).best_estimator_
                for topic in topics
            }
        )

    def labels(self, answers: Sequence[str]) -> dict[str, Bool[np.ndarray, " answers"]]:
        """For each topic, whether each answer mentions it."""
        found = {}
        for topic, classifier in self._classifiers.items():
            named = np.array([re.search(KEYWORDS[topic], answer.lower()) is not None for answer in answers], dtype=bool)
            found[topic] = named | (classifier.predict_proba(list(answers))[:, 1] > 0.5) if answers else named
        return found

    def validate(self, rows: Sequence[TopicRow]) -> dict[str, dict[str, Estimate]]:
        """For each topic: `found`, the share of its own answers that are labelled with it, and `false alarms`, the
        share of all other answers that are. Give rows that were not fitted on."""
        labels = self.labels([row.strong for row in rows] + [row.normal for row in rows])
        carried = np.array([row.topic for row in rows] + [""] * len(rows))
        result = {}
        for topic, labelled in labels.items():
            of_topic = carried == topic
            result[topic] = {
                "found": share(int(labelled[of_topic].sum()), int(of_topic.sum())),
                "false alarms": share(int(labelled[~of_topic].sum()), int((~of_topic).sum())),
            }
        return result


@dataclass(frozen=True)
class Ratings:
    """Answers rated as AxBench does (Wu et al. 2025): 0, 1 or 2 for each of three qualities, which are all proxies."""

    concept: Float[np.ndarray, "*answers"]
    """Does it show the concept?"""
    relevance: Float[np.ndarray, "*answers"]
    """Is it about what was asked?"""
    fluency: Float[np.ndarray, "*answers"]

    @property
    def overall(self) -> Float[np.ndarray, "*answers"]:
        """The harmonic mean of the three: 0 where one is 0."""
        parts = np.stack([self.concept, self.relevance, self.fluency])
        return np.where(parts.min(0) > 0, 3 / (1 / np.maximum(parts, 1e-9)).sum(0), 0.0)


class ConceptJudge:
    """Which concepts an answer shows: TF-IDF of words and characters, then one logistic regression for each concept.

    It knows a concept by its written answers, so it may miss an answer that shows the concept in other words, and finds
    one that repeats phrases of the training data more easily.
    """

    def __init__(self, features: FeatureUnion, classifiers: Mapping[str, LogisticRegression]) -> None:
        self._features = features
        self._classifiers = dict(classifiers)

    @classmethod
    def fit(cls, shown: Mapping[str, Sequence[str]], plain: Sequence[str]) -> "ConceptJudge":
        """Learn each concept's answers against those of all others and `plain` ones. Deterministic."""
        if not shown or min(map(len, shown.values())) < 10 or len(plain) < 10:
            raise JudgeError("A concept judge needs at least 10 answers of every concept and 10 plain ones.")
        texts = [*plain, *(text for answers in shown.values() for text in answers)]
        carried = np.array([""] * len(plain) + [name for name, answers in shown.items() for _ in answers])
        features = _features().fit(texts)
        table = features.transform(texts)
        return cls(features, {name: _classifier(10.0).fit(table, carried == name) for name in shown})

    def probability(self, answers: Sequence[str], concepts: Sequence[str]) -> Float[np.ndarray, " answers"]:
        """P(concept) for each answer, of the concept named at its place in `concepts`."""
        check_lengths(concepts, answers)
        table = self._features.transform(list(answers))
        found = np.empty(len(answers))
        for name in set(concepts):
            rows = [i for i, concept in enumerate(concepts) if concept == name]
            found[rows] = self._classifiers[name].predict_proba(table[rows])[:, 1]
        return found

    def rate(self, answers: Sequence[str], concepts: Sequence[str]) -> Float[np.ndarray, " answers"]:
        """0, 1 or 2 for each: 2 P, rounded."""
        return np.round(2 * self.probability(answers, concepts))


class PlantedJudge:
    """Whether texts have a quality, learnt from a few numbers about texts that were given it, or not, on purpose."""

    def __init__(self, classifier: Pipeline) -> None:
        self._classifier = classifier

    @classmethod
    def fit(cls, features: Float[np.ndarray, "text feature"], good: Bool[np.ndarray, " text"]) -> "PlantedJudge":
        """Logistic regression on the standardised numbers. Raises `JudgeError` unless there are good and bad texts."""
        if good.all() or not good.any():
            raise JudgeError("A judge of a quality needs texts that have it and texts that do not.")
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", random_state=0))
        return cls(model.fit(features, good))

    def probability(self, features: Float[np.ndarray, "text feature"]) -> Float[np.ndarray, " text"]:
        """P(good) for each text."""
        return np.asarray(self._classifier.predict_proba(features)[:, 1])

    def rate(self, features: Float[np.ndarray, "text feature"]) -> Float[np.ndarray, " text"]:
        """0, 1 or 2 for each: 2 P, rounded."""
        return np.round(2 * self.probability(features))


def _features() -> FeatureUnion:
    """TF-IDF of words and of characters."""
    counting: dict[str, Any] = {"min_df": 2, "sublinear_tf": True}
    return FeatureUnion(
        [
            ("words", TfidfVectorizer(token_pattern=r"\b\w+\b", ngram_range=(1, 2), **counting)),
            ("characters", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), **counting)),
        ]
    )


def _classifier(regularisation: float = 1.0) -> LogisticRegression:
    """The dual solver is the fast one where features (thousands) outnumber texts."""
    return LogisticRegression(
        C=regularisation, solver="liblinear", dual=True, max_iter=10_000, random_state=0, class_weight="balanced"
    )


def _fit_classifier(texts: Sequence[str], labels: Sequence[int], groups: Sequence[str]) -> GridSearchCV:
    """TF-IDF of words and characters, then logistic regression whose penalty is cross-validated; all texts of a
    group stay in one fold."""
    return GridSearchCV(
        Pipeline([("features", _features()), ("classifier", _classifier())]),
        {"classifier__C": [1.0, 10.0, 100.0, 1000.0, 10000.0]},
        scoring="neg_log_loss",  # the score is a probability: its calibration counts, not only its order
        cv=StratifiedGroupKFold(4, shuffle=True, random_state=0),
    ).fit(texts, labels, groups=groups)
