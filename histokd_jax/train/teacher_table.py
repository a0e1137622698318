"""A teacher that is a table: hazards of a finished run as batch fields, refused where they would leak test patients.

The run directory of the teacher says in fold_K/follow_up_train.csv whom the model of fold K trained on, and in
fold_K/time_bins.json what its bins mean. A table of all folds' models on all patients is made by
`histokd predict --model RUN --data DATASET --mode MODE --out TABLE`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import schema
from data_pipelines.cohort import Cohort
from data_pipelines.errors import DataError
from data_pipelines.follow_up import read_survival
from data_pipelines.splits import Split
from histokd_jax.evals.survival_predictions import SurvivalPredictions, read_survival_predictions
from histokd_jax.tasks.survival import BINS_FILE, FOLLOW_UP_FILE

SAME_FOLD, OUT_OF_SAMPLE = "same_fold", "out_of_sample"
MARK = "mark"
LEAKAGE_MARK = "teacher trained on patients that the student is tested on"


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherFields:
    """What a fold learns from the table.

    Attributes:
      fields: "teacher_hazards" [n, C] float32 and "has_teacher" [n] bool of the cohort; set on training patients only.
      marks: what must be said beside every number.
    """

    fields: dict[str, np.ndarray]
    marks: tuple[str, ...]


def read_teacher(cfg: ConfigDict, cohort: Cohort, split: Split, fold: int, edges: Sequence[float]) -> TeacherFields:
    """The teacher's hazards of the training patients of one fold.

    Args:
      cfg: resolved configuration, with the section `distill`.
      cohort: the samples, one per patient.
      split: the fold.
      fold: its number.
      edges: of the student's time bins, months.

    Returns:
      The fields and marks.

    Raises:
      DataError: a table without hazards or with other bins, that lacks training patients, or whose models trained on
        test patients of the fold.
    """
    options = cfg.distill
    path = pathlib.Path(options.table.replace("{fold}", str(fold)))
    run = pathlib.Path(options.teacher_run.replace("{fold}", str(fold)) or path.parent)
    table = _of_mode(read_survival_predictions(path), options.table_mode, path)
    cases = [str(case) for case in cohort.case_id]
    train = {cases[row] for row in split.train}
    table = table.where(np.isin(table.case_id, sorted(train)))
    if options.rows == SAME_FOLD:
        table = table.where(table.fold == fold)
    trained_on = {k: _trained_on(run, k) for k in table.folds}
    if options.rows == OUT_OF_SAMPLE:
        unseen = [case not in trained_on[k] for case, k in zip(table.case_id.tolist(), table.fold.tolist())]
        table = table.where(np.array(unseen, bool))
    row_of = _one_row_each(table, path, options.rows)
    _check_complete(path, fold, options, train, row_of)
    used = table.folds
    for k in used:
        _check_bins(run, k, edges)
    marks = _check_leakage(path, fold, options.leakage, {cases[row] for row in split.test}, trained_on, used)
    hazards = np.zeros((len(cases), len(edges) - 1), np.float32)
    taught = np.array([case in row_of for case in cases])
    hazards[taught] = table.hazards[[row_of[case] for case in cases if case in row_of]]
    return TeacherFields({schema.TEACHER_HAZARDS: hazards, schema.HAS_TEACHER: taught}, marks)


def _of_mode(table: SurvivalPredictions, mode: str, path: pathlib.Path) -> SurvivalPredictions:
    if not table.num_bins:
        raise DataError(f"{path}: no hazards (a Cox head?); a teacher needs loss.survival=nll or ce")
    if mode and mode not in table.modes or not mode and len(table.modes) > 1:
        raise DataError(f"{path}: distill.table_mode={mode!r}, the table holds the modes {list(table.modes)}: name one")
    return table.of_mode(mode or table.modes[0])


def _file(run: pathlib.Path, fold: int, name: str) -> pathlib.Path:
    path = run / f"fold_{fold}" / name
    if not path.is_file():
        raise DataError(
            f"{path} is missing, so that it is unknown whom the teacher of fold {fold} trained on: give its run "
            "directory with distill.teacher_run"
        )
    return path


def _trained_on(run: pathlib.Path, fold: int) -> frozenset[str]:
    return frozenset(str(case) for case in read_survival(_file(run, fold, FOLLOW_UP_FILE)).case_id)


def _check_bins(run: pathlib.Path, fold: int, edges: Sequence[float]) -> None:
    path = _file(run, fold, BINS_FILE)
    found = json.loads(path.read_text())["edges"]
    if len(found) != len(edges) or not np.allclose(found[1:-1], edges[1:-1]):
        raise DataError(
            f"{path}: the teacher's time bins end at {found[1:-1]}, the student's at {list(edges[1:-1])} months: train "
            "both with the same survival.n_bins, survival.bins_from, follow-up and splits"
        )


def _one_row_each(table: SurvivalPredictions, path: pathlib.Path, rows: str) -> dict[str, int]:
    """Patient -> row; of several models that did not see a patient, the one of the lowest fold."""
    found: dict[str, int] = {}
    for i in np.lexsort((table.fold, table.case_id)).tolist():
        case = str(table.case_id[i])
        if case in found and table.fold[found[case]] == table.fold[i]:
            raise DataError(
                f"{path}: several rows of case {case} in fold {table.fold[i]} (distill.rows={rows}): predict with "
                "data.unit=case, one row per patient"
            )
        found.setdefault(case, i)
    return found


def _check_complete(
    path: pathlib.Path, fold: int, options: ConfigDict, train: Collection[str], found: Collection[str]
) -> None:
    missing = sorted(set(train) - set(found))
    if not found or missing and not options.allow_missing:
        raise DataError(
            f"{path}: no {options.rows} prediction of {len(missing)} of the {len(train)} training patients of fold "
            f"{fold}: {_first(missing)}; predict them too, or set distill.allow_missing=True to train them on their "
            "follow-up alone"
        )


def _check_leakage(
    path: pathlib.Path,
    fold: int,
    leakage: str,
    test: Collection[str],
    trained_on: dict[int, frozenset[str]],
    used: Iterable[int],
) -> tuple[str, ...]:
    seen = {k: sorted(set(test) & trained_on[k]) for k in used}
    seen = {k: cases for k, cases in seen.items() if cases}
    if not seen:
        return ()
    if leakage == MARK:
        return (LEAKAGE_MARK,)
    text = "; ".join(f"teacher of fold {k}: {len(cases)} of {len(test)} ({_first(cases)})" for k, cases in seen.items())
    raise DataError(
        f"{path}: the teacher trained on patients that fold {fold} is tested on: {text}. Use distill.rows=same_fold "
        "with the same splits, a teacher cross-fitted inside every training part ({fold} in distill.table), or "
        "distill.leakage=mark to train anyway and have every number marked"
    )


def _first(cases: Sequence[str], count: int = 5) -> str:
    return ", ".join(cases[:count]) + (", ..." if len(cases) > count else "")
