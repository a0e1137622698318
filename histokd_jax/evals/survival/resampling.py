"""Intervals of survival metrics: bootstrap over patients within folds, paired comparison of models, spread of folds.

The unit is the patient and the estimate the mean over folds, as in `histokd_jax.evals.bootstrap`, which draws the
resamples: patients are resampled within their fold, and a resample in which a fold lost all deaths (or all censored
patients) is drawn again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from histokd_jax.evals import bootstrap
from histokd_jax.evals.survival._arrays import checked
from histokd_jax.evals.survival.concordance import TIED_TOLERANCE, harrell_c, harrell_c_resampled

Metric = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(rows [m] int, weights [B, m]) -> [B]: the metric of these patients, each taken as often as its weight says."""


@dataclasses.dataclass(frozen=True, eq=False)
class FoldMetric:
    """A metric over folds.

    Attributes:
      value: mean over the folds in which it is defined; NaN if there is none.
      std: population s.d. over those folds, as published.
      folds: fold -> value, NaN included.
      interval: percentile bootstrap over patients of `value`.
      fold_interval: Student-t interval of the mean over folds. The training sets of folds overlap, so it is too narrow.
      samples: [B] bootstrap values.
      n_redrawn: resamples of a fold drawn again because one kind of patient was missing.
    """

    value: float
    std: float
    folds: Mapping[int, float]
    interval: bootstrap.Interval
    fold_interval: bootstrap.PairedT
    samples: np.ndarray
    n_redrawn: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models on the same patients, first minus second.

    Attributes:
      difference: mean over the folds in which both are defined; NaN if there is none.
      interval: percentile interval of the paired bootstrap.
      p: two-sided bootstrap p-value, twice the smaller tail, at least 2 / (B + 1).
      fold_interval: paired Student-t over folds.
    """

    difference: float
    interval: bootstrap.Interval
    p: float
    fold_interval: bootstrap.PairedT


def draw_patients(
    case_id: Sequence[str], fold: np.ndarray, event: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> bootstrap.Resamples:
    """Draws patients with replacement within their fold; the same arguments give the same resamples.

    Args:
      case_id: [n] patient of each row.
      fold: [n] int.
      event: [n] bool.
      resamples: B.
      seed: of the draw.

    Returns:
      Multiplicities [B, n] of the rows.
    """
    return bootstrap.draw_resamples(case_id, fold, np.asarray(event).astype(int), resamples=resamples, seed=seed)


def fold_metric(metric: Metric, fold: np.ndarray, drawn: bootstrap.Resamples, *, level: float = 0.95) -> FoldMetric:
    """Mean over folds of any metric, with its intervals.

    Args:
      metric: see `Metric`; `by_repetition` makes one from a function of rows.
      fold: [n] int.
      drawn: from `draw_patients`.
      level: of the intervals.

    Returns:
      The metric. Folds in which it is undefined on the original patients are left out, as in the estimate.
    """
    fold = np.asarray(fold)
    folds, samples = {}, []
    for k in np.unique(fold).tolist():
        rows = np.flatnonzero(fold == k)
        folds[k] = float(metric(rows, np.ones((1, len(rows))))[0])
        if not np.isnan(folds[k]):
            samples.append(metric(rows, drawn.weights[:, rows]))
    mean = np.mean(samples, axis=0) if samples else np.full(len(drawn.weights), np.nan)
    values = np.array([v for v in folds.values() if not np.isnan(v)])
    value, std = (float(values.mean()), float(values.std())) if len(values) else (np.nan, np.nan)
    reason = drawn.reason or ("" if len(values) else "the metric is undefined in every fold")
    interval = bootstrap.percentile_interval(mean, level=level, reason=reason)
    spread = bootstrap.paired_t_interval(values, level=level)
    return FoldMetric(value, std, folds, interval, spread, mean, drawn.n_redrawn)


def by_repetition(value: Callable[[np.ndarray], float]) -> Metric:
    """A `Metric` from a function of row indices: every resample is evaluated on repeated rows.

    Args:
      value: [m] int row indices (with repeats) -> the metric.

    Returns:
      The metric; it costs one evaluation per resample.
    """

    def metric(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.array([value(np.repeat(rows, counts.astype(int))) for counts in weights])

    return metric


def c_index_metric(
    risk: np.ndarray, time: np.ndarray, event: np.ndarray, *, tied_tolerance: float = TIED_TOLERANCE
) -> Metric:
    """Harrell's C-index as a `Metric`; arguments as `concordance.harrell_c`."""
    time, event, risk = checked(time, event, risk=risk)

    def metric(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return harrell_c_resampled(risk[rows], time[rows], event[rows], weights, tied_tolerance=tied_tolerance)

    return metric


def c_index(
    case_id: Sequence[str],
    fold: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    risk: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    tied_tolerance: float = TIED_TOLERANCE,
) -> FoldMetric:
    """Harrell's C-index per fold, its mean and the intervals.

    Args:
      case_id: [n] patient of each row.
      fold: [n] int.
      time: [n] float.
      event: [n] bool.
      risk: [n] float.
      resamples: B.
      seed: of the draw.
      level: of the intervals.
      tied_tolerance: as in `concordance.harrell_c`.

    Returns:
      The metric.
    """
    drawn = draw_patients(case_id, fold, event, resamples=resamples, seed=seed)
    return fold_metric(c_index_metric(risk, time, event, tied_tolerance=tied_tolerance), fold, drawn, level=level)


def pooled_c_index(
    case_id: Sequence[str],
    fold: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    risk: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    tied_tolerance: float = TIED_TOLERANCE,
) -> tuple[float, bootstrap.Interval, str]:
    """C-index of all folds together, which ranks risks of different networks against each other, and its interval.

    Args:
      case_id: as in `c_index`, like the rest.
      fold: patients are still drawn within their fold.
      time: [n] float.
      event: [n] bool.
      risk: [n] float.
      resamples: B.
      seed: of the draw.
      level: of the interval.
      tied_tolerance: as in `concordance.harrell_c`.

    Returns:
      value, interval, and why the value is NaN (else "").
    """
    drawn = draw_patients(case_id, fold, event, resamples=resamples, seed=seed)
    whole = harrell_c(risk, time, event, tied_tolerance=tied_tolerance)
    samples = harrell_c_resampled(risk, time, event, drawn.weights, tied_tolerance=tied_tolerance)
    interval = bootstrap.percentile_interval(samples, level=level, reason=drawn.reason or whole.reason)
    return whole.value, interval, whole.reason


def compare(first: FoldMetric, second: FoldMetric, *, level: float = 0.95) -> Comparison:
    """Paired comparison of two models evaluated on the same patients with the same resamples.

    Args:
      first: from `fold_metric` or `c_index`.
      second: the same with the other risks and equal case ids, folds, events, number of resamples and seed.
      level: of the intervals.

    Returns:
      The comparison.

    Raises:
      ValueError: the two do not cover the same folds or resamples.
    """
    if set(first.folds) != set(second.folds) or first.samples.shape != second.samples.shape:
        raise ValueError(
            f"cannot pair folds {sorted(first.folds)} ({len(first.samples)} resamples) with {sorted(second.folds)} "
            f"({len(second.samples)}); evaluate both models on the same patients"
        )
    defined = [[k for k, v in metric.folds.items() if not np.isnan(v)] for metric in (first, second)]
    reason = first.interval.reason or second.interval.reason
    if defined[0] != defined[1] and not reason:
        reason = f"the first is defined in folds {defined[0]}, the second in {defined[1]}"
    samples = first.samples - second.samples
    interval = bootstrap.percentile_interval(samples, level=level, reason=reason)
    spread = bootstrap.paired_t_interval([first.folds[k] - second.folds[k] for k in first.folds], level=level)
    p = np.nan if np.isnan(interval.low) else _two_sided(samples)
    return Comparison(spread.mean, interval, p, spread)


def compare_c_index(
    case_id: Sequence[str],
    fold: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    risk_first: np.ndarray,
    risk_second: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Difference of the C-indices of two models on the same patients; arguments as in `c_index`."""
    drawn = draw_patients(case_id, fold, event, resamples=resamples, seed=seed)
    first, second = (
        fold_metric(c_index_metric(risk, time, event), fold, drawn, level=level) for risk in (risk_first, risk_second)
    )
    return compare(first, second, level=level)


def _two_sided(samples: np.ndarray) -> float:
    samples = samples[~np.isnan(samples)]
    tail = min((samples <= 0).sum(), (samples >= 0).sum())
    return float(min(1.0, 2.0 * (tail + 1) / (len(samples) + 1)))
