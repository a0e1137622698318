"""Cumulative/dynamic AUC over time and its average, as in the evaluation notebook of MCAT (G-HANet section 7)."""

from __future__ import annotations

import dataclasses

import numpy as np

from histokd_jax.evals.survival._arrays import checked, drawn_any, row_blocks
from histokd_jax.evals.survival.brier import checked_times
from histokd_jax.evals.survival.censoring import CensoringDistribution, censoring_distribution
from histokd_jax.evals.survival.concordance import TIED_TOLERANCE
from histokd_jax.evals.survival.kaplan_meier import kaplan_meier


@dataclasses.dataclass(frozen=True, eq=False)
class DynamicAuc:
    """AUC over time.

    Attributes:
      times: [T] evaluation times.
      auc: [T] NaN where undefined.
      mean: plain mean over times; NaN if an AUC is.
      weighted_mean: mean weighted by the drop of the Kaplan-Meier curve of the test patients up to each time; NaN if an
        AUC is, or nobody dies until the last time.
      reason: why something is NaN, else "".
    """

    times: np.ndarray
    auc: np.ndarray
    mean: float
    weighted_mean: float
    reason: str = ""


def dynamic_auc(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    times: np.ndarray,
    censoring: CensoringDistribution,
    *,
    tied_tolerance: float = TIED_TOLERANCE,
) -> DynamicAuc:
    """How well the risk separates deaths until t from patients who live beyond t (Uno 2007; Hung and Chiang 2010).

    Deaths at t_i <= t weigh 1 / G(t_i); ties of risk count 1/2.

    Args:
      risk: [n] float.
      time: [n] float.
      event: [n] bool.
      times: [T] float, increasing.
      censoring: distribution of censoring times, from the training patients.
      tied_tolerance: risks this close are tied.

    Returns:
      The AUC at each time; NaN with a reason where nobody has died, nobody is left, or a weight is undefined.

    Raises:
      ValueError: bad arrays.
    """
    time, event, risk = checked(time, event, risk=risk)
    times = checked_times(times)
    weight = censoring.weights(time)
    auc, reasons = np.full(len(times), np.nan), []
    for k, t in enumerate(times):
        case, control = np.flatnonzero(event & (time <= t)), np.flatnonzero(time > t)
        reason = _undefined(t, case, control, weight, censoring)
        if reason:
            reasons.append(reason)
        else:
            auc[k] = _weighted_auc(risk[case], weight[case], risk[control], tied_tolerance)
    mean = np.nan if reasons else float(auc.mean())
    return DynamicAuc(times, auc, mean, _survival_weighted(auc, times, time, event), "; ".join(reasons[:3]))


def integrated_auc(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    train_time: np.ndarray,
    train_event: np.ndarray,
    *,
    n_times: int = 15,
    percentiles: tuple[float, float] = (20.0, 81.0),
    truncate_months: bool = True,
) -> DynamicAuc:
    """Dynamic AUC by the rule of MCAT's notebook (G-HANet section 7, "Integrated AUC").

    The published means and spreads are those of `weighted_mean`, with one training row per *slide*, which counts
    patients with several slides more than once; give one row per patient unless you reproduce those numbers.

    Args:
      risk: [n] float, validation patients.
      time: [n] float.
      event: [n] bool.
      train_time: [m] float, training patients, for the censoring distribution.
      train_event: [m] bool.
      n_times: number of evaluation times.
      percentiles: evaluation times are percentiles of `time` at evenly spaced ranks between these two.
      truncate_months: cut all follow-up (not the evaluation times) to whole months, as published.

    Returns:
      As `dynamic_auc`.

    Raises:
      ValueError: bad arrays, or no patients.
    """
    times, months, censoring = _published_setting(time, train_time, train_event, n_times, percentiles, truncate_months)
    return dynamic_auc(risk, months, event, times, censoring)


def integrated_auc_resampled(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    weights: np.ndarray,
    train_time: np.ndarray,
    train_event: np.ndarray,
    *,
    n_times: int = 15,
    percentiles: tuple[float, float] = (20.0, 81.0),
    truncate_months: bool = True,
    tied_tolerance: float = TIED_TOLERANCE,
) -> np.ndarray:
    """`integrated_auc(...).mean` in every bootstrap resample; evaluation times and censoring are not resampled.

    Args:
      risk: as `integrated_auc`, like the rest.
      time: [n] float.
      event: [n] bool.
      weights: [B, n] float, how often each patient is drawn.
      train_time: [m] float.
      train_event: [m] bool.
      n_times: number of evaluation times.
      percentiles: of `time`, all patients, whoever is drawn.
      truncate_months: cut follow-up to whole months.
      tied_tolerance: risks this close are tied.

    Returns:
      [B] float64; NaN where at some time nobody drawn has died, nobody drawn is left, or a death has no weight.
    """
    setting = _published_setting(time, train_time, train_event, n_times, percentiles, truncate_months)
    times, months, censoring = setting
    months, event, risk = checked(months, event, risk=risk)
    weights, inverse = np.asarray(weights, np.float64), censoring.weights(months)
    found = [_auc_resampled(risk, months, event, weights, inverse, t, tied_tolerance) for t in times]
    return np.mean(found, axis=0)


def _published_setting(
    time: np.ndarray,
    train_time: np.ndarray,
    train_event: np.ndarray,
    n_times: int,
    percentiles: tuple[float, float],
    truncate_months: bool,
) -> tuple[np.ndarray, np.ndarray, CensoringDistribution]:
    """Evaluation times, follow-up as it counts, and the distribution of censoring, by the rule of `integrated_auc`."""
    if not len(time):
        raise ValueError("integrated_auc needs validation patients; got none")
    times = np.unique(np.percentile(time, np.linspace(*percentiles, n_times)))
    if truncate_months:
        time, train_time = np.floor(time), np.floor(train_time)
    return times, time, censoring_distribution(train_time, train_event)


def _auc_resampled(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    weights: np.ndarray,
    inverse: np.ndarray,
    t: float,
    tolerance: float,
) -> np.ndarray:
    """[B] AUC at one time."""
    case, control = np.flatnonzero(event & (time <= t)), np.flatnonzero(time > t)
    own, others = weights[:, case] * np.nan_to_num(inverse[case]), weights[:, control]
    score = np.zeros(len(weights))
    for block in row_blocks(len(case), len(control)):
        wins = _wins(risk[case[block]], risk[control], tolerance)
        score += np.einsum("bi,bi->b", own[:, block], others @ wins.T)
    total = own.sum(axis=1) * others.sum(axis=1)
    found = np.divide(score, total, out=np.full(len(weights), np.nan), where=total > 0)
    unknown = np.zeros(len(time), bool)
    unknown[case] = np.isnan(inverse[case])
    return np.where(drawn_any(weights, unknown), np.nan, found)


def _weighted_auc(case: np.ndarray, weight: np.ndarray, control: np.ndarray, tolerance: float) -> float:
    score = np.zeros(len(case))
    for block in row_blocks(len(case), len(control)):
        score[block] = _wins(case[block], control, tolerance).sum(axis=1)
    return float(weight @ score / (weight.sum() * len(control)))


def _wins(case: np.ndarray, control: np.ndarray, tolerance: float) -> np.ndarray:
    """[cases, controls] 1 where the case has the higher risk, 1/2 where they are tied."""
    difference = case[:, None] - control[None, :]
    tied = np.abs(difference) <= tolerance
    return np.where(tied, 0.5, difference > 0)


def _undefined(
    t: float, case: np.ndarray, control: np.ndarray, weight: np.ndarray, censoring: CensoringDistribution
) -> str:
    if not len(case):
        return f"nobody has died until {t:g} months"
    if not len(control):
        return f"nobody was followed beyond {t:g} months"
    if np.isnan(weight[case]).any():
        return f"until {t:g} months deaths lie behind {censoring.support:g}, the last time with a censoring weight"
    return ""


def _survival_weighted(auc: np.ndarray, times: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    if np.isnan(auc).any():
        return np.nan
    survival = kaplan_meier(time, event).at(times)
    drop = -np.diff(np.concatenate([[1.0], survival]))
    return float((auc * drop).sum() / (1.0 - survival[-1])) if survival[-1] < 1 else np.nan
