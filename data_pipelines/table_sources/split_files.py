"""Split files `splits_K.csv` of MCAT, PORPOISE, SurvPath (`train,val`) and CLAM (`train,val,test`), by their ids."""

from __future__ import annotations

import re

from data_pipelines.errors import DataError
from data_pipelines.table_sources.contents import Contents, Options
from data_pipelines.table_sources.foreign import Foreign

_PARTS = ("train", "val", "test")
_NUMBER = re.compile(r"(?:splits|fold)_?(\d+)\.csv")


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    named = [name for name in file.header if name and not name.startswith("Unnamed:")]
    present = [name for name in named if name in _PARTS]
    return [f"columns {', '.join(present)}"] if {"train", "val"} <= set(present) and "slide_id" not in named else []


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`."""
    match = _NUMBER.fullmatch(file.name)
    if match is None:
        raise DataError(f"{file.path}: which fold this is must be in the name, as in splits_0.csv")
    present = [part for part in _PARTS if part in file.header]
    table = file.text(present)
    if set(table[present[0]].head(50)) <= {"True", "False", ""}:
        raise DataError(f"{file.path}: holds True and False, not ids; give the files splits_K.csv")
    return Contents(folds={int(match[1]): {part: tuple(i for i in table[part] if i) for part in present}})
