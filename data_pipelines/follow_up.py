"""Follow-up tables: months and whether the event was observed, keyed by case; bad cells are errors that name them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_pipelines.errors import DataError
from data_pipelines.text_table import check_case_ids, is_blank, read_header, read_text_table


class Survival(NamedTuple):
    """Follow-up of n cases: time_months [n] float64 (NaN = unknown) and event [n] bool (True = death observed)."""

    time_months: np.ndarray
    event: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class SurvivalTable:
    """Follow-up keyed by case: case_id (n, unique) and `survival` aligned to it.

    Attributes:
      case_id: n cases.
      survival: their follow-up.
      slides: case -> slide ids, in file order, if the table lists them in a column slide_id; else empty.
    """

    case_id: tuple[str, ...]
    survival: Survival
    slides: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FollowUpColumns:
    """Columns of an endpoint, e.g. disease-specific instead of overall survival; empty names: found by `read_survival`.

    Attributes:
      time: months.
      event: 1 = the event was observed.
      censorship: 1 = censored; in place of `event`.
    """

    time: str = ""
    event: str = ""
    censorship: str = ""

    def __post_init__(self):
        given = [bool(self.time), bool(self.event) != bool(self.censorship)]
        if any((self.time, self.event, self.censorship)) and not all(given):
            raise DataError(
                "survival.time_column needs exactly one of survival.event_column (1 = event) and "
                f"survival.censorship_column (1 = censored); got {self}"
            )
        for name, other in ((self.event, "censorship"), (self.censorship, "event")):
            if other[:6] in name.casefold():
                raise DataError(
                    f"column {name!r} was given as {'event' if name == self.event else 'censorship'} status, but its "
                    f"name says {other}: give it as survival.{other}_column, or rename it"
                )


def read_survival(path: str | os.PathLike, columns: FollowUpColumns | None = None) -> SurvivalTable:
    """Overall survival from case_id,time_months,event or from an MCAT / PORPOISE table.

    The latter has survival_months and censorship with 1 = censored, so event = 1 - censorship, and one row per slide;
    rows of a case must agree. A file with both columns event and censorship must not contradict itself.

    Args:
      path: CSV file, plain, zipped or gzipped.
      columns: other columns, e.g. of another endpoint.

    Returns:
      Months and events per case; blank cells give time NaN, event False.

    Raises:
      DataError: missing columns, bad cells or conflicting rows; names file, line and field.
    """
    header = read_header(path)
    (time, status), flipped = _follow_up_columns(header, columns)
    wanted = dict.fromkeys(("case_id", time, status))
    wanted |= dict.fromkeys(name for name in ("slide_id", "event", "censorship") if name in header)
    table = read_text_table(path, tuple(wanted))
    check_case_ids(table["case_id"], path)
    _check_status(table, path)
    return survival_of(table, time, status, flipped, path)


def survival_of(
    table: pd.DataFrame, time: str, status: str, flipped: bool, path: str | os.PathLike, *, first_line: int = 2
) -> SurvivalTable:
    """Follow-up from the text cells of a table with the column case_id; rows of a case must agree.

    Args:
      table: cells as text.
      time: column of months.
      status: column of 0 and 1.
      flipped: 1 = censored instead of 1 = event.
      path: for messages.
      first_line: line of the first row in the file, for messages.

    Raises:
      DataError: bad cells or conflicting rows.
    """
    columns = (time, status)
    known: dict[str, tuple[float, bool]] = {}
    for row, cells in enumerate(table[["case_id", *columns]].itertuples(index=False, name=None), first_line):
        entry = _parse_survival(cells[1:], columns, flipped, f"{path}, line {row}")
        first = known.setdefault(cells[0], entry)
        if first != entry and not (np.isnan(first[0]) and np.isnan(entry[0])):
            raise DataError(
                f"{path}, line {row}: case {cells[0]!r} has (months, event) {entry} here but {first} earlier; "
                f"a case needs one follow-up"
            )
    times, events = zip(*known.values()) if known else ((), ())
    slides: dict[str, list[str]] = {}
    for case, slide in zip(table["case_id"], table.get("slide_id", ())):
        slides.setdefault(case, []).append(slide)
    return SurvivalTable(
        tuple(known),
        Survival(np.array(times, np.float64), np.array(events, bool)),
        {case: tuple(dict.fromkeys(names)) for case, names in slides.items()},
    )


def _follow_up_columns(header: Sequence[str], columns: FollowUpColumns | None) -> tuple[tuple[str, str], bool]:
    """(column of months, column of status), and whether the status says 1 = censored."""
    if columns is not None and columns.time:
        return (columns.time, columns.event or columns.censorship), bool(columns.censorship)
    flipped = "event" not in header
    return (("survival_months", "censorship") if flipped else ("time_months", "event")), flipped


def _check_status(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Refuses a file in which event is not 1 - censorship: one of them is flipped."""
    if not {"event", "censorship"} <= set(table.columns):
        return
    event, censored = (pd.to_numeric(table[name], errors="coerce").to_numpy() for name in ("event", "censorship"))
    bad = event + censored != 1
    bad &= np.isfinite(event) & np.isfinite(censored)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"{path}, line {row + 2}: event is {event[row]:g} and censorship {censored[row]:g}; event (1 = death) must "
            "be 1 - censorship (1 = censored): one of the columns is flipped"
        )


def _parse_survival(cells: Sequence[str], columns: Sequence[str], flipped: bool, where: str) -> tuple[float, bool]:
    if any(map(is_blank, cells)):
        return np.nan, False
    numbers = pd.to_numeric(pd.Series(cells), errors="coerce").to_numpy(np.float64)
    months, status = numbers
    if not (np.isfinite(months) and months >= 0):
        raise DataError(f"{where}, column {columns[0]!r}: {cells[0]!r} is no follow-up in months (a number >= 0)")
    if status not in (0, 1):
        raise DataError(f"{where}, column {columns[1]!r}: {cells[1]!r} must be 0 or 1")
    return float(months), bool(status) != flipped
