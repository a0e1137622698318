"""Decisions at a threshold chosen on validation: against brute force and scikit-learn, and over folds."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, recall_score

from histokd_jax.evals import thresholds
from histokd_jax.evals.predictions import make_predictions


def case(n=40, seed=0):
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(n) % 2)
    return label, np.round(np.clip(0.3 * label + rng.uniform(0, 0.6, n), 0, 1), 2)


def table(folds=(0, 1), seed=0):
    parts = [case(seed=seed + fold) for fold in folds]
    ids = [f"C{fold}-{i}" for fold in folds for i in range(40)]
    prob = np.concatenate([p for _, p in parts])
    labels = np.concatenate([y for y, _ in parts])
    return make_predictions(ids, ids, np.repeat(folds, 40), "pathology", labels, np.stack([1 - prob, prob], axis=1))


def test_the_threshold_has_the_largest_f1_and_is_the_lowest_of_equals():
    label, prob = case()
    scores = {t: f1_score(label, prob >= t) for t in np.unique(prob)}
    best = thresholds.best_f1_threshold(label, prob)
    assert scores[best] == max(scores.values())
    assert best == min(t for t, value in scores.items() if value == max(scores.values()))
    assert thresholds.best_f1_threshold(np.array([1, 1]), np.array([0.2, 0.9])) == 0.2
    with pytest.raises(ValueError, match="needs positives"):
        thresholds.best_f1_threshold(np.zeros(3), np.ones(3))


def test_metrics_at_a_threshold_equal_the_library():
    label, prob = case()
    found = thresholds.metrics_at(label, prob, 0.4)
    assert found["f1"] == pytest.approx(f1_score(label, prob >= 0.4))
    assert found["macro_f1"] == pytest.approx(f1_score(label, prob >= 0.4, average="macro"))
    assert found["recall"] == pytest.approx(recall_score(label, prob >= 0.4))
    assert found["specificity"] == pytest.approx(recall_score(1 - label, prob < 0.4))


def test_every_fold_is_decided_by_its_own_validation_part():
    val, test = table(seed=0), table(seed=9)
    found = thresholds.report(val, test)["pathology"]
    for fold in (0, 1):
        mine, theirs = val.fold == fold, test.fold == fold
        threshold = thresholds.best_f1_threshold(val.label[mine], val.probs[mine, 1])
        assert found["thresholds"][fold] == threshold
        expected = f1_score(test.label[theirs], test.probs[theirs, 1] >= threshold)
        assert found["val_f1"]["f1"]["per_fold"][fold] == pytest.approx(expected)
        expected = f1_score(test.label[theirs], test.probs[theirs, 1] > 0.5)
        assert found["arg_max"]["f1"]["per_fold"][fold] == pytest.approx(expected)
    values = found["val_f1"]["f1"]["per_fold"]
    assert found["val_f1"]["f1"]["sample_std"] == pytest.approx(np.std(values, ddof=1))
    one = thresholds.report(table((0,)), table((0,), 9))["pathology"]
    assert one["free"]["auroc"]["sample_std"] is None and 0 < one["free"]["auroc"]["mean"] <= 1
