"""C-index against scikit-survival, lifelines and a plain loop; undefined cases; published inflation by missing bags."""

import numpy as np
import pytest
from lifelines.utils import concordance_index
from sksurv.metrics import concordance_index_censored, concordance_index_ipcw
from sksurv.util import Surv

from histokd_jax.evals.survival import concordance as cc
from histokd_jax.evals.survival.censoring import CensoringDistribution, censoring_distribution


def cohort(seed, n=80, censored=0.6, tie_times=12, tie_risks=9):
    """Tied times and risks, and a risk that knows a little about the time."""
    rng = np.random.default_rng(seed)
    time = rng.integers(1, tie_times, n).astype(float)
    risk = (rng.integers(0, tie_risks, n) - 0.3 * time).round(1)
    return risk, time, rng.random(n) > censored


def loop(risk, time, event):
    """The definition of section 7, pair by pair."""
    concordant = tied = comparable = 0
    for i in np.flatnonzero(event):
        for j in range(len(time)):
            if time[i] < time[j] or (time[i] == time[j] and not event[j]):
                comparable += 1
                if abs(risk[i] - risk[j]) <= 1e-8:
                    tied += 1
                elif risk[i] > risk[j]:
                    concordant += 1
    return concordant, tied, comparable


@pytest.mark.parametrize("censored", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_C23_equals_scikit_survival_with_tied_times_and_risks(seed, censored):
    risk, time, event = cohort(seed, censored=censored)
    value, concordant, discordant, tied, _ = concordance_index_censored(event, time, risk, tied_tol=1e-8)
    ours = cc.harrell_c(risk, time, event)
    assert ours.value == value
    assert (ours.n_concordant, ours.n_tied) == (concordant, tied)
    assert ours.n_comparable == concordant + discordant + tied
    assert (concordant, tied, ours.n_comparable) == loop(risk, time, event)


@pytest.mark.parametrize("seed", range(3))
def test_equals_lifelines_without_tolerance(seed):
    risk, time, event = cohort(seed)
    assert cc.harrell_c(risk, time, event, tied_tolerance=0).value == concordance_index(time, -risk, event)


def test_risks_within_the_tolerance_are_tied():
    time, event = np.array([1.0, 2.0]), np.array([True, False])
    assert cc.harrell_c(np.array([0.5, 0.5 + 0.9e-8]), time, event).value == 0.5
    assert cc.harrell_c(np.array([0.5, 0.5 + 1.1e-8]), time, event).value == 0.0
    assert cc.harrell_c(np.array([0.5, 0.5 + 0.9e-8]), time, event, tied_tolerance=0).value == 0.0


def test_blocks_change_nothing(monkeypatch):
    risk, time, event = cohort(0, n=150)
    whole, weights = cc.harrell_c(risk, time, event), np.random.default_rng(0).integers(0, 3, (4, 150))
    resampled = cc.harrell_c_resampled(risk, time, event, weights)
    monkeypatch.setattr(cc, "row_blocks", lambda n, m: [slice(i, min(i + 7, n)) for i in range(0, n, 7)])
    assert cc.harrell_c(risk, time, event) == whole
    np.testing.assert_allclose(cc.harrell_c_resampled(risk, time, event, weights), resampled, rtol=1e-13)


def test_five_thousand_patients_equal_scikit_survival():
    risk, time, event = cohort(1, n=5000, tie_times=400, tie_risks=3000)
    assert cc.harrell_c(risk, time, event).value == concordance_index_censored(event, time, risk)[0]


def test_resampled_equals_repeated_rows():
    risk, time, event = cohort(2, n=40)
    counts = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=10)
    values = cc.harrell_c_resampled(risk, time, event, counts)
    for value, weight in zip(values, counts, strict=True):
        rows = np.repeat(np.arange(40), weight)
        np.testing.assert_allclose(value, cc.harrell_c(risk[rows], time[rows], event[rows]).value, rtol=1e-12)


@pytest.mark.parametrize(
    "time,event,words",
    [
        ([1.0, 2.0, 3.0], [False, False, False], "none of 3 patients has an observed death"),
        ([5.0, 5.0, 5.0], [True, True, True], "nobody of 3 patients was followed longer"),
        ([5.0], [True], "nobody of 1 patients was followed longer"),
        ([], [], "no patients"),
        ([1.0, 2.0, 3.0], [False, False, True], "nobody"),
    ],
    ids=["all_censored", "deaths_tied_everywhere", "one_patient", "empty", "only_the_last_died"],
)
def test_without_comparable_pairs_the_index_is_nan_with_a_reason(time, event, words):
    time, event = np.array(time), np.array(event, bool)
    result = cc.harrell_c(np.zeros(len(time)), time, event)
    assert np.isnan(result.value) and result.n_comparable == 0
    assert words in result.reason
    if len(time):
        assert np.isnan(cc.harrell_c_resampled(np.zeros(len(time)), time, event, np.ones((2, len(time))))).all()
        result = cc.uno_c(np.zeros(len(time)), time, event, CensoringDistribution(np.array([9.0]), np.array([0.5])))
        assert np.isnan(result.value) and "no comparable pair" in result.reason


def test_ties_everywhere_in_risk_are_one_half():
    _, time, event = cohort(3)
    assert cc.harrell_c(np.full(80, 0.7), time, event).value == 0.5


@pytest.mark.parametrize("tau", [None, 6.0, 9.5])
@pytest.mark.parametrize("seed", range(4))
def test_uno_equals_scikit_survival(seed, tau):
    risk, time, event = cohort(seed)
    train_time, train_event = (
        np.append(cohort(seed + 50, n=120)[1], 30.0),
        np.append(cohort(seed + 50, n=120)[2], False),
    )
    ours = cc.uno_c(risk, time, event, censoring_distribution(train_time, train_event), tau=tau)
    expected = concordance_index_ipcw(
        Surv.from_arrays(train_event, train_time), Surv.from_arrays(event, time), risk, tau=tau, tied_tol=1e-8
    )
    np.testing.assert_allclose(ours.value, expected[0], rtol=1e-12)


def test_uno_beyond_the_training_follow_up_is_nan_and_says_which_tau_helps():
    risk, time, event = cohort(0, tie_times=30)
    train = censoring_distribution(np.arange(1.0, 11.0), np.arange(10) % 2 == 1)
    result = cc.uno_c(risk, time, event, train)
    assert np.isnan(result.value) and "set tau to 10 or less" in result.reason
    assert np.isfinite(cc.uno_c(risk, time, event, train, tau=10).value)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda r, t, e: (np.where(np.arange(80) == 3, np.nan, r), t, e), "risk of patient 3 is nan"),
        (lambda r, t, e: (r, np.where(np.arange(80) == 4, -1.0, t), e), "time of patient 4 is -1"),
        (lambda r, t, e: (r, t, e + 1), "expected 0 .censored. or 1"),
        (lambda r, t, e: (r[:-1], t, e), r"risk has shape \(79,\)"),
    ],
    ids=["nan_risk", "negative_time", "event_2", "length"],
)
def test_bad_arrays_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        cc.harrell_c(*change(*cohort(0)))


def test_time_zero_is_an_ordinary_time():
    time, event = np.array([0.0, 0.0, 2.0]), np.array([True, False, True])
    assert cc.harrell_c(np.array([3.0, 1.0, 2.0]), time, event).value == 1.0


def test_C25_missing_patients_counted_as_zero_rank_above_everybody():
    risk, time, event = cohort(4)
    risk, missing = risk - risk.max() - 0.1, np.arange(80) == 7
    plain = cc.harrell_c(risk[~missing], time[~missing], event[~missing])
    inflated = cc.harrell_c(*cc.count_missing_as_zero(np.where(missing, np.nan, risk), time, event, missing))
    expected = (plain.value * plain.n_comparable + 79) / (plain.n_comparable + 79)
    np.testing.assert_allclose(inflated.value, expected, rtol=1e-12)
    assert inflated.value > plain.value
