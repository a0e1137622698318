"""Bootstrap of IPCW C-index, time-dependent AUC and Brier score: against plain loops over repeated patients."""

import numpy as np
import pytest

from histokd_jax.evals import survival_measures as measures
from histokd_jax.evals import survival_predictions as P
from histokd_jax.evals import survival_summary as S
from histokd_jax.evals.survival import brier, concordance, dynamic_auc, resampling
from histokd_jax.evals.survival.censoring import CensoringDistribution, censoring_distribution

EDGES = (0.0, 6.0, 14.0, 40.0)
NAMES = ("c_index", "c_ipcw", "iauc", "ibs")


def follow_up(seed, n):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 30, n) + rng.choice([0.0, 0.25, 0.5], n), rng.random(n) < 0.6


def cohort(n=60, seed=0):
    """risk (with ties), time (with ties), event and hazards of n patients."""
    time, event = follow_up(seed, n)
    rng = np.random.default_rng(seed + 50)
    risk = (rng.normal(size=n) * 3 - 0.1 * time).round()
    return risk, time, event, rng.random((n, 3))


def train(n=120):
    time, event = follow_up(9, n)
    return np.append(time, 60.0), np.append(event, False)


def draws(n, resamples=25, seed=1):
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(float)


def repeated(counts, *columns):
    rows = np.repeat(np.arange(len(counts)), counts.astype(int))
    return [column[rows] for column in columns]


def loop_uno(risk, time, event, counts, probability, tau):
    """Uno's C-index of one resample pair by pair, every patient as often as drawn."""
    score = total = 0.0
    for i in range(len(risk)):
        if not event[i] or time[i] >= tau:
            continue
        for j in range(len(risk)):
            if time[i] < time[j] or (time[i] == time[j] and not event[j]):
                pair = counts[i] * counts[j] / probability[i] ** 2
                total += pair
                score += pair * (1.0 if risk[i] > risk[j] + 1e-8 else 0.5 if abs(risk[i] - risk[j]) <= 1e-8 else 0.0)
    return score / total


@pytest.mark.parametrize("tau", [None, 12.0])
def test_ipcw_c_index_equals_plain_loops(tau):
    risk, time, event, _ = cohort()
    weights, censoring = draws(60), censoring_distribution(*train())
    ours = concordance.uno_c_resampled(risk, time, event, weights, censoring, tau=tau)
    for counts, found in list(zip(weights, ours))[:4]:
        want = loop_uno(risk, time, event, counts, censoring.at(time), np.inf if tau is None else tau)
        assert found == pytest.approx(want, rel=1e-12)
    # Ties between copies of one patient are no comparable pair in either.
    for counts, found in zip(weights, ours):
        value = concordance.uno_c(*repeated(counts, risk, time, event), censoring, tau=tau).value
        assert found == pytest.approx(value, rel=1e-12)


def test_integrated_auc_equals_evaluation_of_repeated_patients_at_the_same_times():
    risk, time, event, _ = cohort()
    weights, reference = draws(60), train()
    ours = dynamic_auc.integrated_auc_resampled(risk, time, event, weights, *reference)
    times = dynamic_auc.integrated_auc(risk, time, event, *reference).times
    censoring = censoring_distribution(np.floor(reference[0]), reference[1])
    for counts, found in zip(weights, ours):
        drawn = repeated(counts, risk, np.floor(time), event)
        assert found == pytest.approx(dynamic_auc.dynamic_auc(*drawn, times, censoring).mean, rel=1e-12, nan_ok=True)
    assert np.isfinite(ours).sum() > 20 and np.nanstd(ours) > 0.01


def test_integrated_brier_equals_evaluation_of_repeated_patients():
    _, time, event, survival = cohort()
    times, weights, censoring = np.array([4.0, 9.0, 17.0]), draws(60), censoring_distribution(*train())
    ours = brier.integrated_brier_resampled(survival, time, event, weights, times, censoring)
    for counts, found in zip(weights, ours):
        drawn = repeated(counts, survival, time, event)
        assert found == pytest.approx(brier.brier_score(*drawn, times, censoring).integrated, rel=1e-12)


def test_everybody_once_is_the_metric_itself():
    risk, time, event, hazards = cohort()
    rows, reference = table(risk, time, event, hazards, folds=1), measures.Reference(*train(), EDGES)
    want = measures.fold_metrics(rows, reference)
    for name in NAMES:
        found = measures.resampled(name, rows, reference, np.ones((1, 60)))
        assert found[0] == pytest.approx(want[name][0], rel=1e-12), name


def test_undefined_resamples_are_nan_and_only_those():
    time, event = np.array([1.0, 2.0, 8.0, 9.0]), np.array([True, False, True, False])
    risk, weights = np.array([3.0, 1.0, 2.0, 0.0]), np.array([[1, 1, 1, 1], [0, 2, 0, 2], [0, 1, 2, 1.0]])
    known = CensoringDistribution(np.array([20.0]), np.array([0.0]))
    assert np.isnan(concordance.uno_c_resampled(risk, time, event, weights, known)).tolist() == [False, True, False]
    # The death at 8 months lies behind a training follow-up of 5: NaN where it is drawn.
    short = CensoringDistribution(np.array([5.0]), np.array([0.5]))
    assert np.isnan(concordance.uno_c_resampled(risk, time, event, weights, short)).tolist() == [True, True, True]
    without = np.array([[1, 1, 0, 2.0]])
    assert np.isfinite(concordance.uno_c_resampled(risk, time, event, without, short)).all()
    survival = np.full((4, 2), 0.5)
    at = np.array([1.5, 8.5])
    found = brier.integrated_brier_resampled(survival, time, event, weights, at, known)
    assert np.isfinite(found).all()
    nobody = brier.integrated_brier_resampled(survival, time, event, np.zeros((1, 4)), at, known)
    assert np.isnan(nobody).all()


def table(risk, time, event, hazards, folds=2):
    n = len(risk)
    case = [f"c{i}" for i in range(n)]
    known = (time, event.astype(int), np.zeros(n, int))
    return P.make_survival_predictions(case, case, np.arange(n) % folds, "pathology", *known, risk, hazards)


def references(folds=2):
    return {k: measures.Reference(*train(), EDGES) for k in range(folds)}


def test_summary_intervals_are_those_of_a_plain_loop_over_the_same_draws():
    risk, time, event, hazards = cohort(80)
    rows = table(risk, time, event, hazards)
    found = S.summarise(rows, references(), bootstrap=60, seed=4)["modes"]["pathology"]["metrics"]
    drawn = resampling.draw_patients(rows.case_id, rows.fold, event, resamples=60, seed=4).weights
    reference = references()[0]
    for name in NAMES:
        means = []
        for counts in drawn:
            parts = [(rows.where(rows.fold == k), counts[rows.fold == k]) for k in (0, 1)]
            means.append(np.mean([measures.resampled(name, r, reference, c[None])[0] for r, c in parts]))
        means = np.array(means)
        undefined = int(np.isnan(means).sum())
        assert found[name]["n_undefined_resamples"] == undefined
        ends = np.quantile(means[~np.isnan(means)], [0.025, 0.975])
        np.testing.assert_allclose(found[name]["ci"], ends, rtol=1e-9)
        assert found[name]["ci"][0] < found[name]["mean"] < found[name]["ci"][1], name


def test_left_out_resamples_are_said():
    """Few deaths: in some resamples nobody has died at the first evaluation time."""
    time = np.arange(1.0, 25.0)
    event = np.isin(np.arange(24), (2, 3, 9, 14, 20))
    risk = np.sin(np.arange(24.0))
    rows = table(risk, time, event, np.full((24, 3), 0.2), folds=1)
    found = S.summarise(rows, references(1), bootstrap=300)
    row = found["modes"]["pathology"]["metrics"]["iauc"]
    assert 0 < row["n_undefined_resamples"] < 150 and row["ci"][0] is not None
    words = f"undefined in {row['n_undefined_resamples']} resamples, which the interval leaves out"
    assert words in S.remark(row) and words in S.print_table(found)
    assert "300 bootstrap resamples of patients" in S.print_table(found)


def test_paired_differences_of_every_metric():
    risk, time, event, hazards = cohort(80)
    better, worse = (table(score, time, event, h) for score, h in ((-time, 0.1 * hazards), (risk, hazards)))
    found = S.compare(better, worse, reference=references(), bootstrap=200)["modes"]["pathology"]["metrics"]
    assert tuple(found) == NAMES
    arms = [S.summarise(rows, references(), bootstrap=0)["modes"]["pathology"]["metrics"] for rows in (better, worse)]
    for name, row in found.items():
        assert row["difference"] == pytest.approx(arms[0][name]["mean"] - arms[1][name]["mean"]), name
        assert row["ci"][0] <= row["difference"] <= row["ci"][1] and 0 < row["p"] <= 1
        assert len(row["per_fold"]) == 2 and "n_undefined_resamples" in row
    assert found["c_ipcw"]["verdict"].endswith("a gain") and found["c_ipcw"]["ci"][0] > 0
    # The Brier score is an error: the arm with the smaller one gains.
    assert found["ibs"]["verdict"].endswith("a gain") == (found["ibs"]["ci"][1] < 0)
    same = S.compare(worse, worse, reference=references(), bootstrap=50)["modes"]["pathology"]["metrics"]
    assert all(row["difference"] == 0 == row["ci"][0] == row["ci"][1] for row in same.values())


def test_comparison_without_training_parts_or_survival_curves():
    risk, time, event, hazards = cohort(80)
    rows, cox = table(risk, time, event, hazards), table(risk, time, event, hazards[:, :0])
    assert set(S.compare(rows, rows, bootstrap=20)["modes"]["pathology"]["metrics"]) == {"c_index"}
    found = S.compare(rows, cox, reference=references(), bootstrap=20)["modes"]["pathology"]["metrics"]
    assert set(found) == set(NAMES) - {"ibs"}
    with pytest.raises(ValueError, match=r"folds \[1\]"):
        S.compare(rows, rows, reference=references(1), bootstrap=20)
