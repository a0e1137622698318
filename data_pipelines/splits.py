"""Patient-level folds: drawing, reading, writing, leakage checks and fingerprints (MKD section 3.4, check L)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from data_pipelines import atomic, text_table
from data_pipelines.cohort import Cohort
from data_pipelines.errors import DataError
from data_pipelines.ids import bare_slide_id
from data_pipelines.samples import SEPARATOR

_LOG = logging.getLogger(__name__)
PARTS = ("train", "val", "test")
CORRECTED, PUBLISHED = "corrected", "published"
PROTOCOLS = (CORRECTED, PUBLISHED)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One fold: sorted int32 rows of the cohort.

    Attributes:
      train: rows for fitting.
      val: rows for model selection; may be empty.
      test: rows that are reported.
      patient_overlap: True if a patient has samples in several parts (only ever when explicitly allowed); results must
        then be labelled as within-patient.
      not_in_cohort: ids of a split file that the cohort does not hold.
      unassigned: sample ids of the cohort that the split file does not place.
      val_is_test: True if the reported part is also the validation part (protocol "published"): whatever is selected
        on it is reported on the patients it was selected on, and results must be labelled so.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    patient_overlap: bool = False
    not_in_cohort: tuple[str, ...] = ()
    unassigned: tuple[str, ...] = ()
    val_is_test: bool = False


def make_folds(
    cohort: Cohort,
    *,
    n_folds: int = 5,
    val_fraction: float = 0.2,
    stratify: bool = True,
    seed: int = 0,
    strata: np.ndarray | None = None,
    protocol: str = CORRECTED,
) -> list[Split]:
    """Shuffled k-fold cross-validation over patients; of each remainder, `val_fraction` is validation.

    All samples of a patient stay together. Stratification deals the shuffled patients of one class after another, so
    that class counts differ by at most one between folds (a patient counts with the label of its first sample).

    Args:
      cohort: labelled if `stratify`.
      n_folds: number of folds, at least 2.
      val_fraction: share of a fold's remainder used for validation, in [0, 1); 0.2 gives 64 / 16 / 20 with 5 folds.
      stratify: False reproduces the published protocol of MKD.
      seed: of all draws.
      strata: [n] int >= 0, what to stratify by in place of the label; groups may be smaller than the folds.
      protocol: "corrected", or "published": nothing is held out of the training part, and the reported part is the
        validation part as well.

    Returns:
      One split per fold; the test parts partition the cohort.

    Raises:
      DataError: too few patients, or a class with fewer patients than folds under `stratify`.
    """
    patients, first = np.unique(np.array(cohort.case_id), return_index=True)
    if not 2 <= n_folds <= len(patients):
        raise DataError(
            f"n_folds={n_folds} needs 2 <= n_folds <= patients, and the cohort has {len(patients)}; samples of one "
            f"patient cannot be split between folds (read explicit splits with allow_patient_overlap to do so)"
        )
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} must lie in [0, 1)")
    _check_protocol(protocol)
    label = np.zeros(len(patients), np.int32)
    if stratify:
        label = cohort.labels_for(first) if strata is None else np.asarray(strata)[first]
    _check_class_sizes(label, n_folds, cohort, stratify and strata is None)
    fraction = 0.0 if protocol == PUBLISHED else val_fraction
    dealt = _shuffled_by_class(np.arange(len(patients)), label, np.random.default_rng([seed, n_folds]))
    return folds_of_tests(
        cohort, [dealt[fold::n_folds] for fold in range(n_folds)], label, fraction, [seed, n_folds], protocol
    )


def folds_of_tests(
    cohort: Cohort,
    tests: Sequence[np.ndarray],
    label: np.ndarray,
    val_fraction: float,
    seed: Sequence[int],
    protocol: str = CORRECTED,
) -> list[Split]:
    """Folds with given test patients; of each remainder, `val_fraction` is validation.

    Args:
      cohort: the cohort.
      tests: per fold the patients of its test part, as indices into the sorted unique case ids.
      label: class of each of these patients, by which validation patients are drawn.
      val_fraction: see `make_folds`.
      seed: of the draws; the number of the fold is appended.
      protocol: see `make_folds`.

    Returns:
      One split per fold.

    Raises:
      DataError: the test parts do not partition the cohort.
    """
    patients, patient_of = np.unique(np.array(cohort.case_id), return_inverse=True)
    folds = []
    for fold, test in enumerate(tests):
        rest = np.setdiff1d(np.arange(len(patients)), test)
        train, val = _draw_validation(rest, label, val_fraction, np.random.default_rng([*seed, fold]))
        folds.append(Split(*(_rows(np.isin(patient_of, part)) for part in (train, val, test))))
    check_partition(folds, cohort)
    return [_validated_on_test(split) for split in folds] if protocol == PUBLISHED else folds


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise DataError(f"split.protocol={protocol!r} is unknown; choose one of {PROTOCOLS}")


def _validated_on_test(split: Split) -> Split:
    return dataclasses.replace(split, val=split.test, val_is_test=True)


def _check_class_sizes(label: np.ndarray, n_folds: int, cohort: Cohort, stratify: bool) -> None:
    if not stratify:
        return
    for c, size in enumerate(np.bincount(label)):
        if 0 < size < n_folds:
            raise DataError(
                f"class {cohort.class_names[c]!r} has {size} patients, fewer than n_folds={n_folds}; use fewer folds "
                f"or split.stratify=False"
            )


def _shuffled_by_class(items: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The items shuffled, then grouped by class."""
    shuffled = rng.permutation(items)
    return shuffled[np.argsort(label[shuffled], kind="stable")]


def _draw_validation(
    items: np.ndarray, label: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(train, val): every (1/fraction)-th of the items in class order, so that classes keep their shares within one."""
    ordered = _shuffled_by_class(items, label, rng)
    # The small offset keeps exact products such as 5 * 0.2 from falling just below an integer.
    quota = np.floor(np.arange(len(ordered) + 1) * fraction + 1e-9)
    taken = np.diff(quota) > 0
    if fraction > 0 and not taken.any():
        raise DataError(f"val_fraction={fraction} of {len(ordered)} patients leaves the validation part empty")
    return ordered[~taken], ordered[taken]


def _rows(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(mask).astype(np.int32)


def check_leakage(split: Split, cohort: Cohort, *, allow_patient_overlap: bool = False) -> bool:
    """Checks that no sample and no patient lies in two parts of a split.

    Args:
      split: the split.
      cohort: the cohort its rows refer to.
      allow_patient_overlap: tolerate a patient (never a sample) in two parts, e.g. two sections of one patient.

    Returns:
      True if a patient lies in two parts.

    Raises:
      DataError: a sample in two parts, or a patient and the flag is not set; names the case and the parts.
    """
    overlap = False
    for ids, kind in ((cohort.sample_id, "sample"), (cohort.case_id, "patient")):
        part_of: dict[str, str] = {}
        for part in PARTS:
            for item in sorted({ids[row] for row in getattr(split, part)}):
                if part_of.setdefault(item, part) == part:
                    continue
                if kind == "sample" or not allow_patient_overlap:
                    raise DataError(
                        f"{kind} {item!r} is in {part_of[item]} and in {part}; parts of a split must not share "
                        f"patients (samples of one patient in two parts need allow_patient_overlap)"
                    )
                overlap = True
    return overlap


def check_partition(folds: Sequence[Split], cohort: Cohort) -> None:
    """Checks that the test parts of all folds hold every sample of the cohort exactly once.

    Raises:
      DataError: a sample is tested twice or never; names it.
    """
    times = np.zeros(len(cohort), int)
    for split in folds:
        np.add.at(times, split.test, 1)
    if (times != 1).any():
        row = int(np.argmax(times != 1))
        raise DataError(
            f"sample {cohort.sample_id[row]!r} is in {times[row]} of {len(folds)} test parts "
            f"({int((times != 1).sum())} such samples); the test parts must partition the cohort"
        )


def split_fingerprint(split: Split, cohort: Cohort) -> str:
    """SHA-256 (hex) of which sample ids are in which part; independent of row numbers and of the order of rows."""
    content = {part: sorted(cohort.sample_id[row] for row in getattr(split, part)) for part in PARTS}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_folds(folds: Sequence[Split], cohort: Cohort, path: str | os.PathLike) -> None:
    """Writes splits_0.csv, splits_1.csv, ... with the columns of the published code, each atomically.

    Columns: train, train_label, val, val_label, test, test_label; sample ids, padded with empty cells. A cohort without
    labels is written without the label columns.

    Args:
      folds: splits of `cohort`.
      cohort: the cohort.
      path: directory, created if needed.
    """
    directory = pathlib.Path(path)
    with atomic.storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for fold, split in enumerate(folds):
        columns = {}
        for part in PARTS:
            rows = getattr(split, part)
            columns[part] = pd.Series([cohort.sample_id[row] for row in rows], dtype=object)
            if cohort.class_names:
                columns[f"{part}_label"] = pd.Series(cohort.labels_for(rows).astype(str), dtype=object)
        content = pd.DataFrame(columns).fillna("").to_csv(index=False).encode()
        with atomic.storage_errors(directory):
            temporary = atomic.write_temporary(directory, f"splits_{fold}.csv", content)
            os.replace(temporary, directory / f"splits_{fold}.csv")


def read_folds(
    path: str | os.PathLike,
    cohort: Cohort,
    *,
    val_fraction: float = 0.2,
    stratify: bool = True,
    seed: int = 0,
    allow_patient_overlap: bool = False,
    strata: np.ndarray | None = None,
    protocol: str = CORRECTED,
) -> list[Split]:
    """Reads splits_K.csv files of one directory (or one such file).

    Three layouts: ours and the published code's (train, train_label, val, val_label, test, test_label); CLAM's
    (,train,val,test); and MCAT's / PORPOISE's (,train,val), where val is the fold that is reported: it becomes test,
    and `val_fraction` of the train patients is drawn as validation (0: none); or, with the protocol "published", it is
    test and validation, as its authors used it. Ids may be case ids or slide ids (with or without
    extension); a case id stands for all samples of that case.

    Args:
      path: directory or file.
      cohort: the cohort to place.
      val_fraction: share of train drawn as validation in the two-column layout.
      stratify: stratify that draw.
      seed: of that draw.
      allow_patient_overlap: accept a patient in two parts; the splits are then marked.
      strata: [n] int, what to stratify that draw by in place of the label.
      protocol: "corrected" or "published"; files with a test column are read the same in both.

    Returns:
      One split per file, in the order of K. Ids unknown to the cohort and samples without a place are listed in the
      splits and logged.

    Raises:
      DataError: no files, bad columns, an id in two parts, a label that contradicts the cohort, or an empty part.
    """
    path = pathlib.Path(path)
    _check_protocol(protocol)
    numbered = {}
    for file in [path] if path.is_file() else path.glob("*.csv"):
        match = re.fullmatch(r"(?:splits|fold)_?(\d+)\.csv", file.name)
        if match or path.is_file():
            numbered[int(match.group(1)) if match else 0] = file
    if not numbered:
        raise DataError(f"{path}: no files splits_K.csv")
    folds = []
    for number in sorted(numbered):
        parts, missing = _read_parts(numbered[number], cohort)
        published = "test" not in parts and protocol == PUBLISHED
        if "test" not in parts:
            rng = np.random.default_rng([seed, number])
            label = _stratifying(cohort, stratify, strata)
            parts = _with_inner_validation(parts, cohort, 0.0 if published else val_fraction, label, rng)
        split = _finish_split(parts, missing, cohort, allow_patient_overlap, numbered[number])
        folds.append(_validated_on_test(split) if published else split)
    return folds


def split_with_parts(
    parts: Mapping[str, np.ndarray],
    cohort: Cohort,
    *,
    val_fraction: float = 0.2,
    stratify: bool = True,
    seed: int = 0,
    allow_patient_overlap: bool = False,
    strata: np.ndarray | None = None,
    protocol: str = CORRECTED,
) -> Split:
    """One split of given rows, e.g. the official parts of a data set.

    Args:
      parts: "train" and "test" -> rows of the cohort; with "val" nothing is drawn.
      cohort: the cohort.
      val_fraction: share of the training patients drawn as validation (0: none).
      stratify: stratify that draw.
      seed: of that draw.
      allow_patient_overlap: accept a patient in two parts; the split is then marked.
      strata: see `read_folds`.
      protocol: "corrected", or "published": nothing is drawn, the reported part is the validation part as well.

    Raises:
      DataError: a patient in two parts, or an empty validation part.
    """
    _check_protocol(protocol)
    published = "val" not in parts and protocol == PUBLISHED
    if "val" not in parts:
        fraction = 0.0 if published else val_fraction
        given = {"train": np.asarray(parts["train"]), "val": np.asarray(parts["test"])}
        rng = np.random.default_rng([seed, 0])
        parts = _with_inner_validation(given, cohort, fraction, _stratifying(cohort, stratify, strata), rng)
    split = Split(*(np.asarray(parts[part], np.int32) for part in PARTS))
    overlap = check_leakage(split, cohort, allow_patient_overlap=allow_patient_overlap)
    split = dataclasses.replace(split, patient_overlap=overlap)
    return _validated_on_test(split) if published else split


def _stratifying(cohort: Cohort, stratify: bool, strata: np.ndarray | None) -> np.ndarray:
    """[n] int groups that keep their shares in a draw."""
    if not stratify:
        return np.zeros(len(cohort), np.int32)
    return cohort.labels_for(np.arange(len(cohort))) if strata is None else np.asarray(strata)


def _finish_split(
    parts: dict[str, np.ndarray], missing: Sequence[str], cohort: Cohort, allow_overlap: bool, file: pathlib.Path
) -> Split:
    for part in ("train", "test"):
        if not len(parts[part]):
            raise DataError(f"{file}: no id of the {part} part is in the cohort; check that both use the same ids")
    placed = np.concatenate([parts[part] for part in PARTS])
    unassigned = [cohort.sample_id[row] for row in np.setdiff1d(np.arange(len(cohort)), placed)]
    split = Split(*(parts[part] for part in PARTS), not_in_cohort=tuple(missing), unassigned=tuple(unassigned))
    try:
        overlap = check_leakage(split, cohort, allow_patient_overlap=allow_overlap)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    for ids, what in ((missing, "ids are not in the cohort"), (unassigned, "samples of the cohort have no part")):
        if ids:
            _LOG.warning("%s: %d %s: %s%s", file, len(ids), what, ", ".join(ids[:5]), ", ..." if len(ids) > 5 else "")
    return dataclasses.replace(split, patient_overlap=overlap)


def _with_inner_validation(
    parts: dict[str, np.ndarray], cohort: Cohort, fraction: float, label: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Two-column layout: the reported fold becomes test; validation patients are drawn from train."""
    case = np.array(cohort.case_id)
    patients, first = np.unique(case[parts["train"]], return_index=True)
    _, val = _draw_validation(np.arange(len(patients)), label[parts["train"][first]], fraction, rng)
    held_out = np.isin(case[parts["train"]], patients[val])
    return {"train": parts["train"][~held_out], "val": parts["train"][held_out], "test": parts["val"]}


def _read_parts(file: pathlib.Path, cohort: Cohort) -> tuple[dict[str, np.ndarray], list[str]]:
    """(part -> sorted rows, ids unknown to the cohort) of one file."""
    table = text_table.read_text_table(file)
    present = [part for part in PARTS if part in table.columns]
    if not {"train", "val"} <= set(present):
        raise DataError(f"{file}: columns {list(table.columns)}; expected train, val and optionally test")
    rows_of = _lookup(cohort)
    part_of: dict[str, str] = {}
    parts, missing = {}, []
    for part in present:
        rows: list[int] = []
        for line, item in enumerate(table[part]):
            if not item:
                continue
            if item in part_of:
                raise DataError(f"{file}, line {line + 2}: {item!r} is in {part_of[item]} and again in {part}")
            part_of[item] = part
            found = rows_of.get(item, ())
            missing += [] if found else [item]
            rows += found
            if f"{part}_label" in table.columns:
                _check_label(table[f"{part}_label"][line], item, found, cohort, f"{file}, line {line + 2}")
        parts[part] = np.unique(np.array(rows, np.int32))
    return parts, missing


def _lookup(cohort: Cohort) -> dict[str, list[int]]:
    rows_of: dict[str, list[int]] = {}
    for row, (case, joined) in enumerate(zip(cohort.case_id, cohort.slide_id)):
        slides = joined.split(SEPARATOR) if cohort.slides else [joined]
        for item in {case, *slides, *map(bare_slide_id, slides)}:
            rows_of.setdefault(item, []).append(row)
    return rows_of


def _check_label(text: str, item: str, rows: Sequence[int], cohort: Cohort, where: str) -> None:
    for row in rows:
        label = int(cohort.label[row])
        if label >= 0 and text.strip() not in (str(label), f"{label}.0", cohort.class_names[label]):
            raise DataError(
                f"{where}: the split file gives {item!r} the label {text!r}, the cohort has {label} for task "
                f"{cohort.task!r}; the split was made for other labels"
            )
