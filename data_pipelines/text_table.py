"""Reads a delimited table as text, cell by cell, and refuses what other readers would guess at."""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from data_pipelines.errors import DataError

BLANK = {"", "na", "n/a", "nan", "not available", "not evaluated"}
_SEPARATORS = (",", ";", "\t")


def is_blank(cell: str) -> bool:
    """Whether a cell says that there is no value, in one of the usual spellings."""
    return cell.strip("[]").casefold() in BLANK


def listed(names: Sequence[str]) -> str:
    """The first dozen names and the number of the others."""
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


def require_columns(found: Sequence[str], columns: Sequence[str], path: str | os.PathLike) -> None:
    """Checks that each of the columns exists once.

    Raises:
      DataError: one is missing, or occurs twice.
    """
    counts = Counter(found)
    for name in columns:
        if not counts[name]:
            raise DataError(f"{path}: no column {name!r}; the file has {listed(found)}")
        if counts[name] > 1:
            raise DataError(
                f"{path}: column {name!r} occurs {counts[name]} times; keep one of them or rename the others"
            )


def read_text_table(path: str | os.PathLike, columns: Sequence[str] = (), *, skip: int = 0) -> pd.DataFrame:
    """A table with every cell as stripped text.

    Commas, semicolons or tabs separate the cells, whichever occurs most in the header; a byte order mark is ignored.

    Args:
      path: the file, plain or compressed.
      columns: take these columns, which must exist once; default: all, none of which may have the name of another.
      skip: lines before the header.

    Returns:
      The table; columns without a name are left out.

    Raises:
      DataError: not UTF-8, no header, a row with more cells than the header, a missing or doubled column.
    """
    raw = _read(path, separator_of(path, skip=skip), skiprows=skip)
    names = [str(name).strip() for name in raw.iloc[0]]
    named = [i for i, name in enumerate(names) if name and not name.startswith("Unnamed:")]
    body = raw.iloc[1:].reset_index(drop=True)
    wanted = columns or list(dict.fromkeys(names[i] for i in named))
    require_columns([names[i] for i in named], wanted, path)
    table = body[[names.index(name) for name in wanted]]
    table.columns = list(wanted)
    return table.apply(lambda column: column.str.strip())


def read_header(path: str | os.PathLike, *, skip: int = 0) -> list[str]:
    """The names of the columns, stripped, as they are in the file.

    Raises:
      DataError: not UTF-8, or empty.
    """
    return [str(name).strip() for name in _read(path, separator_of(path, skip=skip), nrows=1, skiprows=skip).iloc[0]]


def read_rows(path: str | os.PathLike, count: int, skip: int = 0) -> pd.DataFrame:
    """The first rows below the header as text, by position.

    Raises:
      DataError: not UTF-8, or empty.
    """
    separator = separator_of(path, skip=skip)
    return _read(path, separator, nrows=count + 1, skiprows=skip).iloc[1:].reset_index(drop=True)


def separator_of(path: str | os.PathLike, *, skip: int = 0) -> str:
    """What separates the cells: a comma, a semicolon or a tab, whichever occurs most in the header."""
    first = str(_read(path, "\0", nrows=1, skiprows=skip).iloc[0, 0])
    return max(_SEPARATORS, key=first.count)


def _read(path: str | os.PathLike, separator: str, **options) -> pd.DataFrame:
    # header=None keeps pandas from renaming doubled columns, and from taking the first cells of long rows as an index.
    try:
        return pd.read_csv(
            path, sep=separator, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig", **options
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the table as UTF-8") from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path}: the file is empty; expected a table with a header") from error
    except pd.errors.ParserError as error:
        raise DataError(f"{path}: rows differ in their number of cells ({str(error).strip()})") from error
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: a damaged archive ({error}); restore the file from a copy") from error
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as a table ({error})") from error
