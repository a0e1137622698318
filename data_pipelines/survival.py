"""Follow-up as discrete time bins, sampling classes of a survival cohort, and checks of times and censoring.

Every array here has one row per *patient*: several slides of a patient would count its death several times. `event` is
True where the death was observed; tables with the opposite flag (`censorship`, 1 = censored) are turned round once,
where they are read (`tables.read_survival`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.errors import DataError

BINS_FROM = ("cohort", "train_fold")
LATE_EVENT_SHARE = 0.6
"""Event share in the longest decile of follow-up above which the coding is suspected: the last patients under
observation are mostly alive (0.03 to 0.37 in TCGA cohorts of 166 to 956 patients)."""
EVENT_SHARE = 0.8
"""Overall event share above which the coding is suspected (TCGA: 0.07 to 0.54)."""
_MIN_PATIENTS = 20
_NAMED = 5


@dataclasses.dataclass(frozen=True)
class TimeBins:
    """Consecutive time bins, closed on the left and open on the right.

    Attributes:
      edges: K + 1 strictly increasing times in months.
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        edges = np.asarray(self.edges, np.float64)
        if edges.ndim != 1 or len(edges) < 2 or not np.isfinite(edges).all() or not (np.diff(edges) > 0).all():
            raise DataError(f"time-bin edges {self.edges} must be at least two finite, strictly increasing times")

    @property
    def num_bins(self) -> int:
        """Number of bins K."""
        return len(self.edges) - 1

    def assign(self, time: np.ndarray) -> np.ndarray:
        """Bin of each time: the number of inner edges that are <= time (G-HANet section 3.6, step 3).

        A time outside the edges belongs to the first or last bin; this happens to patients who were not there when the
        edges were fitted.

        Args:
          time: [n] float, months.

        Returns:
          [n] int32 in [0, K).

        Raises:
          DataError: a time is not finite.
        """
        time = np.asarray(time, np.float64)
        _refuse(~np.isfinite(time), time, None, "follow-up is not finite", "exclude patients without follow-up first")
        return np.searchsorted(self.edges[1:-1], time, side="right").astype(np.int32)


def fit_time_bins(
    time: np.ndarray,
    event: np.ndarray,
    *,
    num_bins: int = 4,
    bins_from: str = "cohort",
    train: np.ndarray | None = None,
    eps: float = 1e-6,
) -> TimeBins:
    """Bins at the quantiles of the observed death times (G-HANet section 3.6; `bins_from` is deviation D3).

    Inner edges are the k/K quantiles, by linear interpolation, of the times of patients with an observed death; the
    outer ones are the shortest follow-up - `eps` and the longest + `eps`, censored patients included.

    Args:
      time: [n] float months, one row per patient.
      event: [n] bool.
      num_bins: K >= 1.
      bins_from: "cohort" takes all rows, as published, which leaks a little of the validation times; "train_fold" takes
        the rows of `train` only.
      train: [n] bool, patients of the training fold; needed by "train_fold".
      eps: widening of the outer edges, months.

    Returns:
      The bins.

    Raises:
      DataError: unknown `bins_from`, bad times, no deaths, or ties that leave a bin without a death.
    """
    if bins_from not in BINS_FROM:
        raise DataError(f"labels.bins_from={bins_from!r} is unknown; choose one of {BINS_FROM}")
    if num_bins < 1:
        raise DataError(f"labels.n_bins={num_bins}; at least 1 bin is needed")
    time, event = _arrays(time, event)
    if bins_from == "train_fold":
        if train is None:
            raise DataError("labels.bins_from='train_fold' needs the patients of the training fold; got train=None")
        rows = np.asarray(train, bool)
        time, event = time[rows], event[rows]
    check_follow_up(time, event)
    inner = np.quantile(time[event], np.arange(1, num_bins) / num_bins)
    edges = np.concatenate([[time.min() - eps], inner, [time.max() + eps]])
    _check_distinct(edges, time[event], num_bins)
    return TimeBins(tuple(edges.tolist()))


def _check_distinct(edges: np.ndarray, deaths: np.ndarray, num_bins: int) -> None:
    distinct = (np.diff(edges) > 0).all()
    counts = np.bincount(np.searchsorted(edges[1:-1], deaths, side="right"), minlength=num_bins)
    if not distinct or (counts == 0).any():
        raise DataError(
            f"{len(deaths)} deaths at {len(np.unique(deaths))} distinct times do not fill {num_bins} time bins: edges "
            f"{edges.tolist()}, deaths per bin {counts.tolist()}; use fewer bins (labels.n_bins)"
        )


def sampling_class(bin_index: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Class of the balanced sampler: 2 * bin + censorship (G-HANet section 3.6, step 4).

    Args:
      bin_index: [n] int in [0, K).
      event: [n] bool, True = death observed.

    Returns:
      [n] int32 in [0, 2K); even = death, odd = censored.
    """
    return (2 * np.asarray(bin_index) + ~np.asarray(event, bool)).astype(np.int32)


def check_follow_up(
    time: np.ndarray, event: np.ndarray, *, case_id: Sequence[str] | None = None, source: str = "survival data"
) -> tuple[str, ...]:
    """Checks follow-up of a cohort or fold that a model is to learn from.

    Args:
      time: [n] float months.
      event: [n] bool.
      case_id: n patient ids, for the messages.
      source: file or fold, for the messages.

    Returns:
      Warnings: patients with follow-up 0 (they stay, in the first bin).

    Raises:
      DataError: no patients, a time that is negative or not finite, or no observed death.
    """
    time, event = _arrays(time, event, source)
    if not len(time):
        raise DataError(f"{source}: no patients with follow-up")
    fix = "exclude patients without follow-up first"
    _refuse(~np.isfinite(time), time, case_id, f"{source}: follow-up is not finite", fix)
    _refuse(time < 0, time, case_id, f"{source}: follow-up is negative", "correct the time or exclude the patient")
    if not event.any():
        raise DataError(
            f"{source}: all {len(time)} patients are censored, so nothing can be learned or ranked; check the coding "
            f"(event: 1 = death, censorship: 1 = censored)"
        )
    zero = time == 0
    if not zero.any():
        return ()
    return (f"{source}: follow-up is 0 months for {_named(zero, time, case_id)}; kept, in the first time bin",)


def check_folds(
    bin_index: np.ndarray, event: np.ndarray, train: np.ndarray, val: np.ndarray, *, num_bins: int, fold: int = 0
) -> tuple[str, ...]:
    """Checks that a fold can be learned from and evaluated.

    Args:
      bin_index: [n] int, from `TimeBins.assign`.
      event: [n] bool.
      train: [n] bool, patients of the training part.
      val: [n] bool, patients of the validation part.
      num_bins: K.
      fold: for the messages.

    Returns:
      Warnings with counts: bins without a death in the training part, a validation part without a death.

    Raises:
      DataError: the training part has no patient or no death.
    """
    event, bin_index = np.asarray(event, bool), np.asarray(bin_index)
    train, val = np.asarray(train, bool), np.asarray(val, bool)
    if not event[train].any():
        raise DataError(
            f"fold {fold}: none of the {int(train.sum())} training patients has an observed death; make other folds, "
            f"stratified by event"
        )
    warnings = []
    deaths = np.bincount(bin_index[train & event], minlength=num_bins)
    if (deaths == 0).any():
        warnings.append(
            f"fold {fold}: time bins {np.flatnonzero(deaths == 0).tolist()} have no death among the "
            f"{int(train.sum())} training patients (deaths per bin {deaths.tolist()}); their hazards are not learned"
        )
    if not event[val].any():
        warnings.append(
            f"fold {fold}: none of the {int(val.sum())} validation patients has an observed death; the C-index is "
            f"undefined there"
        )
    return tuple(warnings)


@dataclasses.dataclass(frozen=True)
class CensorshipEvidence:
    """What speaks for or against a flipped event column.

    Attributes:
      n: patients.
      event_fraction: share with an observed death.
      median_event: median follow-up of those, months (NaN if none).
      median_censored: median follow-up of the others, months (NaN if none).
      late_event_fraction: event share among the tenth with the longest follow-up.
      agreement: share of patients whose event equals that of the other column; NaN if there is none.
      n_compared: patients compared with the other column.
      reasons: why the coding is suspect; empty: nothing found.
    """

    n: int
    event_fraction: float
    median_event: float
    median_censored: float
    late_event_fraction: float
    agreement: float
    n_compared: int
    reasons: tuple[str, ...]

    @property
    def suspicious(self) -> bool:
        """Whether the column is probably flipped."""
        return bool(self.reasons)

    def message(self, source: str = "survival data") -> str:
        """One line for a warning; "" if nothing is suspicious."""
        if not self.reasons:
            return ""
        return (
            f"{source}: events and censorings are probably swapped: {'; '.join(self.reasons)}. Median follow-up is "
            f"{self.median_event:.1f} months with event and {self.median_censored:.1f} without; "
            f"{self.event_fraction:.0%} of {self.n} patients have an event. `event` is 1 = death, "
            f"`censorship` is 1 = censored: if the column holds the other, rename it"
        )


def censorship_evidence(
    time: np.ndarray, event: np.ndarray, *, other_event: np.ndarray | None = None, other_name: str = "the other column"
) -> CensorshipEvidence:
    """Looks for a flipped event column. It never changes the data: the caller warns with the evidence.

    Three signs: the event disagrees with another column (vital status, another endpoint) in most patients; most of the
    patients followed longest have an event, although those are the ones who outlived the study; nearly all have an
    event. Medians alone decide nothing: in TCGA-BRCA deaths have the longer follow-up. The last two signs need 20
    patients.

    Args:
      time: [n] float months, finite.
      event: [n] bool as read.
      other_event: [n] float or bool, 1 = event, NaN = unknown; None: no such column.
      other_name: its name, for the message.

    Returns:
      The evidence.
    """
    time, event = _arrays(time, event)
    late = event[time >= np.quantile(time, 0.9)] if len(time) else event
    share, late_share = (float(x.mean()) if len(x) else np.nan for x in (event, late))
    agreement, n_compared = _agreement(event, other_event)
    reasons = []
    if n_compared and agreement < 0.5:
        reasons.append(f"only {agreement:.0%} of {n_compared} patients have the event that {other_name} gives")
    if len(time) >= _MIN_PATIENTS and late_share >= LATE_EVENT_SHARE:
        reasons.append(f"{late_share:.0%} of the {len(late)} patients followed longest have an event")
    if len(time) >= _MIN_PATIENTS and share >= EVENT_SHARE:
        reasons.append(f"{share:.0%} of all patients have an event")
    medians = (float(np.median(time[rows])) if rows.any() else np.nan for rows in (event, ~event))
    return CensorshipEvidence(len(time), share, *medians, late_share, agreement, n_compared, tuple(reasons))


def _agreement(event: np.ndarray, other: np.ndarray | None) -> tuple[float, int]:
    if other is None:
        return np.nan, 0
    other = np.asarray(other, np.float64)
    known = np.isfinite(other)
    return (float((event[known] == (other[known] == 1)).mean()) if known.any() else np.nan), int(known.sum())


def _arrays(time: np.ndarray, event: np.ndarray, source: str = "survival data") -> tuple[np.ndarray, np.ndarray]:
    """Times as float64 and events as bool, of equal length."""
    time, event = np.asarray(time, np.float64), np.asarray(event)
    if time.ndim != 1 or time.shape != event.shape:
        raise DataError(f"{source}: time {time.shape} and event {event.shape} must be vectors of equal length")
    if event.dtype != bool and not np.isin(event, (0, 1)).all():
        bad = event[~np.isin(event, (0, 1))][0]
        raise DataError(f"{source}: event holds {bad}; expected 0 (censored) or 1 (death observed)")
    return time, event.astype(bool)


def _named(rows: np.ndarray, time: np.ndarray, case_id: Sequence[str] | None) -> str:
    found = np.flatnonzero(rows)
    names = [f"{case_id[row] if case_id is not None else f'row {row}'} ({time[row]:g})" for row in found[:_NAMED]]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{len(found)} of {len(rows)} patients: {', '.join(names)}{more}"


def _refuse(rows: np.ndarray, time: np.ndarray, case_id: Sequence[str] | None, what: str, fix: str) -> None:
    if rows.any():
        raise DataError(f"{what} for {_named(rows, time, case_id)}; {fix}")
