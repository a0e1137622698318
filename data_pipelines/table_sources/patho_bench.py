"""Patho-Bench: `k=all.tsv`, one row per slide, columns `fold_0`, `fold_1`, ... in {train, val, test}."""

from __future__ import annotations

import re

import pandas as pd

from data_pipelines.errors import DataError
from data_pipelines.table_sources import rows
from data_pipelines.table_sources.contents import Contents, Options
from data_pipelines.table_sources.foreign import Foreign

_FOLD = re.compile(r"fold_(\d+)")
_PARTS = ("train", "val", "test")


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    folds = [name for name in file.header if _FOLD.fullmatch(name)]
    if not folds or not {"case_id", "slide_id"} <= set(file.header):
        return []
    return [f"columns case_id, slide_id and {len(folds)} of fold_K"]


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`."""
    folds = {int(match[1]): name for name in file.header if (match := _FOLD.fullmatch(name))}
    outcome = rows.named_columns(options)
    others = [n for n in file.header if n and not _FOLD.fullmatch(n) and not n.startswith("Unnamed:")]
    labels = [n for n in options.label_columns or others if n not in ("case_id", "slide_id", *outcome)]
    named = ("case_id", "slide_id", *labels, *outcome, *folds.values())
    table = rows.keyed(file, {name: name for name in named})
    found, dropped = rows.labels_of(table, labels, file, options)
    return Contents(
        labels=found,
        follow_up=rows.named_follow_up(table, file, options),
        slides=rows.slides_of(table, file),
        folds={number: _parts(table, name, file) for number, name in sorted(folds.items())},
        left_out=dropped,
    )


def _parts(table: pd.DataFrame, column: str, file: Foreign) -> dict[str, tuple[str, ...]]:
    found: dict[str, dict[str, None]] = {part: {} for part in _PARTS}
    for row, (case, part) in enumerate(zip(table["case_id"], table[column]), file.first_line):
        if part not in ("", *_PARTS):
            raise DataError(f"{file.path}, line {row}, column {column!r}: {part!r} is none of {', '.join(_PARTS)}")
        if part:
            found[part][case] = None
    return {part: tuple(cases) for part, cases in found.items() if cases}
