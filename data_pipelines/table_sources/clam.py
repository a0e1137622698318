"""CLAM: `case_id,slide_id,label`; GigaPath: `slide_id,pat_id,label`; BCNB: `slide_id` and several label columns."""

from __future__ import annotations

from data_pipelines import tcga
from data_pipelines.table_sources import rows
from data_pipelines.table_sources.contents import Contents, Options
from data_pipelines.table_sources.foreign import Foreign

_CASES = ("case_id", "pat_id")


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    if "slide_id" not in file.header or not _labels(file):
        return []
    case = next((f"columns {name}," for name in _CASES if name in file.header), "no column of cases; columns")
    return [f"{case} slide_id, {', '.join(_labels(file)[:4])}"]


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`; without a column of cases they come from barcodes, or every slide is a case of its own."""
    case = next((name for name in _CASES if name in file.header), None)
    outcome = rows.named_columns(options)
    labels = [name for name in options.label_columns or _labels(file) if name not in outcome]
    table = file.text(list(dict.fromkeys([*([case] if case else []), "slide_id", *labels, *outcome])))
    notes = []
    if case:
        table = table.rename(columns={case: "case_id"})
    else:
        table.insert(0, "case_id", [tcga.patient_of(name) or name for name in table["slide_id"]])
        own = sum(tcga.patient_of(name) is None for name in table["slide_id"])
        notes = [f"{own} slide ids are no TCGA barcodes; each is a case of its own"] if own else []
    table = rows.keyed_table(table, file)
    found, dropped = rows.labels_of(table, labels, file, options)
    return Contents(
        labels=found,
        follow_up=rows.named_follow_up(table, file, options),
        slides=rows.slides_of(table, file),
        left_out=dropped,
        notes=tuple(notes),
    )


def _labels(file: Foreign) -> list[str]:
    others = (*_CASES, "slide_id")
    return [name for name in file.header if name and name not in others and not name.startswith("Unnamed:")]
