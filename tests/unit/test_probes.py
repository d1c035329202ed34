import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from helpers.probes import fit_inlp, fit_leace, fit_mean_projection, linear_probe, linear_scores, mlp_probe, orthonormal

FITS = {"leace": fit_leace, "inlp": fit_inlp, "mean projection": fit_mean_projection}
SHAPE = np.random.default_rng(99).normal(size=(12, 12))
"""What turns round Gaussians into ones with correlated features."""


def gaussians(rows, features=12, distance=2.0, seed=0, shape=None):
    """Two classes in turns, `distance` standard deviations apart along the first feature; then stretched by `shape`."""
    x = np.random.default_rng(seed).normal(size=(rows, features))
    y = np.arange(rows) % 2
    x[:, 0] += distance * (y - 0.5)
    return (x if shape is None else x @ shape), y


# Probes


def test_a_linear_probe_reaches_the_accuracy_that_two_gaussians_allow():
    truth = stats.norm.cdf(1)  # the classes are two standard deviations apart
    for shape in (None, SHAPE):
        estimate = linear_probe(*gaussians(4000, shape=shape), *gaussians(2000, seed=1, shape=shape))
        assert estimate.low <= truth <= estimate.high
        assert estimate.n == 2000


def test_a_probe_does_not_mind_features_of_very_different_scales():
    scale = 10.0 ** np.arange(-3, 3).repeat(2)
    (x, y), (test_x, test_y) = gaussians(4000), gaussians(2000, seed=1)
    scaled = linear_probe(x * scale, y, test_x * scale, test_y)
    assert scaled == linear_probe(x, y, test_x, test_y)


def test_scores_of_a_linear_probe_are_right_as_often_as_it_is_and_rank_the_rows():
    data = (*gaussians(400), *gaussians(200, seed=1))
    scores = linear_scores(*data)
    assert linear_probe(*data).value == ((scores > 0) == data[3]).mean()
    assert np.corrcoef(scores, data[2][:, 0])[0, 1] > 0.9


def test_probes_of_pure_noise_are_at_chance_within_their_interval():
    noise, test_noise = gaussians(1000, distance=0), gaussians(600, distance=0, seed=1)
    for probe in (linear_probe, mlp_probe):
        estimate = probe(*noise, *test_noise)
        assert estimate.low <= 0.5 <= estimate.high


def test_classes_that_differ_in_spread_alone_are_seen_by_the_mlp_and_not_by_the_linear_probe():
    def rings(seed):
        x, y = gaussians(2000, features=4, distance=0, seed=seed)
        return x * np.where(y, 3.0, 1.0)[:, None], y

    linear, mlp = linear_probe(*rings(0), *rings(1)), mlp_probe(*rings(0), *rings(1))
    assert linear.value < 0.6
    assert mlp.low > 0.8


def test_a_rare_class_is_not_drowned_by_a_frequent_one():
    (x, y), (test_x, test_y) = gaussians(4000), gaussians(2000, seed=1)
    keep = (y == 0) | (np.arange(4000) % 20 == 1)  # nine in ten have label 0
    rare = test_y == 1
    both = linear_probe(x[keep], y[keep], test_x, test_y)
    assert 0.8 < both.value < 0.88
    assert rare.mean() == 0.5


@pytest.mark.parametrize("probe", [linear_probe, mlp_probe])
def test_a_probe_gives_the_same_for_the_same_seed(probe):
    data = (*gaussians(200), *gaussians(100, seed=1))
    assert probe(*data, seed=3) == probe(*data, seed=3)


# Erasers


@pytest.mark.parametrize(("rows", "features"), [(500, 12), (60, 12), (40, 100)])
def test_after_leace_no_logistic_regression_beats_the_majority_on_the_rows_it_was_fitted_on(rows, features):
    x, y = gaussians(rows, features, shape=SHAPE if features == 12 else None)
    y = np.where(np.arange(rows) % 5 == 0, 0, y)  # 3 in 5 have label 0
    assert x.dtype == np.float64
    erased = fit_leace(x, y).erase(x)
    covariance = (erased - erased.mean(axis=0)).T @ (y - y.mean()) / rows
    assert np.abs(covariance).max() < 1e-12
    for c in (1e-2, 1.0, 1e4):
        model = LogisticRegression(C=c, max_iter=5000, tol=1e-8)
        before, after = model.fit(x, y).score(x, y), model.fit(erased, y).score(erased, y)
        assert after <= max(y.mean(), 1 - y.mean()) < before
        constant = log_loss(y, np.full(rows, y.mean()))
        assert log_loss(y, model.predict_proba(erased)[:, 1]) >= constant - 1e-9


@pytest.mark.parametrize("name", FITS)
def test_what_was_erased_stays_erased_and_is_not_found_by_a_linear_probe_on_other_rows(name):
    x, y = gaussians(4000, shape=SHAPE)
    eraser = FITS[name](x, y)
    other = gaussians(2000, seed=1, shape=SHAPE)
    erased = eraser.erase(x)
    np.testing.assert_allclose(eraser.erase(erased), erased, atol=1e-10)
    assert linear_probe(erased, y, eraser.erase(other[0]), other[1]).low < 0.53
    before, after = (np.linalg.norm(rows[y == 1].mean(0) - rows[y == 0].mean(0)) for rows in (x, erased))
    assert after < (0.5 if name == "inlp" else 1e-10) * before


@pytest.mark.parametrize("name", FITS)
def test_directions_are_orthonormal_and_hold_all_that_is_removed(name):
    x, y = gaussians(600, shape=SHAPE)
    eraser = FITS[name](x, y)
    directions = eraser.directions
    np.testing.assert_allclose(directions @ directions.T, np.eye(len(directions)), atol=1e-10)
    removed = x - eraser.erase(x)
    removed = removed - removed.mean(axis=0)
    np.testing.assert_allclose(removed - removed @ directions.T @ directions, 0, atol=1e-9)
    assert np.abs(removed).max() > 0.1


def test_leace_moves_along_the_difference_of_means_and_reads_the_linear_discriminant():
    x, y = gaussians(200_000, shape=SHAPE)
    difference = SHAPE[0] / np.linalg.norm(SHAPE[0])
    discriminant = np.linalg.solve(SHAPE.T @ SHAPE, SHAPE[0])
    eraser = fit_leace(x, y)
    assert eraser.directions.shape == eraser.readout.shape == (1, 12)
    assert abs(eraser.directions[0] @ difference) > 0.999
    assert abs(eraser.readout[0] @ discriminant) / np.linalg.norm(discriminant) > 0.99
    assert abs(difference @ discriminant) / np.linalg.norm(discriminant) < 0.9  # two different directions
    np.testing.assert_allclose(np.abs(fit_mean_projection(x, y).directions), np.abs(eraser.directions), atol=1e-6)


def test_leace_moves_rows_less_than_the_mean_projection_in_the_distance_that_it_minimises():
    x, y = gaussians(4000, shape=SHAPE)
    x = x - x.mean(axis=0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(x.T)))
    moved = {
        name: np.square((x - FITS[name](x, y).erase(x)) @ whiten.T).sum(axis=1).mean()
        for name in ("leace", "mean projection")
    }
    assert moved["leace"] == pytest.approx(1, abs=0.05)  # one of twelve whitened features
    assert moved["leace"] < moved["mean projection"]


def test_leace_leaves_rows_alone_whose_classes_have_equal_means():
    x = np.random.default_rng(0).normal(size=(50, 4))
    x, y = np.vstack([x, x]), np.repeat([0, 1], 50)
    eraser = fit_leace(x, y)
    assert eraser.directions.shape == (0, 4)
    np.testing.assert_array_equal(eraser.erase(x), x)


def test_a_weak_concept_is_erased_too():
    x, y = gaussians(40_000, 3, distance=0.01)
    erased = fit_leace(x, y).erase(x)
    np.testing.assert_allclose(erased[y == 0].mean(axis=0), erased[y == 1].mean(axis=0), atol=1e-12)


def test_inlp_stops_when_nothing_is_left_to_find():
    x, y = gaussians(4000)
    eraser = fit_inlp(x, y)
    assert 1 <= len(eraser.directions) < 6
    assert abs(eraser.directions[0, 0]) > 0.99  # the feature that tells the classes apart goes first
    assert linear_probe(eraser.erase(x), y, eraser.erase(x), y).value < 0.55


def test_inlp_stops_at_its_maximum_and_at_the_number_of_features():
    x, y = gaussians(40, 100)
    assert fit_inlp(x, y, max_iterations=7).directions.shape == (7, 100)
    x, y = gaussians(100, 3, distance=1.0)
    copies = np.hstack([x, x])  # three directions hold everything that six features say
    eraser = fit_inlp(copies, y, stop_accuracy=0.5)
    assert len(eraser.directions) <= 6
    np.testing.assert_allclose(eraser.directions @ eraser.directions.T, np.eye(len(eraser.directions)), atol=1e-10)


def test_inlp_on_noise_removes_nothing():
    x, y = gaussians(20_000, 3, distance=0)
    eraser = fit_inlp(x, y)
    assert eraser.directions.shape == (0, 3)
    np.testing.assert_array_equal(eraser.erase(x), x)


def test_erasing_keeps_single_precision_and_takes_labels_of_truth_values():
    x, y = gaussians(300)
    for fit in FITS.values():
        eraser = fit(x.astype(np.float32), y.astype(bool))
        assert eraser.erase(x.astype(np.float32)).dtype == np.float32
        np.testing.assert_allclose(eraser.directions, fit(x, y).directions, atol=1e-4)


# Directions


def test_orthonormal_keeps_span_and_sense():
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = orthonormal(rows)
    torch.testing.assert_close(found @ found.T, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows @ found.T @ found, rows, atol=1e-5, rtol=1e-5)
    assert ((rows * found).sum(1) > 0).all()
    torch.testing.assert_close(found[0], rows[0] / rows[0].norm())


# Bad input


@pytest.mark.parametrize("fit", FITS.values())
def test_one_class_or_strange_labels_are_one_sentence(fit):
    x, y = gaussians(20)
    with pytest.raises(ValueError, match=r"^Labels must be 0 and 1, with rows of both classes; got 1\.$"):
        fit(x, np.ones(20, dtype=int))
    with pytest.raises(ValueError, match=r"got 1, 2\.$"):
        fit(x, y + 1)
    with pytest.raises(ValueError, match=r"got none\.$"):
        fit(x[:0], y[:0])


@pytest.mark.parametrize("fit", FITS.values())
def test_nan_and_shapes_that_do_not_fit_are_one_sentence(fit, untyped):
    x, y = gaussians(20)
    bad = x.copy()
    bad[3, 1], bad[3, 2], bad[7, 0] = np.nan, np.inf, np.nan
    with pytest.raises(ValueError, match=r"^2 of 20 rows hold NaN or infinity\.$"):
        fit(bad, y)
    with pytest.raises(ValueError, match=r"^Rows of features and one label for each are needed; got shapes"):
        fit(x, y[:-1])
    with pytest.raises(ValueError, match=r"got shapes \(20,\), \(20,\)\.$"):
        fit(x[:, 0], y)


def test_probes_check_both_sets(untyped):
    (x, y), (test_x, test_y) = gaussians(40), gaussians(20, seed=1)
    with pytest.raises(ValueError, match=r"^Training rows have 12 features and test rows 11; give the same\.$"):
        linear_probe(x, y, test_x[:, 1:], test_y)
    with pytest.raises(ValueError, match="both classes; got 0"):
        linear_probe(x, y, test_x, 0 * test_y)
    with pytest.raises(ValueError, match=r"^An MLP probe needs 20 or more training rows, .* got 19\.$"):
        mlp_probe(x[:19], y[:19], test_x, test_y)


def test_an_eraser_refuses_rows_of_another_width_and_settings_that_make_no_sense(untyped):
    x, y = gaussians(40)
    for fit in FITS.values():
        with pytest.raises(ValueError, match=r"fitted on 12 features; it cannot erase from shape \(40, 11\)\.$"):
            fit(x, y).erase(x[:, 1:])
    with pytest.raises(ValueError, match=r"at least one iteration .* got 0 and 0\.55\.$"):
        fit_inlp(x, y, max_iterations=0)
    with pytest.raises(ValueError, match=r"got 100 and 2\.$"):
        fit_inlp(x, y, stop_accuracy=2.0)
    with pytest.raises(ValueError, match="have the same mean"):
        fit_mean_projection(np.ones((4, 2)), np.array([0, 1, 0, 1]))
