"""Brier score, dynamic AUC and calibration against scikit-survival, lifelines and plain loops."""

import numpy as np
import pytest
from lifelines import KaplanMeierFitter
from sksurv.metrics import brier_score as sk_brier
from sksurv.metrics import cumulative_dynamic_auc, integrated_brier_score
from sksurv.util import Surv

from histokd_jax.evals.survival import brier
from histokd_jax.evals.survival.calibration import calibration_at
from histokd_jax.evals.survival.censoring import censoring_distribution
from histokd_jax.evals.survival.dynamic_auc import dynamic_auc, integrated_auc

TIMES = np.array([2.0, 3.5, 5.0, 9.0])


def cohort(seed, n=90, censored=0.5):
    rng = np.random.default_rng(seed)
    time = rng.integers(1, 15, n).astype(float)
    risk = (rng.integers(0, 12, n) - 0.5 * time).round()
    return risk, time, rng.random(n) > censored, rng.random((n, len(TIMES)))


def train(seed, n=150):
    _, time, event, _ = cohort(seed + 100, n)
    return np.append(time, 40.0), np.append(event, False)


@pytest.mark.parametrize("censored", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_brier_equals_scikit_survival(seed, censored):
    _, time, event, survival = cohort(seed, censored=censored)
    reference = [Surv.from_arrays(e, t) for t, e in (train(seed), (time, event))]
    ours = brier.brier_score(survival, time, event, TIMES, censoring_distribution(*train(seed)))
    np.testing.assert_allclose(ours.score, sk_brier(*reference, survival, TIMES)[1], rtol=1e-12)
    np.testing.assert_allclose(ours.integrated, integrated_brier_score(*reference, survival, TIMES), rtol=1e-12)
    assert ours.reason == ""


def test_brier_without_censoring_is_the_plain_squared_error():
    _, time, _, survival = cohort(0)
    event = np.ones(90, bool)
    ours = brier.brier_score(survival, time, event, TIMES, censoring_distribution(time, event))
    np.testing.assert_allclose(ours.score, ((time[:, None] > TIMES) - survival).__pow__(2).mean(0), rtol=1e-12)


def test_brier_behind_the_training_follow_up_is_nan_with_a_reason():
    _, time, event, survival = cohort(0)
    short = censoring_distribution(np.array([1.0, 2.0, 4.0]), np.array([True, False, True]))
    ours = brier.brier_score(survival, time, event, TIMES, short)
    np.testing.assert_array_equal(np.isnan(ours.score), [False, False, True, True])
    assert np.isnan(ours.integrated) and "undefined from 5 months on" in ours.reason and "beyond 4" in ours.reason


def test_brier_of_one_time_has_no_integral():
    _, time, event, survival = cohort(0)
    ours = brier.brier_score(survival[:, :1], time, event, TIMES[:1], censoring_distribution(*train(0)))
    assert np.isfinite(ours.score).all() and np.isnan(ours.integrated) and "one time only" in ours.reason


def test_survival_between_bin_edges():
    curve, edges = np.array([[0.8, 0.5]]), (2.0, 4.0, 10.0)
    at = np.array([0.0, 2.0, 3.0, 4.0, 7.0, 10.0, 99.0])
    np.testing.assert_allclose(brier.survival_at(curve, edges, at)[0], [1, 1, 0.9, 0.8, 0.65, 0.5, 0.5])
    steps = brier.survival_at(curve, edges, at, interpolation="step")
    np.testing.assert_allclose(steps[0], [1, 1, 1, 0.8, 0.8, 0.5, 0.5])
    with pytest.raises(ValueError, match="K . 1 edges"):
        brier.survival_at(curve, (0.0, 1.0), at)
    with pytest.raises(ValueError, match="interpolation='cubic'"):
        brier.survival_at(curve, edges, at, interpolation="cubic")


@pytest.mark.parametrize("censored", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_dynamic_auc_equals_scikit_survival(seed, censored):
    risk, time, event, _ = cohort(seed, censored=censored)
    ours = dynamic_auc(risk, time, event, TIMES, censoring_distribution(*train(seed)))
    auc, mean = cumulative_dynamic_auc(*(Surv.from_arrays(e, t) for t, e in (train(seed), (time, event))), risk, TIMES)
    np.testing.assert_allclose(ours.auc, auc, rtol=1e-12)
    np.testing.assert_allclose(ours.weighted_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(ours.mean, auc.mean(), rtol=1e-12)


def test_dynamic_auc_without_censoring_is_the_mann_whitney_statistic():
    risk, time, _, _ = cohort(3)
    event = np.ones(90, bool)
    ours = dynamic_auc(risk, time, event, TIMES[:1], censoring_distribution(time, event))
    case, control = risk[time <= 2], risk[time > 2]
    wins = np.mean([(a > b) + 0.5 * (a == b) for a in case for b in control])
    np.testing.assert_allclose(ours.auc, [wins], rtol=1e-12)


@pytest.mark.parametrize(
    "time,event,times,words",
    [
        ([3.0, 4.0, 5.0], [1, 0, 1], [2.0, 4.0], "nobody has died until 2 months"),
        ([3.0, 4.0, 5.0], [1, 0, 1], [5.0], "nobody was followed beyond 5 months"),
        ([3.0, 60.0, 70.0], [1, 1, 0], [65.0], "deaths lie behind 14"),
    ],
    ids=["no_case", "no_control", "no_weight"],
)
def test_an_undefined_auc_is_nan_with_a_reason(time, event, times, words):
    ours = dynamic_auc(
        np.arange(3.0), np.array(time), np.array(event), np.array(times), censoring_distribution(*train(0))
    )
    assert np.isnan(ours.auc).any() and np.isnan(ours.mean) and np.isnan(ours.weighted_mean)
    assert words in ours.reason


def test_times_must_increase():
    risk, time, event, _ = cohort(0)
    with pytest.raises(ValueError, match="strictly increasing"):
        dynamic_auc(risk, time, event, np.array([3.0, 3.0]), censoring_distribution(*train(0)))


def test_integrated_auc_truncates_months_on_request():
    risk, time, event, _ = cohort(1)
    rng = np.random.default_rng(0)
    later, reference = time + rng.random(90), train(1)
    times = np.percentile(later, np.linspace(20, 81, 15))
    censoring = censoring_distribution(*reference)
    cut = integrated_auc(risk, later, event, reference[0] + 0.5, reference[1])
    np.testing.assert_array_equal(cut.auc, dynamic_auc(risk, time, event, times, censoring).auc)
    exact = integrated_auc(risk, later, event, *reference, truncate_months=False)
    np.testing.assert_array_equal(exact.auc, dynamic_auc(risk, later, event, times, censoring).auc)
    assert exact.mean != cut.mean


@pytest.mark.parametrize("groups", [1, 4])
def test_calibration_compares_with_kaplan_meier_in_each_group(groups):
    _, time, event, survival = cohort(2)
    predicted = survival[:, 0]
    ours = calibration_at(predicted, time, event, 5.0, groups=groups)
    cuts = np.quantile(predicted, np.arange(groups + 1) / groups)
    total = 0.0
    for g in range(groups):
        rows = (predicted > cuts[g]) & (predicted <= cuts[g + 1]) | ((g == 0) & (predicted == cuts[0]))
        curve = KaplanMeierFitter().fit(time[rows], event[rows])
        np.testing.assert_allclose(ours.observed[g], curve.predict(5.0), rtol=1e-12)
        band = curve.confidence_interval_.loc[:5.0].iloc[-1]
        np.testing.assert_allclose([ours.low[g], ours.high[g]], band, rtol=1e-9)
        np.testing.assert_allclose(ours.predicted[g], predicted[rows].mean(), rtol=1e-12)
        assert (ours.n[g], ours.n_at_risk[g]) == (rows.sum(), (time[rows] >= 5).sum())
        total += rows.sum() * abs(predicted[rows].mean() - curve.predict(5.0))
    np.testing.assert_allclose(ours.error, total / 90, rtol=1e-12)


def test_calibration_of_equal_predictions_is_one_group():
    _, time, event, _ = cohort(2)
    assert calibration_at(np.full(90, 0.4), time, event, 5.0).n.tolist() == [90]


def test_calibration_behind_the_follow_up_is_nan_with_a_reason():
    _, time, event, survival = cohort(2)
    ours = calibration_at(survival[:, 0], time, event & (time < 12), 99.0)
    assert np.isnan(ours.error) and "not followed for 99 months" in ours.reason


def test_calibration_refuses_a_risk_score():
    _, time, event, survival = cohort(2)
    with pytest.raises(ValueError, match="patient 0 is -"):
        calibration_at(-survival[:, 0], time, event, 5.0)
