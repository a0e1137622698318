"""Tests that pick the features of gene groups: Welch's t, false-discovery rate, smallest p (G-HANet section 3.5)."""

from __future__ import annotations

import numpy as np
from scipy import stats

from data_pipelines.errors import DataError


def welch(values: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Two-sided p of Welch's t-test (unequal variances) per column.

    Args:
      values: [n, m] float64.
      high: rows of the one sample; repeats count.
      low: rows of the other.

    Returns:
      [m] float64; NaN where a column is constant over both samples: nothing is tested there, rounding would decide.

    Raises:
      DataError: fewer than two rows in a sample.
    """
    if min(len(high), len(low)) < 2:
        raise DataError(
            f"gene selection: {len(high)} high-risk and {len(low)} low-risk training patients; the test needs two of "
            "each: set genes.selection='none' or train on more patients"
        )
    a, b = values[high], values[low]
    square = a.var(axis=0, ddof=1) / len(a), b.var(axis=0, ddof=1) / len(b)
    total = square[0] + square[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (a.mean(axis=0) - b.mean(axis=0)) / np.sqrt(total)
        freedom = total**2 / (square[0] ** 2 / (len(a) - 1) + square[1] ** 2 / (len(b) - 1))
    constant = np.ptp(values[np.concatenate([high, low])], axis=0) == 0
    return np.where(constant, np.nan, 2 * stats.t.sf(np.abs(t), freedom))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values of the false-discovery-rate procedure; NaN stays NaN and is no test.

    Args:
      p: [m] float.

    Returns:
      [m] float64: min over k >= rank of p_(k) m / k, at most 1.
    """
    out = np.full(len(p), np.nan)
    valid = np.flatnonzero(~np.isnan(p))
    order = valid[np.argsort(p[valid], kind="stable")]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    out[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return out


def smallest(scores: np.ndarray, n: int) -> np.ndarray:
    """Mask of the n smallest scores, NaN never; the order of the columns decides ties."""
    chosen = np.zeros(len(scores), bool)
    order = np.argsort(scores, kind="stable")[:n]
    chosen[order[~np.isnan(scores[order])]] = True
    return chosen
