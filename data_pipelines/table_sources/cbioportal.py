"""cBioPortal: `data_*.txt` with `Hugo_Symbol` and one column per sample; `data_clinical_patient.txt` with survival.

Expression (z-scores or other) becomes `*_rnaseq`, discrete copy number (-2 to 2) `*_cnv`. Mutation lists (MAF) are not
read.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from data_pipelines import text_table
from data_pipelines.errors import DataError
from data_pipelines.follow_up import SurvivalTable
from data_pipelines.genes import GeneTable
from data_pipelines.table_sources import rows
from data_pipelines.table_sources.contents import Contents, LeftOut, Options
from data_pipelines.table_sources.expression import one_sample_per_patient, scale_of
from data_pipelines.table_sources.foreign import Foreign

_GENE, _PATIENT, _SAMPLE = "Hugo_Symbol", "PATIENT_ID", "SAMPLE_ID"
_NOT_SAMPLES = (_GENE, "Entrez_Gene_Id", "Cytoband")
_STATUS = re.compile(r"(OS|DSS|DFS|PFS|PFI|DFI)_STATUS")
_CODED = re.compile(r"([01])(?::.*)?")
_WORDS = {"living": "0", "alive": "0", "deceased": "1", "dead": "1"}


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    if "Variant_Classification" in file.header:
        return []
    if _GENE in file.header:
        return [f"column {_GENE} and {len(_samples(file))} samples"]
    if _PATIENT in file.header:
        return [f"column {_PATIENT}{' and ' + _SAMPLE if _SAMPLE in file.header else ''}"]
    return []


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`."""
    return _molecular(file, options) if _GENE in file.header else _clinical(file, options)


def _samples(file: Foreign) -> list[str]:
    return [name for name in file.header if name and name not in _NOT_SAMPLES and not name.startswith("Unnamed:")]


def _molecular(file: Foreign, options: Options) -> Contents:
    samples = _samples(file)
    text_table.require_columns(file.header, samples, file.path)
    table = file.text((_GENE, *samples))
    left_out, notes = [], []
    without = table[_GENE] == ""
    if without.any():
        notes.append(f"{int(without.sum())} rows without a gene symbol were left out")
    repeated = table[_GENE].duplicated() & ~without
    left_out += [LeftOut("gene", name, "a later row of the same symbol") for name in table[_GENE][repeated]]
    keep = ~(without | repeated)
    values = np.stack([_numbers(table[name], file) for name in samples])[:, keep.to_numpy()]
    names = table[_GENE][keep].to_numpy()
    empty = np.isnan(values).all(axis=0)
    left_out += [LeftOut("gene", name, "no value in any sample") for name in names[empty]]
    known = values[:, ~empty]
    discrete = bool(np.isin(known[~np.isnan(known)], (-2, -1, 0, 1, 2)).all())
    kind = "_cnv" if discrete or re.search(r"(?:^|_)cna(?:_|\.|$)", file.name) else "_rnaseq"
    found = GeneTable(tuple(samples), tuple(f"{name}{kind}" for name in names[~empty]), known)
    genes, more = one_sample_per_patient(found, options.sample_type)
    scale = scale_of(file.name, genes) if kind == "_rnaseq" else ""
    return Contents(genes=genes, scale=scale, left_out=(*left_out, *more), notes=tuple(notes))


def _numbers(column: pd.Series, file: Foreign) -> np.ndarray:
    blank = column.map(text_table.is_blank)
    numbers = pd.to_numeric(column.where(~blank), errors="coerce").to_numpy(np.float32)
    bad = (np.isnan(numbers) & ~blank.to_numpy()) | np.isinf(numbers)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"{file.path}, line {row + file.first_line}, column {column.name!r}: {column.iloc[row]!r} is no finite "
            "number"
        )
    return numbers


def _clinical(file: Foreign, options: Options) -> Contents:
    status = {match[1].casefold(): name for name in file.header if (match := _STATUS.fullmatch(name))}
    pairs = {e: (name.replace("_STATUS", "_MONTHS"), name) for e, name in status.items()}
    pairs = {endpoint: pair for endpoint, pair in pairs.items() if pair[0] in file.header}
    outcome = {name for pair in pairs.values() for name in pair}
    others = [n for n in file.header if n and n not in (_PATIENT, _SAMPLE, *outcome) and not n.startswith("Unnamed:")]
    labels = list(options.label_columns or others)
    if _SAMPLE in file.header:
        # Sample-level facts belong to a sample, and a patient may have several: only columns asked for are taken.
        labels = list(options.label_columns)
    table = rows.keyed(file, {_PATIENT: "case_id", **{name: name for name in (*labels, *sorted(outcome))}})
    skipped = [] if labels == others else [name for name in others if name not in labels]
    found, dropped = rows.labels_of(table, labels, file, options)
    return Contents(
        labels=found,
        follow_up={e: _follow_up(table, file, *pair) for e, pair in pairs.items()},
        left_out=(*dropped, *(LeftOut("column", name, rows.NOT_NAMED) for name in skipped)),
    )


def _follow_up(table: pd.DataFrame, file: Foreign, time: str, status: str) -> SurvivalTable:
    coded = [_code(text, f"{file.path}, line {row}", status) for row, text in enumerate(table[status], file.first_line)]
    return rows.follow_up_of(table.assign(**{status: coded}), file, time, status, censored=False)


def _code(text: str, where: str, column: str) -> str:
    """0, 1 or blank of `1:DECEASED`, `0:LIVING`, `DECEASED`, ..."""
    if text_table.is_blank(text):
        return ""
    match = _CODED.fullmatch(text)
    code = match[1] if match else _WORDS.get(text.casefold())
    if code is None:
        raise DataError(f"{where}, column {column!r}: {text!r} is no status; expected 0:..., 1:..., LIVING or DECEASED")
    return code
