"""Expression with one row per patient: the first column holds ids, the others are genes (SurvPath's `rna_clean.csv`).

Also what several readers share: one sample per patient by the rules of TCGA barcodes.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from data_pipelines import tables, tcga
from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable
from data_pipelines.table_sources.contents import LOG, UNKNOWN, Contents, LeftOut, Options
from data_pipelines.table_sources.foreign import Foreign

_MIN_GENES = 20
_KEYS = ("", "case_id")
NORMAL, CONTROL = "sample of normal tissue", "control sample"
OTHER_SAMPLE = "another sample of the patient is taken"


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    genes = _genes(file)
    if not file.header or file.header[0] not in _KEYS or len(genes) < _MIN_GENES:
        return []
    row = file.first_row()
    if len(row) != len(file.header) or _is_number(row[0]):
        return []
    # 0/1 memberships of pathways are no expression.
    if not all(_is_number(cell) for cell in row[1:] if cell) or {*row[1:]} <= {"0", "1", "0.0", "1.0", ""}:
        return []
    return [f"{len(genes)} numeric columns, one row per patient, first {row[0]!r}"]


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`."""
    genes = _genes(file)
    found = tables.read_numeric_table(file.path, lambda names: genes, case_column=file.header[0])
    has_kind = any(name.endswith(tables.KINDS) for name in found.names)
    names = found.names if has_kind else tuple(f"{name}_rnaseq" for name in found.names)
    table, left_out = one_sample_per_patient(dataclasses.replace(found, names=names), options.sample_type)
    notes = [f"{found.n_duplicate_rows} rows repeat a case; the first one counts"] if found.n_duplicate_rows else []
    return Contents(genes=table, scale=scale_of(file.name, table), left_out=tuple(left_out), notes=tuple(notes))


def scale_of(name: str, table: GeneTable) -> str:
    """What the values of expression are, as far as the file says: its name, or a floor as log2(0.001) leaves it."""
    if "zscore" in name.casefold().replace("-", "").replace("_", ""):
        return "z-score"
    lowest = float(np.nanmin(table.values)) if np.isfinite(table.values).any() else 0.0
    return LOG if abs(lowest - np.log2(0.001)) < 1e-3 else UNKNOWN


def one_sample_per_patient(table: GeneTable, sample_type: int | None = None) -> tuple[GeneTable, list[LeftOut]]:
    """A table keyed by samples becomes one keyed by patients.

    Ids without a sample type are kept as they are, TCGA patients among them. Of the tumour samples of a patient the
    lowest type counts (01 primary before 02 recurrent ... 06 metastasis), then the first vial; of `sample_type` only
    those samples.

    Args:
      table: case_id holds sample ids.
      sample_type: the only sample type to take; None: any tumour.

    Returns:
      The table, and the samples that were not taken.

    Raises:
      DataError: no sample is left.
    """
    left_out, chosen = [], collections.defaultdict(list)
    for row, sample in enumerate(table.case_id):
        barcode = tcga.parse(sample)
        if barcode is None or barcode.sample_type is None:
            chosen[barcode.patient if barcode else sample].append((0, "", row))
        elif reason := _unwanted(barcode, sample_type):
            left_out.append(LeftOut("sample", sample, reason))
        else:
            chosen[barcode.patient].append((barcode.sample_type, barcode.vial, row))
    picked = {patient: min(samples) for patient, samples in chosen.items()}
    for patient, samples in chosen.items():
        left_out += [
            LeftOut("sample", table.case_id[item[2]], OTHER_SAMPLE) for item in samples if item != picked[patient]
        ]
    if not picked:
        raise DataError(f"none of {len(table.case_id)} samples is of the wanted type; see --sample-type")
    rows = [item[2] for item in picked.values()]
    kept = GeneTable(tuple(picked), table.names, table.values[rows])
    return kept, left_out


def _unwanted(barcode: tcga.Barcode, wanted: int | None) -> str:
    if wanted is not None:
        return "" if barcode.sample_type == wanted else f"sample type {barcode.sample_type:02d} is not the wanted one"
    if barcode.sample_type in tcga.TUMOUR_TYPES:
        return ""
    return NORMAL if barcode.sample_type < 20 else CONTROL


def _genes(file: Foreign) -> list[str]:
    return [name for name in file.header[1:] if name and not name.startswith("Unnamed:")]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
