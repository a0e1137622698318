"""The prediction tables `predictions_{val,test}.csv`: schema, atomic writer, validating reader.

Columns: case_id, slide_id, fold, mode, label, prob. With two classes `prob` is the probability of class 1; with C > 2
it is the largest probability, followed by the columns prob_0 .. prob_{C-1}. A blank label (`predict` on slides without
labels) is read as -1. Anything else in the file is refused, so that arms and seeds stay in directories of their own.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TextIO

import numpy as np

from data_pipelines.atomic import storage_errors, temporary
from histokd_jax.evals.prediction_rows import (
    PredictionRows,
    PredictionsError,
    cells_by_name,
    parse_number,
    read_cells,
)

COLUMNS = ("case_id", "slide_id", "fold", "mode", "label", "prob")
UNLABELLED = -1
# Probabilities of a bfloat16 softmax sum to 1 within about 1e-2.
SUM_TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True)
class Predictions(PredictionRows):
    """Predictions of one run on one split, one row per (slide, fold, mode).

    Attributes:
      case_id: [n] str, patient.
      slide_id: [n] str.
      fold: [n] int64, fold whose model predicted.
      mode: [n] str, inference mode, e.g. "pathology".
      label: [n] int64 class index, -1 where unknown.
      probs: [n, C] float64.
    """

    case_id: np.ndarray
    slide_id: np.ndarray
    fold: np.ndarray
    mode: np.ndarray
    label: np.ndarray
    probs: np.ndarray

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return self.probs.shape[1]


def make_predictions(
    case_id: Sequence[str],
    slide_id: Sequence[str],
    fold: Sequence[int] | int,
    mode: Sequence[str] | str,
    label: Sequence[int],
    probs: np.ndarray,
) -> Predictions:
    """Build validated predictions; `fold` and `mode` may be scalars.

    Args:
      case_id: [n] patients.
      slide_id: [n] slides.
      fold: [n] or scalar.
      mode: [n] or scalar.
      label: [n] class index, -1 where unknown.
      probs: [n, C] class probabilities, C >= 2.

    Returns:
      The predictions.

    Raises:
      PredictionsError: on NaN, probabilities that do not sum to 1, labels out of range, or a duplicate
        (case, slide, fold, mode).
    """
    n = len(case_id)
    table = Predictions(
        case_id=np.asarray(case_id, dtype=str),
        slide_id=np.asarray(slide_id, dtype=str),
        fold=np.broadcast_to(np.asarray(fold, np.int64), (n,)).copy(),
        mode=np.broadcast_to(np.asarray(mode, dtype=str), (n,)).copy(),
        label=np.asarray(label, np.int64),
        probs=np.asarray(probs, np.float64),
    )
    _validate(table, "predictions")
    return table


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Rows of several tables, e.g. of all folds and modes.

    Args:
      parts: at least one table; all with the same number of classes.

    Returns:
      One table.

    Raises:
      PredictionsError: on a different number of classes or duplicate rows.
    """
    classes = {part.num_classes for part in parts}
    if len(classes) != 1:
        raise PredictionsError(f"cannot join predictions with {sorted(classes)} classes: one class count is expected")
    fields = [f.name for f in dataclasses.fields(Predictions)]
    return make_predictions(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def write_predictions(path: str | os.PathLike[str], table: Predictions) -> pathlib.Path:
    """Write a prediction table atomically; probabilities keep all their digits.

    Args:
      path: target file; replaced in one step, so a reader sees the old or the new table.
      table: predictions.

    Returns:
      The path.
    """
    path = pathlib.Path(path)
    binary = table.num_classes == 2
    header = [*COLUMNS, *([] if binary else [f"prob_{c}" for c in range(table.num_classes)])]
    lead = table.probs[:, 1] if binary else table.probs.max(axis=1)
    with atomic_writer(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        for i in range(len(table)):
            label = "" if table.label[i] == UNLABELLED else int(table.label[i])
            row = [table.case_id[i], table.slide_id[i], int(table.fold[i]), table.mode[i], label, repr(float(lead[i]))]
            writer.writerow(row if binary else [*row, *(repr(float(p)) for p in table.probs[i])])
    return path


def read_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Read and validate a prediction table.

    Args:
      path: CSV written by `write_predictions`, or by hand in its schema.

    Returns:
      The predictions.

    Raises:
      FileNotFoundError: if there is no such file.
      PredictionsError: naming file, row (1 = header) and column of what breaks the schema.
    """
    path = pathlib.Path(path)
    header, rows = read_cells(path)
    num_classes = _classes_of_header(path, header)
    if not rows:
        raise PredictionsError(f"{path}: no rows below the header; did the run finish an evaluation?")
    parsed = [_parse_row(path, number, header, row) for number, row in enumerate(rows, start=2)]
    case_id, slide_id, fold, mode, label, prob = zip(*(row[:6] for row in parsed), strict=True)
    positive = np.array(prob)
    probs = np.array([row[6] for row in parsed]) if num_classes > 2 else np.stack([1 - positive, positive], axis=1)
    table = Predictions(np.array(case_id), np.array(slide_id), np.array(fold), np.array(mode), np.array(label), probs)
    _validate(table, str(path), first_row=2)
    return table


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    """Text stream to a temporary file beside `path`, moved into place when the block ends without an exception.

    Args:
      path: target; its folder must exist.

    Yields:
      A UTF-8 text stream.

    Raises:
      StorageError: if the file system refuses (no permission, disk full).
    """
    path = pathlib.Path(path)
    scratch = temporary(path.parent, f"{path.name}.{os.getpid()}")
    try:
        with storage_errors(path), scratch.open("w", encoding="utf-8", newline="") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        with storage_errors(path):
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _classes_of_header(path: pathlib.Path, header: list[str]) -> int:
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise PredictionsError(f"{path}: missing column(s) {missing}; expected {list(COLUMNS)}, found {header}")
    extra = [name for name in header if name not in COLUMNS]
    expected = [f"prob_{c}" for c in range(len(extra))]
    if extra and (extra != expected or len(extra) < 3):
        raise PredictionsError(
            f"{path}: unexpected column(s) {extra}; beside {list(COLUMNS)} only prob_0 .. prob_(C-1) with C > 2 are "
            "allowed (keep seeds and arms in directories of their own)"
        )
    if len(set(header)) != len(header):
        raise PredictionsError(f"{path}: duplicate column names in {header}")
    return len(extra) or 2


def _parse_row(path: pathlib.Path, number: int, header: list[str], row: list[str]) -> tuple:
    cell = cells_by_name(path, number, header, row)
    class_columns = [name for name in header if name not in COLUMNS]
    return (
        cell["case_id"],
        cell["slide_id"],
        parse_number(path, number, "fold", cell["fold"], int),
        cell["mode"],
        UNLABELLED if cell["label"] == "" else parse_number(path, number, "label", cell["label"], int),
        _probability(path, number, "prob", cell["prob"]),
        [_probability(path, number, name, cell[name]) for name in class_columns],
    )


def _probability(path: pathlib.Path, row: int, column: str, text: str) -> float:
    value = parse_number(path, row, column, text, float)
    if not math.isfinite(value) or not 0.0 <= value <= 1.0:
        raise PredictionsError(f"{path}: row {row}, column {column}: {text!r}; a finite value in [0, 1] is expected")
    return value


def _validate(table: Predictions, source: str, first_row: int = 0) -> None:
    """Raise on NaN, sums away from 1, labels out of range, empty names and duplicates; rows count from first_row."""
    n, probs = len(table), table.probs
    if probs.ndim != 2 or probs.shape[0] != n or probs.shape[1] < 2:
        raise PredictionsError(f"{source}: probs must be [{n}, C >= 2], got {probs.shape}")
    checks = (
        (~np.isfinite(probs).all(axis=1), "probability is NaN or infinite"),
        ((probs < 0).any(axis=1) | (probs > 1).any(axis=1), "probability outside [0, 1]"),
        (np.abs(probs.sum(axis=1) - 1) > SUM_TOLERANCE, "probabilities do not sum to 1"),
        ((table.label < UNLABELLED) | (table.label >= probs.shape[1]), f"label outside [0, {probs.shape[1]})"),
        (table.case_id == "", "case_id is empty"),
        (table.mode == "", "mode is empty"),
    )
    for bad, what in checks:
        if bad.any():
            i = int(np.argmax(bad))
            raise PredictionsError(
                f"{source}: row {i + first_row}: {what} (case {str(table.case_id[i])!r}, "
                f"slide {str(table.slide_id[i])!r}, fold {table.fold[i]}, mode {str(table.mode[i])!r}, "
                f"label {table.label[i]}, probs {probs[i].tolist()})"
            )
    _refuse_duplicates(table, source, first_row)


def _refuse_duplicates(table: Predictions, source: str, first_row: int) -> None:
    seen: dict[tuple, int] = {}
    keys = zip(table.case_id.tolist(), table.slide_id.tolist(), table.fold.tolist(), table.mode.tolist(), strict=True)
    for i, key in enumerate(keys):
        if key in seen:
            raise PredictionsError(
                f"{source}: rows {seen[key] + first_row} and {i + first_row} both predict "
                f"(case, slide, fold, mode) = {key}; one row each is expected"
            )
        seen[key] = i
