"""Confidence intervals: percentile bootstrap over patients, paired bootstrap, paired t-interval.

The unit of resampling is the patient: all slides of a drawn patient are drawn together. The estimate that the interval
belongs to is the mean over folds of a fold metric, so patients are resampled *within* their fold, the metric is taken
per fold, and the fold values are averaged; scores of different folds' models are never ranked against each other. A
patient predicted in several folds (an external set seen by every fold's model) is drawn once for all of them.

A resample in which a fold lost one of its classes has no AUROC; it is drawn again, and the redraws are counted. With
`stratified=True` patients are drawn within (fold, class) instead, which fixes the class counts (slightly narrower
intervals: the prevalence is taken as known).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from histokd_jax.evals.classification import classification_metrics, metric_names

MAX_REDRAWS = 200


@dataclasses.dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes:
      low: lower end, NaN if undefined.
      high: upper end, NaN if undefined.
      level: e.g. 0.95.
      n_resamples: resamples that entered.
      n_undefined: resamples left out because the metric was undefined in them.
      reason: why the interval is undefined, else "".
    """

    low: float
    high: float
    level: float
    n_resamples: int
    n_undefined: int = 0
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Resamples:
    """Multiplicities of rows in each resample.

    Attributes:
      weights: [B, n] float64, how often each row is drawn.
      n_redrawn: resamples of a stratum that were drawn again because a class was missing.
      n_incomplete: resamples that still lack a class after `MAX_REDRAWS` rounds (their AUROC is NaN).
      reason: why no interval can be had (e.g. a fold with one patient), else "".
    """

    weights: np.ndarray
    n_redrawn: int
    n_incomplete: int
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class PairedT:
    """Student-t interval of the mean of paired differences.

    Attributes:
      mean: mean difference.
      low: lower end.
      high: upper end.
      p: two-sided p-value of mean = 0.
      n: number of finite differences.
      reason: why interval and p are NaN, else "".
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    reason: str = ""


def draw_resamples(
    case_id: Sequence[str],
    fold: np.ndarray,
    labels: np.ndarray,
    *,
    resamples: int = 2000,
    seed: int = 0,
    stratified: bool = False,
) -> Resamples:
    """Draw patients with replacement within their fold.

    Args:
      case_id: [n] patient of each row.
      fold: [n] int, fold of each row.
      labels: [n] int, class of each row.
      resamples: B.
      seed: seed of the draw; the same arguments give the same resamples, so two models can be compared in pairs.
      stratified: draw within (fold, class); needs one class per patient.

    Returns:
      The multiplicities of the n rows in each of the B resamples.

    Raises:
      ValueError: if `stratified` and a patient has rows of several classes.
    """
    fold, labels = np.asarray(fold), np.asarray(labels)
    cases, case_of_row = np.unique(np.asarray(case_id, dtype=str), return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = np.ones((resamples, len(cases)))
    n_redrawn, incomplete = 0, np.zeros(resamples, bool)
    for members in _strata(cases, case_of_row, fold, labels, stratified):
        holds_class = _class_membership(members, case_of_row, labels)
        drawn, redrawn, missing = _draw_stratum(rng, len(members), resamples, holds_class)
        counts[:, members] = drawn
        n_redrawn, incomplete = n_redrawn + redrawn, incomplete | missing
    reason = _too_few_patients(case_of_row, fold)
    return Resamples(counts[:, case_of_row], n_redrawn, int(incomplete.sum()), reason)


def bootstrap_fold_means(
    labels: np.ndarray, probs: np.ndarray, fold: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Mean over folds of every metric, in every resample.

    Args:
      labels: [n] int.
      probs: [n, C] float.
      fold: [n] int.
      weights: [B, n] from `draw_resamples`.

    Returns:
      metric name -> [B] float64. Folds in which the metric is undefined on the original rows (e.g. a fold with one
      class) are left out of the mean, as in the estimate; NaN where another fold became undefined in that resample.
    """
    fold = np.asarray(fold)
    sums = {name: [] for name in metric_names(probs.shape[1])}
    for k in np.unique(fold):
        rows = fold == k
        original = classification_metrics(labels[rows], probs[rows])
        resampled = classification_metrics(labels[rows], probs[rows], weights[:, rows])
        for name, value in resampled.items():
            if not np.isnan(original[name]):
                sums[name].append(value)
    nothing = np.full(len(weights), np.nan)
    return {name: np.mean(values, axis=0) if values else nothing for name, values in sums.items()}


def percentile_interval(samples: np.ndarray, *, level: float = 0.95, reason: str = "") -> Interval:
    """Percentile interval of resampled values.

    Args:
      samples: [B] float; NaN entries are left out and counted.
      level: coverage, e.g. 0.95.
      reason: if not empty, the interval is undefined for this reason.

    Returns:
      The interval; undefined (NaN, with a reason) when more than half of the resamples are NaN.
    """
    defined = samples[~np.isnan(samples)]
    n_undefined = len(samples) - len(defined)
    if not reason and 2 * len(defined) < len(samples):
        reason = f"the metric is undefined in {n_undefined} of {len(samples)} resamples"
    if reason or not len(defined):
        return Interval(np.nan, np.nan, level, len(defined), n_undefined, reason or "no resamples")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, len(defined), n_undefined)


def paired_t_interval(diffs: Sequence[float], *, level: float = 0.95) -> PairedT:
    """Student-t interval of the mean paired difference, e.g. over seeds.

    Over the folds of one cross-validation the training sets overlap, so the differences are not independent and the
    interval is too narrow; over seeds it covers the variation of training only, not that of patients.

    Args:
      diffs: paired differences; NaN entries are left out.
      level: coverage.

    Returns:
      Mean, interval, two-sided p and n. Interval and p are NaN with a reason for n < 2.
    """
    values = np.asarray(diffs, np.float64)
    values = values[~np.isnan(values)]
    n = len(values)
    if n < 2:
        mean = float(values[0]) if n else np.nan
        return PairedT(mean, np.nan, np.nan, np.nan, n, f"{n} paired difference{'s' * (n != 1)}; at least 2 are needed")
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(n)
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    p = 2 * stats.t.sf(abs(mean) / error, n - 1) if error > 0 else float(mean == 0)
    return PairedT(float(mean), float(mean - half), float(mean + half), float(p), n)


def _strata(
    cases: np.ndarray, case_of_row: np.ndarray, fold: np.ndarray, labels: np.ndarray, stratified: bool
) -> list[np.ndarray]:
    """Patients that are exchangeable: those that occur in the same set of folds (and class, if stratified)."""
    groups: dict[tuple, list[int]] = {}
    for case, (folds, classes) in enumerate(_folds_and_classes(len(cases), case_of_row, fold, labels)):
        if stratified and len(classes) > 1:
            raise ValueError(
                f"case {str(cases[case])!r} has rows of classes {sorted(classes)}: a stratified bootstrap needs "
                "one class per patient; use stratified=False"
            )
        groups.setdefault((folds, classes if stratified else None), []).append(case)
    return [np.array(members) for members in groups.values()]


def _folds_and_classes(
    n_cases: int, case_of_row: np.ndarray, fold: np.ndarray, labels: np.ndarray
) -> list[tuple[frozenset, frozenset]]:
    folds: list[set] = [set() for _ in range(n_cases)]
    classes: list[set] = [set() for _ in range(n_cases)]
    for case, k, label in zip(case_of_row.tolist(), fold.tolist(), labels.tolist(), strict=True):
        folds[case].add(k)
        classes[case].add(label)
    return [(frozenset(f), frozenset(c)) for f, c in zip(folds, classes, strict=True)]


def _class_membership(members: np.ndarray, case_of_row: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[m, classes in the stratum] float: does patient i have a row of that class?"""
    position = np.full(case_of_row.max() + 1, -1)
    position[members] = np.arange(len(members))
    inside = position[case_of_row] >= 0
    classes, column = np.unique(labels[inside], return_inverse=True)
    holds = np.zeros((len(members), len(classes)))
    holds[position[case_of_row[inside]], column] = 1.0
    return holds


def _draw_stratum(
    rng: np.random.Generator, m: int, resamples: int, holds_class: np.ndarray
) -> tuple[np.ndarray, int, np.ndarray]:
    """[B, m] counts, number of redraws, and [B] bool: still lacks a class."""
    share = np.full(m, 1.0 / m)
    counts = rng.multinomial(m, share, size=resamples).astype(np.float64)
    n_redrawn = 0
    for _ in range(MAX_REDRAWS):
        missing = (counts @ holds_class == 0).any(axis=1)
        if not missing.any():
            break
        n_redrawn += int(missing.sum())
        counts[missing] = rng.multinomial(m, share, size=int(missing.sum()))
    return counts, n_redrawn, (counts @ holds_class == 0).any(axis=1)


def _too_few_patients(case_of_row: np.ndarray, fold: np.ndarray) -> str:
    for k in np.unique(fold):
        if len(np.unique(case_of_row[fold == k])) < 2:
            return f"fold {int(k)} holds one patient: nothing to resample"
    return ""
