"""Summaries of prediction tables: per mode and metric, and what distillation bought. JSON-serialisable throughout.

Mean and *population* standard deviation are over folds (mkd.md section 8). An undefined number is `null` with a
`reason` beside it, never 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histokd_jax.evals import bootstrap as bs
from histokd_jax.evals.classification import (
    LOWER_IS_BETTER,
    classification_metrics,
    metric_names,
    undefined_reason,
)
from histokd_jax.evals.per_class import summarise_classes
from histokd_jax.evals.predictions import UNLABELLED, Predictions, atomic_writer

FORMAT_VERSION = 1
LEVEL = 0.95
UNITS = ("patient", "slide")
SIMULATED = {"bags": "simulated bags", "pairs": "simulated images"}
"""What a simulation made, by `data_kind` of a run (absent: bags)."""
MARKS = {"simulated": SIMULATED["bags"], "patient_overlap": "within one patient, across sections"}
LABELS = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1 (positive class)",
    "precision": "Precision",
    "recall": "Recall (sensitivity)",
    "specificity": "Specificity",
    "cohen_kappa": "Cohen's kappa",
    "macro_f1": "Macro F1",
    "weighted_f1": "Weighted F1",
    "quadratic_kappa": "Quadratic-weighted kappa",
    "brier": "Brier score (lower is better)",
}


@dataclasses.dataclass(frozen=True)
class _Resampling:
    resamples: int
    seed: int
    stratified: bool
    unit: str

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {UNITS}, got {self.unit!r}")

    def draw(self, rows: Predictions) -> bs.Resamples:
        ids = rows.case_id if self.unit == "patient" else rows.slide_id
        options = {"resamples": self.resamples, "seed": self.seed, "stratified": self.stratified}
        return bs.draw_resamples(ids, rows.fold, rows.label, **options)

    def facts(self) -> dict[str, Any]:
        how = f"{self.unit}s resampled within folds, fold metrics averaged, percentile interval"
        return {**dataclasses.asdict(self), "level": LEVEL, "how": how}


def metric_label(name: str, num_classes: int) -> str:
    """Name of a metric for readers, e.g. "AUROC (macro one-vs-rest)" with more than two classes."""
    macro = num_classes > 2 and name in ("auroc", "average_precision")
    return LABELS[name] + (" (macro one-vs-rest)" if macro else "")


def summarise(
    table: Predictions,
    *,
    num_classes: int,
    bootstrap: int = 2000,
    seed: int = 0,
    stratified: bool = False,
    unit: str = "patient",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics of every mode: per fold, mean, population standard deviation, bootstrap interval.

    Args:
      table: labelled predictions of one split.
      num_classes: C; must match the table.
      bootstrap: resamples of patients within folds; 0 leaves the intervals undefined.
      seed: seed of the resampling.
      stratified: resample within (fold, class).
      unit: what is resampled: "patient" (all slides of a patient together) or "slide". Slides of one patient are not
        independent, so "slide" is only for data of a single patient, and its intervals are too narrow.
      facts: extra top-level entries, e.g. {"simulated": True, "task": "ER"}.

    Returns:
      {"format_version", "num_classes", "folds", "bootstrap": {...}, "modes": {mode: {"n_rows", "n_patients",
      "per_fold_counts": [{"fold", "n", "per_class"}], "metrics": {name: {"per_fold", "mean", "std", "ci", "reason",
      ...}}}}, **facts}. The interval `ci` is of the mean over folds; for more than two classes see also `per_class`.

    Raises:
      ValueError: if the class counts differ, a row has no label, or a fact has the name of an entry.
    """
    _check_labelled(table, num_classes)
    how = _Resampling(bootstrap, seed, stratified, unit)
    summary = {
        "format_version": FORMAT_VERSION,
        "num_classes": num_classes,
        "folds": list(table.folds),
        "bootstrap": how.facts(),
        "modes": {mode: _summarise_mode(table.of_mode(mode), how) for mode in table.modes},
    }
    clash = sorted(set(summary) & set(facts or {}))
    if clash:
        raise ValueError(f"facts must not redefine the summary's entries {clash}")
    return to_json({**summary, **(facts or {})})


def compare(
    distilled: Predictions,
    control: Predictions,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    stratified: bool = False,
    unit: str = "patient",
) -> dict[str, Any]:
    """What distillation bought: paired difference (distilled - control) of every metric in the modes both have.

    The same resamples of patients are applied to both arms, so the interval is of the difference on the same patients.
    It covers the choice of patients, not the randomness of training; repeat over seeds for that
    (`bootstrap.paired_t_interval`).

    Args:
      distilled: predictions of the distilled student's run.
      control: predictions of the same student trained with every lambda at 0, on the same folds.
      bootstrap: resamples.
      seed: seed of the resampling.
      stratified: resample within (fold, class).
      unit: what is resampled: "patient" (all slides of a patient together) or "slide". Slides of one patient are not
        independent, so "slide" is only for data of a single patient, and its intervals are too narrow.

    Returns:
      {"bootstrap": {...}, "modes": {mode: {"n_patients", "metrics": {name: {"distilled", "control", "difference",
      "per_fold", "ci", "folds_t": {...}, "verdict", "reason"}}}}}.

    Raises:
      ValueError: if the arms share no mode, or differ in classes, patients, slides, folds or labels.
    """
    modes = [mode for mode in distilled.modes if mode in control.modes]
    if not modes:
        raise ValueError(f"the arms share no mode: distilled {distilled.modes}, control {control.modes}")
    _check_labelled(distilled, control.num_classes)
    how = _Resampling(bootstrap, seed, stratified, unit)
    compared = {}
    for mode in modes:
        a, b = distilled.of_mode(mode).sorted(), control.of_mode(mode).sorted()
        _check_paired(a, b, mode)
        compared[mode] = _compare_mode(a, b, how)
    return to_json({"bootstrap": how.facts(), "modes": compared})


def verdict(difference: float, low: float, high: float, *, lower_is_better: bool = False) -> str:
    """Plain words for a paired difference.

    Args:
      difference: estimate, distilled - control.
      low: lower end of its interval, NaN if undefined.
      high: upper end.
      lower_is_better: True for errors such as the Brier score.

    Returns:
      One short sentence without a full stop.
    """
    if any(math.isnan(x) for x in (difference, low, high)):
        return "no interval: nothing can be concluded"
    if low <= 0 <= high:
        return "the interval includes zero: no gain shown"
    better = (high < 0) if lower_is_better else (low > 0)
    return "the interval excludes zero: a gain" if better else "the interval excludes zero: a loss"


def marks(summary: Mapping[str, Any]) -> list[str]:
    """What must be said about the data beside every number of a summary."""
    texts = {**MARKS, "simulated": SIMULATED[summary.get("data_kind", "bags")]}
    own = [text for key, text in texts.items() if summary.get(key)]
    return own[::-1] + list(summary.get("marks", ()))


def print_table(summary: Mapping[str, Any]) -> str:
    """Plain-text results table for the terminal.

    Args:
      summary: from `summarise`.

    Returns:
      One line per metric and mode: mean +- population std over folds and bootstrap interval.
    """
    unit = summary["bootstrap"]["unit"]
    title = f"{len(summary['folds'])} fold(s); mean +- population std over folds [bootstrap 95 % CI over {unit}s]"
    lines = ["; ".join([*marks(summary), title])]
    lines += [f"{'mode':<12} {'metric':<30} {'mean':>6}    {'std':>5}  {'CI':<16} note"]
    for mode, entry in summary["modes"].items():
        for name, row in entry["metrics"].items():
            interval = "[" + ", ".join(fixed(x) for x in row["ci"]) + "]"
            spread = f"+- {fixed(row['std']):>5}" if row["n_folds"] > 1 else " " * 8
            cells = f"{fixed(row['mean']):>6} {spread}  {interval:<16} {row['reason'] or ''}"
            lines.append(f"{mode:<12} {LABELS[name]:<30} {cells}".rstrip())
    return "\n".join(lines) + "\n"


def write_summary(path: str | os.PathLike[str], summary: Mapping[str, Any]) -> pathlib.Path:
    """Write a summary as JSON, atomically; NaN becomes null.

    Args:
      path: target, e.g. RUN/summary.json.
      summary: from `summarise` or `compare`, possibly with more entries.

    Returns:
      The path.
    """
    with atomic_writer(path) as stream:
        json.dump(to_json(summary), stream, indent=1, allow_nan=False)
        stream.write("\n")
    return pathlib.Path(path)


def to_json(value: Any) -> Any:
    """The same value in plain JSON types; NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _summarise_mode(rows: Predictions, how: _Resampling) -> dict[str, Any]:
    drawn = how.draw(rows)
    samples = bs.bootstrap_fold_means(rows.label, rows.probs, rows.fold, drawn.weights)
    folds, reasons = _fold_values(rows)
    metrics = {}
    for name in metric_names(rows.num_classes):
        interval = bs.percentile_interval(samples[name], level=LEVEL, reason=drawn.reason)
        metrics[name] = {
            "per_fold": folds[name],
            **mean_std(folds[name]),
            "ci": [interval.low, interval.high],
            "n_undefined_resamples": interval.n_undefined,
            "reason": _join(reasons[name], interval.reason),
        }
    return {
        "n_rows": len(rows),
        "n_patients": len(np.unique(rows.case_id)),
        "n_redrawn_resamples": drawn.n_redrawn,
        "per_fold_counts": [_counts(rows, k) for k in rows.folds],
        "metrics": metrics,
        **(summarise_classes(rows, drawn, LEVEL) if rows.num_classes > 2 else {}),
    }


def _compare_mode(a: Predictions, b: Predictions, how: _Resampling) -> dict[str, Any]:
    drawn = how.draw(a)
    samples_a = bs.bootstrap_fold_means(a.label, a.probs, a.fold, drawn.weights)
    samples_b = bs.bootstrap_fold_means(b.label, b.probs, b.fold, drawn.weights)
    (folds_a, reasons), (folds_b, _) = _fold_values(a), _fold_values(b)
    metrics = {}
    for name in metric_names(a.num_classes):
        one_sided = np.isnan(folds_a[name]) != np.isnan(folds_b[name])
        reason = "undefined in one arm only, in some fold" if one_sided.any() else drawn.reason
        interval = bs.percentile_interval(samples_a[name] - samples_b[name], level=LEVEL, reason=reason)
        diffs = folds_a[name] - folds_b[name]
        difference = mean_std(diffs)["mean"]
        metrics[name] = {
            "distilled": mean_std(folds_a[name])["mean"],
            "control": mean_std(folds_b[name])["mean"],
            "difference": difference,
            "per_fold": diffs,
            "ci": [interval.low, interval.high],
            "folds_t": t_facts(bs.paired_t_interval(diffs, level=LEVEL)),
            "verdict": verdict(difference, interval.low, interval.high, lower_is_better=name in LOWER_IS_BETTER),
            "reason": _join(reasons[name], interval.reason),
        }
    return {"n_patients": len(np.unique(a.case_id)), "n_redrawn_resamples": drawn.n_redrawn, "metrics": metrics}


def _fold_values(rows: Predictions) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """metric -> values [folds]; metric -> reasons of undefined folds."""
    names = metric_names(rows.num_classes)
    values = {name: [] for name in names}
    reasons: dict[str, list[str]] = {name: [] for name in names}
    for k in rows.folds:
        part = rows.where(rows.fold == k)
        for name, value in classification_metrics(part.label, part.probs).items():
            values[name].append(float(value))
            reason = undefined_reason(name, part.label, part.probs)
            if reason:
                reasons[name].append(f"fold {k}: {reason}")
    return {name: np.array(v) for name, v in values.items()}, {name: "; ".join(r) for name, r in reasons.items()}


def mean_std(values: np.ndarray) -> dict[str, Any]:
    """Mean and population standard deviation of the values that are defined, and their number `n_folds`."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return {"mean": math.nan, "std": math.nan, "n_folds": 0}
    return {"mean": float(defined.mean()), "std": float(defined.std(ddof=0)), "n_folds": len(defined)}


def _counts(rows: Predictions, fold: int) -> dict[str, Any]:
    labels = rows.label[rows.fold == fold]
    return {"fold": fold, "n": len(labels), "per_class": np.bincount(labels, minlength=rows.num_classes)}


def t_facts(t: bs.PairedT) -> dict[str, Any]:
    """A t-interval as JSON types."""
    return {"mean": t.mean, "ci": [t.low, t.high], "p": t.p, "n": t.n, "reason": t.reason or None}


def _check_labelled(table: Predictions, num_classes: int) -> None:
    if table.num_classes != num_classes:
        raise ValueError(f"the predictions have {table.num_classes} classes, expected {num_classes}")
    if (table.label == UNLABELLED).any():
        i = int(np.argmax(table.label == UNLABELLED))
        raise ValueError(f"case {str(table.case_id[i])!r} (row {i}) has no label; metrics need labels for every row")


def _check_paired(a: Predictions, b: Predictions, mode: str) -> None:
    def keys(p: Predictions) -> set[tuple]:
        return set(zip(p.case_id.tolist(), p.slide_id.tolist(), p.fold.tolist(), p.label.tolist(), strict=True))

    unmatched: Sequence[tuple] = sorted(keys(a) ^ keys(b))
    if unmatched:
        raise ValueError(
            f"mode {mode!r}: {len(unmatched)} rows (case, slide, fold, label) occur in one arm only, e.g. "
            f"{unmatched[0]}; a paired comparison needs both arms on the same folds and labels"
        )


def _join(*reasons: str) -> str | None:
    return "; ".join(r for r in reasons if r) or None


def fixed(value: float | None) -> str:
    """Three decimals, or "n/a"."""
    return "n/a" if value is None or math.isnan(value) else f"{value:.3f}"
