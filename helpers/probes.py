"""Probes and concept erasure: can a classifier read two classes off activations, and what takes that away?

Everything works on arrays (rows, features) with labels 0 and 1 (or False and True), wherever they come from.

Two things could fool you. A linear probe at chance says that no *linear* reader finds the classes: give `mlp_probe` the
same rows. And with fewer rows than features every labelling of the training rows can be read off them, so only rows
that neither an eraser nor a probe was fitted on count.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from concept_erasure import LeaceFitter
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from helpers.statistics import Estimate, share

Features = Float[np.ndarray, "rows features"]
Labels = Shaped[np.ndarray, " rows"]
Train = Float[np.ndarray, "train features"]
TrainLabels = Shaped[np.ndarray, " train"]
Test = Float[np.ndarray, "test features"]
TestLabels = Shaped[np.ndarray, " test"]


@dataclass(frozen=True)
class Projection:
    """Sets the components along `directions` to zero."""

    directions: Float[np.ndarray, "k features"]
    """Orthonormal."""

    def erase(self, x: Features) -> Features:
        """`x` less its component along each direction. ValueError if it has another number of features."""
        rows = _rows(x, self.directions.shape[1])
        return (rows - (rows @ self.directions.T) @ self.directions).astype(x.dtype)


@dataclass(frozen=True)
class Leace:
    """LEACE's oblique projection about the mean: it reads one direction and moves rows along another."""

    directions: Float[np.ndarray, "k features"]
    """Where rows are moved. For two classes this is the difference of means, whatever the covariance."""
    readout: Float[np.ndarray, "k features"]
    """What it reads, normalised: inverse covariance times the difference of means, as in linear discriminants."""
    mean: Float[np.ndarray, " features"]
    left: Float[np.ndarray, "features k"]
    right: Float[np.ndarray, "k features"]

    def erase(self, x: Features) -> Features:
        """`x - left right (x - mean)`. ValueError if it has another number of features."""
        rows = _rows(x, self.mean.size)
        return (rows - (rows - self.mean) @ self.right.T @ self.left.T).astype(x.dtype)


def orthonormal(vectors: Float[Tensor, "k features"]) -> Float[Tensor, "k features"]:
    """Gram-Schmidt in float64, on the CPU: rows with the span of the linearly independent ones given.

    Each points the way that it did, so that a single vector is only scaled to length 1.
    """
    q, r = torch.linalg.qr(vectors.cpu().double().T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.to(vectors.dtype).contiguous()


def linear_probe(train_x: Train, train_y: TrainLabels, test_x: Test, test_y: TestLabels, seed: int = 0) -> Estimate:
    """Accuracy on the test rows, with its exact interval, of a class-balanced logistic regression.

    Features are standardised by the training rows. ValueError where a set holds one class, NaN or a shape that does
    not fit.
    """
    return _probe(_logistic(seed), train_x, train_y, test_x, test_y)


def linear_scores(
    train_x: Train, train_y: TrainLabels, test_x: Test, test_y: TestLabels, seed: int = 0
) -> Float[np.ndarray, " test"]:
    """What the probe of `linear_probe` says of each test row: log-odds of label 1, which it guesses above 0."""
    rows, labels, test, _ = _standardised(train_x, train_y, test_x, test_y)
    return np.asarray(_logistic(seed).fit(rows, labels).decision_function(test))


def mlp_probe(train_x: Train, train_y: TrainLabels, test_x: Test, test_y: TestLabels, seed: int = 0) -> Estimate:
    """As `linear_probe`, with a network of 256 and 128 hidden units, stopped early on a tenth of the training rows.

    The same seed gives the same accuracy. ValueError for fewer than 20 training rows, else as `linear_probe`.
    """
    if len(train_x) < 20:
        raise ValueError(f"An MLP probe needs 20 or more training rows, as it stops on a tenth; got {len(train_x)}.")
    network = MLPClassifier((256, 128), early_stopping=True, random_state=seed)
    return _probe(network, train_x, train_y, test_x, test_y)


def fit_leace(x: Features, y: Labels) -> Leace:
    """Least-squares concept erasure (https://arxiv.org/abs/2306.03819), by EleutherAI's library, in float64.

    On the rows it was fitted on, the covariance of features and label is then zero, which leaves no linear classifier
    (of convex loss) better than a constant one; among affine maps that do so it moves rows least. The library shrinks
    the covariance that this distance is measured in, so with few rows "least" is an estimate; the guarantee is not.

    The label is one column: two one-hot columns would add an arbitrary second direction.
    """
    rows, labels = _checked(x, y)
    fitter = LeaceFitter.fit(
        torch.from_numpy(rows),
        torch.from_numpy(labels.astype(np.float64)),
        svd_tol=1e-9,  # the library's 0.01 leaves a weak concept in; with one column nothing else is that small
        constrain_cov_trace=False,  # would mix in a projection that is not guarded
    )
    eraser = fitter.eraser
    left, right = eraser.proj_left.numpy(), eraser.proj_right.numpy()
    kept = np.linalg.norm(right, axis=1) > 0
    left, right = left[:, kept], right[kept]
    return Leace(_basis(left.T), _basis(right), rows.mean(axis=0), left, right)


def fit_inlp(
    x: Features, y: Labels, max_iterations: int = 100, stop_accuracy: float = 0.55, seed: int = 0
) -> Projection:
    """Iterative nullspace projection (https://arxiv.org/abs/2004.07667): fit a logistic regression, project out its
    normal, repeat.

    Stops when the regression's accuracy on `x` itself is below `stop_accuracy`, or after `max_iterations`
    directions. With fewer rows than features the accuracy never falls that far, and it removes all it may.
    """
    rows, labels = _checked(x, y)
    if max_iterations < 1 or not 0 < stop_accuracy <= 1:
        raise ValueError(
            f"INLP needs at least one iteration and an accuracy in (0, 1]; got {max_iterations} and {stop_accuracy:g}."
        )
    projection = Projection(np.zeros((0, rows.shape[1])))
    for _ in range(min(max_iterations, rows.shape[1])):
        remaining = projection.erase(rows)
        scale = _scale(remaining)
        standardised = (remaining - remaining.mean(axis=0)) / scale
        model = _logistic(seed).fit(standardised, labels)
        if model.score(standardised, labels) < stop_accuracy:
            break
        normal = projection.erase(projection.erase(model.coef_ / scale))  # twice: once leaves rounding errors
        projection = Projection(np.vstack([projection.directions, _basis(normal)]))
    return projection


def fit_mean_projection(x: Features, y: Labels) -> Projection:
    """Projects out the difference of the class means; ValueError where the means are equal."""
    rows, labels = _checked(x, y)
    gap = rows[labels].mean(axis=0) - rows[~labels].mean(axis=0)
    if not gap.any():
        raise ValueError("The two classes have the same mean, so there is no difference of means to project out.")
    return Projection(_basis(gap[None]))


def _logistic(seed: int) -> LogisticRegression:
    return LogisticRegression(solver="liblinear", class_weight="balanced", max_iter=1000, random_state=seed)


def _probe(model: Any, train_x: Train, train_y: TrainLabels, test_x: Test, test_y: TestLabels) -> Estimate:
    rows, labels, test, truth = _standardised(train_x, train_y, test_x, test_y)
    return share((model.fit(rows, labels).predict(test) == truth).sum(), truth.size)


def _standardised(
    train_x: Train, train_y: TrainLabels, test_x: Test, test_y: TestLabels
) -> tuple[NDArray[np.float64], Bool[np.ndarray, " train"], NDArray[np.float64], Bool[np.ndarray, " test"]]:
    """Both sets of rows, by the mean and the deviation of the training rows, each with its labels."""
    (rows, labels), (test, truth) = _checked(train_x, train_y), _checked(test_x, test_y)
    if rows.shape[1] != test.shape[1]:
        raise ValueError(f"Training rows have {rows.shape[1]} features and test rows {test.shape[1]}; give the same.")
    mean, scale = rows.mean(axis=0), _scale(rows)
    return (rows - mean) / scale, labels, (test - mean) / scale, truth


def _scale(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviation of each feature; infinite, so that it drops out, where an eraser left rounding errors only."""
    deviation = rows.std(axis=0)
    return np.where(deviation > 1e-6 * deviation.max(), deviation, np.inf)


def _basis(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(orthonormal(torch.from_numpy(vectors)))


def _rows(x: NDArray[Any], features: int) -> NDArray[np.float64]:
    if x.ndim != 2 or x.shape[1] != features:
        raise ValueError(f"This eraser was fitted on {features} features; it cannot erase from shape {x.shape}.")
    return x.astype(np.float64)


def _checked(x: Features, y: Labels) -> tuple[NDArray[np.float64], Bool[np.ndarray, " rows"]]:
    rows, labels = np.asarray(x, dtype=np.float64), np.asarray(y)
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        raise ValueError(
            f"Rows of features and one label for each are needed; got shapes {rows.shape}, {labels.shape}."
        )
    if not np.isfinite(rows).all():
        raise ValueError(f"{int((~np.isfinite(rows)).any(axis=1).sum())} of {len(rows)} rows hold NaN or infinity.")
    if set(np.unique(labels)) != {0, 1}:
        found = ", ".join(str(label) for label in np.unique(labels)[:4]) or "none"
        raise ValueError(f"Labels must be 0 and 1, with rows of both classes; got {found}.")
    return rows, labels.astype(bool)
