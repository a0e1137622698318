"""Summaries of survival predictions: per mode and metric, and what an arm bought over its control. JSON-serialisable.

Fold metrics are averaged; the spread is the *population* standard deviation over folds (G-HANet section 6). What the
data cannot give is `null` with a `reason` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histokd_jax.evals import summary as common
from histokd_jax.evals.ablation import Measure
from histokd_jax.evals.survival.concordance import harrell_c, harrell_c_resampled
from histokd_jax.evals.survival.groups import SCOPES
from histokd_jax.evals.survival.resampling import FoldMetric, c_index, pooled_c_index
from histokd_jax.evals.survival.resampling import compare as paired
from histokd_jax.evals.survival_measures import LABELS, Reference, fold_metrics, logrank_of
from histokd_jax.evals.survival_predictions import SurvivalPredictions

FORMAT_VERSION = 1
LOWER_IS_BETTER = frozenset({"ibs"})


def summarise(
    table: SurvivalPredictions,
    reference: Mapping[int, Reference],
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    unit: str = "patient",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics of every mode: per fold, mean, population standard deviation, bootstrap interval of the C-index.

    Args:
      table: predictions of one split with known follow-up.
      reference: fold -> its training part.
      bootstrap: resamples of patients within folds; 0 leaves the intervals undefined.
      seed: of the resampling.
      unit: "patient".
      facts: further top-level entries.

    Returns:
      {"format_version", "num_bins", "folds", "bootstrap": {...}, "modes": {mode: {"n_rows", "n_patients",
      "per_fold_counts": [{"fold", "n", "events"}], "metrics": {name: {"per_fold", "mean", "std", "ci", "reason", ...}},
      "pooled": {"c_index", "ci", "reason", "logrank": {scope: {"p", "statistic", "n", "deaths", "reason"}}}}},
      **facts}.
      Metrics of predicted survival are absent for a Cox head.

    Raises:
      ValueError: a row without follow-up, a fold without reference, or a fact with the name of an entry.
    """
    _check(table, reference, unit)
    summary = {
        "format_version": FORMAT_VERSION,
        "num_bins": table.num_bins,
        "folds": list(table.folds),
        "bootstrap": _how(bootstrap, seed, unit),
        "modes": {mode: _summarise_mode(table.of_mode(mode), reference, bootstrap, seed) for mode in table.modes},
    }
    clash = sorted(set(summary) & set(facts or {}))
    if clash:
        raise ValueError(f"facts must not redefine the summary's entries {clash}")
    return common.to_json({**summary, **(facts or {})})


def compare(
    ours: SurvivalPredictions,
    control: SurvivalPredictions,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    unit: str = "patient",
) -> dict[str, Any]:
    """What an arm bought over its control: paired difference of the C-index in the modes both have.

    Args:
      ours: predictions of one arm.
      control: of the other, on the same patients and folds.
      bootstrap: resamples of patients within folds, the same for both arms.
      seed: of the resampling.
      unit: "patient".

    Returns:
      {"bootstrap": {...}, "modes": {mode: {"n_patients", "metrics": {name: {"distilled", "control", "difference",
      "per_fold", "ci", "folds_t", "verdict", "reason"}}}}}.

    Raises:
      ValueError: the arms share no mode, or differ in patients, folds or follow-up.
    """
    modes = [mode for mode in ours.modes if mode in control.modes]
    if not modes:
        raise ValueError(f"the arms share no mode: {ours.modes} and {control.modes}")
    compared = {}
    for mode in modes:
        a, b = ours.of_mode(mode).sorted(), control.of_mode(mode).sorted()
        _check_paired(a, b, mode)
        compared[mode] = _compare_mode(a, b, bootstrap, seed)
    return common.to_json({"bootstrap": _how(bootstrap, seed, unit), "modes": compared})


def print_table(summary: Mapping[str, Any]) -> str:
    """Plain-text results table for the terminal.

    Args:
      summary: from `summarise`.

    Returns:
      One line per metric and mode.
    """
    title = f"{len(summary['folds'])} fold(s); mean +- population std over folds [bootstrap 95 % CI over patients]"
    lines = ["; ".join([*common.marks(summary), title])]
    lines += [f"{'mode':<12} {'metric':<30} {'mean':>6}    {'std':>5}  {'CI':<16} note"]
    for mode, entry in summary["modes"].items():
        for name, row in entry["metrics"].items():
            undefined = row["ci"][0] is None
            interval = "" if undefined else "[" + ", ".join(common.fixed(x) for x in row["ci"]) + "]"
            spread = f"+- {common.fixed(row['std']):>5}" if row["n_folds"] > 1 else " " * 8
            cells = f"{common.fixed(row['mean']):>6} {spread}  {interval:<16} {row['reason'] or ''}"
            lines.append(f"{mode:<12} {LABELS[name]:<30} {cells}".rstrip())
        test = entry["pooled"]["logrank"]["pooled"]
        p = test["reason"] if test["p"] is None else f"p = {test['p']:.3g}"
        lines.append(f"{mode:<12} log-rank of the halves by risk, all folds pooled: {p}")
    left_out = summary.get("left_out") or {}
    if left_out:
        lines.append("left out: " + ", ".join(f"{n} ({reason})" for reason, n in left_out.items()))
    return "\n".join(lines) + "\n"


def _summarise_mode(
    rows: SurvivalPredictions, reference: Mapping[int, Reference], bootstrap: int, seed: int
) -> dict[str, Any]:
    values, reasons = _fold_values(rows, reference)
    c = _c_index(rows, bootstrap, seed)
    metrics = {}
    for name, per_fold in values.items():
        if not np.isnan(per_fold).all() or reasons[name]:
            facts = {"per_fold": per_fold, **common.mean_std(per_fold)}
            metrics[name] = {**facts, "ci": [np.nan, np.nan], "reason": reasons[name] or None}
    reason = "; ".join(r for r in (reasons["c_index"], c.interval.reason) if r) or None
    facts = {"n_undefined_resamples": c.interval.n_undefined, "reason": reason}
    metrics["c_index"] |= {"ci": [c.interval.low, c.interval.high], **facts}
    return {
        "n_rows": len(rows),
        "n_patients": len(np.unique(rows.case_id)),
        "n_redrawn_resamples": c.n_redrawn,
        "per_fold_counts": [_counts(rows, k) for k in rows.folds],
        "metrics": metrics,
        "pooled": _pooled(rows, bootstrap, seed),
    }


def _fold_values(
    rows: SurvivalPredictions, reference: Mapping[int, Reference]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """metric -> values [folds]; metric -> reasons of undefined folds."""
    values: dict[str, list[float]] = {name: [] for name in LABELS}
    reasons: dict[str, list[str]] = {name: [] for name in LABELS}
    for k in rows.folds:
        for name, (value, reason) in fold_metrics(rows.where(rows.fold == k), reference[k]).items():
            values[name].append(value)
            reasons[name] += [f"fold {k}: {reason}"] if reason else []
    return {name: np.array(v) for name, v in values.items()}, {name: "; ".join(r) for name, r in reasons.items()}


def _pooled(rows: SurvivalPredictions, bootstrap: int, seed: int) -> dict[str, Any]:
    """Risks of all folds together: C-index, and the log-rank test of the halves of higher and lower risk."""
    columns = (rows.case_id, rows.fold, rows.time_months, rows.event == 1, rows.risk)
    value, interval, reason = pooled_c_index(*columns, resamples=bootstrap, seed=seed)
    facts = {"c_index": value, "ci": [interval.low, interval.high], "reason": interval.reason or reason or None}
    return {**facts, "logrank": {scope: logrank_of(rows, scope)[0] for scope in SCOPES}}


def _c_index(rows: SurvivalPredictions, resamples: int, seed: int) -> FoldMetric:
    columns = (rows.case_id, rows.fold, rows.time_months, rows.event == 1, rows.risk)
    return c_index(*columns, resamples=resamples, seed=seed, level=common.LEVEL)


def _compare_mode(a: SurvivalPredictions, b: SurvivalPredictions, bootstrap: int, seed: int) -> dict[str, Any]:
    ours, theirs = _c_index(a, bootstrap, seed), _c_index(b, bootstrap, seed)
    found = paired(ours, theirs, level=common.LEVEL)
    low, high = found.interval.low, found.interval.high
    row = {
        "distilled": ours.value,
        "control": theirs.value,
        "difference": found.difference,
        "per_fold": [ours.folds[k] - theirs.folds[k] for k in ours.folds],
        "ci": [low, high],
        "p": found.p,
        "folds_t": common.t_facts(found.fold_interval),
        "verdict": common.verdict(found.difference, low, high),
        "reason": found.interval.reason or None,
    }
    facts = {"n_patients": len(np.unique(a.case_id)), "n_redrawn_resamples": ours.n_redrawn}
    return {**facts, "metrics": {"c_index": row}}


def _counts(rows: SurvivalPredictions, fold: int) -> dict[str, Any]:
    own = rows.fold == fold
    return {"fold": fold, "n": int(own.sum()), "events": int((rows.event[own] == 1).sum())}


def _how(resamples: int, seed: int, unit: str) -> dict[str, Any]:
    how = f"{unit}s resampled within folds, fold metrics averaged, percentile interval"
    facts = {"resamples": resamples, "seed": seed, "stratified": False, "unit": unit}
    return {**facts, "level": common.LEVEL, "how": how}


def _check(table: SurvivalPredictions, reference: Mapping[int, Reference], unit: str) -> None:
    if unit != "patient":
        raise ValueError(f"unit={unit!r}: intervals of a survival task resample patients")
    if not table.known.all():
        i = int(np.argmin(table.known))
        raise ValueError(f"case {str(table.case_id[i])!r} (row {i}) has no follow-up; metrics need it for every row")
    absent = sorted(set(table.folds) - set(reference))
    if absent:
        raise ValueError(f"folds {absent} have no follow-up of their training part, which the metrics need")


def _check_paired(a: SurvivalPredictions, b: SurvivalPredictions, mode: str) -> None:
    unmatched: Sequence[tuple] = sorted(set(_answers(a)) ^ set(_answers(b)))
    if unmatched:
        raise ValueError(
            f"mode {mode!r}: {len(unmatched)} rows (case, fold, time, event) occur in one arm only, e.g. "
            f"{unmatched[0]}; a paired comparison needs both arms on the same folds and follow-up"
        )


def _answers(rows: SurvivalPredictions) -> list[tuple]:
    columns = (rows.case_id, rows.fold, rows.time_months, rows.event)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _measured(rows: SurvivalPredictions, weights: np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
    time, event = rows.time_months, rows.event == 1
    value = harrell_c(rows.risk, time, event).value
    return {"c_index": (value, harrell_c_resampled(rows.risk, time, event, weights))}


MEASURE = Measure(
    names=("c_index",),
    labels=LABELS,
    lower_is_better=LOWER_IS_BETTER,
    values=_measured,
    answers=_answers,
    classes=lambda rows: rows.event,
)
