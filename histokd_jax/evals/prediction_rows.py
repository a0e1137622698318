"""What every table of predictions offers, whatever it predicts: one row per (sample, fold, mode)."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np


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
