"""Splits: patients and sites in several parts, classes and events per fold."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import splits
from data_pipelines.cohort import Cohort, join_cohort
from data_pipelines.errors import DataError
from data_pipelines.manifest import Manifest
from data_pipelines.sites import sites_of
from data_pipelines.splits import PARTS, Split
from data_pipelines.tables import LabelTable, SurvivalTable
from data_pipelines.validate.findings import ERROR, NOTE, WARNING, Finding, some


def check_folds(
    path: str | os.PathLike, manifest: Manifest, labels: LabelTable | None, survival: SurvivalTable | None
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Reads splits_K.csv files and checks them on all slides of the dataset.

    Args:
      path: directory or file.
      manifest: of the dataset.
      labels: for class counts, or None.
      survival: for event counts, or None.

    Returns:
      Counts per fold, and the findings.
    """
    cohort = _all_slides(manifest, labels)
    try:
        folds = splits.read_folds(path, cohort, stratify=bool(cohort.class_names) and (cohort.label >= 0).all(),
                                  allow_patient_overlap=True)  # fmt: skip
    except DataError as error:
        return [], [Finding(ERROR, "split", str(error))]
    facts, findings = [], []
    for number, split in enumerate(folds):
        counts, found = _check_fold(number, split, cohort, survival)
        facts.append(counts)
        findings += found
    return facts, findings + _check_tests(folds, cohort)


def _all_slides(manifest: Manifest, labels: LabelTable | None) -> Cohort:
    """Every slide as a sample, so that leakage shows between slides of a patient too."""
    cohort = join_cohort(manifest, unit="slide")
    if labels is None:
        return cohort
    value = dict(zip(labels.case_id, labels.value))
    label = np.array([value.get(case, -1) for case in cohort.case_id], np.int32)
    return dataclasses.replace(cohort, label=label, class_names=labels.class_names)


def _check_fold(
    number: int, split: Split, cohort: Cohort, survival: SurvivalTable | None
) -> tuple[dict[str, Any], list[Finding]]:
    cases = {part: sorted({cohort.case_id[row] for row in getattr(split, part)}) for part in PARTS}
    facts: dict[str, Any] = {"fold": number, "cases": {part: len(ids) for part, ids in cases.items()}}
    findings = _patients(number, cases)
    facts["sites_shared_with_test"], found = _sites(number, cases)
    findings += found
    if cohort.class_names:
        facts["classes"], found = _classes(number, cases, cohort)
        findings += found
    if survival is not None:
        facts["events"], found = _events(number, cases, survival)
        findings += found
    for code, ids, what in (
        ("not_in_dataset", split.not_in_cohort, "ids have no slides in the data set"),
        ("unassigned", split.unassigned, "slides have no part"),
    ):
        facts[code] = list(ids)
        if ids:
            findings.append(Finding(NOTE, code, f"fold {number}: {len(ids)} {what} ({some(ids)})", tuple(ids)))
    return facts, findings


def _patients(number: int, cases: Mapping[str, Sequence[str]]) -> list[Finding]:
    parts = collections.Counter(case for ids in cases.values() for case in ids)
    twice = sorted(case for case, count in parts.items() if count > 1)
    if not twice:
        return []
    text = f"fold {number}: {len(twice)} patients are in several parts ({some(twice)}): results would be too good"
    return [Finding(ERROR, "patient_leak", text, tuple(twice))]


def _sites(number: int, cases: Mapping[str, Sequence[str]]) -> tuple[list[str], list[Finding]]:
    test, other = (set(sites_of(ids).values()) for ids in (cases["test"], [*cases["train"], *cases["val"]]))
    shared = sorted(test & other)
    if not shared:
        return [], []
    text = f"fold {number}: {len(shared)} of {len(test)} tissue source sites of test are in other parts too"
    hint = f" ({some(shared)}); models can learn the site (histokd splits --site-preserved)"
    return shared, [Finding(NOTE, "site_overlap", text + hint, tuple(shared))]


def _classes(
    number: int, cases: Mapping[str, Sequence[str]], cohort: Cohort
) -> tuple[dict[str, dict[str, int]], list[Finding]]:
    label = dict(zip(cohort.case_id, cohort.label))
    counts, findings = {}, []
    for part, ids in cases.items():
        found = np.bincount([label[i] for i in ids if label[i] >= 0], minlength=len(cohort.class_names))
        counts[part] = {name: int(count) for name, count in zip(cohort.class_names, found)}
        empty = [name for name, count in counts[part].items() if not count]
        if empty and ids:
            level = WARNING if part == "val" else ERROR
            findings.append(Finding(level, "fold_class", f"fold {number}: {part} has no case of class {some(empty)}"))
    return counts, findings


def _events(
    number: int, cases: Mapping[str, Sequence[str]], table: SurvivalTable
) -> tuple[dict[str, int], list[Finding]]:
    event = {c: bool(e) for c, e, t in zip(table.case_id, table.survival.event, table.survival.time_months) if t == t}
    counts = {part: sum(event.get(case, False) for case in ids) for part, ids in cases.items()}
    levels = {"train": ERROR, "val": WARNING, "test": WARNING}
    findings = [
        Finding(levels[part], "fold_events", f"fold {number}: no case of {part} has an event")
        for part, count in counts.items()
        if not count and cases[part]
    ]
    return counts, findings


def _check_tests(folds: Sequence[Split], cohort: Cohort) -> list[Finding]:
    if len(folds) < 2:
        return []
    times = collections.Counter(cohort.sample_id[row] for split in folds for row in split.test)
    twice = sorted(item for item, count in times.items() if count > 1)
    never = sorted(set(cohort.sample_id) - set(times))
    found = []
    if twice:
        text = f"{len(twice)} slides are tested in several folds ({some(twice)}); pooled results count them repeatedly"
        found.append(Finding(WARNING, "tested_twice", text, tuple(twice)))
    if never:
        text = f"{len(never)} slides are tested in no fold ({some(never)})"
        found.append(Finding(NOTE, "never_tested", text, tuple(never)))
    return found
