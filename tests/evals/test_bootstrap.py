"""Bootstrap: patients as units, folds kept apart, redraws, pairing; intervals against scipy and a plain loop."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from histokd_jax.evals import bootstrap as bs


def cohort(n=60, folds=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    p = np.clip(0.5 + 0.2 * (labels - 0.5) + 0.2 * rng.normal(size=n), 0.01, 0.99)
    return np.array([f"c{i}" for i in range(n)]), np.arange(n) % folds, labels, np.stack([1 - p, p], axis=1)


def test_patients_are_drawn_within_their_fold_with_all_their_slides():
    case = np.array(["a", "a", "b", "c", "d", "e", "f", "f"])
    fold = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    label = np.array([0, 0, 1, 1, 0, 1, 1, 1])
    weights = bs.draw_resamples(case, fold, label, resamples=200).weights
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    np.testing.assert_array_equal(weights[:, 6], weights[:, 7])
    patients = weights[:, [0, 2, 3, 4, 5, 6]]
    np.testing.assert_array_equal(patients[:, :3].sum(1), 3)
    np.testing.assert_array_equal(patients[:, 3:].sum(1), 3)
    assert len(np.unique(patients, axis=0)) > 20


def test_patients_of_an_external_set_are_drawn_once_for_all_folds():
    case = np.array(["a", "b", "c", "d"] * 5)
    fold, label = np.repeat(np.arange(5), 4), np.array([0, 1, 0, 1] * 5)
    weights = bs.draw_resamples(case, fold, label, resamples=50).weights.reshape(50, 5, 4)
    assert (weights == weights[:, :1]).all()


def test_resamples_without_a_class_are_drawn_again_and_counted():
    case, fold = np.array(list("abcdef")), np.zeros(6, int)
    label = np.array([0, 0, 0, 0, 0, 1])
    drawn = bs.draw_resamples(case, fold, label, resamples=500)
    assert drawn.n_redrawn > 100 and drawn.n_incomplete == 0
    assert (drawn.weights[:, 5] > 0).all() and (drawn.weights[:, :5].sum(1) > 0).all()
    assert np.isfinite(bs.bootstrap_fold_means(label, np.tile([0.4, 0.6], (6, 1)), fold, drawn.weights)["auroc"]).all()


def test_stratified_keeps_the_class_counts():
    case, fold, label, _ = cohort()
    weights = bs.draw_resamples(case, fold, label, resamples=50, stratified=True).weights
    for k in range(3):
        for y in range(2):
            rows = (fold == k) & (label == y)
            np.testing.assert_array_equal(weights[:, rows].sum(1), rows.sum())


def test_stratified_refuses_a_patient_with_two_classes():
    with pytest.raises(ValueError, match=r"case 'a' has rows of classes \[0, 1\]"):
        bs.draw_resamples(["a", "a"], np.zeros(2, int), np.array([0, 1]), stratified=True)


def test_fold_means_match_a_plain_loop_over_repeated_rows():
    case, fold, label, probs = cohort()
    weights = bs.draw_resamples(case, fold, label, resamples=20, seed=3).weights
    got = bs.bootstrap_fold_means(label, probs, fold, weights)["auroc"]
    for b in range(20):
        rows = np.repeat(np.arange(len(label)), weights[b].astype(int))
        want = [roc_auc_score(label[r], probs[r, 1]) for r in (rows[fold[rows] == k] for k in range(3))]
        np.testing.assert_allclose(got[b], np.mean(want), rtol=1e-12)


def test_interval_agrees_with_scipys_percentile_bootstrap_of_a_mean():
    rng = np.random.default_rng(0)
    hit = rng.integers(0, 2, 200)
    probs = np.stack([1 - hit * 0.8 - 0.1, hit * 0.8 + 0.1], axis=1)
    label = rng.integers(0, 2, 200)
    case = [f"c{i}" for i in range(200)]
    weights = bs.draw_resamples(case, np.zeros(200, int), label, resamples=4000).weights
    got = bs.percentile_interval(bs.bootstrap_fold_means(label, probs, np.zeros(200, int), weights)["accuracy"])
    want = stats.bootstrap(((hit == label).astype(float),), np.mean, n_resamples=4000, method="percentile", rng=1)
    assert abs(got.low - want.confidence_interval.low) < 0.011
    assert abs(got.high - want.confidence_interval.high) < 0.011


def test_same_seed_gives_the_same_resamples_and_another_seed_others():
    case, fold, label, _ = cohort()
    first, again, other = (bs.draw_resamples(case, fold, label, resamples=9, seed=s).weights for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_one_patient_gives_no_interval_but_a_reason():
    drawn = bs.draw_resamples(["a"] * 6, np.zeros(6, int), np.array([0, 1] * 3), resamples=10)
    assert drawn.reason == "fold 0 holds one patient: nothing to resample"
    interval = bs.percentile_interval(np.ones(10), reason=drawn.reason)
    assert np.isnan(interval.low) and interval.reason == drawn.reason


def test_undefined_resamples_are_left_out_counted_and_refused_when_they_are_most():
    samples = np.r_[np.arange(80.0), np.full(20, np.nan)]
    interval = bs.percentile_interval(samples)
    assert interval.n_undefined == 20 and interval.n_resamples == 80
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(np.arange(80.0), [0.025, 0.975]))
    mostly = bs.percentile_interval(np.r_[np.ones(10), np.full(90, np.nan)])
    assert np.isnan(mostly.low) and "90 of 100" in mostly.reason


def test_paired_t_interval_matches_scipy():
    diffs = [0.01, 0.03, -0.01, 0.02, 0.04]
    got, want = bs.paired_t_interval(diffs), stats.ttest_1samp(diffs, 0.0)
    low, high = want.confidence_interval(0.95)
    np.testing.assert_allclose([got.mean, got.low, got.high, got.p], [np.mean(diffs), low, high, want.pvalue])
    assert got.n == 5


def test_paired_t_interval_edges():
    single = bs.paired_t_interval([0.2])
    assert single.mean == 0.2 and np.isnan(single.low) and np.isnan(single.p) and "at least 2" in single.reason
    assert bs.paired_t_interval([0.0, 0.0]).p == 1.0
    assert bs.paired_t_interval([0.1, 0.3, np.nan]).n == 2


def test_coverage_of_the_interval_is_close_to_its_level():
    """200 cohorts with known accuracy 0.75: the 95 % interval holds it in 90 to 99 % of them."""
    rng, hits = np.random.default_rng(5), 0
    fold, case = np.arange(90) % 3, [f"c{i}" for i in range(90)]
    for trial in range(200):
        label = rng.integers(0, 2, 90)
        predicted = np.where(rng.random(90) < 0.75, label, 1 - label)
        weights = bs.draw_resamples(case, fold, label, resamples=200, seed=trial).weights
        samples = bs.bootstrap_fold_means(label, np.eye(2)[predicted], fold, weights)["accuracy"]
        interval = bs.percentile_interval(samples)
        hits += interval.low <= 0.75 <= interval.high
    assert 180 <= hits <= 198
