"""Metrics against scikit-learn on data with ties, against repeated rows, and at the edges."""

import numpy as np
import pytest
from sklearn import metrics as sk

from histokd_jax.evals import classification as c


def tied_data(seed: int, n: int = 60, num_classes: int = 2):
    rng = np.random.default_rng(seed)
    labels = np.r_[np.arange(num_classes), rng.integers(0, num_classes, n - num_classes)]
    raw = rng.integers(1, 6, (n, num_classes)).astype(float)
    return labels, raw / raw.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_mkd_section8_binary_metrics_match_sklearn(seed):
    y, probs = tied_data(seed)
    pred = (probs[:, 1] > 0.5).astype(int)
    want = {
        "auroc": sk.roc_auc_score(y, probs[:, 1]),
        "average_precision": sk.average_precision_score(y, probs[:, 1]),
        "accuracy": sk.accuracy_score(y, pred),
        "balanced_accuracy": sk.balanced_accuracy_score(y, pred),
        "f1": sk.f1_score(y, pred),
        "precision": sk.precision_score(y, pred),
        "recall": sk.recall_score(y, pred),
        "specificity": sk.recall_score(y, pred, pos_label=0),
        "cohen_kappa": sk.cohen_kappa_score(y, pred),
        "macro_f1": sk.f1_score(y, pred, average="macro"),
        "brier": sk.brier_score_loss(y, probs[:, 1]),
    }
    got = c.classification_metrics(y, probs)
    assert list(got) == list(c.BINARY_METRICS) and set(want) == set(got)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
def test_multiclass_metrics_match_sklearn(seed):
    y, probs = tied_data(seed, num_classes=4)
    pred = probs.argmax(axis=1)
    want = {
        "auroc": sk.roc_auc_score(y, probs, multi_class="ovr", average="macro"),
        "average_precision": np.mean([sk.average_precision_score(y == k, probs[:, k]) for k in range(4)]),
        "accuracy": sk.accuracy_score(y, pred),
        "balanced_accuracy": sk.balanced_accuracy_score(y, pred),
        "macro_f1": sk.f1_score(y, pred, average="macro"),
        "weighted_f1": sk.f1_score(y, pred, average="weighted"),
        "cohen_kappa": sk.cohen_kappa_score(y, pred),
        "quadratic_kappa": sk.cohen_kappa_score(y, pred, weights="quadratic"),
        "brier": np.mean(((probs - np.eye(4)[y]) ** 2).sum(axis=1)),
    }
    got = c.classification_metrics(y, probs)
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_weights_equal_repeated_rows(num_classes):
    y, probs = tied_data(7, num_classes=num_classes)
    weights = np.random.default_rng(1).integers(0, 4, (5, len(y)))
    got = c.classification_metrics(y, probs, weights)
    for b, row in enumerate(weights):
        rows = np.repeat(np.arange(len(y)), row)
        assert len(np.unique(y[rows])) == num_classes
        want = c.classification_metrics(y[rows], probs[rows])
        for name in want:
            np.testing.assert_allclose(got[name][b], want[name], rtol=1e-12, err_msg=name)


def test_auroc_is_the_probability_of_a_correct_order_with_ties_at_one_half():
    y, probs = tied_data(3)
    pos, neg = probs[y == 1, 1], probs[y == 0, 1]
    pairs = (pos[:, None] > neg[None, :]) + 0.5 * (pos[:, None] == neg[None, :])
    np.testing.assert_allclose(c.auroc(y == 1, probs[:, 1]), pairs.mean(), rtol=1e-12)
    assert c.auroc(y == 1, np.ones(len(y))) == 0.5


@pytest.mark.parametrize("label", [0, 1])
def test_single_class_fold_is_nan_with_a_reason_never_zero(label):
    y, probs = np.full(4, label), np.array([[0.6, 0.4], [0.2, 0.8], [0.7, 0.3], [0.1, 0.9]])
    got = c.classification_metrics(y, probs)
    assert np.isnan(got["auroc"])
    assert c.undefined_reason("auroc", y, probs) == f"only class {label} occurs (4 rows)"
    assert got["accuracy"] == 0.5 and c.undefined_reason("accuracy", y, probs) == ""
    assert np.isnan(got["recall"]) == (label == 0)
    assert np.isnan(got["specificity"]) == (label == 1)
    assert np.isnan(got["average_precision"]) == (label == 0)


def test_precision_is_undefined_when_nothing_is_predicted_positive_but_f1_is_zero():
    y, probs = np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]])
    got = c.classification_metrics(y, probs)
    assert np.isnan(got["precision"]) and got["f1"] == 0.0
    assert c.undefined_reason("precision", y, probs) == "no row is predicted positive"


def test_kappa_is_undefined_when_chance_agreement_is_one():
    y, probs = np.zeros(3, int), np.tile([0.9, 0.1], (3, 1))
    assert np.isnan(c.classification_metrics(y, probs)["cohen_kappa"])
    assert c.undefined_reason("cohen_kappa", y, probs).startswith("only class 0")


def test_probability_of_one_half_is_class_0():
    got = c.classification_metrics(np.array([0, 1]), np.full((2, 2), 0.5))
    assert got["recall"] == 0.0 and got["specificity"] == 1.0


def test_absent_class_is_left_out_of_macro_means_and_said_so():
    y, probs = tied_data(11, num_classes=4)
    rows = y != 2
    got = c.classification_metrics(y[rows], probs[rows])
    want = np.mean([sk.roc_auc_score(y[rows] == k, probs[rows, k]) for k in (0, 1, 3)])
    np.testing.assert_allclose(got["auroc"], want, rtol=1e-12)
    assert c.undefined_reason("auroc", y[rows], probs[rows]).endswith("absent: [2]")
    assert c.undefined_reason("accuracy", y[rows], probs[rows]) == ""


def test_a_resample_that_loses_a_class_is_nan():
    y, probs = tied_data(2, num_classes=3)
    weights = np.stack([np.ones(len(y)), (y != 1).astype(float)])
    got = c.classification_metrics(y, probs, weights)
    assert np.isfinite(got["auroc"][0]) and np.isnan(got["auroc"][1])


@pytest.mark.parametrize(
    ("labels", "probs", "message"),
    [
        ([0, 1], [[0.5, 0.5]], "expected labels"),
        ([], np.zeros((0, 2)), "n >= 1"),
        ([0, 2], [[0.5, 0.5], [0.5, 0.5]], r"labels must be in \[0, 2\)"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "row 1 is not finite"),
    ],
)
def test_bad_input_is_refused(labels, probs, message):
    with pytest.raises(ValueError, match=message):
        c.classification_metrics(np.array(labels, int), np.array(probs))
