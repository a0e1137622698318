"""What is done about wild z-scores: nothing (exact), a bound (clip), or ranks as normal scores (rank)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy import special, stats

from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable
from data_pipelines.table_sources.contents import Z_SCORE

EXACT, CLIP, RANK = "exact", "clip", "rank"
POLICIES = (EXACT, CLIP, RANK)
WILD = 50.0
"""Absolute z-scores beyond this are reported: TCGA tables hold values up to 36,893."""
_SUFFIX = "_rnaseq"


def account(table: GeneTable) -> dict[str, Any]:
    """Counts of wild values of expression: genes, values, and the largest with its gene and case."""
    columns = _columns(table)
    values = np.abs(np.nan_to_num(table.values[:, columns], nan=0.0))
    if not values.size:
        return {}
    wild = values > WILD
    row, column = np.unravel_index(int(values.argmax()), values.shape)
    return {
        "limit": WILD,
        "genes_beyond": int(wild.any(axis=0).sum()),
        "values_beyond": int(wild.sum()),
        "largest": float(values[row, column]),
        "largest_gene": table.names[columns[column]],
        "largest_case": table.case_id[row],
    }


def apply(table: GeneTable, policy: str, *, scale: str, limit: float = 10.0) -> GeneTable:
    """Prepares the columns `*_rnaseq`; copy numbers and mutations stay as they are, missing values stay missing.

    Args:
      table: columns under full names.
      policy: "exact"; "clip" to [-limit, limit], for z-scores; or "rank": the rank of a patient among all patients of
        the table, ties shared, as the normal score Phi^-1((rank - 1/2) / n). Ranks see every patient of the cohort,
        also those that a fold tests on, but no label.
      scale: of the expression.
      limit: of "clip".

    Returns:
      The table.

    Raises:
      DataError: an unknown policy, a bad limit, or a bound on values that are no z-scores.
    """
    if policy not in POLICIES:
        raise DataError(f"--outliers {policy!r} is unknown; choose one of {', '.join(POLICIES)}")
    columns = _columns(table)
    if policy == EXACT or not len(columns):
        return table
    values = table.values.copy()
    if policy == CLIP:
        if scale != Z_SCORE:
            raise DataError(
                f"--outliers clip bounds z-scores, and the scale of this expression is {scale}; use rank or exact"
            )
        if not limit > 0:
            raise DataError(f"--clip {limit}: expected a positive bound")
        values[:, columns] = np.clip(values[:, columns], -limit, limit)
    else:
        values[:, columns] = _normal_scores(values[:, columns])
    return dataclasses.replace(table, values=values)


def _columns(table: GeneTable) -> np.ndarray:
    return np.array([column for column, name in enumerate(table.names) if name.endswith(_SUFFIX)], np.int64)


def _normal_scores(values: np.ndarray) -> np.ndarray:
    """[n, G] float32; NaN stays NaN."""
    ranks = stats.rankdata(values, axis=0, nan_policy="omit")
    count = np.maximum((~np.isnan(values)).sum(axis=0), 1)
    return special.ndtri((ranks - 0.5) / count).astype(np.float32)
