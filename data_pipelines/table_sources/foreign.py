"""A foreign file as text: delimited tables, the first sheet of an Excel workbook, JSON."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pandas as pd

from data_pipelines import text_table
from data_pipelines.errors import DataError
from data_pipelines.table_sources import xlsx

TABLES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz", ".csv.zip", ".xlsx")
_COMMENT = "#"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A file, with what is needed to recognise it.

    Attributes:
      path: the file.
      header: names of its columns; empty for JSON.
      skip: lines of comment before the header.
    """

    path: pathlib.Path
    header: tuple[str, ...] = ()
    skip: int = 0

    @property
    def name(self) -> str:
        """Name of the file, for messages."""
        return self.path.name

    @property
    def first_line(self) -> int:
        """Line of the first row below the header."""
        return 2 + self.skip

    def text(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """All or some columns as text; see `text_table.read_text_table`."""
        if self.path.suffix == ".xlsx":
            return xlsx.select(self.path, columns)
        return text_table.read_text_table(self.path, columns, skip=self.skip)

    def first_row(self) -> list[str]:
        """Cells of the first row below the header; empty if there is none."""
        rows = self.text().head(1) if self.path.suffix == ".xlsx" else text_table.read_rows(self.path, 1, self.skip)
        return [str(cell) for cell in rows.iloc[0]] if len(rows) else []

    def json(self) -> Any:
        """The content of a JSON file; None for any other, or one that is not valid."""
        if self.path.suffix != ".json":
            return None
        try:
            return json.loads(self.path.read_bytes())
        except ValueError:
            return None


def open_foreign(path: pathlib.Path) -> Foreign:
    """Looks at a file.

    Raises:
      DataError: no file, an unknown suffix, or no header.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".json":
        return Foreign(path)
    if not path.name.lower().endswith(TABLES):
        raise DataError(f"{path}: the suffix is none of {', '.join(TABLES)}, .json; save the table as CSV")
    if path.suffix == ".xlsx":
        return Foreign(path, tuple(xlsx.select(path).columns))
    skip = _comments(path)
    return Foreign(path, tuple(text_table.read_header(path, skip=skip)), skip)


def _comments(path: pathlib.Path) -> int:
    """Lines before the header of a cBioPortal file, which begin with '#'."""
    if path.suffix not in (".txt", ".tsv", ".gz"):
        return 0
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    count = 0
    try:
        with opened as file:
            for line in file:
                if not line.startswith(_COMMENT.encode()):
                    return count
                count += 1
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the file from a copy") from error
    return 0
