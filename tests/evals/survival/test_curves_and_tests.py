"""Kaplan-Meier, censoring distribution and log-rank against lifelines and scikit-survival; edge cases."""

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from lifelines.statistics import multivariate_logrank_test
from sksurv.compare import compare_survival
from sksurv.nonparametric import CensoringDistributionEstimator, kaplan_meier_estimator
from sksurv.util import Surv

from histokd_jax.evals.survival.censoring import censoring_distribution
from histokd_jax.evals.survival.kaplan_meier import kaplan_meier, numbers_at_risk
from histokd_jax.evals.survival.logrank import logrank


def cohort(seed, n=70, censored=0.5, tie_times=15):
    rng = np.random.default_rng(seed)
    return rng.integers(0, tie_times, n).astype(float), rng.random(n) > censored, rng.integers(0, 3, n)


@pytest.mark.parametrize("censored", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_curve_and_band_equal_lifelines_and_scikit_survival(seed, censored):
    time, event, _ = cohort(seed, censored=censored)
    curve = kaplan_meier(time, event, level=0.9)
    theirs = KaplanMeierFitter(alpha=0.1).fit(time, event)
    rows = theirs.survival_function_.loc[curve.time]["KM_estimate"].to_numpy()
    np.testing.assert_allclose(curve.survival, rows, rtol=1e-12, atol=1e-15)
    band = theirs.confidence_interval_.loc[curve.time].to_numpy()
    inside = (curve.survival > 0) & (curve.survival < 1)
    np.testing.assert_allclose(np.stack([curve.low, curve.high], 1)[inside], band[inside], rtol=1e-10)
    sk_time, sk_survival, sk_band = kaplan_meier_estimator(event, time, conf_type="log-log", conf_level=0.9)
    np.testing.assert_array_equal(curve.time, sk_time)
    np.testing.assert_allclose(curve.survival, sk_survival, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.stack([curve.low, curve.high])[:, inside], sk_band[:, inside], rtol=1e-10)
    counts = theirs.event_table.loc[curve.time]
    np.testing.assert_array_equal(curve.at_risk, counts["at_risk"])
    np.testing.assert_array_equal(curve.events, counts["observed"])
    np.testing.assert_array_equal(curve.censored, counts["censored"])
    median = theirs.median_survival_time_
    assert curve.median == median or (np.isnan(curve.median) and np.isinf(median))


def test_a_curve_by_hand():
    curve = kaplan_meier(np.array([1.0, 2.0, 2.0, 3.0]), np.array([True, True, False, True]))
    np.testing.assert_allclose(curve.survival, [0.75, 0.5, 0.0])
    np.testing.assert_allclose(curve.std_error[:2], [0.75 * np.sqrt(1 / 12), 0.5 * np.sqrt(1 / 12 + 1 / 6)])
    assert np.isnan([curve.std_error[2], curve.low[2], curve.high[2]]).all(), "nobody left: no band"
    assert curve.median == 2.0 and curve.n == 4
    np.testing.assert_allclose(curve.at([0.5, 1.0, 2.9, 99.0]), [1.0, 0.75, 0.5, 0.0])


def test_behind_the_last_follow_up_survival_is_unknown():
    curve = kaplan_meier(np.array([1.0, 2.0]), np.array([True, False]))
    np.testing.assert_array_equal(curve.at([0.0, 2.0, 2.1]), [1.0, 0.5, np.nan])
    assert np.isnan(curve.band_at(2.1)).all()
    assert np.isnan(kaplan_meier(np.array([1.0, 2.0]), np.array([False, False])).median)


def test_numbers_at_risk_count_patients_still_under_observation():
    time, event, _ = cohort(0)
    grid = np.array([0.0, 3.0, 3.5, 14.0, 50.0])
    np.testing.assert_array_equal(numbers_at_risk(time, grid), [(time >= t).sum() for t in grid])


def test_an_empty_group_has_no_curve():
    with pytest.raises(ValueError, match="group is empty"):
        kaplan_meier(np.zeros(0), np.zeros(0, bool))


@pytest.mark.parametrize("seed", range(4))
def test_censoring_distribution_equals_scikit_survival(seed):
    time, event, _ = cohort(seed, censored=0.4)
    ours = censoring_distribution(time, event)
    theirs = CensoringDistributionEstimator().fit(Surv.from_arrays(event, time))
    grid = np.arange(0, time.max(), 0.5)
    np.testing.assert_allclose(ours.at(grid), theirs.predict_proba(grid), rtol=1e-12)


def test_censoring_distribution_behind_its_support():
    last_died = censoring_distribution(np.array([1.0, 2.0, 3.0]), np.array([False, True, True]))
    assert last_died.support == 3.0
    np.testing.assert_allclose(last_died.at([3.0, 3.1]), [2 / 3, np.nan], rtol=1e-15)
    last_censored = censoring_distribution(np.array([1.0, 2.0, 3.0]), np.array([False, True, False]))
    assert last_censored.support == 2.0
    np.testing.assert_allclose(last_censored.at([2.0, 3.0, 9.0]), [2 / 3, 0.0, 0.0], rtol=1e-15)


@pytest.mark.parametrize("censored", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("k", [2, 3])
def test_logrank_equals_lifelines_and_scikit_survival(k, censored):
    time, event, group = cohort(k, censored=censored)
    group = group % k
    ours = logrank(time, event, group)
    lifelines = multivariate_logrank_test(time, group, event)
    np.testing.assert_allclose([ours.statistic, ours.p], [lifelines.test_statistic, lifelines.p_value], rtol=1e-9)
    statistic, p, table, _ = compare_survival(Surv.from_arrays(event, time), group, return_stats=True)
    np.testing.assert_allclose([ours.statistic, ours.p], [statistic, p], rtol=1e-9)
    np.testing.assert_allclose(ours.observed, table["observed"])
    np.testing.assert_allclose(ours.expected, table["expected"], rtol=1e-12)
    np.testing.assert_array_equal(ours.n, np.bincount(group))


def test_logrank_refuses_an_empty_group():
    time, event, _ = cohort(0)
    with pytest.raises(ValueError, match=r"patients per group \{'low': 0, 'high': 70\}"):
        logrank(time, event, np.full(70, "high"), groups=("low", "high"))
    with pytest.raises(ValueError, match="at least two groups"):
        logrank(time, event, np.zeros(70, int))
    with pytest.raises(ValueError, match="not among groups"):
        logrank(time, event, np.arange(70) % 3, groups=(0, 1))


def test_logrank_without_deaths_or_overlap_is_undefined_with_a_reason():
    nobody = logrank(np.arange(4.0), np.zeros(4, bool), np.array([0, 0, 1, 1]))
    assert np.isnan(nobody.p) and "nothing to compare" in nobody.reason
    apart = logrank(np.array([1.0, 1.0, 5.0, 6.0]), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))
    assert np.isnan(apart.statistic) and apart.reason


def test_logrank_with_all_deaths_at_one_time():
    result = logrank(np.ones(6), np.ones(6, bool), np.array([0, 0, 0, 1, 1, 1]))
    assert np.isnan(result.p) and result.reason
