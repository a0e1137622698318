"""What a fold reads of the gene tables: ranked genes, functional groups, or all molecular columns (`genes.kind`)."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import schema
from data_pipelines.cohort import Cohort
from data_pipelines.gene_groups import GroupSelection, read_groups, read_molecular_table, select_gene_groups
from data_pipelines.genes import GeneSelection, GeneTable, select_genes
from data_pipelines.splits import Split
from data_pipelines.tables import read_gene_table, read_ranking_table
from data_pipelines.tabular import ColumnSelection, select_columns
from histokd_jax.tasks import Targets

CNV = "cnv"
GENE_FIELDS = (schema.GENES, CNV)
RANKED, GROUPS, ALL, NO_GENES = "ranked", "groups", "all", "none"
KINDS = (RANKED, GROUPS, ALL, NO_GENES)


class Selection(Protocol):
    """Genes chosen on a fold's training patients, and how their values are prepared.

    Attributes:
      names: K columns of the batch field.
      source: JSON-able facts on how they were chosen.
    """

    names: tuple[str, ...]
    source: Mapping[str, Any]

    def apply_table(self, table: GeneTable) -> np.ndarray:
        """[n, K] float32 of the rows of any table that has the genes."""

    def to_json(self) -> str:
        """A text from which `read_selection` restores it."""


def kind_of(cfg: ConfigDict) -> str:
    """How genes are chosen.

    Raises:
      ValueError: unknown kind.
    """
    if "genes" not in cfg:
        return NO_GENES
    kind = cfg.genes.get("kind", RANKED)
    if kind not in KINDS:
        raise ValueError(f"genes.kind={kind!r} is unknown; choose one of {KINDS}")
    return kind


def reads_genes(cfg: ConfigDict) -> bool:
    """Whether any network of a configuration reads genes."""
    if "teachers" in cfg:
        return bool(cfg.teachers)
    return kind_of(cfg) != NO_GENES


def varies_by_fold(cfg: ConfigDict) -> bool:
    """Whether the width of the networks depends on the fold."""
    return kind_of(cfg) == GROUPS


def read_table(cfg: ConfigDict, path: pathlib.Path) -> GeneTable:
    """The gene table of a file, with the columns that the kind of choice needs: expression, or all molecular ones."""
    if kind_of(cfg) == RANKED:
        return read_gene_table(path)
    return read_molecular_table(path, metadata=cfg.data.get("metadata", "by_name"))


def read_copy_number(path: str, cohort: Cohort) -> GeneTable:
    """The copy-number table of two-stream variants, aligned to the cohort.

    Raises:
      ValueError: no file given, or cases without copy number (listed).
    """
    if not path:
        raise ValueError("variant gmkdn reads two gene streams: give the copy-number table (data.cnv, or --cnv FILE)")
    table = read_gene_table(path, suffix="_cnv").align(cohort.sample_id)
    if not table.has_genes.all():
        lacking = [c for c, has in zip(cohort.sample_id, table.has_genes) if not has]
        raise ValueError(f"{path}: {len(lacking)} cases of the cohort have no copy number: {lacking[:5]}")
    return table


def choose(cfg: ConfigDict, table: GeneTable, split: Split, cohort: Cohort, targets: Targets) -> Selection:
    """Chooses what the batch field of one gene table holds in one fold.

    Args:
      cfg: resolved configuration.
      table: aligned to the cohort.
      split: the fold; everything but a global ranking reads its training patients only.
      cohort: the samples.
      targets: their answers, as the fold's task sees them.

    Returns:
      The selection.
    """
    chooser: Mapping[str, Callable[..., Selection]] = {RANKED: _ranked, GROUPS: _groups, ALL: _all}
    return chooser[kind_of(cfg)](cfg, table, split, cohort, targets)


def read_selection(cfg: ConfigDict, text: str) -> Selection:
    """Restores a selection from its `to_json`."""
    kinds = {RANKED: GeneSelection, GROUPS: GroupSelection, ALL: ColumnSelection}
    return kinds[kind_of(cfg)].from_json(text)


def group_sizes(selection: Selection | None) -> tuple[int, ...]:
    """Sizes of the functional groups of a selection; empty without groups."""
    return tuple(selection.sizes) if isinstance(selection, GroupSelection) else ()


def _ranked(cfg: ConfigDict, table: GeneTable, split: Split, cohort: Cohort, targets: Targets) -> GeneSelection:
    genes, survival = cfg.genes, cohort.survival
    return select_genes(
        table,
        split.train,
        survival=None if survival is None else (survival.time_months, survival.event),
        label=targets[schema.LABEL],
        top_k=genes.top_k,
        token_size=genes.token_size,
        filter=genes.filter,
        ranking=genes.ranking,
        ranking_scope=genes.ranking_scope,
        normalisation=genes.normalisation,
        exclude=tuple(genes.exclude),
        nan_policy=genes.nan_policy,
        clip=genes.clip,
        seed=cfg.seed,
        ranking_table=_ranking_table(genes) if genes.ranking == "table" else None,
    )


def _ranking_table(genes: ConfigDict) -> dict[str, float]:
    if not genes.ranking_table:
        raise ValueError("genes.ranking=table needs genes.ranking_table=FILE, a CSV with the columns gene and p")
    return read_ranking_table(genes.ranking_table)


def _groups(cfg: ConfigDict, table: GeneTable, split: Split, cohort: Cohort, targets: Targets) -> GroupSelection:
    genes = cfg.genes
    if schema.EVENT not in targets:
        raise ValueError("genes.kind=groups compares early deaths with late ones: it needs task_kind=survival")
    if not genes.signatures:
        raise ValueError("genes.kind=groups needs genes.signatures=FILE, a CSV with one column of symbols per group")
    options = ("selection", "p", "select_on", "correction", "empty_group", "top_n", "clip", "suffixes")
    given = {name: genes[name] for name in options if name in genes}
    if "suffixes" in given:
        given["suffixes"] = tuple(given["suffixes"])
    groups = read_groups(genes.signatures)
    return select_gene_groups(
        table, split.train, targets[schema.LABEL], targets[schema.EVENT], groups, seed=cfg.seed, **given
    )


def _all(cfg: ConfigDict, table: GeneTable, split: Split, cohort: Cohort, targets: Targets) -> ColumnSelection:
    genes = cfg.genes
    options = {name: genes[name] for name in ("nan_policy", "clip") if name in genes}
    return select_columns(table, split.train, exclude=tuple(genes.get("exclude", ())), **options)
