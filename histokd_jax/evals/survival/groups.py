"""Patients from rows, and risk groups for Kaplan-Meier curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from histokd_jax.evals.survival._arrays import checked

SCOPES = ("pooled", "per_fold_rank")
LOW, HIGH = 0, 1


@dataclasses.dataclass(frozen=True, eq=False)
class Patients:
    """One row per patient (and fold).

    Attributes:
      case_id: [n] patient ids.
      fold: [n] int; -1 where rows of several folds were averaged.
      time: [n] float.
      event: [n] bool.
      risk: [n] float, mean over the rows of the patient.
    """

    case_id: np.ndarray
    fold: np.ndarray
    time: np.ndarray
    event: np.ndarray
    risk: np.ndarray


def per_patient(
    case_id: Sequence[str],
    fold: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    risk: np.ndarray,
    *,
    across_folds: bool = False,
) -> Patients:
    """Averages the risks of rows that belong to one patient (several slides, or several models).

    Args:
      case_id: [n] patient of each row.
      fold: [n] int.
      time: [n] float.
      event: [n] bool.
      risk: [n] float.
      across_folds: also average over folds, as published for pooled curves; False keeps one row per patient and fold.

    Returns:
      The patients, sorted by (fold, case id).

    Raises:
      ValueError: rows of a patient disagree on the follow-up.
    """
    time, event, risk = checked(time, event, risk=risk)
    case, fold = np.asarray(case_id, dtype=str), np.asarray(fold)
    key = np.zeros(len(case), int) if across_folds else fold
    order = np.lexsort((case, key))
    new = np.ones(len(order), bool)
    new[1:] = (case[order][1:] != case[order][:-1]) | (key[order][1:] != key[order][:-1])
    patient = np.cumsum(new) - 1
    first = order[new]
    differs = (time[order] != time[first][patient]) | (event[order] != event[first][patient])
    if differs.any():
        row, kept = order[np.argmax(differs)], first[patient[np.argmax(differs)]]
        raise ValueError(
            f"case {str(case[row])!r} has (time, event) ({time[row]:g}, {bool(event[row])}) in row {row} but "
            f"({time[kept]:g}, {bool(event[kept])}) in row {kept}; a patient needs one follow-up"
        )
    mean = np.bincount(patient, weights=risk[order]) / np.bincount(patient)
    folds = fold[first].copy()
    mixed = np.bincount(patient, weights=fold[order] != folds[patient]) > 0
    folds[mixed] = -1
    return Patients(case[first], folds, time[first], event[first], mean)


def rank_in_fold(risk: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Mid-ranks within each fold, scaled to (0, 1), so that folds of different networks can be pooled.

    Args:
      risk: [n] float.
      fold: [n] int.

    Returns:
      [n] float64.
    """
    risk, fold = np.asarray(risk, np.float64), np.asarray(fold)
    ranks = np.empty(len(risk))
    for k in np.unique(fold):
        rows = fold == k
        ranks[rows] = (stats.rankdata(risk[rows]) - 0.5) / rows.sum()
    return ranks


def median_split(risk: np.ndarray, fold: np.ndarray | None = None, *, scope: str = "pooled") -> np.ndarray:
    """Low (risk < median) and high (risk >= median) risk group (G-HANet section 7, `km.scope`).

    Args:
      risk: [n] float.
      fold: [n] int; needed by "per_fold_rank".
      scope: "pooled" takes the median of all risks, as published, although they come from different networks;
        "per_fold_rank" ranks within each fold first.

    Returns:
      [n] int, `LOW` or `HIGH`. A risk that is the same for more than half of the patients may leave LOW empty.

    Raises:
      ValueError: unknown scope, no folds, or a risk that is not finite.
    """
    risk = np.asarray(risk, np.float64)
    if scope not in SCOPES:
        raise ValueError(f"km.scope={scope!r} is unknown; choose one of {SCOPES}")
    if not np.isfinite(risk).all():
        raise ValueError(f"risk of patient {int(np.argmin(np.isfinite(risk)))} is not finite; exclude it first")
    if scope == "per_fold_rank":
        if fold is None:
            raise ValueError("km.scope='per_fold_rank' needs the fold of each patient; got None")
        risk = rank_in_fold(risk, fold)
    return np.where(risk >= np.median(risk), HIGH, LOW) if len(risk) else np.zeros(0, int)
