"""Tables of the probes: every encoder over seeds and folds, and its paired difference to the first one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histokd_jax.evals import ablation
from histokd_jax.evals import classification as cls
from histokd_jax.evals.predictions import Predictions
from histokd_jax.evals.summary import to_json
from histokd_jax.probe.training import Probed

METRICS = ("accuracy", "balanced_accuracy", "auroc", "macro_f1")


def _values(table: Predictions, weights: np.ndarray) -> dict[str, tuple[float, np.ndarray]]:
    """The four metrics and their resampled values; the others of `classification_metrics` would double the time."""
    decided, present = table.probs.argmax(axis=1), np.unique(table.label)

    def four(weights: np.ndarray | None) -> dict[str, np.ndarray]:
        confusion = cls.confusion_matrix(table.label, decided, table.num_classes, weights)
        return {
            "accuracy": cls.accuracy(confusion),
            "balanced_accuracy": cls.balanced_accuracy(confusion, present),
            "auroc": cls.macro_auroc(table.label, table.probs, weights),
            "macro_f1": cls.macro_f1(confusion, present),
        }

    value, resampled = four(None), four(weights)
    return {name: (float(value[name]), resampled[name]) for name in METRICS}


MEASURE = dataclasses.replace(ablation.CLASSIFICATION, names=METRICS, values=_values)


def results_table(probed: Mapping[str, Probed], bootstrap: int, unit_name: str) -> dict[str, Any]:
    """Compares encoders on the same patches, labels and folds.

    Args:
      probed: encoder -> what its probes found; the others are compared with the first.
      bootstrap: resamples.
      unit_name: what is resampled, in words (plural).

    Returns:
      See `ablation.ablation_table`; each row also has "seed_std", the sample standard deviation over seeds of the mean
      over folds (None: fewer than two seeds, or a probe that does not depend on the seed).

    Raises:
      ValueError: nothing was finished for the first encoder.
    """
    runs = {label: dict(found.runs) for label, found in probed.items()}
    reference = next(iter(runs))
    table = ablation.ablation_table(runs, reference, bootstrap=bootstrap, seed=0, measure=MEASURE)
    for row in table["rows"]:
        row["seed_std"] = seed_deviation(runs[row["setting"]], row["mode"], row["metric"])
    how = table["how"].replace("patients resampled", f"{unit_name} resampled")
    return to_json({**table, "how": how, "unit": unit_name})


def seed_deviation(runs: Mapping[tuple[int, int], Any], mode: str, metric: str) -> float | None:
    """Sample standard deviation over seeds of the mean over folds of a metric."""
    values: dict[int, list[float]] = {}
    for (seed, _), table in runs.items():
        own = table.of_mode(mode)
        if len(own):
            values.setdefault(seed, []).append(float(cls.classification_metrics(own.label, own.probs)[metric]))
    means = [np.nanmean(found) for found in values.values() if not np.isnan(found).all()]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def printed(table: Mapping[str, Any], metrics: Sequence[str] = ("accuracy", "balanced_accuracy", "auroc")) -> str:
    """The table for the terminal: one line per probe and encoder."""
    rows = {(row["mode"], row["setting"], row["metric"]): row for row in table["rows"]}
    width = max(len("encoder"), *(len(setting) for _, setting, _ in rows))
    title = "   ".join(f"{name:<22}" for name in metrics)
    lines = [f"{'probe@labels':<14} {'encoder':<{width}}  {title}   difference of {metrics[0]}"]
    for mode, setting in dict.fromkeys((mode, setting) for mode, setting, _ in rows):
        cells = [f"{_cell(rows[mode, setting, metric]):<22}" for metric in metrics]
        lines.append(
            f"{mode:<14} {setting:<{width}}  {'   '.join(cells)}   {_difference(rows[mode, setting, metrics[0]])}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _cell(row: Mapping[str, Any]) -> str:
    low, high = row["ci"]
    if row["mean"] is None:
        return "undefined"
    return f"{row['mean']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def _difference(row: Mapping[str, Any]) -> str:
    low, high = row["difference_ci"]
    if row["difference"] is None:
        return row["reason"] or "(reference)"
    return f"{row['difference']:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")
