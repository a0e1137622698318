"""Predicted survival at given times, and the Brier score with inverse-probability-of-censoring weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from histokd_jax.evals.survival._arrays import checked, drawn_any
from histokd_jax.evals.survival.censoring import CensoringDistribution

INTERPOLATIONS = ("linear", "step")


@dataclasses.dataclass(frozen=True, eq=False)
class Brier:
    """Brier scores over time.

    Attributes:
      times: [T] evaluation times, increasing.
      score: [T] weighted squared error of predicted survival; NaN where undefined.
      integrated: time average between the first and last time (trapezoids); NaN if a score is, or T < 2.
      reason: why something is NaN, else "".
    """

    times: np.ndarray
    score: np.ndarray
    integrated: float
    reason: str = ""


def survival_at(
    survival: np.ndarray, edges: Sequence[float], times: np.ndarray, *, interpolation: str = "linear"
) -> np.ndarray:
    """Survival of a discrete-hazard model at any time.

    The model gives S at the right edges of its bins and S = 1 at the first edge.

    Args:
      survival: [n, K] probability to survive each bin.
      edges: K + 1 bin edges, months.
      times: [T] float, months.
      interpolation: "linear" between the edges; "step" lets survival fall at the right edge of each bin.

    Returns:
      [n, T] float64; constant outside the edges.

    Raises:
      ValueError: shapes disagree, or `interpolation` is unknown.
    """
    survival, edges = np.asarray(survival, np.float64), np.asarray(edges, np.float64)
    times = np.asarray(times, np.float64)
    if survival.ndim != 2 or len(edges) != survival.shape[1] + 1:
        raise ValueError(f"survival {survival.shape} needs K + 1 edges for its K bins; got {len(edges)}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation!r} is unknown; choose one of {INTERPOLATIONS}")
    curve = np.concatenate([np.ones((len(survival), 1)), survival], axis=1)
    position = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, len(edges) - 1)
    if interpolation == "step":
        return curve[:, position]
    left = np.minimum(position, len(edges) - 2)
    part = np.clip((times - edges[left]) / (edges[left + 1] - edges[left]), 0.0, 1.0)
    return curve[:, left] * (1.0 - part) + curve[:, left + 1] * part


def brier_score(
    survival: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    times: np.ndarray,
    censoring: CensoringDistribution,
) -> Brier:
    """Time-dependent and integrated Brier score (Graf et al., Statistics in Medicine 1999).

    `BS(t) = mean of S_i(t)^2 / G(t_i)` over deaths until t, `(1 - S_i(t))^2 / G(t)` over patients followed beyond t, 0
    over those censored before. Lower is better; a constant prediction of 1/2 scores about 1/4.

    Args:
      survival: [n, T] predicted survival at `times`.
      time: [n] float.
      event: [n] bool.
      times: [T] float, increasing.
      censoring: distribution of censoring times, from the training patients.

    Returns:
      The scores; NaN with a reason at times where a weight is undefined (behind the training follow-up).

    Raises:
      ValueError: bad arrays.
    """
    errors, times = _weighted_errors(survival, time, event, times, censoring)
    score = errors.mean(axis=0) if len(errors) else np.full(len(times), np.nan)
    return Brier(times, score, float(_time_average(times, score)), _reason(times, score, censoring))


def integrated_brier_resampled(
    survival: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    weights: np.ndarray,
    times: np.ndarray,
    censoring: CensoringDistribution,
) -> np.ndarray:
    """Integrated Brier score in every bootstrap resample; evaluation times and censoring are not resampled.

    Args:
      survival: [n, T] predicted survival at `times`.
      time: [n] float.
      event: [n] bool.
      weights: [B, n] float, how often each patient is drawn.
      times: [T] float, increasing.
      censoring: as in `brier_score`.

    Returns:
      [B] float64; NaN where an error of a drawn patient has no weight, nobody is drawn, or T < 2.
    """
    errors, times = _weighted_errors(survival, time, event, times, censoring)
    weights, unknown = np.asarray(weights, np.float64), np.isnan(errors).any(axis=1)
    total = weights.sum(axis=1, keepdims=True)
    score = np.divide(
        weights @ np.nan_to_num(errors), total, out=np.full((len(weights), len(times)), np.nan), where=total > 0
    )
    return np.where(drawn_any(weights, unknown), np.nan, _time_average(times, score))


def checked_times(times: np.ndarray) -> np.ndarray:
    """Evaluation times as float64; ValueError unless they are finite and strictly increasing."""
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or not len(times) or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise ValueError(f"evaluation times {times.tolist()} must be a non-empty, strictly increasing list of months")
    return times


def _weighted_errors(
    survival: np.ndarray, time: np.ndarray, event: np.ndarray, times: np.ndarray, censoring: CensoringDistribution
) -> tuple[np.ndarray, np.ndarray]:
    """[n, T] squared errors with their weights, whose mean over patients is the score; the checked times."""
    time, event, survival = checked(time, event, survival=survival)
    times = checked_times(times)
    if survival.shape != (len(time), len(times)):
        raise ValueError(f"survival has shape {survival.shape}; expected [{len(time)} patients, {len(times)} times]")
    dead = event[:, None] & (time[:, None] <= times[None, :])
    alive = time[:, None] > times[None, :]
    weight = np.where(dead, censoring.weights(time)[:, None], 0.0)
    weight = np.where(alive, censoring.weights(times)[None, :], weight)
    return weight * (alive - survival) ** 2, times


def _time_average(times: np.ndarray, score: np.ndarray) -> np.ndarray:
    """[...] mean over the last axis by trapezoids."""
    if len(times) < 2:
        return np.full(score.shape[:-1], np.nan)
    return np.trapezoid(score, times, axis=-1) / (times[-1] - times[0])


def _reason(times: np.ndarray, score: np.ndarray, censoring: CensoringDistribution) -> str:
    undefined = np.isnan(score)
    if undefined.any():
        return (
            f"undefined from {times[np.argmax(undefined)]:g} months on: the training patients give no censoring "
            f"weights beyond {censoring.support:g} months"
        )
    return "one time only: nothing to integrate over" if len(times) < 2 else ""
