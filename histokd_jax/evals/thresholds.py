"""Two classes decided at a threshold chosen on validation, beside the arg-max (MoMKD specification, section 7)."""

from __future__ import annotations

from typing import Any

import numpy as np

from histokd_jax.evals import classification
from histokd_jax.evals.predictions import Predictions

VAL_F1 = "val_f1"
CHOICES = ("", VAL_F1)
"""Values of `eval.threshold`: the arg-max alone, or the threshold of the largest F1 on validation as well."""
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "f1", "precision", "recall", "specificity")
FREE_OF_THRESHOLDS = ("auroc", "average_precision")


def best_f1_threshold(labels: np.ndarray, prob: np.ndarray) -> float:
    """The threshold whose decisions `prob >= threshold` have the largest F1; the lowest of equals.

    Args:
      labels: [n] int in {0, 1}, at least one 1.
      prob: [n] float, probability of class 1.

    Returns:
      One of the probabilities.

    Raises:
      ValueError: without positives, where F1 is undefined.
    """
    positive = np.asarray(labels) == 1
    if not positive.any():
        raise ValueError("the threshold of the largest F1 needs positives in the validation part; there are none")
    candidates = np.unique(prob)
    chosen = np.asarray(prob)[None, :] >= candidates[:, None]
    hits = (chosen & positive[None, :]).sum(axis=1)
    return float(candidates[np.argmax(2 * hits / (chosen.sum(axis=1) + positive.sum()))])


def metrics_at(labels: np.ndarray, prob: np.ndarray, threshold: float) -> dict[str, float]:
    """`METRICS` of the decisions `prob >= threshold`.

    Args:
      labels: [n] int in {0, 1}.
      prob: [n] float, probability of class 1.
      threshold: of the decision.
    """
    decided = np.eye(2)[(np.asarray(prob) >= threshold).astype(int)]
    found = classification.classification_metrics(labels, decided)
    return {name: float(found[name]) for name in METRICS}


def report(val: Predictions, test: Predictions) -> dict[str, Any]:
    """Test metrics of every mode and fold, twice: at the arg-max, and at the threshold chosen on validation.

    Args:
      val: predictions of the validation parts.
      test: predictions of the test parts, of the same folds and modes.

    Returns:
      mode -> {"thresholds": per fold, "free", "arg_max", "val_f1": {metric: {"per_fold", "mean", "sample_std"}}}; the
      standard deviation has the divisor n - 1 and is null for one fold.
    """
    return {mode: _of_mode(val.of_mode(mode), test.of_mode(mode)) for mode in test.modes}


def _of_mode(val: Predictions, test: Predictions) -> dict[str, Any]:
    rows: dict[str, list[dict[str, float]]] = {"free": [], "arg_max": [], VAL_F1: []}
    thresholds = []
    for fold in test.folds:
        own, chosen = test.fold == fold, val.fold == fold
        labels, probs = test.label[own], test.probs[own]
        thresholds.append(best_f1_threshold(val.label[chosen], val.probs[chosen, 1]))
        plain = classification.classification_metrics(labels, probs)
        rows["free"].append({name: float(plain[name]) for name in FREE_OF_THRESHOLDS})
        rows["arg_max"].append({name: float(plain[name]) for name in METRICS})
        rows[VAL_F1].append(metrics_at(labels, probs[:, 1], thresholds[-1]))
    return {"thresholds": thresholds, **{name: _over_folds(found) for name, found in rows.items()}}


def _over_folds(found: list[dict[str, float]]) -> dict[str, Any]:
    out = {}
    for name in found[0]:
        values = [_number(row[name]) for row in found]
        known = [value for value in values if value is not None]
        out[name] = {
            "per_fold": values,
            "mean": float(np.mean(known)) if known else None,
            "sample_std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        }
    return out


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
