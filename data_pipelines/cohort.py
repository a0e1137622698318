"""Joins slides, labels, genes and survival into a cohort; whatever does not join is listed with its reason."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import tables
from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable
from data_pipelines.ids import bare_slide_id, near_matches
from data_pipelines.samples import SEPARATOR, SampleReader
from data_pipelines.tables import FollowUpColumns, LabelTable, Survival, SurvivalTable

ALL_SLIDES = "all"
SLIDE_CHOICES = ("first_sorted", "largest_bag", "listing_order", ALL_SLIDES)
UNITS = ("case", "slide")
MISSING_SLIDES = ("exclude", "error")
NO_LABEL, NO_FEATURES, NO_GENES, EXTRA_SLIDE = "no label", "no features", "no genes", "extra slide of the case"
NO_FOLLOW_UP, SLIDE_WITHOUT_FEATURES = "no follow-up", "slide of the case without features"
UNLISTED_SLIDE = "slide that the table does not list"


@dataclasses.dataclass(frozen=True)
class Drop:
    """Something that did not join: its case, why, and the slide (empty if the case has none)."""

    case_id: str
    reason: str
    slide_id: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Cohort:
    """n samples in the order of their ids: cases with one slide or all their slides, or slides of their own (`unit`).

    Attributes:
      case_id: patient of each sample (repeats if unit is "slide").
      slide_index: [n] int32 row in the manifest; of a sample with several slides that of the first.
      slide_id: slide of each sample; several slides are joined by ";".
      label: [n] int32 class index; -1 everywhere if the cohort was built without labels.
      genes: table aligned to the samples (has_genes False where a sample has none), or None.
      survival: aligned follow-up (time NaN where unknown), or None.
      dropped: what did not join.
      class_names: one per class; empty without labels.
      unit: "case" or "slide".
      task: the label column, or None.
      slides: manifest rows of each sample, sorted by slide id, if a sample is all slides of its case; else empty.
    """

    case_id: tuple[str, ...]
    slide_index: np.ndarray
    slide_id: tuple[str, ...]
    label: np.ndarray
    genes: GeneTable | None = None
    survival: Survival | None = None
    dropped: tuple[Drop, ...] = ()
    class_names: tuple[str, ...] = ()
    unit: str = "case"
    task: str | None = None
    slides: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.case_id)

    @property
    def sample_id(self) -> tuple[str, ...]:
        """The ids that key tables and split files: case ids, or slide ids if `unit` is "slide"."""
        return self.slide_id if self.unit == "slide" else self.case_id

    @property
    def bag_index(self) -> np.ndarray:
        """[n] int32 number of each sample's bag for the reader of `open_bags`."""
        return np.arange(len(self), dtype=np.int32) if self.slides else self.slide_index

    def open_bags(self, reader: Any) -> Any:
        """The reader of the samples' bags, given that of the slides."""
        return SampleReader(reader, self.slides) if self.slides else reader

    @property
    def has_genes(self) -> np.ndarray:
        """[n] bool."""
        return np.zeros(len(self), bool) if self.genes is None else self.genes.has_genes

    def labels_for(self, rows: np.ndarray) -> np.ndarray:
        """[len(rows)] int32 labels of some samples.

        Raises:
          DataError: the cohort was built without labels.
        """
        if not self.class_names:
            raise DataError("this cohort was built without labels; pass labels_path and task to build_cohort")
        return self.label[np.asarray(rows)]

    def subset(self, rows: np.ndarray) -> Cohort:
        """The cohort restricted to some samples, in the given order; `dropped` is kept as it is."""
        rows = np.asarray(rows, np.int64)
        ids = [self.sample_id[row] for row in rows]
        return dataclasses.replace(
            self,
            case_id=tuple(self.case_id[row] for row in rows),
            slide_id=tuple(self.slide_id[row] for row in rows),
            slide_index=self.slide_index[rows],
            label=self.label[rows],
            genes=None if self.genes is None else self.genes.align(ids),
            survival=None if self.survival is None else Survival(*(part[rows] for part in self.survival)),
            slides=tuple(self.slides[row] for row in rows) if self.slides else (),
        )

    def report(self) -> dict[str, Any]:
        """JSON-able account: sizes, classes, and for every reason of a drop the count and the ids."""
        reasons: dict[str, list[str]] = collections.defaultdict(list)
        for drop in self.dropped:
            reasons[drop.reason].append(drop.slide_id or drop.case_id)
        counts = np.bincount(self.label[self.label >= 0], minlength=len(self.class_names))
        time = None if self.survival is None else self.survival.time_months
        return {
            "unit": self.unit,
            "task": self.task,
            "n": len(self),
            "n_cases": len(set(self.case_id)),
            **({"n_slides": sum(map(len, self.slides))} if self.slides else {}),
            "classes": {name: int(count) for name, count in zip(self.class_names, counts)},
            "n_with_genes": int(self.has_genes.sum()),
            "n_without_genes": int((~self.has_genes).sum()),
            "n_duplicate_gene_rows": 0 if self.genes is None else self.genes.n_duplicate_rows,
            "n_with_survival": 0 if time is None else int(np.isfinite(time).sum()),
            "n_events": 0 if time is None else int(self.survival.event.sum()),
            "dropped": {reason: {"n": len(ids), "ids": sorted(ids)} for reason, ids in sorted(reasons.items())},
        }


def build_cohort(
    manifest: Any,
    *,
    labels_path: str | os.PathLike | None = None,
    task: str | None = None,
    genes_path: str | os.PathLike | None = None,
    survival_path: str | os.PathLike | None = None,
    slide_choice: str = "first_sorted",
    require_genes: bool = True,
    label_map: Mapping[str, int] | None = None,
    her2_equivocal: str = "drop",
    missing_labels: str = "drop",
    unit: str = "case",
    require_follow_up: bool = False,
    missing_slides: str = "exclude",
    follow_up_columns: FollowUpColumns | None = None,
    read_genes: Callable[[str | os.PathLike], GeneTable] = tables.read_gene_table,
) -> Cohort:
    """Reads the tables and joins them with the slides of a manifest.

    Args:
      manifest: anything with `.slides`, each with slide_id, case_id and n_patches.
      labels_path: label CSV; without it all labels are -1 (prediction on unlabelled slides).
      task: label column; needed with labels_path.
      genes_path: gene table; see `tables.read_gene_table`.
      survival_path: survival table; see `tables.read_survival`. Cases without follow-up stay, with time NaN.
      slide_choice: which slide stands for a case: "first_sorted" by slide id, "largest_bag" (ties by slide id), or
        "listing_order" (first in the manifest); "all": a sample is all slides of its case (those that the survival
        table lists, if it lists slides).
      require_genes: if genes_path is given, drop samples without genes; otherwise keep them with has_genes False.
      label_map: see `tables.read_labels`.
      her2_equivocal: see `tables.read_labels`.
      missing_labels: see `tables.read_labels`.
      unit: "case", or "slide" if every slide is a sample and the tables hold slide ids in their case_id column.
      require_follow_up: drop samples without follow-up (survival tasks).
      missing_slides: cases or slides of the tables without features: "exclude" lists them, "error" refuses.
      follow_up_columns: names of the columns of the survival table; None for those of `tables.read_survival`.
      read_genes: reads the gene table.

    Returns:
      The cohort.

    Raises:
      DataError: an option is unknown, a table is bad, or nothing joins.
    """
    if labels_path is not None and task is None:
        raise DataError(f"labels from {labels_path} need the name of a task (its label column)")
    labels = None
    if labels_path is not None:
        policies = {"her2_equivocal": her2_equivocal, "missing": missing_labels}
        labels = tables.read_labels(labels_path, task, label_map=label_map, **policies)
    return join_cohort(
        manifest,
        labels=labels,
        genes=None if genes_path is None else read_genes(genes_path),
        survival=None if survival_path is None else tables.read_survival(survival_path, follow_up_columns),
        slide_choice=slide_choice,
        require_genes=require_genes,
        unit=unit,
        task=task,
        require_follow_up=require_follow_up,
        missing_slides=missing_slides,
    )


def join_cohort(
    manifest: Any,
    *,
    labels: LabelTable | None = None,
    genes: GeneTable | None = None,
    survival: SurvivalTable | None = None,
    slide_choice: str = "first_sorted",
    require_genes: bool = True,
    unit: str = "case",
    task: str | None = None,
    require_follow_up: bool = False,
    missing_slides: str = "exclude",
) -> Cohort:
    """As `build_cohort`, from tables already in memory."""
    _check_options(slide_choice, unit, missing_slides)
    dropped: list[Drop] = []
    if unit == "slide":
        chosen = {slide.slide_id: (row,) for row, slide in enumerate(manifest.slides)}
    elif slide_choice == ALL_SLIDES:
        chosen = _all_slides(manifest.slides, {} if survival is None else survival.slides, dropped)
    else:
        chosen = _choose_slides(manifest.slides, slide_choice, dropped)
    slide_of = {key: manifest.slides[rows[0]] for key, rows in chosen.items()}
    keys = sorted(chosen)
    if labels is not None:
        keys = _labelled(keys, labels, slide_of, dropped)
    if require_follow_up:
        keys = _followed_up(keys, survival, slide_of, dropped)
    if missing_slides == "error":
        _refuse_missing(dropped)
    if genes is not None and require_genes:
        known = {case for case, has in zip(genes.case_id, genes.has_genes) if has}
        dropped += [Drop(slide_of[key].case_id, NO_GENES, slide_of[key].slide_id) for key in keys if key not in known]
        keys = [key for key in keys if key in known]
    if not keys:
        counts = dict(collections.Counter(drop.reason for drop in dropped))
        held = sorted(chosen)
        listed = [case for table in (labels, genes) if table is not None for case in table.case_id]
        raise DataError(
            f"no sample of the {len(manifest.slides)} slides joins with the tables ({counts}); check that the tables "
            f"and the manifest use the same {unit} ids: the tables have {listed[:3]}, the manifest {held[:3]}"
            f"{near_matches(listed, held)}"
        )
    class_of = {} if labels is None else dict(zip(labels.case_id, labels.value))
    return Cohort(
        case_id=tuple(slide_of[key].case_id for key in keys),
        slide_index=np.array([chosen[key][0] for key in keys], np.int32),
        slide_id=tuple(SEPARATOR.join(manifest.slides[row].slide_id for row in chosen[key]) for key in keys),
        label=np.array([class_of.get(key, -1) for key in keys], np.int32),
        genes=None if genes is None else genes.align(keys),
        survival=None if survival is None else _align_survival(survival, keys),
        dropped=tuple(dropped),
        class_names=() if labels is None else labels.class_names,
        unit=unit,
        task=task,
        slides=tuple(chosen[key] for key in keys) if slide_choice == ALL_SLIDES else (),
    )


def _check_options(slide_choice: str, unit: str, missing_slides: str) -> None:
    options = (
        ("data.slide_choice", slide_choice, SLIDE_CHOICES),
        ("unit", unit, UNITS),
        ("data.missing_slides", missing_slides, MISSING_SLIDES),
    )
    for key, value, allowed in options:
        if value not in allowed:
            raise DataError(f"{key}={value!r} is unknown; choose one of {allowed}")
    if unit == "slide" and slide_choice == ALL_SLIDES:
        raise DataError("data.slide_choice=all joins the slides of a case, data.unit=slide parts them: choose one")


def _all_slides(
    slides: Sequence[Any], listed: Mapping[str, Sequence[str]], dropped: list[Drop]
) -> dict[str, tuple[int, ...]]:
    """case -> manifest rows of its slides, sorted by slide id; mismatches with the listed ones go to `dropped`."""
    chosen: dict[str, list[int]] = collections.defaultdict(list)
    wanted = {case: {bare_slide_id(name) for name in names} for case, names in listed.items()}
    for row, slide in enumerate(slides):
        if bare_slide_id(slide.slide_id) in wanted.get(slide.case_id, (bare_slide_id(slide.slide_id),)):
            chosen[slide.case_id].append(row)
        else:
            dropped.append(Drop(slide.case_id, UNLISTED_SLIDE, slide.slide_id))
    for case, rows in chosen.items():
        found = {bare_slide_id(slides[row].slide_id) for row in rows}
        absent = [name for name in listed.get(case, ()) if bare_slide_id(name) not in found]
        dropped += [Drop(case, SLIDE_WITHOUT_FEATURES, name) for name in absent]
    return {case: tuple(sorted(rows, key=lambda row: slides[row].slide_id)) for case, rows in chosen.items()}


def _followed_up(
    keys: Sequence[str], survival: SurvivalTable | None, slide_of: Mapping[str, Any], dropped: list[Drop]
) -> list[str]:
    """The keys with a follow-up; both sides of the mismatch go to `dropped`."""
    if survival is None:
        raise DataError("a survival task needs follow-up, but no survival table was given: set data.survival=FILE")
    known = {case for case, time in zip(survival.case_id, survival.survival.time_months) if np.isfinite(time)}
    dropped += [Drop(slide_of[key].case_id, NO_FOLLOW_UP, slide_of[key].slide_id) for key in keys if key not in known]
    dropped += [
        Drop(case, NO_FEATURES if case in known else NO_FOLLOW_UP) for case in survival.case_id if case not in slide_of
    ]
    return [key for key in keys if key in known]


def _refuse_missing(dropped: Sequence[Drop]) -> None:
    missing = [drop for drop in dropped if drop.reason in (NO_FEATURES, SLIDE_WITHOUT_FEATURES)]
    if missing:
        names = ", ".join(drop.slide_id or drop.case_id for drop in missing[:5])
        raise DataError(
            f"{len(missing)} cases or slides of the tables have no features in the data set (first {names}): add them, "
            "or leave them out and count them with data.missing_slides=exclude"
        )


def _choose_slides(slides: Sequence[Any], slide_choice: str, dropped: list[Drop]) -> dict[str, tuple[int, ...]]:
    """case -> manifest row of the slide that stands for it; the others go to `dropped`."""
    by_case: dict[str, list[int]] = collections.defaultdict(list)
    for row, slide in enumerate(slides):
        by_case[slide.case_id].append(row)
    preference = {
        "first_sorted": lambda row: slides[row].slide_id,
        "largest_bag": lambda row: (-slides[row].n_patches, slides[row].slide_id),
        "listing_order": lambda row: row,
    }[slide_choice]
    chosen = {case: min(rows, key=preference) for case, rows in by_case.items()}
    for case, rows in by_case.items():
        dropped += [Drop(case, EXTRA_SLIDE, slides[row].slide_id) for row in rows if row != chosen[case]]
    return {case: (row,) for case, row in chosen.items()}


def _labelled(keys: Sequence[str], labels: LabelTable, slide_of: Mapping[str, Any], dropped: list[Drop]) -> list[str]:
    """The keys that have a label; both sides of the mismatch go to `dropped`."""
    class_of = dict(zip(labels.case_id, labels.value))
    kept = []
    for key in keys:
        if class_of.get(key, -1) >= 0:
            kept.append(key)
        else:
            reason = labels.missing[key] if key in class_of else NO_LABEL
            dropped.append(Drop(slide_of[key].case_id, reason, slide_of[key].slide_id))
    for key in labels.case_id:
        if key not in slide_of:
            dropped.append(Drop(key, labels.missing.get(key, NO_FEATURES)))
    return kept


def _align_survival(table: SurvivalTable, keys: Sequence[str]) -> Survival:
    row_of = {case: row for row, case in enumerate(table.case_id)}
    rows = np.array([row_of.get(key, -1) for key in keys], np.int64)
    known = rows >= 0
    time, event = np.full(len(keys), np.nan), np.zeros(len(keys), bool)
    time[known] = table.survival.time_months[rows[known]]
    event[known] = table.survival.event[rows[known]]
    return Survival(time, event)
