"""All molecular columns as one vector, standardised on the training patients (survival baselines, section 2)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable

NAN_POLICIES = ("error", "zero")
NEVER_FEATURES = frozenset({"case_id", "slide_id", "censorship", "event", "train", "survival_months", "time_months"})
"""Columns that say how or when a patient died, or how a table was made; never a feature (G-HANet, deviation D1)."""


@dataclasses.dataclass(frozen=True, eq=False)
class ColumnSelection:
    """K columns and how their values are prepared; stored beside a checkpoint, resolved by name.

    Attributes:
      names: K column names, in the order of the table the selection was made on.
      mean: [K] float64 of the training patients.
      std: [K] float64 of the training patients (population; 1 for a constant column).
      clip: standardised values are clipped to [-clip, clip], or None.
      nan_policy: "error", or "zero": a missing value is the training mean.
      source: JSON-able facts on how the columns were chosen.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    clip: float | None
    nan_policy: str
    source: Mapping[str, Any]

    def apply_table(self, table: GeneTable) -> np.ndarray:
        """Selects the columns by name and standardises them.

        Returns:
          [n, K] float32; rows of cases without genes are 0.

        Raises:
          DataError: the table lacks columns (named), or a value is missing under "error".
        """
        column_of = {name: column for column, name in enumerate(table.names)}
        missing = [name for name in self.names if name not in column_of]
        if missing:
            raise DataError(
                f"gene table lacks {len(missing)} of the {len(self.names)} columns the model was trained on: "
                f"{missing[:8]}; supply a table that has them"
            )
        columns = [column_of[name] for name in self.names]
        rows = np.flatnonzero(table.has_genes)
        values = _readable(table, rows, columns, self.nan_policy)
        scaled = (np.where(np.isnan(values), self.mean, values) - self.mean) / self.std
        out = np.zeros((len(table.case_id), len(self.names)), np.float32)
        out[rows] = scaled if self.clip is None else np.clip(scaled, -self.clip, self.clip)
        return out

    def to_json(self) -> str:
        """A JSON text from which `from_json` restores the same selection exactly."""
        facts = {name: getattr(self, name) for name in ("names", "clip", "nan_policy", "source")}
        return json.dumps(facts | {name: getattr(self, name).tolist() for name in ("mean", "std")})

    @classmethod
    def from_json(cls, text: str) -> ColumnSelection:
        """Restores what `to_json` wrote."""
        facts = json.loads(text)
        arrays = {name: np.array(facts[name], np.float64) for name in ("mean", "std")}
        return cls(**facts | {"names": tuple(facts["names"])} | arrays)


def select_columns(
    table: GeneTable,
    train_rows: np.ndarray,
    *,
    exclude: Sequence[str] = (),
    nan_policy: str = "error",
    clip: float | None = None,
) -> ColumnSelection:
    """All columns of a table, standardised on the training patients.

    Args:
      table: all patients of the cohort; rows without genes are ignored.
      train_rows: rows of the training patients.
      exclude: columns that are left out.
      nan_policy: "error", or "zero": a missing value becomes 0 after standardisation.
      clip: bound on standardised values, or None.

    Returns:
      The selection.

    Raises:
      DataError: an unknown option, a column that says how a patient died, no training patient with genes, or nothing
        left.
    """
    if nan_policy not in NAN_POLICIES:
        raise DataError(f"genes.nan_policy={nan_policy!r} is unknown; choose one of {NAN_POLICIES}")
    if clip is not None and not clip > 0:
        raise DataError(f"genes.clip={clip} must be positive or None")
    leaks = sorted(NEVER_FEATURES & {name.casefold() for name in table.names})
    if leaks:
        raise DataError(f"gene table holds the columns {leaks}, which tell the answer; they are no features")
    columns = [c for c, name in enumerate(table.names) if name not in set(exclude)]
    rows = np.intersect1d(np.flatnonzero(table.has_genes), train_rows)
    if not len(rows) or not columns:
        raise DataError(
            f"{len(rows)} training patients have genes and {len(columns)} columns are left: check the join of genes "
            "and split, and genes.exclude"
        )
    values = _readable(table, rows, columns, nan_policy)
    known = ~np.isnan(values)
    number = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0.0).sum(axis=0) / number
    std = np.sqrt(np.where(known, (values - mean) ** 2, 0.0).sum(axis=0) / number)
    # Equal values may leave a spread of rounding size, which would blow up in the division.
    spread = np.where(known, values, -np.inf).max(axis=0) > np.where(known, values, np.inf).min(axis=0)
    return ColumnSelection(
        names=tuple(table.names[c] for c in columns),
        mean=mean,
        std=np.where(spread & (std > 0), std, 1.0),
        clip=clip,
        nan_policy=nan_policy,
        source={
            "kind": "all",
            "n_columns": len(columns),
            "n_constant": int((~spread).sum()),
            "n_training_patients": len(rows),
            "excluded": sorted(set(exclude) & set(table.names)),
        },
    )


def _readable(table: GeneTable, rows: np.ndarray, columns: Sequence[int], nan_policy: str) -> np.ndarray:
    """[len(rows), len(columns)] float64; errors name the first missing values."""
    values = table.values[np.ix_(rows, np.asarray(columns, np.int64))].astype(np.float64)
    missing = np.argwhere(np.isnan(values))
    if len(missing) and nan_policy == "error":
        listed = [f"(column {table.names[columns[c]]!r}, case {table.case_id[rows[r]]!r})" for r, c in missing[:5]]
        raise DataError(
            f"{len(missing)} gene values are missing, first {', '.join(listed)}; set genes.nan_policy='zero' or name "
            "the columns in genes.exclude"
        )
    return values
