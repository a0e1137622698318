"""The first sheet of an Excel workbook as text; cells with formulas give their stored values."""

from __future__ import annotations

import pathlib
import re
import zipfile
from collections.abc import Sequence
from xml.etree import ElementTree

import pandas as pd

from data_pipelines import text_table
from data_pipelines.errors import DataError

_MAIN = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_SHEETS = re.compile(r"xl/worksheets/sheet(\d+)\.xml")


def select(path: pathlib.Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Columns of the first sheet, whose first row is the header.

    Args:
      path: .xlsx file.
      columns: names to take, which must exist once; default: all that have a name.

    Returns:
      The table with every cell as stripped text.

    Raises:
      DataError: no workbook, an empty sheet, a missing or doubled column.
    """
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path}: the first sheet is empty; expected a table with a header")
    header = rows[0]
    named = [name for name in header if name]
    wanted = list(columns) or list(dict.fromkeys(named))
    text_table.require_columns(named, wanted, path)
    at = [header.index(name) for name in wanted]
    body = [[row[i] if i < len(row) else "" for i in at] for row in rows[1:] if any(row)]
    return pd.DataFrame(body, columns=wanted, dtype=str)


def _rows(path: pathlib.Path) -> list[list[str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            sheets = sorted((int(match[1]), name) for name in names if (match := _SHEETS.fullmatch(name)))
            if not sheets:
                raise DataError(f"{path}: no worksheet in the file; save the table as CSV")
            shared = _shared(archive) if "xl/sharedStrings.xml" in names else []
            sheet = ElementTree.fromstring(archive.read(sheets[0][1]))
    except (zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise DataError(f"{path}: no readable Excel workbook ({error}); save the table as CSV") from error
    return [_cells(row, shared) for row in sheet.iter(f"{_MAIN}row")]


def _shared(archive: zipfile.ZipFile) -> list[str]:
    root = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
    return ["".join(part.text or "" for part in item.iter(f"{_MAIN}t")) for item in root.iter(f"{_MAIN}si")]


def _cells(row: ElementTree.Element, shared: Sequence[str]) -> list[str]:
    """Text of the cells of a row; empty cells are not stored, so the reference says where a cell belongs."""
    cells: list[str] = []
    for cell in row.iter(f"{_MAIN}c"):
        place = _column_number(cell.get("r", "")) if cell.get("r") else len(cells)
        cells += [""] * (place + 1 - len(cells))
        cells[place] = _text(cell, shared).strip()
    return cells


def _column_number(reference: str) -> int:
    number = 0
    for letter in re.match(r"[A-Z]*", reference)[0]:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1


def _text(cell: ElementTree.Element, shared: Sequence[str]) -> str:
    if cell.get("t") == "inlineStr":
        return "".join(part.text or "" for part in cell.iter(f"{_MAIN}t"))
    value = cell.find(f"{_MAIN}v")
    content = "" if value is None else value.text or ""
    if cell.get("t") == "s":
        return shared[int(content)]
    return {"1": "TRUE", "0": "FALSE"}.get(content, content) if cell.get("t") == "b" else content
