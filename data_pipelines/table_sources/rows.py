"""Rows per slide become values per case; whatever contradicts itself is refused with file, line and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from data_pipelines import tcga
from data_pipelines.bag import check_key
from data_pipelines.errors import BagError, DataError
from data_pipelines.follow_up import Survival, SurvivalTable, survival_of
from data_pipelines.ids import bare_slide_id
from data_pipelines.table_sources.contents import OVERALL, LeftOut, Options
from data_pipelines.table_sources.foreign import Foreign
from data_pipelines.text_table import check_case_ids, is_blank

NOT_NAMED = "name it with --label-columns to keep it"
DAYS_PER_MONTH = 365.25 / 12
_MONTHS = {"months": 1.0, "days": 1 / DAYS_PER_MONTH, "years": 12.0}
TIME_UNITS = tuple(_MONTHS)


def keyed(file: Foreign, columns: Mapping[str, str]) -> pd.DataFrame:
    """Columns of a file under our names, with checked ids.

    Args:
      file: the table.
      columns: name in the file -> our name; one of them must become case_id.

    Returns:
      Text cells; the columns case_id and slide_id hold ids without blanks, slide ids without extension.

    Raises:
      DataError: a missing column, an empty or unusable id, or a slide whose barcode names another patient.
    """
    return keyed_table(file.text(list(columns)).rename(columns=dict(columns)), file)


def keyed_table(table: pd.DataFrame, file: Foreign) -> pd.DataFrame:
    """As `keyed`, for a table that was read and renamed already."""
    table = table.copy()
    check_case_ids(table["case_id"], file.path)
    for field in ("case_id", "slide_id"):
        if field in table:
            if field == "slide_id":
                table[field] = [bare_slide_id(name) for name in table[field]]
            _check_ids(table[field], field, file)
    if "slide_id" in table:
        _check_barcodes(table, file)
    return table


def _check_ids(ids: Sequence[str], field: str, file: Foreign) -> None:
    for row, text in enumerate(ids, file.first_line):
        try:
            check_key(text, field, text)
        except BagError as error:
            raise DataError(f"{file.path}, line {row}, column {field!r}: {error}") from error


def _check_barcodes(table: pd.DataFrame, file: Foreign) -> None:
    for row, (case, slide) in enumerate(zip(table["case_id"], table["slide_id"]), file.first_line):
        patients = tcga.patient_of(case), tcga.patient_of(slide)
        if None not in patients and patients[0] != patients[1]:
            raise DataError(
                f"{file.path}, line {row}: slide {slide!r} is of patient {patients[1]!r} by its barcode and of case "
                f"{case!r} by the table; correct one of them"
            )


def slides_of(table: pd.DataFrame, file: Foreign) -> dict[str, str]:
    """Slide id -> case id.

    Raises:
      DataError: a slide of two cases.
    """
    found: dict[str, str] = {}
    for row, (slide, case) in enumerate(zip(table["slide_id"], table["case_id"]), file.first_line):
        if found.setdefault(slide, case) != case:
            raise DataError(
                f"{file.path}, line {row}: slide {slide!r} has case {case!r} here and {found[slide]!r} before; a slide "
                "belongs to one case"
            )
    return found


def labels_of(
    table: pd.DataFrame, columns: Sequence[str], file: Foreign, options: Options
) -> tuple[dict[str, dict[str, str]], tuple[LeftOut, ...]]:
    """Label columns per case, or per slide; the cells of a case must agree, where they are not blank.

    Returns:
      Column -> id -> text; blank = not available, in whichever of the usual spellings. And the cells that were dropped
      because the rows of a case disagree (`options.conflicts`).

    Raises:
      DataError: rows of an id that disagree, unless they are to be dropped.
    """
    key = "slide_id" if options.by == "slide" else "case_id"
    if key not in table:
        raise DataError(f"{file.path}: no column of slide ids, so labels cannot be kept by slide")
    found: dict[str, dict[str, str]] = {}
    dropped: dict[tuple[str, str], str] = {}
    for column in columns:
        values: dict[str, str] = {}
        for row, (item, text) in enumerate(zip(table[key], table[column]), file.first_line):
            text = "" if is_blank(text) else text
            if not text or values.setdefault(item, text) == text:
                values.setdefault(item, "")
            elif not values[item]:
                values[item] = text
            elif options.conflicts == "drop":
                dropped[column, item] = f"column {column!r}: {text!r} in one row and {values[item]!r} in another"
            else:
                raise DataError(
                    f"{file.path}, line {row}, column {column!r}: {item!r} is {text!r} here and {values[item]!r} before"
                    f"{_hint(table, options)}"
                )
        found[column] = {item: "" if (column, item) in dropped else text for item, text in values.items()}
    return found, tuple(LeftOut("label", item, reason) for (_, item), reason in dropped.items())


def _hint(table: pd.DataFrame, options: Options) -> str:
    slides = "if labels belong to slides, use --by slide; " if options.by == "case" and "slide_id" in table else ""
    return f"; {slides}--conflicts drop makes such labels not available"


def follow_up_of(
    table: pd.DataFrame, file: Foreign, time: str, status: str, censored: bool, unit: str = "months"
) -> SurvivalTable:
    """Follow-up in months of a table with the column case_id.

    Args:
      table: text cells.
      file: for messages.
      time, status: columns; the status is 0 or 1.
      censored: 1 = censored instead of 1 = event.
      unit: of the time.

    Raises:
      DataError: bad cells, or rows of a case that disagree.
    """
    found = survival_of(table, time, status, censored, file.path, first_line=file.first_line)
    months = found.survival.time_months * _MONTHS[unit]
    return SurvivalTable(found.case_id, Survival(months, found.survival.event))


def named_follow_up(table: pd.DataFrame, file: Foreign, options: Options) -> dict[str, SurvivalTable]:
    """Overall survival from the columns that the user names; nothing if none are named.

    Raises:
      DataError: not exactly a time column and one status column.
    """
    time, event, censorship = options.time_column, options.event_column, options.censorship_column
    if not any((time, event, censorship)):
        return {}
    if not time or bool(event) == bool(censorship):
        raise DataError("--time-column needs exactly one of --event-column (1 = event) and --censorship-column")
    return {OVERALL: follow_up_of(table, file, time, event or censorship, bool(censorship), options.time_unit)}


def named_columns(options: Options) -> tuple[str, ...]:
    """The follow-up columns that the user names."""
    return tuple(filter(None, (options.time_column, options.event_column, options.censorship_column)))


def joined(parts: Sequence[SurvivalTable]) -> SurvivalTable:
    """One table of several that may overlap.

    Raises:
      DataError: a case with different follow-up in two of them.
    """
    known: dict[str, tuple[float, bool]] = {}
    for part in parts:
        for case, month, event in zip(part.case_id, *part.survival):
            entry = (float(month), bool(event))
            first = known.setdefault(case, entry)
            if first != entry and not (first[0] != first[0] and month != month):
                raise DataError(f"case {case!r} has (months, event) {entry} in one file and {first} in another")
    times, events = zip(*known.values()) if known else ((), ())
    return SurvivalTable(tuple(known), Survival(np.array(times, np.float64), np.array(events, bool)))
