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
from histokd_jax.evals.bootstrap import Resamples
from histokd_jax.evals.survival.concordance import harrell_c, harrell_c_resampled
from histokd_jax.evals.survival.groups import SCOPES
from histokd_jax.evals.survival.resampling import FoldMetric, draw_patients, fold_metric, pooled_c_index
from histokd_jax.evals.survival.resampling import compare as paired
from histokd_jax.evals.survival_measures import LABELS, Reference, fold_metrics, logrank_of, metric_of
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
    """Metrics of every mode: per fold, mean, population standard deviation, bootstrap interval.

    Training parts (weights of censoring, time bins) and evaluation times stay as they are in every resample. One in
    which a metric is undefined, e.g. because nobody drawn died before the first evaluation time, is left out of the
    interval of that metric and counted.

    Args:
      table: predictions of one split with known follow-up.
      reference: fold -> its training part.
      bootstrap: resamples of patients within folds; 0 leaves the intervals undefined.
      seed: of the resampling.
      unit: "patient".
      facts: further top-level entries.

    Returns:
      {"format_version", "num_bins", "folds", "bootstrap": {...}, "modes": {mode: {"n_rows", "n_patients",
      "per_fold_counts": [{"fold", "n", "events"}], "metrics": {name: {"per_fold", "mean", "std", "ci",
      "n_undefined_resamples", "reason", ...}},
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
    reference: Mapping[int, Reference] | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    unit: str = "patient",
) -> dict[str, Any]:
    """What an arm bought over its control: paired differences in the modes both have.

    Args:
      ours: predictions of one arm.
      control: of the other, on the same patients and folds.
      reference: fold -> its training part, equal for both; None compares Harrell's C-index only.
      bootstrap: resamples of patients within folds, the same for both arms.
      seed: of the resampling.
      unit: "patient".

    Returns:
      {"bootstrap": {...}, "modes": {mode: {"n_patients", "metrics": {name: {"distilled", "control", "difference",
      "per_fold", "ci", "n_undefined_resamples", "p", "folds_t", "verdict", "reason"}}}}}. The Brier score is absent
      where an arm predicts no survival.

    Raises:
      ValueError: the arms share no mode, or differ in patients, folds or follow-up, or a fold has no reference.
    """
    modes = [mode for mode in ours.modes if mode in control.modes]
    if not modes:
        raise ValueError(f"the arms share no mode: {ours.modes} and {control.modes}")
    compared = {}
    for mode in modes:
        a, b = ours.of_mode(mode).sorted(), control.of_mode(mode).sorted()
        _check_paired(a, b, mode)
        if reference is not None:
            _check_references(a, reference)
        compared[mode] = _compare_mode(a, b, reference, bootstrap, seed)
    return common.to_json({"bootstrap": _how(bootstrap, seed, unit), "modes": compared})


def print_table(summary: Mapping[str, Any]) -> str:
    """Plain-text results table for the terminal.

    Args:
      summary: from `summarise`.

    Returns:
      One line per metric and mode.
    """
    resamples = summary["bootstrap"]["resamples"]
    title = f"{len(summary['folds'])} fold(s); mean +- population std over folds [95 % CI, {resamples} bootstrap "
    title += "resamples of patients]"
    lines = ["; ".join([*common.marks(summary), title])]
    lines += [f"{'mode':<12} {'metric':<30} {'mean':>6}    {'std':>5}  {'CI':<16} note"]
    for mode, entry in summary["modes"].items():
        for name, row in entry["metrics"].items():
            undefined = row["ci"][0] is None
            interval = "" if undefined else "[" + ", ".join(common.fixed(x) for x in row["ci"]) + "]"
            spread = f"+- {common.fixed(row['std']):>5}" if row["n_folds"] > 1 else " " * 8
            cells = f"{common.fixed(row['mean']):>6} {spread}  {interval:<16} {remark(row)}"
            lines.append(f"{mode:<12} {LABELS[name]:<30} {cells}".rstrip())
        test = entry["pooled"]["logrank"]["pooled"]
        p = test["reason"] if test["p"] is None else f"p = {test['p']:.3g}"
        lines.append(f"{mode:<12} log-rank of the halves by risk, all folds pooled: {p}")
    left_out = summary.get("left_out") or {}
    if left_out:
        lines.append("left out: " + ", ".join(f"{n} ({reason})" for reason, n in left_out.items()))
    return "\n".join(lines) + "\n"


def remark(row: Mapping[str, Any]) -> str:
    """What must be said of a metric or difference: why a fold or its interval is undefined, and what was left out.

    Args:
      row: a metric of `summarise` or of `compare`.
    """
    said = [row["reason"]] if row["reason"] else []
    left_out = row.get("n_undefined_resamples")
    if left_out and row["ci"][0] is not None:
        said.append(f"undefined in {left_out} resamples, which the interval leaves out")
    return "; ".join(said)


def _summarise_mode(
    rows: SurvivalPredictions, reference: Mapping[int, Reference], bootstrap: int, seed: int
) -> dict[str, Any]:
    values, reasons = _fold_values(rows, reference)
    drawn, metrics = _draw(rows, bootstrap, seed), {}
    for name, per_fold in values.items():
        if np.isnan(per_fold).all() and not reasons[name]:
            continue
        interval = _metric(rows, reference, name, drawn).interval
        reason = "; ".join(r for r in (reasons[name], interval.reason) if r) or None
        facts = {"n_undefined_resamples": interval.n_undefined, "reason": reason}
        ends = [interval.low, interval.high]
        metrics[name] = {"per_fold": per_fold, **common.mean_std(per_fold), "ci": ends, **facts}
    return {
        "n_rows": len(rows),
        "n_patients": len(np.unique(rows.case_id)),
        "n_redrawn_resamples": drawn.n_redrawn,
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


def _draw(rows: SurvivalPredictions, resamples: int, seed: int) -> Resamples:
    return draw_patients(rows.case_id, rows.fold, rows.event == 1, resamples=resamples, seed=seed)


def _metric(
    rows: SurvivalPredictions, reference: Mapping[int, Reference] | None, name: str, drawn: Resamples
) -> FoldMetric:
    return fold_metric(metric_of(name, rows, reference), rows.fold, drawn, level=common.LEVEL)


def _compare_mode(
    a: SurvivalPredictions,
    b: SurvivalPredictions,
    reference: Mapping[int, Reference] | None,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    # Equal patients, folds and events, hence the same draw for both.
    drawn = _draw(a, bootstrap, seed)
    names = [name for name in LABELS if name != "ibs" or (a.num_bins and b.num_bins)]
    metrics = {}
    for name in names if reference is not None else ("c_index",):
        ours, theirs = (_metric(rows, reference, name, drawn) for rows in (a, b))
        metrics[name] = _difference(ours, theirs, lower_is_better=name in LOWER_IS_BETTER)
    facts = {"n_patients": len(np.unique(a.case_id)), "n_redrawn_resamples": drawn.n_redrawn}
    return {**facts, "metrics": metrics}


def _difference(ours: FoldMetric, theirs: FoldMetric, *, lower_is_better: bool) -> dict[str, Any]:
    found = paired(ours, theirs, level=common.LEVEL)
    low, high = found.interval.low, found.interval.high
    return {
        "distilled": ours.value,
        "control": theirs.value,
        "difference": found.difference,
        "per_fold": [ours.folds[k] - theirs.folds[k] for k in ours.folds],
        "ci": [low, high],
        "n_undefined_resamples": found.interval.n_undefined,
        "p": found.p,
        "folds_t": common.t_facts(found.fold_interval),
        "verdict": common.verdict(found.difference, low, high, lower_is_better=lower_is_better),
        "reason": found.interval.reason or None,
    }


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
    _check_references(table, reference)


def _check_references(table: SurvivalPredictions, reference: Mapping[int, Reference]) -> None:
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
