"""Metrics of ordered classes against scikit-learn (cocofnet_hmkd.md, section 11 and check T6)."""

import numpy as np
import pytest
from sklearn import metrics

from histokd_jax.evals.classification import classification_metrics, confusion_matrix, quadratic_kappa, weighted_f1
from histokd_jax.evals.per_class import RATES, per_class_report, summarise_classes
from histokd_jax.evals.predictions import make_predictions
from histokd_jax.evals.summary import print_table, summarise


def drawn(seed, n=60, classes=4, never=None, absent=None):
    """Labels, and probabilities in which a class is never predicted, or labels in which it does not occur."""
    rng = np.random.default_rng(seed)
    labels, probs = rng.integers(0, classes, n), rng.dirichlet(np.ones(classes), n)
    if never is not None:
        probs[:, never] = 0.0
        probs /= probs.sum(1, keepdims=True)
    if absent is not None:
        labels[labels == absent] = (absent + 1) % classes
    return labels, probs


@pytest.mark.parametrize("options", [{}, {"never": 2}, {"absent": 0}, {"never": 3, "absent": 1}])
def test_T6_weighted_f1_accuracy_and_kappa_match_an_independent_library(options):
    labels, probs = drawn(1, **options)
    found, predicted = classification_metrics(labels, probs), probs.argmax(1)
    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "weighted_f1": metrics.f1_score(labels, predicted, average="weighted", zero_division=0),
        "cohen_kappa": metrics.cohen_kappa_score(labels, predicted, labels=range(4)),
        "quadratic_kappa": metrics.cohen_kappa_score(labels, predicted, labels=range(4), weights="quadratic"),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)


def test_the_majority_answer_on_the_bci_test_split_gives_the_floor_of_the_specification():
    labels = np.repeat([0, 1, 2, 3], [38, 235, 446, 258])
    probs = np.tile([0.0, 0.0, 1.0, 0.0], (len(labels), 1))
    found = classification_metrics(labels, probs)
    values = [round(float(found[name]), 4) for name in ("accuracy", "weighted_f1", "macro_f1")]
    assert values == [0.4565, 0.2862, 0.1567]
    assert found["quadratic_kappa"] == 0.0


@pytest.mark.parametrize("options", [{}, {"never": 2}])
def test_the_report_of_every_class_matches_an_independent_library(options):
    labels, probs = drawn(2, **options)
    found, predicted = per_class_report(labels, probs), probs.argmax(1)
    columns = metrics.precision_recall_fscore_support(labels, predicted, labels=range(4), zero_division=np.nan)
    for name, expected in zip(("precision", "recall", "f1", "support"), columns):
        np.testing.assert_allclose(found[name], expected, atol=1e-12, err_msg=name)
    areas = [metrics.roc_auc_score(labels == c, probs[:, c]) for c in range(4)]
    np.testing.assert_allclose(found["auroc"], areas, atol=1e-12)


def test_multiplicities_count_like_repeated_rows():
    labels, probs = drawn(3)
    weights = np.random.default_rng(4).integers(0, 3, (2, len(labels)))
    found = per_class_report(labels, probs, weights)
    for b in range(2):
        rows = np.repeat(np.arange(len(labels)), weights[b])
        again = per_class_report(labels[rows], probs[rows])
        for name in again:
            np.testing.assert_allclose(found[name][b], again[name], atol=1e-12, err_msg=name)


def test_perfect_and_constant_answers():
    perfect = confusion_matrix(np.arange(4), np.arange(4), 4)
    assert quadratic_kappa(perfect) == 1.0 and weighted_f1(perfect) == 1.0
    assert np.isnan(quadratic_kappa(np.diag([5.0, 0, 0, 0]))) and np.isnan(weighted_f1(np.zeros((3, 3))))


def table(n=40):
    labels, probs = drawn(5, n=n)
    ids = [f"p{i}" for i in range(n)]
    return make_predictions(ids, ids, np.arange(n) % 2, "he", labels, probs)


def test_the_summary_holds_confusion_and_intervals_of_every_class():
    rows = table()
    entry = summarise(rows, num_classes=4, bootstrap=200)["modes"]["he"]
    expected = metrics.confusion_matrix(rows.label, rows.probs.argmax(1), labels=range(4))
    assert entry["confusion"] == expected.tolist() and entry["per_class"]["support"] == expected.sum(1).tolist()
    for rate in RATES:
        for value, (low, high) in zip(entry["per_class"][rate]["value"], entry["per_class"][rate]["ci"]):
            assert low <= value <= high
    assert "Weighted F1" in print_table(summarise(rows, num_classes=4, bootstrap=0))


def test_no_resamples_leave_the_intervals_undefined():
    from histokd_jax.evals import bootstrap

    rows = table()
    drawn_rows = bootstrap.draw_resamples(rows.case_id, rows.fold, rows.label, resamples=0)
    found = summarise_classes(rows, drawn_rows, 0.95)
    assert np.isnan(found["per_class"]["f1"]["ci"]).all() and np.isfinite(found["per_class"]["f1"]["value"]).all()
