"""Privileged vectors of examples (expression, measurements), keyed by example id."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Sequence

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.ids import near_matches
from data_pipelines.text_table import BLANK, read_text_table

KEY = "example_id"


@dataclasses.dataclass(frozen=True, eq=False)
class VectorTable:
    """One vector per example.

    Attributes:
      row_of: example id -> row.
      values: [m, P] float32, all finite.
      names: P names, or empty.
    """

    row_of: dict[str, int]
    values: np.ndarray
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """P."""
        return self.values.shape[1]

    def of(self, example_id: str) -> np.ndarray | None:
        """[P] float32, or None if the table does not list the example."""
        row = self.row_of.get(example_id)
        return None if row is None else self.values[row]


def read_vectors(path: str | os.PathLike[str], example_ids: Sequence[str]) -> VectorTable:
    """Reads an NPZ file (example_id [m], values [m, P], names [P] if known) or a CSV (example_id, one column each).

    Args:
      path: the file.
      example_ids: of the dataset.

    Raises:
      DataError: another layout, an id twice, a value that is no finite number, or no id of the dataset.
    """
    ids, values, names = _read_npz(path) if str(path).endswith(".npz") else _read_csv(path)
    if values.ndim != 2 or len(ids) != len(values) or not values.shape[1]:
        raise DataError(f"{path}: {len(ids)} ids for values of shape {values.shape}; expected values [ids, P], P >= 1")
    if names and len(names) != values.shape[1]:
        raise DataError(f"{path}: {len(names)} names for vectors of {values.shape[1]} numbers")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        what = names[column] if names else f"number {column}"
        raise DataError(f"{path}: {ids[row]}, {what} is {values[row, column]}; expected finite numbers")
    row_of = {key: row for row, key in enumerate(ids)}
    if len(row_of) < len(ids):
        twice = next(key for key in ids if ids.count(key) > 1)
        raise DataError(f"{path}: {KEY} {twice!r} occurs twice; keep one of its rows")
    if not set(row_of) & set(example_ids):
        raise DataError(
            f"{path}: none of its {len(ids)} ids (first {ids[:3]}) is an example of the dataset (first "
            f"{list(example_ids[:3])}){near_matches(ids, list(example_ids))}"
        )
    return VectorTable(row_of, values.astype(np.float32), tuple(names))


def _read_npz(path: str | os.PathLike[str]) -> tuple[list[str], np.ndarray, list[str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if KEY not in file or "values" not in file:
                raise DataError(f"{path}: holds {list(file)}, expected arrays {KEY} and values")
            names = [str(name) for name in file["names"]] if "names" in file else []
            return [str(key) for key in file[KEY]], np.asarray(file["values"], np.float64), names
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as NPZ ({error})") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not plain arrays of strings and numbers ({error})") from error


def _read_csv(path: str | os.PathLike[str]) -> tuple[list[str], np.ndarray, list[str]]:
    table = read_text_table(path)
    if KEY not in table.columns:
        raise DataError(f"{path}: no column {KEY!r}; the table has {list(table.columns)}")
    names = [name for name in table.columns if name != KEY]
    values = np.empty((len(table), len(names)))
    for column, name in enumerate(names):
        for row, cell in enumerate(table[name]):
            try:
                values[row, column] = np.nan if cell.lower() in BLANK else float(cell)
            except ValueError as error:
                raise DataError(f"{path}, line {row + 2}: {name} is {cell!r}, expected a number") from error
    return list(table[KEY]), values, names
