"""Prediction tables of survival tasks: schema, atomic writer, validating reader.

Columns: case_id, slide_id, fold, mode, time_months, event, bin, risk, hazard_0 .. hazard_{C-1} (none for a Cox head).
A sample of several slides joins their ids by ";". Higher risk means an earlier death. Blank time_months, event and bin
(`predict` without follow-up) are read as NaN, -1 and -1. Anything else in the file is refused.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from histokd_jax.evals.prediction_rows import PredictionRows, cells_by_name, parse_number, read_cells
from histokd_jax.evals.predictions import PredictionsError, atomic_writer

COLUMNS = ("case_id", "slide_id", "fold", "mode", "time_months", "event", "bin", "risk")
UNKNOWN = -1


@dataclasses.dataclass(frozen=True)
class SurvivalPredictions(PredictionRows):
    """Predictions of one run on one split, one row per (sample, fold, mode).

    Attributes:
      case_id: [n] str, patient.
      slide_id: [n] str, slides of the sample, joined by ";".
      fold: [n] int64, fold whose model predicted.
      mode: [n] str, inference mode.
      time_months: [n] float64 follow-up, NaN where unknown.
      event: [n] int64, 1 = death observed, 0 = censored, -1 where unknown.
      bin: [n] int64 time bin of the follow-up, -1 where unknown.
      risk: [n] float64.
      hazards: [n, C] float64, probability of death within each bin given survival up to it; C = 0 for a Cox head.
    """

    case_id: np.ndarray
    slide_id: np.ndarray
    fold: np.ndarray
    mode: np.ndarray
    time_months: np.ndarray
    event: np.ndarray
    bin: np.ndarray
    risk: np.ndarray
    hazards: np.ndarray

    @property
    def num_bins(self) -> int:
        """Number of time bins C; 0 for a Cox head."""
        return self.hazards.shape[1]

    @property
    def known(self) -> np.ndarray:
        """[n] bool: the follow-up is known."""
        return self.event != UNKNOWN


def make_survival_predictions(
    case_id: Sequence[str],
    slide_id: Sequence[str],
    fold: Sequence[int] | int,
    mode: Sequence[str] | str,
    time_months: np.ndarray,
    event: np.ndarray,
    bin_index: np.ndarray,
    risk: np.ndarray,
    hazards: np.ndarray,
) -> SurvivalPredictions:
    """Builds validated predictions; `fold` and `mode` may be scalars.

    Args:
      case_id: [n] patients.
      slide_id: [n] slides.
      fold: [n] or scalar.
      mode: [n] or scalar.
      time_months: [n] months, NaN where unknown.
      event: [n] 1 = death, 0 = censored, -1 = unknown.
      bin_index: [n] time bin, -1 where unknown.
      risk: [n] finite.
      hazards: [n, C] in [0, 1], C >= 0.

    Returns:
      The predictions.

    Raises:
      PredictionsError: on a risk or hazard that is not finite, contradictory follow-up, or a duplicate (case, slide,
        fold, mode).
    """
    n = len(case_id)
    table = SurvivalPredictions(
        case_id=np.asarray(case_id, dtype=str),
        slide_id=np.asarray(slide_id, dtype=str),
        fold=np.broadcast_to(np.asarray(fold, np.int64), (n,)).copy(),
        mode=np.broadcast_to(np.asarray(mode, dtype=str), (n,)).copy(),
        time_months=np.asarray(time_months, np.float64),
        event=np.asarray(event, np.int64),
        bin=np.asarray(bin_index, np.int64),
        risk=np.asarray(risk, np.float64),
        hazards=np.asarray(hazards, np.float64),
    )
    _validate(table, "predictions")
    return table


def concatenate(parts: Sequence[SurvivalPredictions]) -> SurvivalPredictions:
    """Rows of several tables, e.g. of all folds and modes.

    Raises:
      PredictionsError: on different numbers of bins or duplicate rows.
    """
    bins = {part.num_bins for part in parts}
    if len(bins) != 1:
        raise PredictionsError(f"cannot join predictions with {sorted(bins)} time bins: one number is expected")
    fields = [f.name for f in dataclasses.fields(SurvivalPredictions)]
    return make_survival_predictions(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def write_survival_predictions(path: str | os.PathLike[str], table: SurvivalPredictions) -> pathlib.Path:
    """Writes a prediction table atomically; numbers keep all their digits.

    Args:
      path: target file; replaced in one step.
      table: predictions.

    Returns:
      The path.
    """
    path = pathlib.Path(path)
    with atomic_writer(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*COLUMNS, *(f"hazard_{c}" for c in range(table.num_bins))])
        for i in range(len(table)):
            known = table.event[i] != UNKNOWN
            follow_up = [repr(float(table.time_months[i])), int(table.event[i])] if known else ["", ""]
            place = int(table.bin[i]) if table.bin[i] != UNKNOWN else ""
            ids = [table.case_id[i], table.slide_id[i], int(table.fold[i]), table.mode[i]]
            numbers = [repr(float(value)) for value in (table.risk[i], *table.hazards[i])]
            writer.writerow([*ids, *follow_up, place, *numbers])
    return path


def read_survival_predictions(path: str | os.PathLike[str]) -> SurvivalPredictions:
    """Reads and validates a prediction table.

    Args:
      path: CSV written by `write_survival_predictions`, or by hand in its schema.

    Returns:
      The predictions.

    Raises:
      FileNotFoundError: if there is no such file.
      PredictionsError: naming file, row (1 = header) and column of what breaks the schema.
    """
    path = pathlib.Path(path)
    header, rows = read_cells(path)
    _check_header(path, header)
    if not rows:
        raise PredictionsError(f"{path}: no rows below the header; did the run finish an evaluation?")
    parsed = [_parse_row(path, number, header, row) for number, row in enumerate(rows, start=2)]
    columns = [np.array(column) for column in zip(*(row[:8] for row in parsed), strict=True)]
    hazards = np.array([row[8] for row in parsed], np.float64).reshape(len(parsed), len(header) - len(COLUMNS))
    table = SurvivalPredictions(*columns, hazards)
    _validate(table, str(path), first_row=2)
    return table


def _check_header(path: pathlib.Path, header: list[str]) -> None:
    expected = [*COLUMNS, *(f"hazard_{c}" for c in range(len(header) - len(COLUMNS)))]
    if header != expected:
        raise PredictionsError(
            f"{path}: the columns are {header}; expected {list(COLUMNS)} and hazard_0 .. hazard_(C-1) in this order"
        )


def _parse_row(path: pathlib.Path, number: int, header: list[str], row: list[str]) -> tuple:
    cell = cells_by_name(path, number, header, row)

    def value(column: str, kind: type, blank=None):
        if cell[column] == "" and blank is not None:
            return blank
        return parse_number(path, number, column, cell[column], kind)

    return (
        cell["case_id"],
        cell["slide_id"],
        value("fold", int),
        cell["mode"],
        value("time_months", float, math.nan),
        value("event", int, UNKNOWN),
        value("bin", int, UNKNOWN),
        value("risk", float),
        [value(name, float) for name in header[len(COLUMNS) :]],
    )


def _validate(table: SurvivalPredictions, source: str, first_row: int = 0) -> None:
    """Raises on shapes, values that are not finite, contradictory follow-up and duplicates; rows from first_row."""
    n, hazards = len(table), table.hazards
    if hazards.ndim != 2 or any(len(getattr(table, f.name)) != n for f in dataclasses.fields(table)):
        shapes = {f.name: getattr(table, f.name).shape for f in dataclasses.fields(table)}
        raise PredictionsError(f"{source}: every field needs {n} rows and hazards two axes, got {shapes}")
    if table.risk.shape != (n,):
        raise PredictionsError(f"{source}: risk must be [{n}], got {table.risk.shape}")
    known = table.known
    checks = (
        (~np.isfinite(table.risk), "risk is NaN or infinite"),
        (~np.isfinite(hazards).all(axis=1), "hazard is NaN or infinite"),
        ((hazards < 0).any(axis=1) | (hazards > 1).any(axis=1), "hazard outside [0, 1]"),
        (~np.isin(table.event, (UNKNOWN, 0, 1)), "event is not 0 or 1"),
        (known & ~(np.isfinite(table.time_months) & (table.time_months >= 0)), "follow-up is no time >= 0"),
        (~known & ~np.isnan(table.time_months), "a time without an event status"),
        (table.bin < UNKNOWN, "bin is negative"),
        ((hazards.shape[1] > 0) & (table.bin >= hazards.shape[1]), f"bin outside [0, {hazards.shape[1]})"),
        (table.case_id == "", "case_id is empty"),
        (table.mode == "", "mode is empty"),
    )
    for bad, what in checks:
        if bad.any():
            i = int(np.argmax(bad))
            raise PredictionsError(
                f"{source}: row {i + first_row}: {what} (case {str(table.case_id[i])!r}, fold {table.fold[i]}, mode "
                f"{str(table.mode[i])!r}, time {table.time_months[i]}, event {table.event[i]}, bin {table.bin[i]}, "
                f"risk {table.risk[i]}, hazards {hazards[i].tolist()})"
            )
    seen: dict[tuple, int] = {}
    keys = zip(table.case_id.tolist(), table.slide_id.tolist(), table.fold.tolist(), table.mode.tolist(), strict=True)
    for i, key in enumerate(keys):
        if key in seen:
            raise PredictionsError(
                f"{source}: rows {seen[key] + first_row} and {i + first_row} both predict (case, slide, fold, mode) = "
                f"{key}; one row each is expected"
            )
        seen[key] = i
