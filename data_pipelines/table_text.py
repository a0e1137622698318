"""CSV files as text: what every reader of tables shares."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pandas as pd

from data_pipelines.errors import DataError

BLANK = {"", "na", "n/a", "nan", "not available", "not evaluated"}


def read_text(path: str | os.PathLike, columns: Sequence[str] = ()) -> pd.DataFrame:
    """The CSV with every cell as stripped text; checks that `columns` exist."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    table.columns = table.columns.str.strip()
    require(table, columns, path)
    table = table[list(columns)] if columns else table
    return table.apply(lambda column: column.str.strip())


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return f"{names[:12]}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def check_case_ids(case_id: Sequence[str], path: str | os.PathLike) -> None:
    """Refuses rows without a case id.

    Raises:
      DataError: naming the line.
    """
    for row, case in enumerate(case_id):
        if not isinstance(case, str) or not case:
            raise DataError(f"{path}, line {row + 2}: case_id is empty; every row needs the id of its case")


def require(table: pd.DataFrame, columns: Sequence[str], path: str | os.PathLike) -> None:
    """Refuses a table without some columns.

    Raises:
      DataError: naming the column.
    """
    for name in columns:
        if name not in table.columns:
            raise DataError(f"{path}: no column {name!r}; the file has {listed(table.columns)}")
