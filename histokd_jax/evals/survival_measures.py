"""What is measured on survival predictions: in a fold, against its training part, and over all folds of a mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histokd_jax.evals.survival.brier import Brier, brier_score, integrated_brier_resampled, survival_at
from histokd_jax.evals.survival.censoring import CensoringDistribution, censoring_distribution
from histokd_jax.evals.survival.concordance import harrell_c, harrell_c_resampled, uno_c, uno_c_resampled
from histokd_jax.evals.survival.dynamic_auc import integrated_auc, integrated_auc_resampled
from histokd_jax.evals.survival.groups import HIGH, LOW, Patients, median_split, per_patient
from histokd_jax.evals.survival.logrank import logrank
from histokd_jax.evals.survival.resampling import Metric
from histokd_jax.evals.survival_predictions import SurvivalPredictions

LABELS = {
    "c_index": "C-index (Harrell)",
    "c_ipcw": "C-index (IPCW)",
    "iauc": "Integrated AUC",
    "ibs": "Integrated Brier score",
}
N_TIMES = 15
PER_FOLD_RANK = "per_fold_rank"


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What the metrics of a fold need of its training part.

    Attributes:
      time: [m] months of the training patients.
      event: [m] bool.
      edges: C + 1 edges of the time bins.
    """

    time: np.ndarray
    event: np.ndarray
    edges: tuple[float, ...]

    @property
    def censoring(self) -> CensoringDistribution:
        """Of the training patients."""
        return censoring_distribution(self.time, self.event)


NOTHING = Reference(np.zeros(0), np.zeros(0, bool), ())
"""For metrics that need nothing of the training part."""


def mean_nll(hazards: np.ndarray, bin_index: np.ndarray, event: np.ndarray, clamp: float = 1e-7) -> float:
    """Mean negative log-likelihood of discrete hazards (G-HANet section 5, `nll_surv` with a = 0).

    Args:
      hazards: [n, C] in [0, 1].
      bin_index: [n] int, time bin.
      event: [n] bool.
      clamp: lower bound of the arguments of the logarithms.

    Returns:
      The mean over patients.
    """
    hazards, rows = np.asarray(hazards, np.float64), np.arange(len(bin_index))
    survival = np.concatenate([np.ones((len(hazards), 1)), np.cumprod(1 - hazards, axis=1)], axis=1)

    def log(x):
        return np.log(np.maximum(x, clamp))

    death = log(survival[rows, bin_index]) + log(hazards[rows, bin_index])
    return float(-np.where(event, death, log(survival[rows, np.asarray(bin_index) + 1])).mean())


def fold_metrics(rows: SurvivalPredictions, reference: Reference) -> dict[str, tuple[float, str]]:
    """Every metric of one mode in one fold: name -> (value, why it is NaN or "")."""
    time, event = rows.time_months, rows.event == 1
    censoring = reference.censoring
    harrell = harrell_c(rows.risk, time, event)
    uno = uno_c(rows.risk, time, event, censoring, tau=_tau(reference))
    auc = integrated_auc(rows.risk, time, event, reference.time, reference.event)
    found = {"c_index": (harrell.value, harrell.reason), "c_ipcw": (uno.value, uno.reason)}
    found["iauc"] = (auc.mean, auc.reason)
    brier = brier_over_time(rows, reference)
    found["ibs"] = (np.nan, "") if brier is None else (brier.integrated, brier.reason)
    return found


def resampled(name: str, rows: SurvivalPredictions, reference: Reference, weights: np.ndarray) -> np.ndarray:
    """One metric of `fold_metrics` in every bootstrap resample of a fold's patients.

    The training part and the evaluation times are not resampled.

    Args:
      name: of `LABELS`.
      rows: [n] of one mode and fold.
      reference: the training part of the fold.
      weights: [B, n] float, how often each row is drawn.

    Returns:
      [B] float64; NaN where the metric is undefined.
    """
    columns = (rows.risk, rows.time_months, rows.event == 1, weights)
    if name == "c_index":
        return harrell_c_resampled(*columns)
    if name == "c_ipcw":
        return uno_c_resampled(*columns, reference.censoring, tau=_tau(reference))
    if name == "iauc":
        return integrated_auc_resampled(*columns, reference.time, reference.event)
    times = evaluation_times(rows, reference)
    if not rows.num_bins or len(times) < 2:
        return np.full(len(weights), np.nan)
    survival = predicted_survival(rows, reference.edges, times)
    return integrated_brier_resampled(survival, *columns[1:], times, reference.censoring)


def metric_of(name: str, table: SurvivalPredictions, reference: Mapping[int, Reference] | None) -> Metric:
    """A metric of `fold_metrics` as `resampling.fold_metric` takes it.

    Args:
      name: of `LABELS`.
      table: rows of one mode, all folds.
      reference: fold -> its training part; only Harrell's C-index does without.
    """

    def metric(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        own = table.where(rows)
        return resampled(name, own, NOTHING if reference is None else reference[own.folds[0]], weights)

    return metric


def _tau(reference: Reference) -> float:
    # Deaths behind the training follow-up have no weight; everything up to it counts.
    return float(np.nextafter(reference.censoring.support, np.inf))


def evaluation_times(rows: SurvivalPredictions, reference: Reference) -> np.ndarray:
    """Times at which survival is judged: percentiles 20 to 81 of the follow-up within that of the training part."""
    inside = rows.time_months[rows.time_months <= reference.censoring.support]
    if not len(inside):
        return np.zeros(0)
    return np.unique(np.percentile(inside, np.linspace(20.0, 81.0, N_TIMES)))


def predicted_survival(rows: SurvivalPredictions, edges: Sequence[float], times: np.ndarray) -> np.ndarray:
    """[n, T] probability to live beyond `times`, linear within the time bins."""
    return survival_at(np.cumprod(1.0 - rows.hazards, axis=1), edges, times)


def brier_over_time(rows: SurvivalPredictions, reference: Reference) -> Brier | None:
    """Brier scores of one mode in one fold; None for a Cox head, which predicts no survival."""
    times = evaluation_times(rows, reference)
    if not rows.num_bins:
        return None
    if len(times) < 2:
        return Brier(times, np.zeros(len(times)), np.nan, "fewer than two evaluation times")
    survival = predicted_survival(rows, reference.edges, times)
    return brier_score(survival, rows.time_months, rows.event == 1, times, reference.censoring)


def patients_of(rows: SurvivalPredictions) -> Patients:
    """One row per patient of one mode, all folds pooled, as published."""
    columns = (rows.case_id, rows.fold, rows.time_months, rows.event == 1, rows.risk)
    return per_patient(*columns, across_folds=True)


def logrank_of(rows: SurvivalPredictions, scope: str) -> tuple[dict[str, Any], Patients, np.ndarray]:
    """Log-rank test between the halves of lower and higher risk.

    Args:
      rows: of one mode, all folds.
      scope: "pooled" or "per_fold_rank", see `groups.median_split`.

    Returns:
      ({"p", "statistic", "n": [low, high], "deaths": [low, high], "reason"}, patients, group of each).
    """
    # Ranks within a fold need the folds apart; a patient predicted in several folds is averaged only when pooled.
    patients = patients_of(rows)
    if scope == PER_FOLD_RANK and (patients.fold >= 0).all():
        group = median_split(patients.risk, patients.fold, scope=scope)
    else:
        group = median_split(patients.risk)
    n = [int((group == side).sum()) for side in (LOW, HIGH)]
    deaths = [int(patients.event[group == side].sum()) for side in (LOW, HIGH)]
    facts = {"n": n, "deaths": deaths}
    if not all(n):
        reason = "most risks are equal, so that one half is empty"
        return {**facts, "p": np.nan, "statistic": np.nan, "reason": reason}, patients, group
    test = logrank(patients.time, patients.event, group, groups=(LOW, HIGH))
    return {**facts, "p": test.p, "statistic": test.statistic, "reason": test.reason or None}, patients, group
