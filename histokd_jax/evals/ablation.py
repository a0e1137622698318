"""The table of a sweep: every setting over folds and seeds, and its paired difference to the reference.

Estimates are means over all (seed, fold) pairs of a fold metric. Two intervals answer two questions. The bootstrap
resamples patients within folds, the same draw for every setting and seed: it covers the choice of patients, given the
trained models. The t-interval over seeds takes one difference per seed (the mean over folds): it covers the randomness
of training, given the patients. Pairs of (seed, fold) share patients and training data, so a t-interval over them
would be too narrow and is not given.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from histokd_jax.evals import bootstrap as bs
from histokd_jax.evals import summary
from histokd_jax.evals.classification import LOWER_IS_BETTER, classification_metrics
from histokd_jax.evals.predictions import Predictions, atomic_writer

Runs = Mapping[tuple[int, int], Predictions]
"""(seed, fold) -> predictions of all modes on the test part of that fold."""
HOW = (
    "estimate: mean over (seed, fold) pairs; interval: 95 % percentile bootstrap, patients resampled within folds, the "
    "same draws for every setting and seed; difference: setting - reference on the pairs that both have; t over seeds: "
    "95 % Student-t interval of one difference per seed"
)


@dataclasses.dataclass(frozen=True)
class Measure:
    """The metrics that a table compares.

    Attributes:
      names: metric names.
      labels: name -> what readers see; may hold more.
      lower_is_better: names of errors.
      values: (table, [B, n] multiplicities of its rows) -> {name: (value, [B] resampled values)}; may hold more.
      answers: table -> [n] what is known of each row (hashable), equal in all settings.
      classes: table -> [n] int; a resample of a fold that lacks one of them is drawn again.
    """

    names: tuple[str, ...]
    labels: Mapping[str, str]
    lower_is_better: frozenset[str]
    values: Callable[[Any, np.ndarray], Mapping[str, tuple[float, np.ndarray]]]
    answers: Callable[[Any], Sequence[Any]]
    classes: Callable[[Any], np.ndarray]


def _class_values(table: Predictions, weights: np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
    value = classification_metrics(table.label, table.probs)
    resampled = classification_metrics(table.label, table.probs, weights)
    return {name: (float(value[name]), resampled[name]) for name in value}


CLASSIFICATION = Measure(
    names=("auroc", "average_precision", "balanced_accuracy"),
    labels=summary.LABELS,
    lower_is_better=LOWER_IS_BETTER,
    values=_class_values,
    answers=lambda table: table.label.tolist(),
    classes=lambda table: table.label,
)


def ablation_table(
    runs: Mapping[str, Runs],
    reference: str,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    unit: str = "patient",
    measure: Measure = CLASSIFICATION,
) -> dict[str, Any]:
    """Compares settings that were trained on the same folds.

    Args:
      runs: setting -> its predictions; pairs that failed are absent.
      reference: the setting that the others are compared with.
      bootstrap: resamples.
      seed: seed of the resampling.
      unit: "patient" or "slide", see `summary.summarise`.
      measure: what is compared.

    Returns:
      {"reference", "how", "bootstrap", "unit", "rows": [{"setting", "mode", "metric", "pairs", "seeds", "mean",
      "ci", "difference", "difference_ci", "seeds_t": {...}, "verdict", "reason"}]}, JSON-able.

    Raises:
      ValueError: the reference has no predictions, or a fold holds other slides or labels in some setting.
    """
    if not runs.get(reference):
        raise ValueError(f"the reference setting {reference!r} has no predictions: nothing to compare with")
    rows = []
    modes = list(dict.fromkeys(mode for table in _tables(runs) for mode in table.modes))
    for mode in modes:
        own = {
            name: {p: t.of_mode(mode).sorted() for p, t in found.items() if mode in t.modes}
            for name, found in runs.items()
        }
        own = {name: found for name, found in own.items() if found}
        rows += _mode_rows(own, reference, mode, bootstrap, seed, unit, measure)
    order = {name: place for place, name in enumerate(runs)}
    rows.sort(key=lambda row: (modes.index(row["mode"]), measure.names.index(row["metric"]), order[row["setting"]]))
    facts = {"reference": reference, "how": HOW, "bootstrap": bootstrap, "unit": unit}
    return summary.to_json({**facts, "rows": rows})


def write_table(
    directory: pathlib.Path,
    table: Mapping[str, Any],
    facts: Mapping[str, Any],
    labels: Mapping[str, str] = summary.LABELS,
) -> list[pathlib.Path]:
    """Writes table.json (with `facts`), table.csv and table.md; returns their paths."""
    paths = [directory / f"table.{kind}" for kind in ("json", "csv", "md")]
    summary.write_summary(paths[0], {**facts, **table})
    with atomic_writer(paths[1]) as stream:
        _write_csv(stream, table)
    with atomic_writer(paths[2]) as stream:
        stream.write(markdown(table, facts, labels))
    return paths


def markdown(table: Mapping[str, Any], facts: Mapping[str, Any], labels: Mapping[str, str] = summary.LABELS) -> str:
    """The table for readers: one section per mode and metric, then what failed.

    Args:
      table: from `ablation_table`.
      facts: "title", "marks" (what must be said about the data), "failed" (name -> why), all optional.
      labels: metric -> name for readers.
    """
    marks = "".join(f" ({mark})" for mark in facts.get("marks", ()))
    lines = [f"# {facts.get('title', 'Ablations')}{marks}", "", f"{table['how']}. Reference: {table['reference']}.", ""]
    for mode, metric in dict.fromkeys((row["mode"], row["metric"]) for row in table["rows"]):
        lines += [f"## {labels[metric]}, mode {mode}", ""]
        lines += ["| setting | runs | mean [95 % CI] | difference [95 % CI] | t over seeds | reading |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_line(row) for row in table["rows"] if (row["mode"], row["metric"]) == (mode, metric)]
        lines += [""]
    if facts.get("failed"):
        lines += ["## Not finished", "", *(f"- {name}: {why}" for name, why in facts["failed"].items()), ""]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    cells = [row["setting"], str(row["pairs"]), f"{_number(row['mean'])} {_interval(row['ci'])}"]
    if row["difference"] is None:
        cells += ["", "", row["reason"] or "reference"]
    else:
        t = row["seeds_t"]
        cells += [f"{_number(row['difference'], '+')} {_interval(row['difference_ci'], '+')}"]
        cells += [_interval(t["ci"], "+") if t["reason"] is None else t["reason"], row["verdict"]]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, sign: str = "") -> str:
    return "n/a" if value is None else f"{value:{sign}.3f}"


def _interval(ends: Sequence[float | None], sign: str = "") -> str:
    return "[" + ", ".join(_number(end, sign) for end in ends) + "]"


def _write_csv(stream: Any, table: Mapping[str, Any]) -> None:
    columns = ["mode", "metric", "setting", "pairs", "seeds", "mean", "ci_low", "ci_high", "difference"]
    columns += ["difference_low", "difference_high", "t_low", "t_high", "t_n", "verdict", "reason"]
    writer = csv.writer(stream, lineterminator=os.linesep)
    writer.writerow(columns)
    for row in table["rows"]:
        t = row["seeds_t"] or {"ci": [None, None], "n": None}
        values = [row["mode"], row["metric"], row["setting"], row["pairs"], row["seeds"], row["mean"], *row["ci"]]
        values += [row["difference"], *row["difference_ci"], *t["ci"], t["n"], row["verdict"], row["reason"]]
        writer.writerow(["" if value is None else value for value in values])


def _tables(runs: Mapping[str, Runs]) -> list[Predictions]:
    return [table for found in runs.values() for table in found.values()]


def _mode_rows(runs, reference, mode, bootstrap, seed, unit, measure) -> list[dict[str, Any]]:
    weights, reason = _weights(_fold_rows(runs, mode, measure), bootstrap, seed, unit, measure)
    values = {
        name: {pair: measure.values(t, weights[pair[1]]) for pair, t in found.items()} for name, found in runs.items()
    }
    rows = []
    for name, own in values.items():
        for metric in measure.names:
            row = {"setting": name, "mode": mode, "metric": metric, "seeds": len({s for s, _ in own})}
            row |= _estimate(own, metric, reason)
            compared = name != reference and reference in values
            lower = metric in measure.lower_is_better
            row |= _difference(own, values[reference], metric, reason, lower) if compared else _NOTHING
            if name != reference and not compared:
                row["reason"] = "the reference has no such mode"
            rows.append(row)
    return rows


_NOTHING = {"difference": None, "difference_ci": [None, None], "seeds_t": None, "verdict": None}


def _fold_rows(runs: Mapping[str, Runs], mode: str, measure: Measure) -> dict[int, Predictions]:
    """fold -> its rows, checked to be the same slides and labels in every setting and seed."""
    rows: dict[int, Predictions] = {}
    for name, found in runs.items():
        for (seed, fold), table in found.items():
            first = rows.setdefault(fold, table)
            if _keys(first, measure) != _keys(table, measure):
                raise ValueError(
                    f"setting {name}, seed {seed}, fold {fold}, mode {mode}: other slides or labels than the rest of "
                    "the sweep; a paired comparison needs the same test part"
                )
    return rows


def _keys(table: Predictions, measure: Measure) -> list[tuple]:
    return list(zip(table.case_id.tolist(), table.slide_id.tolist(), measure.answers(table), strict=True))


def _weights(
    rows: Mapping[int, Predictions], resamples: int, seed: int, unit: str, measure: Measure
) -> tuple[dict[int, np.ndarray], str]:
    """fold -> [B, n] multiplicities of its rows, and why there are no intervals, if so."""
    folds = sorted(rows)
    ids = np.concatenate([rows[k].case_id if unit == "patient" else rows[k].slide_id for k in folds])
    fold = np.concatenate([np.full(len(rows[k]), k) for k in folds])
    labels = np.concatenate([measure.classes(rows[k]) for k in folds])
    drawn = bs.draw_resamples(ids, fold, labels, resamples=resamples, seed=seed)
    return {k: drawn.weights[:, fold == k] for k in folds}, drawn.reason


def _defined(values: Mapping, metric: str) -> dict[tuple[int, int], tuple[float, np.ndarray]]:
    return {pair: found[metric] for pair, found in values.items() if not np.isnan(found[metric][0])}


def _estimate(own: Mapping, metric: str, reason: str) -> dict[str, Any]:
    found = _defined(own, metric)
    if not found:
        return {"pairs": 0, "mean": np.nan, "ci": [np.nan, np.nan], "reason": "undefined in every fold"}
    samples = np.mean([s for _, s in found.values()], axis=0)
    interval = bs.percentile_interval(samples, level=summary.LEVEL, reason=reason)
    mean = float(np.mean([v for v, _ in found.values()]))
    return {"pairs": len(found), "mean": mean, "ci": [interval.low, interval.high], "reason": interval.reason or None}


def _difference(own: Mapping, other: Mapping, metric: str, reason: str, lower: bool) -> dict[str, Any]:
    mine, theirs = _defined(own, metric), _defined(other, metric)
    pairs = sorted(set(mine) & set(theirs))
    if not pairs:
        return {**_NOTHING, "reason": "no (seed, fold) in common with the reference"}
    diffs = {pair: mine[pair][0] - theirs[pair][0] for pair in pairs}
    samples = np.mean([mine[pair][1] - theirs[pair][1] for pair in pairs], axis=0)
    interval = bs.percentile_interval(samples, level=summary.LEVEL, reason=reason)
    seeds = sorted({seed for seed, _ in pairs})
    t = bs.paired_t_interval(
        [np.mean([d for (s, _), d in diffs.items() if s == seed]) for seed in seeds], level=summary.LEVEL
    )
    difference = float(np.mean(list(diffs.values())))
    return {
        "difference": difference,
        "difference_ci": [interval.low, interval.high],
        "seeds_t": {"mean": t.mean, "ci": [t.low, t.high], "p": t.p, "n": t.n, "reason": t.reason or None},
        "verdict": summary.verdict(difference, interval.low, interval.high, lower_is_better=lower),
    }
