"""Tables of label-free tasks: what each example adds to the joint-embedding loss of the step that it was evaluated in.

Columns: case_id, slide_id, fold, mode, loss, together. The loss couples the examples of a step, so a row is no property
of its example alone: `together` says how many examples shared the statistics. Anything else in the file is refused.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from histokd_jax.evals.prediction_rows import PredictionRows, cells_by_name, parse_number, read_cells
from histokd_jax.evals.predictions import PredictionsError, atomic_writer

COLUMNS = ("case_id", "slide_id", "fold", "mode", "loss", "together")


@dataclasses.dataclass(frozen=True)
class RepresentationRows(PredictionRows):
    """Losses of one run on one split, one row per (example, fold, mode).

    Attributes:
      case_id: [n] str, group of the example.
      slide_id: [n] str, example.
      fold: [n] int64, fold whose model was evaluated.
      mode: [n] str.
      loss: [n] float64, finite.
      together: [n] int64, examples of the step, itself included.
    """

    case_id: np.ndarray
    slide_id: np.ndarray
    fold: np.ndarray
    mode: np.ndarray
    loss: np.ndarray
    together: np.ndarray

    def full_steps(self) -> RepresentationRows:
        """The rows of steps that held as many examples as any: the last step of a pass may hold fewer."""
        return self.where(is_full(self.together)) if len(self) else self


def is_full(together: np.ndarray) -> np.ndarray:
    """[n] bool: rows of steps with the largest number of examples (specification, deviation 29: the rest is dropped).

    Args:
      together: [n] examples of the step of each row.
    """
    together = np.asarray(together)
    return together == together.max(initial=0)


def make_rows(
    case_id: Sequence[str],
    slide_id: Sequence[str],
    fold: Sequence[int] | int,
    mode: Sequence[str] | str,
    loss: np.ndarray,
    together: np.ndarray,
) -> RepresentationRows:
    """Builds validated rows; `fold` and `mode` may be scalars.

    Args:
      case_id: [n] groups.
      slide_id: [n] examples.
      fold: [n] or scalar.
      mode: [n] or scalar.
      loss: [n] finite.
      together: [n] examples of the step, >= 1.

    Raises:
      PredictionsError: on a loss that is not finite, or a duplicate (case, slide, fold, mode).
    """
    n = len(case_id)
    table = RepresentationRows(
        case_id=np.asarray(case_id, dtype=str),
        slide_id=np.asarray(slide_id, dtype=str),
        fold=np.broadcast_to(np.asarray(fold, np.int64), (n,)).copy(),
        mode=np.broadcast_to(np.asarray(mode, dtype=str), (n,)).copy(),
        loss=np.asarray(loss, np.float64),
        together=np.asarray(together).astype(np.int64),
    )
    _validate(table, "losses")
    return table


def concatenate(parts: Sequence[RepresentationRows]) -> RepresentationRows:
    """Rows of several tables, e.g. of all folds.

    Raises:
      PredictionsError: on duplicate rows.
    """
    names = [field.name for field in dataclasses.fields(RepresentationRows)]
    return make_rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def write_rows(path: str | os.PathLike[str], table: RepresentationRows) -> pathlib.Path:
    """Writes a table atomically; numbers keep all their digits.

    Args:
      path: target file; replaced in one step.
      table: the rows.

    Returns:
      The path.
    """
    path = pathlib.Path(path)
    with atomic_writer(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i in range(len(table)):
            ids = [table.case_id[i], table.slide_id[i], int(table.fold[i]), table.mode[i]]
            writer.writerow([*ids, repr(float(table.loss[i])), int(table.together[i])])
    return path


def read_rows(path: str | os.PathLike[str]) -> RepresentationRows:
    """Reads and validates a table.

    Args:
      path: CSV written by `write_rows`.

    Raises:
      FileNotFoundError: if there is no such file.
      PredictionsError: naming file, row (1 = header) and column of what breaks the schema.
    """
    path = pathlib.Path(path)
    header, rows = read_cells(path)
    if header != list(COLUMNS):
        raise PredictionsError(f"{path}: the columns are {header}; expected {list(COLUMNS)} in this order")
    if not rows:
        raise PredictionsError(f"{path}: no rows below the header; did the run finish an evaluation?")
    parsed = [_parse(path, number, header, row) for number, row in enumerate(rows, start=2)]
    table = RepresentationRows(*(np.array(column) for column in zip(*parsed, strict=True)))
    _validate(table, str(path), first_row=2)
    return table


def _parse(path: pathlib.Path, number: int, header: list[str], row: list[str]) -> tuple:
    cell = cells_by_name(path, number, header, row)
    numbers = {"fold": int, "loss": float, "together": int}
    return tuple(
        parse_number(path, number, name, cell[name], numbers[name]) if name in numbers else cell[name]
        for name in COLUMNS
    )


def _validate(table: RepresentationRows, source: str, first_row: int = 0) -> None:
    n = len(table)
    shapes = {field.name: getattr(table, field.name).shape for field in dataclasses.fields(table)}
    if any(shape != (n,) for shape in shapes.values()):
        raise PredictionsError(f"{source}: every field needs [{n}] rows, got {shapes}")
    checks = (
        (~np.isfinite(table.loss), "loss is NaN or infinite"),
        (table.together < 1, "together is below 1"),
        (table.mode == "", "mode is empty"),
        (table.case_id == "", "case_id is empty"),
    )
    for bad, what in checks:
        if bad.any():
            i = int(np.argmax(bad))
            raise PredictionsError(
                f"{source}: row {i + first_row}: {what} (example {str(table.slide_id[i])!r}, fold {table.fold[i]}, "
                f"loss {table.loss[i]}, together {table.together[i]})"
            )
    keys = list(zip(table.case_id.tolist(), table.slide_id.tolist(), table.fold.tolist(), table.mode.tolist()))
    if len(set(keys)) != n:
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise PredictionsError(f"{source}: two rows for (case, slide, fold, mode) = {twice}; one each is expected")
