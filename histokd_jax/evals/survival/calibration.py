"""Calibration at a time point: predicted survival against the Kaplan-Meier estimate, by risk group."""

from __future__ import annotations

import dataclasses

import numpy as np

from histokd_jax.evals.survival._arrays import checked
from histokd_jax.evals.survival.kaplan_meier import kaplan_meier


@dataclasses.dataclass(frozen=True, eq=False)
class SurvivalCalibration:
    """Predicted and observed survival at one time, in groups of increasing predicted survival.

    Attributes:
      at: the time, months.
      predicted: [k] mean predicted survival.
      observed: [k] Kaplan-Meier survival; NaN where the group was not followed that long.
      low: [k] lower confidence limit of `observed`.
      high: [k] upper confidence limit of `observed`.
      n: [k] patients.
      n_at_risk: [k] of these, still under observation at the time.
      error: mean |predicted - observed| over patients of groups with an observation; NaN if there is none.
      reason: why something is NaN, else "".
    """

    at: float
    predicted: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    n_at_risk: np.ndarray
    error: float
    reason: str = ""


def calibration_at(
    survival: np.ndarray, time: np.ndarray, event: np.ndarray, at: float, *, groups: int = 4, level: float = 0.95
) -> SurvivalCalibration:
    """Compares predicted with observed survival at one time.

    Args:
      survival: [n] predicted probability to live beyond `at`.
      time: [n] float.
      event: [n] bool.
      at: time point, same unit as `time`.
      groups: patients are cut at the quantiles of `survival` into this many groups; equal predictions stay together,
        which may merge groups.
      level: of the confidence limits.

    Returns:
      The comparison.

    Raises:
      ValueError: bad arrays, no patients, a prediction outside [0, 1], or groups < 1.
    """
    time, event, survival = checked(time, event, survival=survival)
    if groups < 1 or not len(time):
        raise ValueError(f"calibration needs patients and a group or more; got {len(time)} patients, {groups} groups")
    outside = (survival < 0) | (survival > 1)
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(f"predicted survival of patient {row} is {survival[row]:g}; expected a probability in [0, 1]")
    cuts = np.unique(np.quantile(survival, np.arange(1, groups) / groups))
    members = np.searchsorted(cuts, survival, side="left")
    parts = [np.flatnonzero(members == g) for g in np.unique(members)]
    curves = [kaplan_meier(time[rows], event[rows], level=level) for rows in parts]
    predicted = np.array([survival[rows].mean() for rows in parts])
    observed = np.array([float(curve.at(at)) for curve in curves])
    low, high = np.array([[float(x) for x in curve.band_at(at)] for curve in curves]).T
    n = np.array([len(rows) for rows in parts])
    n_at_risk = np.array([int((time[rows] >= at).sum()) for rows in parts])
    error, reason = _error(predicted, observed, n, at)
    return SurvivalCalibration(float(at), predicted, observed, low, high, n, n_at_risk, error, reason)


def _error(predicted: np.ndarray, observed: np.ndarray, n: np.ndarray, at: float) -> tuple[float, str]:
    known = ~np.isnan(observed)
    reason = "" if known.all() else f"{int((~known).sum())} of {len(n)} groups were not followed for {at:g} months"
    if not known.any():
        return np.nan, reason
    return float(np.average(np.abs(predicted - observed)[known], weights=n[known])), reason
