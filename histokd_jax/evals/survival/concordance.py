"""Concordance: Harrell's C-index (G-HANet section 7) and Uno's, weighted by the inverse probability of censoring."""

from __future__ import annotations

import dataclasses

import numpy as np

from histokd_jax.evals.survival._arrays import checked, drawn_any, row_blocks
from histokd_jax.evals.survival.censoring import CensoringDistribution

TIED_TOLERANCE = 1e-8
NO_PAIRS = "no comparable pair of patients"


@dataclasses.dataclass(frozen=True)
class Concordance:
    """A C-index and what it is made of.

    Attributes:
      value: in [0, 1], or NaN.
      n_comparable: comparable ordered pairs.
      n_concordant: of these, pairs whose earlier death has the higher risk.
      n_tied: of these, pairs of equal risk; each counts 1/2.
      reason: why the value is NaN, else "".
    """

    value: float
    n_comparable: int
    n_concordant: int
    n_tied: int
    reason: str = ""


def harrell_c(
    risk: np.ndarray, time: np.ndarray, event: np.ndarray, *, tied_tolerance: float = TIED_TOLERANCE
) -> Concordance:
    """Harrell's C-index (G-HANet section 7).

    The ordered pair (i, j) is comparable if the death of i was observed and t_i < t_j, or t_i = t_j and j is censored.
    It scores 1 if risk_i > risk_j, and 1/2 if they differ by at most the tolerance. Two deaths at one time are not
    compared.

    Args:
      risk: [n] float.
      time: [n] float.
      event: [n] bool.
      tied_tolerance: risks this close are tied; 0 demands equality.

    Returns:
      The index; NaN with a reason if no pair is comparable.

    Raises:
      ValueError: bad arrays.
    """
    time, event, risk = checked(time, event, risk=risk)
    concordant, tied, comparable = _pair_counts(risk, time, event, tied_tolerance).sum(axis=1)
    if not comparable:
        return Concordance(np.nan, 0, 0, 0, _no_pairs(event))
    return Concordance(float((concordant + 0.5 * tied) / comparable), int(comparable), int(concordant), int(tied))


def uno_c(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    censoring: CensoringDistribution,
    *,
    tau: float | None = None,
    tied_tolerance: float = TIED_TOLERANCE,
) -> Concordance:
    """Uno's C-index (Statistics in Medicine 2011): pairs weighted by 1 / G(t_i)^2.

    Args:
      risk: [n] float.
      time: [n] float.
      event: [n] bool.
      censoring: distribution of censoring times, from the training patients.
      tau: only deaths before this time count; None: all. Needed where the test follow-up outlasts the training one.
      tied_tolerance: as in `harrell_c`.

    Returns:
      The index with unweighted pair counts; NaN with a reason if no pair is comparable, or if a death that counts lies
      where the training patients say nothing about censoring.

    Raises:
      ValueError: bad arrays.
    """
    time, event, risk = checked(time, event, risk=risk)
    counted = event if tau is None else event & (time < tau)
    counts = _pair_counts(risk, time, event, tied_tolerance)[:, counted[event]]
    if not counts[2].sum():
        return Concordance(np.nan, 0, 0, 0, _no_pairs(counted))
    probability = censoring.at(time[counted])
    unknown = ~(probability > 0)
    if unknown.any():
        reason = (
            f"{int(unknown.sum())} of {int(counted.sum())} deaths lie where the training patients leave the "
            f"probability of censoring undefined; set tau to {censoring.support:g} or less"
        )
        return Concordance(np.nan, *_integers(counts), reason)
    weight = 1.0 / probability**2
    concordant, tied, comparable = counts @ weight
    return Concordance(float((concordant + 0.5 * tied) / comparable), *_integers(counts))


def harrell_c_resampled(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    weights: np.ndarray,
    *,
    tied_tolerance: float = TIED_TOLERANCE,
) -> np.ndarray:
    """Harrell's C-index in every bootstrap resample.

    Args:
      risk: [n] float.
      time: [n] float.
      event: [n] bool.
      weights: [B, n] float, how often each patient is drawn.
      tied_tolerance: as in `harrell_c`.

    Returns:
      [B] float64; NaN where a resample has no comparable pair.
    """
    time, event, risk = checked(time, event, risk=risk)
    return _resampled(risk, time, event, event.astype(np.float64), weights, tied_tolerance)


def uno_c_resampled(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    weights: np.ndarray,
    censoring: CensoringDistribution,
    *,
    tau: float | None = None,
    tied_tolerance: float = TIED_TOLERANCE,
) -> np.ndarray:
    """Uno's C-index in every bootstrap resample; the distribution of censoring is not resampled.

    Args:
      risk: [n] float.
      time: [n] float.
      event: [n] bool.
      weights: [B, n] float, how often each patient is drawn.
      censoring: as in `uno_c`.
      tau: as in `uno_c`.
      tied_tolerance: as in `harrell_c`.

    Returns:
      [B] float64; NaN where a resample has no comparable pair, or a death that counts has no weight.
    """
    time, event, risk = checked(time, event, risk=risk)
    counted = event if tau is None else event & (time < tau)
    inverse = censoring.weights(time) ** 2
    found = _resampled(risk, time, event, np.where(counted, np.nan_to_num(inverse), 0.0), weights, tied_tolerance)
    return np.where(drawn_any(weights, counted & np.isnan(inverse)), np.nan, found)


def count_missing_as_zero(
    risk: np.ndarray, time: np.ndarray, event: np.ndarray, missing: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the released evaluation makes of patients without features: risk 0, time 0, death (deviation D17).

    Every real risk of a hazard model is below 0, so each such patient is "ranked correctly" before everybody else. This
    exists only to reproduce published numbers; elsewhere such patients are left out and reported.

    Args:
      risk: [n] float; anything where missing.
      time: [n] float.
      event: [n] bool.
      missing: [n] bool, patients without features.

    Returns:
      risk, time and event with those patients replaced.
    """
    missing = np.asarray(missing, bool)
    return np.where(missing, 0.0, risk), np.where(missing, 0.0, time), np.asarray(event, bool) | missing


def _resampled(
    risk: np.ndarray, time: np.ndarray, event: np.ndarray, of_death: np.ndarray, weights: np.ndarray, tolerance: float
) -> np.ndarray:
    """[B] C-index of resamples, the pairs of patient i weighing `of_death[i]`; 0 where i is no death that counts."""
    weights, deaths = np.asarray(weights, np.float64), np.flatnonzero(of_death)
    score, total = np.zeros(len(weights)), np.zeros(len(weights))
    for block in row_blocks(len(deaths), len(time)):
        rows = deaths[block]
        own = weights[:, rows] * of_death[rows]
        concordant, tied, comparable = _pairs(rows, risk, time, event, tolerance)
        score += np.einsum("bi,bi->b", own, weights @ (concordant + 0.5 * tied).T)
        total += np.einsum("bi,bi->b", own, weights @ comparable.T.astype(np.float64))
    return np.divide(score, total, out=np.full(len(weights), np.nan), where=total > 0)


def _pairs(
    rows: np.ndarray, risk: np.ndarray, time: np.ndarray, event: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bool [len(rows), n]: concordant, tied and comparable partners of the deaths in `rows`."""
    here = time[rows, None]
    comparable = (here < time[None, :]) | ((here == time[None, :]) & ~event[None, :])
    difference = risk[rows, None] - risk[None, :]
    tied = comparable & (np.abs(difference) <= tolerance)
    return comparable & ~tied & (difference > 0), tied, comparable


def _pair_counts(risk: np.ndarray, time: np.ndarray, event: np.ndarray, tolerance: float) -> np.ndarray:
    """[3, deaths] concordant, tied and comparable partners of every death."""
    deaths = np.flatnonzero(event)
    counts = np.zeros((3, len(deaths)))
    for block in row_blocks(len(deaths), len(time)):
        for kind, pairs in enumerate(_pairs(deaths[block], risk, time, event, tolerance)):
            counts[kind, block] = pairs.sum(axis=1)
    return counts


def _integers(counts: np.ndarray) -> tuple[int, int, int]:
    """Comparable, concordant and tied pairs, in the order of `Concordance`."""
    concordant, tied, comparable = counts.sum(axis=1)
    return int(comparable), int(concordant), int(tied)


def _no_pairs(event: np.ndarray) -> str:
    if not len(event):
        return f"{NO_PAIRS}: no patients"
    if not event.any():
        return f"{NO_PAIRS}: none of {len(event)} patients has an observed death that counts"
    return f"{NO_PAIRS}: nobody of {len(event)} patients was followed longer than one of the {int(event.sum())} deaths"
