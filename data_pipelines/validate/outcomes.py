"""Labels and follow-up: classes, drops, and signs of a flipped censoring column."""

from __future__ import annotations

import collections
import os
from typing import Any

import numpy as np

from data_pipelines import survival, tables, text_table
from data_pipelines.tables import LabelTable, SurvivalTable
from data_pipelines.validate.findings import ERROR, NOTE, WARNING, Finding, some

_STATUS = ("vital_status", "OS_STATUS", "os_status", "status")
_DEAD, _ALIVE = {"1", "dead", "deceased", "1:deceased", "true"}, {"0", "alive", "living", "0:living", "false"}


def check_labels(labels: LabelTable, task: str, cases: set[str]) -> tuple[dict[str, Any], list[Finding]]:
    """Class counts of the cases of a dataset, and cases without a label by reason.

    Args:
      labels: of one task.
      task: its name.
      cases: case ids of the dataset.
    """
    inside = np.array([case in cases for case in labels.case_id], bool)
    value = labels.value[inside]
    counts = np.bincount(value[value >= 0], minlength=len(labels.class_names))
    without = collections.Counter(
        labels.missing[case] for case in labels.case_id if case in labels.missing and case in cases
    )
    facts = {"classes": {n: int(c) for n, c in zip(labels.class_names, counts)}, "without_label": dict(without)}
    findings = [
        Finding(ERROR, "empty_class", f"task {task}: no case of class {name!r} has slides")
        for name, count in zip(labels.class_names, counts)
        if not count
    ]
    if len(labels.class_names) < 2:
        findings.append(Finding(ERROR, "one_class", f"task {task}: the only class is {labels.class_names}"))
    for reason, count in without.items():
        findings.append(Finding(NOTE, "dropped", f"task {task}: {count} cases are dropped: {reason}"))
    return facts, findings


def check_survival(
    path: str | os.PathLike, table: SurvivalTable, cases: set[str]
) -> tuple[dict[str, Any], list[Finding]]:
    """Follow-up of the cases of a dataset; the coding is judged on the whole table, which is larger.

    Args:
      path: file of the table, which may have a column of vital status to compare with.
      table: what was read from it.
      cases: case ids of the dataset.
    """
    inside = np.array([case in cases for case in table.case_id], bool)
    time, event = table.survival
    known = np.isfinite(time)
    name = os.path.basename(path)
    other, column = _status(path, table)
    evidence = survival.censorship_evidence(
        time[known], event[known], other_event=None if other is None else other[known], other_name=column
    )
    rows = inside & known
    facts = {
        "cases_with_follow_up": int(rows.sum()),
        "cases_without_follow_up": int((inside & ~known).sum()),
        "events": int(event[rows].sum()),
        "median_months": float(np.median(time[rows])) if rows.any() else None,
        "event_fraction_of_longest_tenth": _number(evidence.late_event_fraction),
        "median_months_with_event": _number(evidence.median_event),
        "median_months_censored": _number(evidence.median_censored),
        "agreement_with_status": _number(evidence.agreement),
    }
    findings = []
    if evidence.suspicious:
        findings.append(Finding(ERROR, "censorship", evidence.message(name)))
    if rows.any() and not event[rows].any():
        findings.append(Finding(ERROR, "no_events", f"{name}: none of the {int(rows.sum())} cases has an event"))
    missing = [case for case, gone in zip(table.case_id, inside & ~known) if gone]
    if missing:
        text = f"{name}: {len(missing)} cases have no follow-up ({some(missing)}) and are not used for survival"
        findings.append(Finding(WARNING, "no_follow_up", text, tuple(missing)))
    zero = [case for case, at in zip(table.case_id, inside & (time == 0)) if at]
    if zero:
        findings.append(
            Finding(NOTE, "zero_months", f"{name}: {len(zero)} cases have 0 months of follow-up", tuple(zero))
        )
    return facts, findings


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _status(path: str | os.PathLike, table: SurvivalTable) -> tuple[np.ndarray | None, str]:
    """[n] 1 = dead, 0 = alive, NaN = unknown by the first column of vital status, and its name."""
    column = next((name for name in _STATUS if name in text_table.read_header(path)), None)
    if column is None:
        return None, ""
    rows = text_table.read_text_table(path, ("case_id", column))
    words = dict(zip(rows["case_id"], rows[column].str.casefold()))
    known = [1.0 if words[c] in _DEAD else 0.0 if words[c] in _ALIVE else np.nan for c in table.case_id]
    return np.array(known), column


def read_outcomes(
    path: str | os.PathLike, task: str | None, label_map: dict[str, int] | None
) -> tuple[LabelTable | None, SurvivalTable | None]:
    """The labels (if the table has the column `task`) and the follow-up (if it has its columns)."""
    header = set(text_table.read_header(path))
    labels = tables.read_labels(path, task, label_map=label_map) if task and task in header else None
    timed = {"time_months", "event"} <= header or {"survival_months", "censorship"} <= header
    return labels, tables.read_survival(path) if timed else None
