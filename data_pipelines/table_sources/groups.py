"""Gene groups: signature tables (one column of symbols per group), or memberships (gene x group, 0/1; SurvPath)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from data_pipelines.errors import DataError
from data_pipelines.gene_groups import read_groups
from data_pipelines.table_sources.contents import Contents, Options
from data_pipelines.table_sources.foreign import Foreign
from data_pipelines.text_table import check_case_ids

_MEMBER = {"0", "1", "0.0", "1.0"}


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    row = file.first_row() if len(file.header) >= 2 else []
    if len(row) != len(file.header) or not row:
        return []
    if file.header[0] in ("", "gene") and set(row[1:]) <= _MEMBER and row[0] not in _MEMBER:
        return [f"genes against {len(file.header) - 1} groups, 0 or 1"]
    symbols = [cell for cell in row if cell]
    if all(file.header) and symbols and all(cell.replace("-", "").replace(".", "").isalnum() for cell in symbols):
        if not any(cell.replace(".", "").replace("-", "").isdecimal() for cell in symbols):
            return [f"{len(file.header)} columns of gene symbols"]
    return []


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`."""
    if file.header[0] not in ("", "gene"):
        return Contents(groups=read_groups(file.path))
    members = pd.read_csv(file.path, encoding="utf-8-sig", index_col=0, keep_default_na=False)
    genes = [str(name).strip() for name in members.index]
    check_case_ids(genes, file.path)
    values = members.to_numpy()
    if values.dtype.kind not in "iuf" or not np.isin(values, (0, 1)).all():
        raise DataError(f"{file.path}: memberships must be 0 or 1")
    names = [str(name).strip() for name in members.columns]
    empty = [name for name, column in zip(names, values.T) if not column.any()]
    groups = {name: tuple(gene for gene, in_it in zip(genes, column) if in_it) for name, column in zip(names, values.T)}
    notes = (f"{len(empty)} groups without a gene were left out: {empty[:5]}",) if empty else ()
    return Contents(groups={name: genes for name, genes in groups.items() if genes}, notes=notes)
