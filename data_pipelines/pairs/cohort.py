"""Examples of a pair dataset as a cohort, and its official parts as a split."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from data_pipelines.cohort import Cohort, Drop
from data_pipelines.errors import DataError
from data_pipelines.pairs.manifest import PairManifest
from data_pipelines.splits import PARTS, Split, split_with_parts


def pair_cohort(manifest: PairManifest, task: str | None = None, *, labelled: bool = False) -> Cohort:
    """The examples as samples: slide_id is the example id, case_id its group, or the example id where it has none.

    Args:
      manifest: of the dataset.
      task: name of the label.
      labelled: leave out examples without a label.

    Raises:
      DataError: `labelled`, and none has a label.
    """
    rows = [row for row, example in enumerate(manifest.examples) if example.label >= 0 or not labelled]
    if not rows:
        raise DataError(f"data set {manifest.name} has no labels: nothing can be compared with them")
    chosen = [manifest.examples[row] for row in rows]
    dropped = [Drop(e.group or e.example_id, "no label", e.example_id) for e in manifest.examples if e.label < 0]
    return Cohort(
        case_id=tuple(example.group or example.example_id for example in chosen),
        slide_index=np.array(rows, np.int32),
        slide_id=tuple(example.example_id for example in chosen),
        label=manifest.labels[rows],
        dropped=tuple(dropped) if labelled else (),
        class_names=manifest.class_names,
        unit="slide",
        task=task,
    )


def has_official_parts(manifest: PairManifest) -> bool:
    """Whether the examples come with parts."""
    return any(example.split for example in manifest.examples)


def labelled_rows(cohort: Cohort) -> np.ndarray:
    """Rows of the examples with a label, which alone can be evaluated.

    Raises:
      DataError: there are none.
    """
    rows = np.flatnonzero(cohort.label >= 0).astype(np.int32)
    if not len(rows):
        raise DataError(
            "no example of the data set has a label, so nothing can be evaluated: give labels with `histokd pairs "
            "--labels` or a label rule"
        )
    return rows


def official_split(
    manifest: PairManifest,
    cohort: Cohort,
    *,
    allow_patient_overlap: bool = False,
    need_labels: bool = True,
    **options,
) -> Split:
    """The official parts as one split of the labelled examples; unlabelled ones of the training part train as well.

    Args:
      manifest: of the dataset.
      cohort: all its examples.
      allow_patient_overlap: accept a group in two parts, marked.
      need_labels: False takes every example for its part, labelled or not.
      **options: val_fraction, stratify, seed and protocol of `splits.split_with_parts`.

    Raises:
      DataError: no training or test part, or a group in two parts; names it and the ways out.
    """
    kept = labelled_rows(cohort) if need_labels else np.arange(len(cohort), dtype=np.int32)
    part_of = np.array([manifest.examples[row].split for row in cohort.slide_index])
    rows = {part: np.flatnonzero(part_of[kept] == part).astype(np.int32) for part in PARTS}
    if not len(rows["train"]) or not len(rows["test"]):
        found = ", ".join(f"{part} ({n})" for part, n in sorted(collections.Counter(part_of[kept].tolist()).items()))
        raise DataError(
            f"data set {manifest.name} has the official parts {found}: training needs train and test"
            + (" with labels" if need_labels else "")
            + "; draw folds instead with data.official_split=False"
        )
    given = rows if len(rows["val"]) else {part: rows[part] for part in ("train", "test")}
    try:
        split = split_with_parts(given, cohort.subset(kept), allow_patient_overlap=allow_patient_overlap, **options)
    except DataError as error:
        raise DataError(
            f"official split of {manifest.name}: {error}; draw folds by group with data.official_split=False, or "
            "accept it, marked, with --allow-patient-overlap"
        ) from error
    return with_unlabelled(split, cohort, kept, np.flatnonzero(part_of == "train"))


def with_unlabelled(split: Split, cohort: Cohort, kept: np.ndarray, usable: np.ndarray | None = None) -> Split:
    """A split of the labelled examples as one of all: unlabelled ones train, unless their group is held out.

    Args:
      split: rows of `cohort.subset(kept)`.
      cohort: all examples.
      kept: rows of the labelled ones.
      usable: rows that may train; None: all.
    """
    train, val, test = (kept[rows] for rows in (split.train, split.val, split.test))
    case = np.array(cohort.case_id)
    free = np.setdiff1d(np.arange(len(cohort)) if usable is None else usable, kept)
    free = free[~np.isin(case[free], case[np.concatenate([val, test])])]
    return dataclasses.replace(split, train=np.sort(np.concatenate([train, free])).astype(np.int32), val=val, test=test)
