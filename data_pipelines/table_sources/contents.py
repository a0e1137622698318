"""What a foreign table holds, in our terms; several files of a cohort are merged without guessing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.follow_up import SurvivalTable
from data_pipelines.genes import GeneTable

Z_SCORE, LOG, UNKNOWN = "z-score", "log", "not recorded"
"""Scales of expression."""
OVERALL = "os"


class LeftOut(NamedTuple):
    """Something of a source that is not in our tables: what kind of thing, which one, and why."""

    what: str
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says about a source.

    Attributes:
      by: "case", or "slide": label columns belong to slides, and our label table is keyed by slide id.
      time_column, event_column, censorship_column: follow-up under names that are not known.
      time_unit: of `time_column`: "months", "days" or "years".
      label_columns: label columns to take where a source has many others.
      conflicts: "refuse" labels of a case that disagree, or "drop" them: such a cell is not available, and listed.
      sample_type: TCGA sample type to take of several samples of a patient; None: the primary tumour first.
      study: which cohort of a folder that holds several.
      pathways: which collection of gene groups of a folder that holds several.
    """

    by: str = "case"
    time_column: str = ""
    event_column: str = ""
    censorship_column: str = ""
    time_unit: str = "months"
    label_columns: tuple[str, ...] = ()
    conflicts: str = "refuse"
    sample_type: int | None = None
    study: str = ""
    pathways: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """Everything found in one or several files; empty where there is nothing.

    Attributes:
      labels: column -> case id (or slide id, see `Options.by`) -> text; blank = not available.
      follow_up: endpoint ("os", "dss", ...) -> follow-up per case.
      genes: columns under full names (`TP53_rnaseq`); NaN where a case lacks a value.
      scale: of the expression in `genes`.
      slides: slide id without extension -> case id.
      stains: stain or other modality -> case id -> whether it exists.
      groups: gene group -> symbols.
      folds: number -> part -> ids.
      left_out: what was not taken.
      notes: lines for people.
    """

    labels: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    follow_up: Mapping[str, SurvivalTable] = dataclasses.field(default_factory=dict)
    genes: GeneTable | None = None
    scale: str = ""
    slides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stains: Mapping[str, Mapping[str, bool]] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    folds: Mapping[int, Mapping[str, Sequence[str]]] = dataclasses.field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()

    def cases(self) -> tuple[str, ...]:
        """All case ids that any part but the folds names, sorted."""
        found = set(self.slides.values())
        for table in self.follow_up.values():
            found.update(table.case_id)
        for values in (*self.labels.values(), *self.stains.values()):
            found.update(self.slides.get(key, key) for key in values)
        if self.genes is not None:
            found.update(self.genes.case_id)
        return tuple(sorted(found))


def merge(parts: Sequence[Contents]) -> Contents:
    """One cohort out of several files.

    Raises:
      DataError: two files give different values for the same thing; names it.
    """
    scales = [part.scale for part in parts if part.scale]
    if len(set(scales)) > 1:
        raise DataError(f"the files hold expression of different scales: {sorted(set(scales))}; give one of them")
    return Contents(
        labels=_merged([part.labels for part in parts], "label column"),
        follow_up=_united([part.follow_up for part in parts], "endpoint"),
        genes=_merged_genes([part.genes for part in parts if part.genes is not None]),
        scale=scales[0] if scales else "",
        slides=_united([part.slides for part in parts], "slide"),
        stains=_merged([part.stains for part in parts], "modality"),
        groups=_united([part.groups for part in parts], "gene group"),
        folds=_united([part.folds for part in parts], "fold"),
        left_out=tuple(item for part in parts for item in part.left_out),
        notes=tuple(note for part in parts for note in part.notes),
    )


def _united(maps: Sequence[Mapping[Any, Any]], what: str) -> dict[Any, Any]:
    """The union of mappings that may overlap in equal entries only."""
    found: dict[Any, Any] = {}
    for mapping in maps:
        for key, value in mapping.items():
            if key in found and not _equal(found[key], value):
                raise DataError(f"two files disagree about {what} {key!r}; give only one of them")
            found[key] = value
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, SurvivalTable):
        same = one.case_id == other.case_id
        return same and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one.survival, other.survival))
    return one == other


def _merged(maps: Sequence[Mapping[str, Mapping[str, Any]]], what: str) -> dict[str, dict[str, Any]]:
    """Columns of several files, joined by id; a blank cell contradicts nothing."""
    found: dict[str, dict[str, Any]] = {}
    for mapping in maps:
        for column, values in mapping.items():
            into = found.setdefault(column, {})
            for key, value in values.items():
                if into.get(key, "") in ("", value):
                    into[key] = value
                elif value != "":
                    raise DataError(
                        f"{what} {column!r}: {key!r} is {into[key]!r} in one file and {value!r} in another; correct one"
                    )
    return found


def _merged_genes(tables: Sequence[GeneTable]) -> GeneTable | None:
    """Columns of several files side by side; a case that a file does not list has no value (NaN) in its columns."""
    if len(tables) < 2:
        return tables[0] if tables else None
    cases = tuple(dict.fromkeys(case for table in tables for case in table.case_id))
    row_of = {case: row for row, case in enumerate(cases)}
    values = np.full((len(cases), sum(len(table.names) for table in tables)), np.nan, np.float32)
    start = 0
    for table in tables:
        rows = [row_of[case] for case in table.case_id]
        values[rows, start : start + len(table.names)] = table.values
        start += len(table.names)
    return GeneTable(cases, tuple(name for table in tables for name in table.names), values)
