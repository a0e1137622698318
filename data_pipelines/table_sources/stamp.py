"""STAMP: clini table `PATIENT` + targets, slide table `PATIENT,FILENAME` (CSV or Excel), and `splits.json`."""

from __future__ import annotations

import re
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.table_sources import rows
from data_pipelines.table_sources.contents import Contents, Options
from data_pipelines.table_sources.foreign import Foreign

_PATIENT, _FILE = "PATIENT", "FILENAME"
_PARTS = {"train_patients": "train", "val_patients": "val", "test_patients": "test"}


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    content = file.json()
    if isinstance(content, dict) and isinstance(content.get("splits"), list):
        return [f"JSON with {len(content['splits'])} splits"]
    if _PATIENT not in file.header:
        return []
    return [f"columns {_PATIENT}, {_FILE}" if _FILE in file.header else f"column {_PATIENT} and targets"]


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`."""
    if not file.header:
        return Contents(folds=_folds(file.json(), file))
    if _FILE in file.header:
        table = file.text((_PATIENT, _FILE))
        # File names are relative to the folder of features, and patients may lack a file.
        table[_FILE] = [re.split(r"[/\\]", name)[-1] for name in table[_FILE]]
        missing = int((table[_FILE] == "").sum())
        slides = rows.keyed_table(
            table[table[_FILE] != ""].rename(columns={_PATIENT: "case_id", _FILE: "slide_id"}), file
        )
        notes = (f"{missing} patients of the slide table have no file",) if missing else ()
        return Contents(slides=rows.slides_of(slides, file), notes=notes)
    outcome = rows.named_columns(options)
    others = [name for name in file.header if name and name != _PATIENT and not name.startswith("Unnamed:")]
    labels = [name for name in options.label_columns or others if name not in outcome]
    table = rows.keyed(file, {_PATIENT: "case_id", **{name: name for name in (*labels, *outcome)}})
    found, dropped = rows.labels_of(table, labels, file, options)
    return Contents(labels=found, follow_up=rows.named_follow_up(table, file, options), left_out=dropped)


def _folds(content: Any, file: Foreign) -> dict[int, dict[str, tuple[str, ...]]]:
    folds = {}
    for number, split in enumerate(content["splits"]):
        if not isinstance(split, dict) or not {"train_patients", "test_patients"} <= set(split):
            raise DataError(f"{file.path}, split {number}: expected train_patients and test_patients")
        folds[number] = {
            part: tuple(dict.fromkeys(str(case) for case in split[key])) for key, part in _PARTS.items() if key in split
        }
    return folds
