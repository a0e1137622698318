"""Curves on a grid against scikit-learn, and calibration against a plain loop."""

import numpy as np
from sklearn import metrics as sk

from histokd_jax.evals import curves


def data(seed=0, n=80):
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(0, 2, n - 2)]
    p = rng.integers(1, 20, n) / 20
    return labels, np.stack([1 - p, p], axis=1)


def test_roc_matches_sklearn_between_thresholds():
    y, probs = data()
    fpr, tpr, _ = sk.roc_curve(y, probs[:, 1], drop_intermediate=False)
    got = curves.roc_on_grid(y == 1, probs[:, 1], np.ones(len(y)))
    for x, value in zip(curves.GRID[1:-1], got[1:-1], strict=True):
        i = np.flatnonzero(fpr <= x + 1e-12)[-1]
        share = max(0.0, x - fpr[i]) / (fpr[i + 1] - fpr[i])
        np.testing.assert_allclose(value, tpr[i] + share * (tpr[i + 1] - tpr[i]), atol=1e-9)
    assert got[0] == 0.0 and got[-1] == 1.0


def test_precision_at_recall_matches_sklearn():
    y, probs = data(1)
    precision, recall, _ = sk.precision_recall_curve(y, probs[:, 1])
    got = curves.precision_on_grid(y == 1, probs[:, 1], np.ones(len(y)))
    for value, x in zip(got[1:], curves.GRID[1:], strict=True):
        # sklearn lists recall descending: the last entry that still reaches x is the strictest threshold.
        np.testing.assert_allclose(value, precision[:-1][recall[:-1] >= x - 1e-12][-1], rtol=1e-12)


def test_single_class_gives_nan_curves():
    assert np.isnan(curves.roc_on_grid(np.ones(3, bool), np.ones(3), np.ones(3))).all()
    assert np.isnan(curves.precision_on_grid(np.zeros(3, bool), np.ones(3), np.ones(3))).all()


def test_band_holds_the_mean_curve_and_leaves_out_single_class_folds():
    y, probs = data(2, 90)
    fold = np.arange(90) % 3
    y[fold == 2] = 1
    weights = np.random.default_rng(0).multinomial(90, np.full(90, 1 / 90), size=200).astype(float)
    band = curves.curve_band(curves.roc_on_grid, y, probs, fold, weights)
    rows = [curves.roc_on_grid(y[fold == k] == 1, probs[fold == k, 1], np.ones(30)) for k in (0, 1)]
    np.testing.assert_allclose(band.mean, np.mean(rows, axis=0))
    assert ((band.low <= band.mean + 1e-9) & (band.mean <= band.high + 1e-9)).all()


def test_calibration_matches_a_plain_loop():
    y, probs = data(3, 200)
    probs = np.clip(probs + [0.013, -0.013], 0, 1)  # away from the edges of the bins
    got = curves.calibration(y, probs, bins=5)
    ece = 0.0
    for low in np.arange(5) / 5:
        rows = (probs[:, 1] >= low) & ((probs[:, 1] < low + 0.2) | (low == 0.8))
        ece += rows.mean() * abs(y[rows].mean() - probs[rows, 1].mean())
    np.testing.assert_allclose(got.ece, ece, rtol=1e-9)
    assert got.count.sum() == 200 and ((got.low <= got.observed) & (got.observed <= got.high)).all()


def test_perfectly_calibrated_multiclass_has_zero_ece():
    probs = np.eye(3)[[0, 1, 2, 0]]
    assert curves.calibration(np.array([0, 1, 2, 0]), probs).ece == 0.0
