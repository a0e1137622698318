"""Reads labels, genes and gene rankings from CSV and npz files; bad cells are errors that name them."""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from data_pipelines import atomic, text_table
from data_pipelines.errors import DataError
from data_pipelines.follow_up import FollowUpColumns, Survival, SurvivalTable, read_survival
from data_pipelines.genes import GeneTable
from data_pipelines.text_table import BLANK, check_case_ids

__all__ = ["FollowUpColumns", "LabelTable", "Survival", "SurvivalTable", "read_gene_table", "read_labels"]
__all__ += ["read_gene_npz", "read_numeric_table", "read_ranking_table", "read_survival", "write_gene_table"]

KINDS = ("_rnaseq", "_cnv", "_mut")
"""Suffixes of molecular columns: expression, copy number, mutation."""
HER2_POLICIES = ("drop", "negative", "fish_resolved")
MISSING_POLICIES = ("drop", "negative")
UNAVAILABLE, EQUIVOCAL = "label not available", "label equivocal"
_POSITIVE, _NEGATIVE = {"positive", "pos", "+"}, {"negative", "neg", "-"}
_EQUIVOCAL = {"equivocal", "indeterminate"}
_NOT_GENES = {"case_id", "slide_id", "survival_months", "time_months", "censorship", "event", "train", "site"}


@dataclasses.dataclass(frozen=True, eq=False)
class LabelTable:
    """Labels of one task.

    Attributes:
      case_id: n case ids (slide ids for a table keyed by slide), unique, in file order.
      value: [n] int32 class index, -1 where there is none.
      class_names: name of each class index.
      missing: case -> why it has no label (`UNAVAILABLE` or `EQUIVOCAL`).
    """

    case_id: tuple[str, ...]
    value: np.ndarray
    class_names: tuple[str, ...]
    missing: Mapping[str, str]


def read_labels(
    path: str | os.PathLike,
    task: str,
    *,
    label_map: Mapping[str, int] | None = None,
    her2_equivocal: str = "drop",
    missing: str = "drop",
) -> LabelTable:
    """Labels of one task from a CSV with the columns case_id and `task`; blank = not available.

    Without `label_map`, a column holds class indices 0..C-1, or the words Positive / Negative (any case), where
    Equivocal and Indeterminate are no label. For a HER2 task, `her2_equivocal` decides on equivocal cases (MKD section
    3.3): "drop" them, count them as "negative", or take the column `<task>_FISH` ("fish_resolved").

    Args:
      path: the CSV file, plain or compressed.
      task: name of the label column.
      label_map: cell text -> class index; then no other text is accepted.
      her2_equivocal: one of `HER2_POLICIES`; used by tasks whose name begins with HER2.
      missing: one of `MISSING_POLICIES`: cases without a label have none, or are of class 0 (MoMKD section 2).

    Returns:
      The labels; rows that repeat a case must agree.

    Raises:
      DataError: missing column, unknown value, conflicting rows or gaps in the classes; names file, line and field.
    """
    if her2_equivocal not in HER2_POLICIES:
        raise DataError(f"labels.her2_equivocal={her2_equivocal!r} is unknown; choose one of {HER2_POLICIES}")
    if missing not in MISSING_POLICIES:
        raise DataError(f"labels.missing={missing!r} is unknown; choose one of {MISSING_POLICIES}")
    fish_column = f"{task}_FISH"
    header = text_table.read_header(path)
    table = text_table.read_text_table(path, ("case_id", task, *[name for name in (fish_column,) if name in header]))
    check_case_ids(table["case_id"], path)
    policy = her2_equivocal if task.casefold().startswith("her2") else "drop"
    fish = table[fish_column] if fish_column in table else None
    values, seen_at, without = {}, {}, {}
    for row, (case, text) in enumerate(zip(table["case_id"], table[task])):
        where = f"{path}, line {row + 2}, column {task!r}"
        value = _parse_label(text, label_map, where)
        if value == EQUIVOCAL:
            value = _resolve_equivocal(policy, None if fish is None else fish.iloc[row], fish_column, where)
        if isinstance(value, str):
            without.setdefault(case, value)
            continue
        if values.setdefault(case, value) != value:
            raise DataError(
                f"{where}: case {case!r} has class {value} here but {values[case]} in line {seen_at[case]}; a case "
                f"needs one label"
            )
        seen_at.setdefault(case, row + 2)
    if missing == "negative":
        values = {**dict.fromkeys(without, 0), **values}
    cases = tuple(dict.fromkeys(table["case_id"]))
    textual = label_map is None and any(t.casefold() in _POSITIVE | _NEGATIVE for t in table[task])
    return LabelTable(
        case_id=cases,
        value=np.array([values.get(case, -1) for case in cases], np.int32),
        class_names=_class_names(set(values.values()), label_map, textual, f"{path}, column {task!r}"),
        missing={case: reason for case, reason in without.items() if case not in values},
    )


def _parse_label(text: str, label_map: Mapping[str, int] | None, where: str) -> int | str:
    """A class index, or the reason why there is none."""
    word = text.casefold().strip("[]")
    if label_map is not None:
        if text in label_map:
            return int(label_map[text])
        if word in BLANK:
            return UNAVAILABLE
        raise DataError(f"{where}: {text!r} is not in the label map, which knows {sorted(label_map)}")
    if word in BLANK:
        return UNAVAILABLE
    if word in _EQUIVOCAL:
        return EQUIVOCAL
    if word in _POSITIVE | _NEGATIVE:
        return int(word in _POSITIVE)
    whole, _, fraction = text.partition(".")
    if whole.isdecimal() and not fraction.strip("0"):
        return int(whole)
    raise DataError(
        f"{where}: {text!r} is no label; expected a class index 0, 1, ..., Positive, Negative, Equivocal or an empty "
        f"cell (not available); give a label map for other codes"
    )


def _resolve_equivocal(policy: str, fish: str | None, column: str, where: str) -> int | str:
    if policy == "drop":
        return EQUIVOCAL
    if policy == "negative":
        return 0
    if fish is None:
        raise DataError(f"{where}: labels.her2_equivocal='fish_resolved' needs a column {column!r}, which is missing")
    return _parse_label(fish, None, f"{where} ({column})")


def _class_names(seen: set[int], label_map: Mapping[str, int] | None, textual: bool, where: str) -> tuple[str, ...]:
    if label_map is not None:
        used = set(label_map.values())
        names = ["/".join(sorted(k for k, v in label_map.items() if v == c)) for c in range(len(used))]
    elif textual:
        used, names = seen | {0, 1}, ["negative", "positive"]
    else:
        used = seen
        names = [str(c) for c in range(len(used))]
    if used != set(range(len(names))):
        raise DataError(
            f"{where}: the classes are {sorted(used)}; expected 0..C-1 without gaps; give a label map to renumber them"
        )
    return tuple(names)


def read_gene_table(path: str | os.PathLike, *, suffix: str | None = None) -> GeneTable:
    """Expression from genes.npz, from a CSV (case_id + one column per gene), or from an MCAT / PORPOISE table.

    If there are columns `*_rnaseq`, those are the genes (read by name, suffix removed); otherwise every column but
    case_id and unnamed index columns. Of several rows of a case the first is kept and the others are counted.

    Args:
      path: .npz with case_id, gene, values; or CSV, plain, zipped or gzipped.
      suffix: take the columns with this suffix instead, e.g. "_cnv"; an .npz without any kind of suffix is taken whole.

    Returns:
      The table; empty cells are NaN.

    Raises:
      DataError: missing or non-numeric fields; names file, line and column.
    """
    if str(path).endswith(".npz"):
        return _of_kind(read_gene_npz(path), suffix, path)
    table = read_numeric_table(path, lambda names: _gene_columns(names, suffix, path))
    suffix = suffix or ("_rnaseq" if table.names[0].endswith("_rnaseq") else "")
    return dataclasses.replace(table, names=tuple(name.removesuffix(suffix) for name in table.names))


def read_gene_npz(path: str | os.PathLike) -> GeneTable:
    """All columns of an .npz that `write_gene_table` wrote, under their full names.

    Raises:
      DataError: a missing field.
    """
    with np.load(path, allow_pickle=False) as stored:
        absent = {"case_id", "gene", "values"} - set(stored.files)
        if absent:
            raise DataError(f"{path}: no field {sorted(absent)}; expected case_id, gene, values")
        case_id, gene = ([str(item) for item in stored[name]] for name in ("case_id", "gene"))
        return GeneTable(tuple(case_id), tuple(gene), stored["values"].astype(np.float32))


def _of_kind(table: GeneTable, suffix: str | None, path: str | os.PathLike) -> GeneTable:
    """The columns of one kind without their suffix; the whole table if its names have no suffix of a kind.

    A case without any value of the kind has none measured, and is left out.
    """
    if not any(name.endswith(KINDS) for name in table.names):
        return table
    names = _gene_columns(list(table.names), suffix, path)
    columns = [column for column, name in enumerate(table.names) if name in set(names)]
    values = table.values[:, columns]
    known = ~np.isnan(values).all(axis=1)
    end = suffix or ("_rnaseq" if names[0].endswith("_rnaseq") else "")
    return GeneTable(
        case_id=tuple(case for case, has in zip(table.case_id, known) if has),
        names=tuple(table.names[column].removesuffix(end) for column in columns),
        values=values[known],
    )


def read_numeric_table(
    path: str | os.PathLike, choose: Callable[[list[str]], list[str]], *, case_column: str = "case_id"
) -> GeneTable:
    """Numeric columns of a table with case_id, by name; of several rows of a case the first is kept.

    Args:
      path: CSV with commas, semicolons or tabs, plain, zipped or gzipped.
      choose: picks columns among the names of the file, and raises if there are none.
      case_column: name of the column of case ids in the file; "" for a column without a name.

    Returns:
      The table under the full names; empty cells are NaN, and `n_conflicting_rows` counts later rows that differ.

    Raises:
      DataError: no case_id, an empty one, a doubled column, or a cell that is no finite number.
    """
    header = text_table.read_header(path)
    text_table.require_columns(header, (case_column,), path)
    at = header.index(case_column)
    separator = text_table.separator_of(path)
    table = pd.read_csv(path, sep=separator, encoding="utf-8-sig", low_memory=False, converters={at: str.strip})
    table.columns = [name if i != at else "case_id" for i, name in enumerate(table.columns.str.strip())]
    check_case_ids(table["case_id"], path)
    columns = choose(list(table.columns))
    # pandas renames a doubled column X to X.1; the file's own header shows it.
    text_table.require_columns(header, [name for name in columns if name in header], path)
    values = np.column_stack([_numeric(table[name], path) for name in columns])
    first_row: dict[str, int] = {}
    first = np.array([first_row.setdefault(case, row) for row, case in enumerate(table["case_id"])])
    keep = first == np.arange(len(first))
    same = (values == values[first]) | (np.isnan(values) & np.isnan(values[first]))
    return GeneTable(
        case_id=tuple(table["case_id"][keep]),
        names=tuple(columns),
        values=values[keep],
        n_duplicate_rows=int((~keep).sum()),
        n_conflicting_rows=int((~same.all(axis=1)).sum()),
    )


def _gene_columns(columns: list[str], suffix: str | None, path: str | os.PathLike) -> list[str]:
    found = [name for name in columns if name.endswith(suffix or "_rnaseq")]
    if not found and suffix is None and not _NOT_GENES & (set(columns) - {"case_id"}):
        found = [name for name in columns if name != "case_id" and name and not name.startswith("Unnamed:")]
    if not found:
        others = {end: sum(name.endswith(end) for name in columns) for end in KINDS}
        raise DataError(
            f"{path}: no gene column {'*' + (suffix or '_rnaseq')!r} among {text_table.listed(columns)}; by suffix "
            f"there are {others}: pass suffix= to read another kind"
        )
    return found


def _numeric(column: pd.Series, path: str | os.PathLike) -> np.ndarray:
    numbers = pd.to_numeric(column, errors="coerce")
    bad = (numbers.isna() & column.notna()) | np.isinf(numbers)
    if bad.any():
        row = int(np.argmax(bad.to_numpy()))
        raise DataError(f"{path}, line {row + 2}, column {column.name!r}: {column.iloc[row]!r} is no finite number")
    return numbers.to_numpy(np.float32)


def write_gene_table(table: GeneTable, path: str | os.PathLike) -> None:
    """Writes case_id, gene, values as an uncompressed .npz; a killed writer leaves no file of that name.

    Cases without genes are left out, so that reading them back reports them as absent.

    Raises:
      DataError: the name does not end in .npz.
      StorageError: the folder is missing, full or not writable.
    """
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise DataError(f"{path}: a gene table is written as .npz")
    with atomic.storage_errors(path):
        os.replace(atomic.write_temporary(path.parent, path.name, gene_table_bytes(table)), path)
        atomic.sync(path.parent)


def gene_table_bytes(table: GeneTable) -> bytes:
    """Content of the .npz that `write_gene_table` writes; equal tables give equal bytes."""
    keep = np.flatnonzero(table.has_genes)
    content = io.BytesIO()
    np.savez(
        content,
        case_id=np.array([table.case_id[row] for row in keep], np.str_),
        gene=np.array(table.names, np.str_),
        values=table.values[keep],
    )
    return content.getvalue()


def read_ranking_table(path: str | os.PathLike) -> dict[str, float]:
    """A precomputed gene ranking: CSV with the columns gene and p (the layout of the official code).

    Returns:
      gene -> p.

    Raises:
      DataError: missing columns, a p outside [0, 1], or a gene twice; names file, line and value.
    """
    table = text_table.read_text_table(path, ("gene", "p"))
    ranking: dict[str, float] = {}
    for row, (gene, text) in enumerate(table.itertuples(index=False, name=None)):
        p = pd.to_numeric(text, errors="coerce")
        if not 0 <= p <= 1:
            raise DataError(f"{path}, line {row + 2}, column 'p': {text!r} of gene {gene!r} is no p-value in [0, 1]")
        if gene in ranking:
            raise DataError(f"{path}, line {row + 2}: gene {gene!r} occurs twice")
        ranking[gene] = float(p)
    return ranking
