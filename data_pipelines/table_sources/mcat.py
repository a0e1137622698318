"""MCAT and PORPOISE: one row per slide, survival, and molecular columns `*_rnaseq`, `*_cnv`, `*_mut`; zipped CSV.

Read by name: the two order their columns differently. Older tables hold mutations under bare gene symbols.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines import tables
from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable
from data_pipelines.table_sources import rows
from data_pipelines.table_sources.contents import OVERALL, Z_SCORE, Contents, LeftOut, Options
from data_pipelines.table_sources.foreign import Foreign
from data_pipelines.text_table import listed

TIME, CENSORSHIP = "survival_months", "censorship"
IDS = ("case_id", "slide_id")
LABELS = ("oncotree_code", "is_female", "age")
UNUSED = {
    "site": "tables lose its leading zero; the tissue source site is read from the barcode",
    "train": "a mark of the authors that their own splits do not use",
}


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    if not {*IDS, TIME, CENSORSHIP} <= set(file.header) or f"{TIME}_dss" in file.header:
        return []
    counts = {end: sum(name.endswith(end) for name in file.header) for end in tables.KINDS}
    kinds = ", ".join(f"{count} *{end}" for end, count in counts.items() if count) or "no molecular column"
    return [f"columns {', '.join(IDS)}, {TIME}, {CENSORSHIP}; {kinds}"]


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`."""
    own = (*IDS, TIME, CENSORSHIP)
    labels = [name for name in LABELS if name in file.header]
    table = rows.keyed(file, {name: name for name in (*own, *labels)})
    genes, notes = _genes(file)
    left_out = tuple(LeftOut("column", name, why) for name, why in UNUSED.items() if name in file.header)
    found, dropped = rows.labels_of(table, labels, file, options)
    return Contents(
        labels=found,
        follow_up={OVERALL: rows.follow_up_of(table, file, TIME, CENSORSHIP, censored=True)},
        genes=genes,
        scale=Z_SCORE if genes and any(name.endswith("_rnaseq") for name in genes.names) else "",
        slides=rows.slides_of(table, file),
        left_out=(*left_out, *dropped),
        notes=tuple(notes),
    )


def _genes(file: Foreign) -> tuple[GeneTable | None, list[str]]:
    known = {*IDS, TIME, CENSORSHIP, *LABELS, *UNUSED}
    suffixed = [name for name in file.header if name.endswith(tables.KINDS)]
    bare = [
        name
        for name in file.header
        if name and not name.startswith("Unnamed:") and name not in known and not name.endswith(tables.KINDS)
    ]
    if not suffixed and not bare:
        return None, ["the table has no molecular column"]
    found = tables.read_numeric_table(file.path, lambda names: [*suffixed, *bare])
    _check_indicators(found, bare, file)
    names = (*suffixed, *(f"{name}_mut" for name in bare))
    notes = []
    if bare:
        notes.append(f"{len(bare)} columns of bare gene symbols hold 0 and 1: kept as mutations (*_mut)")
    if found.n_conflicting_rows:
        notes.append(f"{found.n_conflicting_rows} slides differ from the first of their case; the first one counts")
    return dataclasses.replace(found, names=names), notes


def _check_indicators(table: GeneTable, bare: Sequence[str], file: Foreign) -> None:
    wanted = set(bare)
    columns = [column for column, name in enumerate(table.names) if name in wanted]
    values = table.values[:, columns]
    other = ~(np.isin(values, (0, 1)) | np.isnan(values)).all(axis=0)
    if other.any():
        names = [table.names[columns[i]] for i in np.flatnonzero(other)]
        raise DataError(
            f"{file.path}: {len(names)} columns are neither known, nor named *_rnaseq, *_cnv or *_mut, nor 0/1 "
            f"indicators of mutations: {listed(names)}; remove or rename them"
        )
