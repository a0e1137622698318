"""What happens to every class: confusion matrix, precision, recall, F1, one-vs-rest AUROC, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

from histokd_jax.evals import bootstrap as bs
from histokd_jax.evals.classification import auroc, checked, confusion_matrix, diagonal, ratio
from histokd_jax.evals.predictions import Predictions

RATES = ("precision", "recall", "f1", "auroc")


def per_class_report(labels: np.ndarray, probs: np.ndarray, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Precision, recall, F1, one-vs-rest AUROC and support of every class.

    Args:
      labels: [n] int.
      probs: [n, C] float.
      weights: [..., n] multiplicities, or None.

    Returns:
      "precision", "recall", "f1", "auroc", "support" -> [..., C] float64. NaN where undefined; F1 is 0 for a class that
      occurs but is never predicted.

    Raises:
      ValueError: as `classification.classification_metrics`.
    """
    labels, probs, weights = checked(labels, probs, weights)
    confusion = confusion_matrix(labels, probs.argmax(axis=1), probs.shape[1], weights)
    right, support, predicted = diagonal(confusion), confusion.sum(-1), confusion.sum(-2)
    areas = [auroc(labels == c, probs[:, c], weights) for c in range(probs.shape[1])]
    return {
        "precision": ratio(right, predicted),
        "recall": ratio(right, support),
        "f1": ratio(2 * right, support + predicted),
        "auroc": np.stack(areas, axis=-1),
        "support": support,
    }


def summarise_classes(rows: Predictions, drawn: bs.Resamples, level: float) -> dict[str, Any]:
    """Confusion matrix and report of every class of one mode, all folds pooled.

    Args:
      rows: labelled predictions of one mode.
      drawn: resamples of their patients.
      level: coverage of the intervals.

    Returns:
      {"confusion": [C, C] counts, rows are true classes, "per_class": {"support": [C], rate: {"value": [C], "ci":
      [C, 2]}}}.
    """
    confusion = confusion_matrix(rows.label, rows.probs.argmax(axis=1), rows.num_classes)
    whole, resampled = (per_class_report(rows.label, rows.probs, weights) for weights in (None, drawn.weights))
    report: dict[str, Any] = {"support": whole["support"].astype(int)}
    for name in RATES:
        intervals = [
            bs.percentile_interval(resampled[name][:, c], level=level, reason=drawn.reason)
            for c in range(rows.num_classes)
        ]
        report[name] = {"value": whole[name], "ci": [[interval.low, interval.high] for interval in intervals]}
    return {"confusion": confusion.astype(int), "per_class": report}
