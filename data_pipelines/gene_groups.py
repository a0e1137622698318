"""Functional gene groups and the features of each that a fold keeps (G-HANet specification, sections 3.2 to 3.5)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import tables, text_table
from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable
from data_pipelines.group_tests import benjamini_hochberg, smallest, welch
from data_pipelines.sampling import draw_epoch
from data_pipelines.survival import sampling_class

SUFFIXES = ("_mut", "_cnv", "_rnaseq")
METADATA = ("by_name", "positional")
WELCH, NONE, TOP_N = "welch_p05", "none", "top_n"
SELECTIONS = (WELCH, NONE, TOP_N)
SAMPLER_DRAW, UNIQUE_PATIENTS = "sampler_draw", "unique_patients"
SELECT_ON = (SAMPLER_DRAW, UNIQUE_PATIENTS)
CORRECTIONS = ("none", "fdr_bh")
ERROR, SKIP_GROUP, KEEP_TOP_N = "error", "skip_group", "keep_top_n"
EMPTY_GROUP = (ERROR, SKIP_GROUP, KEEP_TOP_N)

Groups = Mapping[str, Sequence[str]]
"""Group name -> gene symbols, in the order of the tokens."""


@dataclasses.dataclass(frozen=True, eq=False)
class GroupSelection:
    """K kept features, group after group, and how their values are prepared; stored beside a checkpoint (D21).

    Attributes:
      names: K feature names; a gene of several groups occurs once in each of them.
      group_names: T names, in the order of the tokens.
      sizes: T kept counts, summing to K; 0 for a group that is skipped.
      columns: [K] int64, columns in the table the selection was made on.
      mean: [K] float64 of the training patients.
      std: [K] float64 of the training patients (population; 1 for a constant feature).
      clip: standardised values are clipped to [-clip, clip], or None.
      source: JSON-able facts on how the features were chosen.
    """

    names: tuple[str, ...]
    group_names: tuple[str, ...]
    sizes: tuple[int, ...]
    columns: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    clip: float | None
    source: Mapping[str, Any]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Selects and standardises features of the table the selection was made on.

        Args:
          values: [n, G], columns as in that table.

        Returns:
          [n, K] float32, group after group.

        Raises:
          DataError: a value is missing.
        """
        values = np.asarray(values)
        return self._finish(_complete(values[:, self.columns], self.names, range(len(values))))

    def apply_table(self, table: GeneTable) -> np.ndarray:
        """As `apply`, but finds the features by name in any table.

        Returns:
          [n, K] float32; rows of cases without genes are 0.

        Raises:
          DataError: the table lacks kept features (named), or a value is missing.
        """
        column_of = {name: column for column, name in enumerate(table.names)}
        missing = sorted({name for name in self.names if name not in column_of})
        if missing:
            raise DataError(
                f"gene table lacks {len(missing)} of the {len(set(self.names))} features the model was trained on: "
                f"{missing[:8]}; supply a table that has them"
            )
        columns = np.array([column_of[name] for name in self.names], np.int64)
        rows = np.flatnonzero(table.has_genes)
        out = np.zeros((len(table.case_id), len(self.names)), np.float32)
        cases = [table.case_id[row] for row in rows]
        out[rows] = self._finish(_complete(table.values[np.ix_(rows, columns)], self.names, cases))
        return out

    def _finish(self, values: np.ndarray) -> np.ndarray:
        out = (values - self.mean) / self.std
        return (out if self.clip is None else np.clip(out, -self.clip, self.clip)).astype(np.float32)

    def to_json(self) -> str:
        """A JSON text from which `from_json` restores the same selection exactly."""
        facts = {name: getattr(self, name) for name in ("names", "group_names", "sizes", "clip", "source")}
        return json.dumps(facts | {name: getattr(self, name).tolist() for name in ("columns", "mean", "std")})

    @classmethod
    def from_json(cls, text: str) -> GroupSelection:
        """Restores what `to_json` wrote."""
        facts = json.loads(text)
        for name in ("names", "group_names", "sizes"):
            facts[name] = tuple(facts[name])
        for name, dtype in (("columns", np.int64), ("mean", np.float64), ("std", np.float64)):
            facts[name] = np.array(facts[name], dtype)
        return cls(**facts)


def read_groups(path: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """Gene families from a signature table: one column per family, padded with empty cells.

    Returns:
      Family -> its distinct symbols in file order.

    Raises:
      DataError: no column, or a family without genes.
    """
    table = text_table.read_text_table(path)
    groups = {}
    for name in table.columns:
        symbols = tuple(dict.fromkeys(text for text in table[name] if text))
        if not symbols:
            raise DataError(f"{path}, column {name!r}: the family names no gene; remove the column or fill it")
        groups[name] = symbols
    if not groups:
        raise DataError(f"{path}: no gene family; expected one column of symbols per family")
    return groups


def read_molecular_table(path: str | os.PathLike, *, metadata: str = "by_name") -> GeneTable:
    """All molecular columns of an MCAT table, of every kind, under their full names (`TP53_rnaseq`).

    Args:
      path: CSV, plain or zipped, with `case_id`; one row per slide, of which the first of a case counts. Or an .npz,
        of which every column is molecular.
      metadata: "by_name" takes the columns `*_mut`, `*_cnv`, `*_rnaseq`; "positional" is the off-by-one of the authors'
        code (D1): the last molecular column is lost and the metadata column before the first one (`train`, or
        `censorship` where there is no `train`) counts as a feature.

    Returns:
      The table; empty cells are NaN.

    Raises:
      DataError: an unknown option, no `case_id`, no molecular column, or a cell that is no number.
    """
    _check_choice("data.metadata", metadata, METADATA)
    if str(path).endswith(".npz"):
        if metadata == "positional":
            raise DataError(f"{path}: data.metadata='positional' repeats a fault of reading the authors' CSV: give it")
        return tables.read_gene_npz(path)
    return tables.read_numeric_table(path, lambda names: _molecular_columns(names, metadata, path))


def _molecular_columns(names: list[str], metadata: str, path: str | os.PathLike) -> list[str]:
    columns = [name for name in names if name.endswith(SUFFIXES)]
    if not columns:
        raise DataError(f"{path}: no column ends in one of {SUFFIXES}; the file has {names[:12]}")
    if metadata == "positional":
        first = names.index(columns[0])
        columns = names[first - 1 : -1]
    return columns


def match_groups(names: Sequence[str], groups: Groups, suffixes: Sequence[str] = SUFFIXES) -> dict[str, list[int]]:
    """Columns of each group: every symbol with every suffix, as far as present, sorted by name (section 3.3).

    Args:
      names: column names of a table.
      groups: symbols of each group.
      suffixes: kinds of columns; ("",) for a table whose columns are bare symbols.

    Returns:
      Group -> columns; a column may be in several groups, and a group may be empty.
    """
    column_of = {name: column for column, name in enumerate(names)}
    found = {}
    for group, symbols in groups.items():
        wanted = {symbol + suffix for symbol in symbols for suffix in suffixes}
        found[group] = [column_of[name] for name in sorted(wanted & column_of.keys())]
    return found


def select_gene_groups(
    table: GeneTable,
    train_rows: np.ndarray,
    bins: np.ndarray,
    event: np.ndarray,
    groups: Groups,
    *,
    selection: str = WELCH,
    p: float = 0.05,
    select_on: str = SAMPLER_DRAW,
    correction: str = "none",
    empty_group: str = ERROR,
    top_n: int = 10,
    clip: float | None = None,
    suffixes: Sequence[str] = SUFFIXES,
    seed: int = 0,
) -> GroupSelection:
    """Chooses the features of every group that differ between early deaths and longer survivors (section 3.5).

    High risk: death observed in time bin 0 or 1. Low risk: any patient of a later bin. Censored patients of bins 0 and
    1 are not used. Everything, scaling included, is computed on training patients with genes only.

    Args:
      table: all patients of the cohort; rows without genes are ignored.
      train_rows: rows of the training patients, each once.
      bins: [n] int time bin, aligned to the table; negative: unknown, not used.
      event: [n] 1 = death observed, aligned to the table.
      groups: symbols of each group, in the order of the tokens.
      selection: "welch_p05" (two-sided Welch test with threshold `p`), "top_n" (the `top_n` smallest p of each group)
        or "none" (all features).
      p: threshold, strict.
      select_on: "sampler_draw" tests on one epoch of the training sampler, patients repeated (D4); "unique_patients"
        tests every patient once.
      correction: "none", or "fdr_bh": Benjamini-Hochberg over the distinct features of all groups (D5).
      empty_group: a group without kept feature is an "error", is skipped ("skip_group": size 0), or keeps its `top_n`
        features of smallest p ("keep_top_n") (D6).
      top_n: see `selection` and `empty_group`.
      clip: bound on standardised values, or None.
      suffixes: see `match_groups`.
      seed: of the sampler draw.

    Returns:
      The selection.

    Raises:
      DataError: an unknown option, arrays that do not fit, too few patients to test, or a group without features.
    """
    _check_options(selection, p, select_on, correction, empty_group, top_n, clip)
    rows = _training_rows(table, train_rows, bins, event)
    matched = match_groups(table.names, groups, suffixes)
    if not any(matched.values()):
        raise DataError(
            f"none of the {len(groups)} gene groups has a column in the table (columns such as {table.names[:4]}, "
            f"suffixes {tuple(suffixes)}); check genes.suffixes and the symbols of the groups"
        )
    used = np.unique(np.concatenate([np.array(c, np.int64) for c in matched.values()]))
    values = _complete(
        table.values[np.ix_(rows, used)], [table.names[c] for c in used], [table.case_id[r] for r in rows]
    )
    mean, std = values.mean(axis=0), values.std(axis=0)
    # Equal values may leave a spread of rounding size, which would blow up in the division.
    std = np.where(values.max(axis=0) > values.min(axis=0), std, 1.0)
    draws = _draws(bins[rows], event[rows], select_on, seed)
    high = (np.asarray(event)[rows] == 1) & (bins[rows] <= 1)
    low = bins[rows] >= 2
    scores, facts = np.full(len(used), np.nan), {}
    if selection != NONE:
        number = {"n_high": int(high[draws].sum()), "n_low": int(low[draws].sum())}
        facts = number | {"unused": len(draws) - sum(number.values())}
        scores = welch((values - mean) / std, draws[high[draws]], draws[low[draws]])
    kept = _keep(matched, used, scores, selection, p, correction, empty_group, top_n)
    at = np.concatenate([np.searchsorted(used, columns) for columns in kept.values()])
    return GroupSelection(
        names=tuple(table.names[column] for columns in kept.values() for column in columns),
        group_names=tuple(kept),
        sizes=tuple(len(columns) for columns in kept.values()),
        columns=used[at],
        mean=mean[at],
        std=std[at],
        clip=clip,
        source=facts
        | {"selection": selection, "p": p, "select_on": select_on, "correction": correction, "seed": seed}
        | {"empty_group": empty_group, "top_n": top_n, "candidates": [len(c) for c in matched.values()]},
    )


def _draws(bins: np.ndarray, event: np.ndarray, select_on: str, seed: int) -> np.ndarray:
    """Positions among the training rows that take part in the test."""
    if select_on == UNIQUE_PATIENTS:
        return np.arange(len(bins))
    classes = sampling_class(bins, event)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3,)))
    return draw_epoch(
        np.ones(len(bins)), classes, len(bins), sampler="class_balanced_replacement", stratified=False, rng=rng
    )


def _keep(matched, used, scores, selection, p, correction, empty_group, top_n) -> dict[str, list[int]]:
    adjusted = benjamini_hochberg(scores) if correction == "fdr_bh" else scores
    kept = {}
    for group, columns in matched.items():
        at = np.searchsorted(used, np.array(columns, np.int64))
        if selection == NONE:
            chosen = np.ones(len(at), bool)
        elif selection == TOP_N:
            chosen = smallest(scores[at], top_n)
        else:
            chosen = adjusted[at] < p
        if not chosen.any() and empty_group == KEEP_TOP_N:
            chosen = smallest(scores[at], top_n)
        if not chosen.any() and empty_group != SKIP_GROUP:
            raise DataError(
                f"gene group {group!r} keeps none of its {len(columns)} features (selection {selection!r}, p < {p}): "
                "its squared error would be undefined; set genes.empty_group='skip_group' or 'keep_top_n'"
            )
        kept[group] = [column for column, yes in zip(columns, chosen) if yes]
    if not any(kept.values()):
        raise DataError("every gene group is empty; set genes.empty_group='keep_top_n' or genes.selection='none'")
    return kept


def _training_rows(table: GeneTable, train_rows: np.ndarray, bins: np.ndarray, event: np.ndarray) -> np.ndarray:
    n = len(table.case_id)
    if np.shape(bins) != (n,) or np.shape(event) != (n,):
        raise DataError(
            f"bins {np.shape(bins)} and event {np.shape(event)} must be aligned to the {n} rows of the table"
        )
    rows = np.asarray(train_rows, np.int64)
    if len(np.unique(rows)) != len(rows):
        raise DataError("train_rows names a patient twice; scaling needs every training patient once")
    rows = rows[table.has_genes[rows] & (np.asarray(bins)[rows] >= 0)]
    if not len(rows):
        raise DataError("gene groups: no training patient has genes and survival; check the join of genes and split")
    return rows


def _complete(values: np.ndarray, names: Sequence[str], cases: Sequence) -> np.ndarray:
    """Float64 values, or an error that names the first missing entries (the reference has no imputation)."""
    missing = np.isnan(values)
    if missing.any():
        listed = [f"(feature {names[c]!r}, case {cases[r]!r})" for r, c in np.argwhere(missing)[:5]]
        raise DataError(
            f"{int(missing.sum())} gene values are missing, first {', '.join(listed)}; fill them in the table"
        )
    return np.asarray(values, np.float64)


def _check_options(selection, p, select_on, correction, empty_group, top_n, clip) -> None:
    _check_choice("genes.selection", selection, SELECTIONS)
    _check_choice("genes.select_on", select_on, SELECT_ON)
    _check_choice("genes.correction", correction, CORRECTIONS)
    _check_choice("genes.empty_group", empty_group, EMPTY_GROUP)
    if not 0 < p <= 1 or top_n < 1:
        raise DataError(f"genes.p={p} must be in (0, 1] and genes.top_n={top_n} at least 1")
    if clip is not None and not clip > 0:
        raise DataError(f"genes.clip={clip} must be positive or None")


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(f"{key}={value!r} is unknown; choose one of {allowed}")
