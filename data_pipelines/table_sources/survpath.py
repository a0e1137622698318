"""SurvPath: `metadata/tcga_*.csv` with three endpoints; expression and clinical columns are in files of their own.

Expression (`raw_rna_data/*/*/rna_clean.csv`) is read by `expression`, `clinical_data` by `labels`, and the pathways
(`pathway_compositions`, `*_signatures.csv`) by `groups`; a folder `datasets_csv` is taken apart by `folders`.
"""

from __future__ import annotations

from data_pipelines.table_sources import mcat, rows
from data_pipelines.table_sources.contents import OVERALL, Contents, LeftOut, Options
from data_pipelines.table_sources.foreign import Foreign

_ENDPOINTS = {OVERALL: "", "dss": "_dss", "pfi": "_pfi"}


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    wanted = {*mcat.IDS, f"{mcat.TIME}_dss", f"{mcat.CENSORSHIP}_dss"}
    return [f"columns {', '.join(sorted(wanted))}"] if wanted <= set(file.header) else []


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`."""
    columns = {
        name: (f"{mcat.TIME}{end}", f"{mcat.CENSORSHIP}{end}")
        for name, end in _ENDPOINTS.items()
        if f"{mcat.TIME}{end}" in file.header
    }
    labels = [name for name in mcat.LABELS if name in file.header]
    named = [*mcat.IDS, *labels, *(name for pair in columns.values() for name in pair)]
    table = rows.keyed(file, {name: name for name in named})
    rest = [n for n in file.header if n and n not in named and n not in mcat.UNUSED and not n.startswith("Unnamed:")]
    left_out = [LeftOut("column", name, why) for name, why in mcat.UNUSED.items() if name in file.header]
    found, dropped = rows.labels_of(table, labels, file, options)
    return Contents(
        labels=found,
        follow_up={name: rows.follow_up_of(table, file, *pair, censored=True) for name, pair in columns.items()},
        slides=rows.slides_of(table, file),
        left_out=(*left_out, *dropped, *(LeftOut("column", name, "not known to the reader") for name in rest)),
        notes=("the authors' target is disease-specific survival: --endpoint dss",),
    )
