"""Intervals of the C-index, paired comparison, risk groups and patients from rows."""

import numpy as np
import pytest
from scipy import stats

from histokd_jax.evals.survival import groups, resampling
from histokd_jax.evals.survival.concordance import harrell_c


def cohort(n=90, folds=3, seed=0):
    rng = np.random.default_rng(seed)
    time = rng.exponential(20, n).round(1)
    case, fold = np.array([f"c{i}" for i in range(n)]), np.arange(n) % folds
    return case, fold, time, rng.random(n) < 0.5, -time + rng.normal(size=n) * 20


def test_interval_is_that_of_a_plain_loop_over_the_same_draws():
    case, fold, time, event, risk = cohort()
    ours = resampling.c_index(case, fold, time, event, risk, resamples=50, seed=3)
    weights = resampling.draw_patients(case, fold, event, resamples=50, seed=3).weights.astype(int)
    means = []
    for counts in weights:
        rows = np.repeat(np.arange(90), counts)
        assert np.bincount(fold[rows]).tolist() == [30, 30, 30]
        parts = [rows[fold[rows] == k] for k in range(3)]
        means.append(np.mean([harrell_c(risk[r], time[r], event[r]).value for r in parts]))
    np.testing.assert_allclose(ours.samples, means, rtol=1e-12)
    np.testing.assert_allclose([ours.interval.low, ours.interval.high], np.quantile(means, [0.025, 0.975]), rtol=1e-12)
    values = [harrell_c(risk[fold == k], time[fold == k], event[fold == k]).value for k in range(3)]
    np.testing.assert_allclose([ours.value, ours.std], [np.mean(values), np.std(values)], rtol=1e-12)
    t = stats.t.interval(0.95, 2, np.mean(values), np.std(values, ddof=1) / np.sqrt(3))
    np.testing.assert_allclose([ours.fold_interval.low, ours.fold_interval.high], t, rtol=1e-9)


def test_any_metric_can_be_resampled_by_repetition():
    case, fold, time, event, risk = cohort()
    drawn = resampling.draw_patients(case, fold, event, resamples=20)
    slow = resampling.by_repetition(lambda rows: harrell_c(risk[rows], time[rows], event[rows]).value)
    fast = resampling.c_index_metric(risk, time, event)
    np.testing.assert_allclose(
        resampling.fold_metric(slow, fold, drawn).samples, resampling.fold_metric(fast, fold, drawn).samples, rtol=1e-12
    )


def test_paired_comparison_uses_the_same_draws():
    case, fold, time, event, risk = cohort()
    noise = np.random.default_rng(9).normal(size=90)
    same = resampling.compare_c_index(case, fold, time, event, risk, risk, resamples=100)
    assert same.difference == same.interval.low == same.interval.high == 0.0 and same.p == 1.0
    ours = resampling.compare_c_index(case, fold, time, event, risk, noise, resamples=400)
    first = resampling.c_index(case, fold, time, event, risk, resamples=400)
    second = resampling.c_index(case, fold, time, event, noise, resamples=400)
    expected = np.quantile(first.samples - second.samples, [0.025, 0.975])
    np.testing.assert_allclose([ours.interval.low, ours.interval.high], expected, rtol=1e-12)
    np.testing.assert_allclose(ours.difference, first.value - second.value, rtol=1e-12)
    diffs = [first.folds[k] - second.folds[k] for k in range(3)]
    np.testing.assert_allclose(ours.fold_interval.p, stats.ttest_1samp(diffs, 0).pvalue, rtol=1e-9)
    assert 0 < ours.p < 0.05


def test_comparison_needs_the_same_folds():
    case, fold, time, event, risk = cohort()
    first = resampling.c_index(case, fold, time, event, risk, resamples=10)
    other = resampling.c_index(case, fold + 1, time, event, risk, resamples=10)
    with pytest.raises(ValueError, match="same patients"):
        resampling.compare(first, other)


def test_a_fold_without_deaths_is_left_out_and_visible():
    case, fold, time, event, risk = cohort()
    event = event & (fold != 1)
    ours = resampling.c_index(case, fold, time, event, risk, resamples=30)
    assert np.isnan(ours.folds[1]) and np.isfinite([ours.value, ours.interval.low]).all()
    np.testing.assert_allclose(ours.value, np.mean([ours.folds[0], ours.folds[2]]))


def test_without_any_death_everything_is_nan_with_a_reason():
    case, fold, time, _, risk = cohort()
    ours = resampling.c_index(case, fold, time, np.zeros(90, bool), risk, resamples=10)
    assert np.isnan([ours.value, ours.std, ours.interval.low]).all() and ours.interval.reason
    value, interval, reason = resampling.pooled_c_index(case, fold, time, np.zeros(90, bool), risk, resamples=10)
    assert np.isnan(value) and interval.reason == reason and "none of 90" in reason


def test_pooled_index_ranks_all_folds_together():
    case, fold, time, event, risk = cohort()
    value, interval, reason = resampling.pooled_c_index(case, fold, time, event, risk, resamples=100)
    assert value == harrell_c(risk, time, event).value and reason == ""
    assert interval.low < value < interval.high


def test_slides_of_a_patient_are_averaged():
    rows = groups.per_patient(
        ["b", "a", "b", "a"], np.array([0, 0, 0, 1]), [2.0, 5.0, 2.0, 5.0], [1, 0, 1, 0], [1.0, 3.0, 2.0, 7.0]
    )
    assert rows.case_id.tolist() == ["a", "b", "a"] and rows.fold.tolist() == [0, 0, 1]
    assert rows.risk.tolist() == [3.0, 1.5, 7.0] and rows.event.tolist() == [False, True, False]
    whole = groups.per_patient(
        ["b", "a", "b", "a"], [0, 0, 0, 1], [2.0, 5.0, 2.0, 5.0], [1, 0, 1, 0], [1.0, 3.0, 2.0, 7.0], across_folds=True
    )
    assert whole.case_id.tolist() == ["a", "b"] and whole.fold.tolist() == [-1, 0]
    assert whole.risk.tolist() == [5.0, 1.5]
    with pytest.raises(ValueError, match=r"case 'a' has \(time, event\) \(6, False\) in row 1"):
        groups.per_patient(["a", "a"], [0, 0], [5.0, 6.0], [0, 0], [1.0, 2.0])


def test_median_split_puts_the_median_itself_high():
    assert groups.median_split(np.array([1.0, 2.0, 3.0])).tolist() == [groups.LOW, groups.HIGH, groups.HIGH]
    assert groups.median_split(np.full(4, 2.0)).tolist() == [groups.HIGH] * 4


def test_rank_scope_removes_the_offset_between_folds():
    risk, fold = np.array([0.0, 1.0, 2.0, 3.0, 100.0, 101.0, 102.0, 103.0]), np.repeat([0, 1], 4)
    assert groups.median_split(risk).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert groups.median_split(risk, fold, scope="per_fold_rank").tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    np.testing.assert_allclose(groups.rank_in_fold(np.array([5.0, 5.0, 1.0]), np.zeros(3)), [2 / 3, 2 / 3, 1 / 6])
    with pytest.raises(ValueError, match="km.scope='fold'"):
        groups.median_split(risk, fold, scope="fold")
    with pytest.raises(ValueError, match="needs the fold"):
        groups.median_split(risk, scope="per_fold_rank")
    with pytest.raises(ValueError, match="patient 1 is not finite"):
        groups.median_split(np.array([0.0, np.nan]))
