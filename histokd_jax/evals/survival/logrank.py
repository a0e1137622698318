"""Log-rank test of two or more groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from histokd_jax.evals.survival._arrays import checked


@dataclasses.dataclass(frozen=True, eq=False)
class LogRank:
    """Result of a log-rank test.

    Attributes:
      statistic: chi-square statistic; NaN if undefined.
      p: two-sided p-value; NaN if undefined.
      degrees_of_freedom: groups - 1.
      groups: k group names.
      n: [k] patients.
      observed: [k] deaths.
      expected: [k] deaths expected if all groups had one survival curve.
      reason: why the test is undefined, else "".
    """

    statistic: float
    p: float
    degrees_of_freedom: int
    groups: tuple
    n: np.ndarray
    observed: np.ndarray
    expected: np.ndarray
    reason: str = ""


def logrank(time: np.ndarray, event: np.ndarray, group: np.ndarray, *, groups: Sequence | None = None) -> LogRank:
    """Tests whether groups share one survival curve (unweighted log-rank, hypergeometric covariance).

    Args:
      time: [n] float.
      event: [n] bool.
      group: [n] group of each patient.
      groups: the groups that are to be compared; None: those that occur.

    Returns:
      The test; undefined with a reason if nobody died while more than one group was under observation.

    Raises:
      ValueError: bad arrays, fewer than two groups, an empty group, or a group that is not in `groups`.
    """
    time, event = checked(time, event)
    group = np.asarray(group)
    if group.shape != time.shape:
        raise ValueError(f"group has shape {group.shape}, time {time.shape}; expected one group per patient")
    groups = tuple(np.unique(group).tolist() if groups is None else groups)
    member = np.stack([group == name for name in groups]) if groups else np.zeros((0, len(time)), bool)
    _check_groups(member, group, groups)
    observed, expected, covariance = _moments(time, event, member)
    difference = (observed - expected)[:-1]
    facts = (len(groups) - 1, groups, member.sum(axis=1), observed, expected)
    if np.linalg.matrix_rank(covariance[:-1, :-1]) < len(groups) - 1:
        reason = "a group has no patient under observation at any death of the others: nothing to compare"
        return LogRank(np.nan, np.nan, *facts, reason)
    statistic = float(difference @ np.linalg.solve(covariance[:-1, :-1], difference))
    return LogRank(statistic, float(stats.chi2.sf(statistic, len(groups) - 1)), *facts)


def _check_groups(member: np.ndarray, group: np.ndarray, groups: tuple) -> None:
    sizes = dict(zip(groups, member.sum(axis=1).tolist(), strict=True))
    if len(sizes) != len(groups):
        raise ValueError(f"groups {groups} names a group twice")
    if len(groups) < 2 or not all(sizes.values()):
        raise ValueError(
            f"the log-rank test compares at least two groups with patients; got patients per group {sizes} (a risk "
            f"that is the same for most patients leaves one side of a split empty)"
        )
    if sum(sizes.values()) != len(group):
        other = sorted(set(group.tolist()) - set(groups), key=str)
        raise ValueError(f"group holds {other}, which are not among groups={groups}; leave those patients out")


def _moments(time: np.ndarray, event: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observed and expected deaths [k] and the covariance [k, k] of their difference."""
    moments = np.unique(time[event])
    order = np.sort(time)
    at_risk = len(time) - np.searchsorted(order, moments, side="left").astype(np.float64)
    deaths = np.bincount(np.searchsorted(moments, time[event]), minlength=len(moments)).astype(np.float64)
    inside = np.stack([rows.sum() - np.searchsorted(np.sort(time[rows]), moments, side="left") for rows in member])
    share = inside / at_risk
    observed = (member & event).sum(axis=1).astype(np.float64)
    correction = np.divide(at_risk - deaths, at_risk - 1, out=np.zeros_like(at_risk), where=at_risk > 1)
    spread = deaths * correction
    covariance = np.diag((share * spread).sum(axis=1)) - (share * spread) @ share.T
    return observed, (share * deaths).sum(axis=1), covariance
