"""What every table of predictions offers, whatever it predicts: one row per (sample, fold, mode)."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from typing import Self

import numpy as np


class PredictionsError(ValueError):
    """A prediction table that breaks the schema; names file, row and field."""


def read_cells(path: pathlib.Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a prediction table as text.

    Raises:
      FileNotFoundError: if there is no such file.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.reader(stream)
        header = next(reader, [])
        return header, list(reader)


def cells_by_name(path: pathlib.Path, number: int, header: list[str], row: list[str]) -> dict[str, str]:
    """Column -> cell of one row; `number` is its line in the file, 1 = header.

    Raises:
      PredictionsError: the row is shorter or longer than the header.
    """
    if len(row) != len(header):
        raise PredictionsError(f"{path}: row {number} has {len(row)} fields, the header has {len(header)}")
    return dict(zip(header, row, strict=True))


def parse_number(path: pathlib.Path, row: int, column: str, text: str, kind: type) -> int | float:
    """A cell as int or float.

    Raises:
      PredictionsError: naming file, row and column.
    """
    try:
        return kind(text)
    except ValueError:
        raise PredictionsError(f"{path}: row {row}, column {column}: {text!r} is not {kind.__name__}") from None


class PredictionRows:
    """Base of frozen dataclasses whose fields are arrays [n, ...], among them case_id, slide_id, fold and mode."""

    case_id: np.ndarray
    slide_id: np.ndarray
    fold: np.ndarray
    mode: np.ndarray

    def __len__(self) -> int:
        return len(self.case_id)

    @property
    def modes(self) -> tuple[str, ...]:
        """Inference modes, in order of first appearance."""
        return tuple(dict.fromkeys(self.mode.tolist()))

    @property
    def folds(self) -> tuple[int, ...]:
        """Fold numbers, ascending."""
        return tuple(np.unique(self.fold).tolist())

    def where(self, rows: np.ndarray) -> Self:
        """The rows selected by a boolean mask or an index array."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    def of_mode(self, mode: str) -> Self:
        """The rows of one inference mode."""
        return self.where(self.mode == mode)

    def sorted(self) -> Self:
        """The same rows ordered by (mode in order of first appearance, fold, case, slide)."""
        rank = {mode: i for i, mode in enumerate(self.modes)}
        order = [rank[mode] for mode in self.mode.tolist()]
        return self.where(np.lexsort((self.slide_id, self.case_id, self.fold, order)))
