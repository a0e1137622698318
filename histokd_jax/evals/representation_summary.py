"""Summaries of label-free runs: the joint-embedding loss per fold with a bootstrap interval. JSON-serialisable.

A loss of pre-training is comparable between runs with the same loss, batch size and number of branches only; whether a
representation is any good, only a probe can say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from histokd_jax.evals import summary as common
from histokd_jax.evals.ablation import Measure
from histokd_jax.evals.representation_predictions import RepresentationRows

FORMAT_VERSION = 1
LABELS = {"loss": "Joint-embedding loss (lower is better)"}
LOWER_IS_BETTER = frozenset({"loss"})


def summarise(
    table: RepresentationRows,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    unit: str = "patient",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Loss of every mode: per fold, mean, population standard deviation, bootstrap interval over groups.

    Rows of an incomplete last step are left out, because their loss has statistics over fewer examples.

    Args:
      table: losses of one split.
      bootstrap: resamples of groups within folds; 0 leaves the interval undefined.
      seed: of the resampling.
      unit: "patient" resamples groups, "slide" examples.
      facts: further top-level entries.

    Returns:
      {"format_version", "folds", "bootstrap": {...}, "modes": {mode: {"n_rows", "n_patients", "n_left_out",
      "per_fold_counts": [{"fold", "n"}], "metrics": {"loss": {"per_fold", "mean", "std", "ci", "reason", ...}}}},
      **facts}.

    Raises:
      ValueError: a fact with the name of an entry, or an unknown unit.
    """
    if unit not in common.UNITS:
        raise ValueError(f"unit={unit!r} is unknown; choose one of {common.UNITS}")
    how = f"{unit}s resampled within folds, losses of given steps averaged, percentile interval"
    summary = {
        "format_version": FORMAT_VERSION,
        "folds": list(table.folds),
        "bootstrap": {
            **{"resamples": bootstrap, "seed": seed, "stratified": False, "unit": unit},
            **{"level": common.LEVEL, "how": how},
        },
        "modes": {mode: _mode(table.of_mode(mode), bootstrap, seed, unit) for mode in table.modes},
    }
    clash = sorted(set(summary) & set(facts or {}))
    if clash:
        raise ValueError(f"facts must not redefine the summary's entries {clash}")
    return common.to_json({**summary, **(facts or {})})


def print_table(summary: Mapping[str, Any]) -> str:
    """Plain-text results for the terminal: one line per mode."""
    title = f"{len(summary['folds'])} fold(s); mean +- population std over folds [bootstrap 95 % CI]"
    lines = ["; ".join([*common.marks(summary), title])]
    for mode, entry in summary["modes"].items():
        row = entry["metrics"]["loss"]
        interval = "" if row["ci"][0] is None else "[" + ", ".join(common.fixed(x) for x in row["ci"]) + "]"
        spread = f"+- {common.fixed(row['std'])}" if row["n_folds"] > 1 else ""
        cells = " ".join(filter(None, [common.fixed(row["mean"]), spread, interval, row["reason"] or ""]))
        lines.append(f"{mode:<14} {LABELS['loss']:<40} {cells}")
    return "\n".join(lines) + "\n"


def _mode(rows: RepresentationRows, bootstrap: int, seed: int, unit: str) -> dict[str, Any]:
    kept = {fold: rows.where(rows.fold == fold).full_steps() for fold in rows.folds}
    per_fold = np.array([part.loss.mean() for part in kept.values()])
    low, high = _interval(list(kept.values()), bootstrap, seed, unit)
    row = {"per_fold": per_fold, **common.mean_std(per_fold), "ci": [low, high], "reason": None}
    if not bootstrap:
        row["reason"] = "no resamples"
    return {
        "n_rows": len(rows),
        "n_patients": len(np.unique(rows.case_id)),
        "n_left_out": len(rows) - sum(map(len, kept.values())),
        "per_fold_counts": [{"fold": fold, "n": len(part)} for fold, part in kept.items()],
        "metrics": {"loss": row},
    }


def _interval(parts: list[RepresentationRows], resamples: int, seed: int, unit: str) -> tuple[float, float]:
    if not resamples:
        return np.nan, np.nan
    rng, means = np.random.default_rng(seed), np.zeros(resamples)
    for part in parts:
        ids = part.case_id if unit == "patient" else part.slide_id
        _, group = np.unique(ids, return_inverse=True)
        size, total = np.bincount(group), np.bincount(group, weights=part.loss)
        drawn = rng.multinomial(len(size), np.full(len(size), 1.0 / len(size)), size=resamples)
        means += (drawn @ total) / (drawn @ size) / len(parts)
    tail = 100 * (1 - common.LEVEL) / 2
    return float(np.percentile(means, tail)), float(np.percentile(means, 100 - tail))


def _values(rows: RepresentationRows, weights: np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
    full = rows.together == rows.together.max(initial=0)
    shares = weights * full
    resampled = shares @ rows.loss / np.maximum(shares.sum(axis=1), 1e-30)
    return {"loss": (float(rows.loss[full].mean()), resampled)}


MEASURE = Measure(
    names=("loss",),
    labels=LABELS,
    lower_is_better=LOWER_IS_BETTER,
    values=_values,
    answers=lambda rows: [0] * len(rows),
    classes=lambda rows: np.zeros(len(rows), np.int64),
)
