"""MADELEINE: one row per slide id and a 0/1 column per stain that says whether the stain exists; optionally `split`.

A missing stain stays missing: it is a 0 in the table of availability, never a vector of zeros.
"""

from __future__ import annotations

from data_pipelines import tcga
from data_pipelines.errors import DataError
from data_pipelines.table_sources import rows
from data_pipelines.table_sources.contents import Contents, Options
from data_pipelines.table_sources.foreign import Foreign

_HE, _SPLIT = "HE", "split"
_PARTS = ("train", "val", "test")


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    stains = _stains(file)
    if "slide_id" not in file.header or "case_id" in file.header or _HE not in stains or len(stains) < 2:
        return []
    return [f"columns slide_id and the stains {', '.join(stains)}"]


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`; without a barcode every slide is a case of its own."""
    stains, split = _stains(file), [_SPLIT] if _SPLIT in file.header else []
    table = file.text(("slide_id", *stains, *split))
    table.insert(0, "case_id", [tcga.patient_of(name) or name for name in table["slide_id"]])
    table = rows.keyed_table(table, file)
    found: dict[str, dict[str, bool]] = {stain: {} for stain in stains}
    folds: dict[str, dict[str, None]] = {}
    for row, record in enumerate(table.to_dict("records"), file.first_line):
        case = record["case_id"]
        for stain in stains:
            if record[stain] not in ("0", "1", "0.0", "1.0"):
                raise DataError(
                    f"{file.path}, line {row}, column {stain!r}: {record[stain]!r} must be 1 (the stain exists) or 0"
                )
            found[stain][case] = found[stain].get(case, False) or record[stain][0] == "1"
        if split and record[_SPLIT]:
            if record[_SPLIT] not in _PARTS:
                raise DataError(f"{file.path}, line {row}, column 'split': {record[_SPLIT]!r} is none of {_PARTS}")
            folds.setdefault(record[_SPLIT], {})[case] = None
    own = sum(tcga.patient_of(case) is None for case in table["case_id"])
    notes = (f"{own} slide ids are no TCGA barcodes; each is a case of its own",) if own else ()
    parts = {part: tuple(cases) for part, cases in folds.items()}
    return Contents(
        slides=rows.slides_of(table, file), stains=found, folds={0: parts} if "train" in parts else {}, notes=notes
    )


def _stains(file: Foreign) -> list[str]:
    others = ("slide_id", "case_id", _SPLIT)
    return [name for name in file.header if name and name not in others and not name.startswith("Unnamed:")]
