"""Classification metrics in NumPy, float64, with case weights, so that a bootstrap is one vectorised call.

Every metric takes `weights [..., n]` (default: all 1) and returns `[...]`; with the counts of B resamples as weights
[B, n] it returns the B resampled values at once. An undefined value is NaN, never 0; `undefined_reason` says why.

Definitions follow mkd.md section 8: class decision by arg-max (ties go to the lower class, so a binary probability of
exactly 0.5 is class 0). With more than two classes AUROC and average precision are macro averages of one-vs-rest over
the classes that occur in `labels`, as are balanced accuracy (macro recall) and macro F1.
"""

from __future__ import annotations

import numpy as np

BINARY_METRICS = (
    "auroc",
    "average_precision",
    "accuracy",
    "balanced_accuracy",
    "f1",
    "precision",
    "recall",
    "specificity",
    "cohen_kappa",
    "macro_f1",
    "brier",
)
MULTICLASS_METRICS = (
    "auroc",
    "average_precision",
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "weighted_f1",
    "cohen_kappa",
    "quadratic_kappa",
    "brier",
)
LOWER_IS_BETTER = frozenset({"brier"})


def metric_names(num_classes: int) -> tuple[str, ...]:
    """Names of the metrics that `classification_metrics` returns, in the order of the tables.

    Args:
      num_classes: C >= 2.

    Returns:
      `BINARY_METRICS` for C = 2, otherwise `MULTICLASS_METRICS`.
    """
    return BINARY_METRICS if num_classes == 2 else MULTICLASS_METRICS


def classification_metrics(
    labels: np.ndarray, probs: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """All metrics of one set of predictions.

    Args:
      labels: [n] int, class index in [0, C).
      probs: [n, C] float, class probabilities.
      weights: [..., n] non-negative multiplicities of the rows; None counts each row once.

    Returns:
      metric name -> [...] float64, NaN where undefined.

    Raises:
      ValueError: on empty input, wrong shapes, labels outside [0, C) or non-finite probabilities.
    """
    labels, probs, weights = checked(labels, probs, weights)
    num_classes = probs.shape[1]
    confusion = confusion_matrix(labels, probs.argmax(axis=1), num_classes, weights)
    present = np.unique(labels)
    shared = {
        "auroc": macro_auroc(labels, probs, weights),
        "average_precision": macro_average_precision(labels, probs, weights),
        "accuracy": accuracy(confusion),
        "balanced_accuracy": balanced_accuracy(confusion, present),
        "macro_f1": macro_f1(confusion, present),
        "weighted_f1": weighted_f1(confusion),
        "quadratic_kappa": quadratic_kappa(confusion),
        "cohen_kappa": cohen_kappa(confusion),
        "brier": brier(labels, probs, weights),
    }
    if num_classes == 2:
        shared |= {
            "precision": precision(confusion),
            "recall": recall(confusion),
            "specificity": specificity(confusion),
            "f1": f1(confusion),
        }
    return {name: np.asarray(shared[name], np.float64) for name in metric_names(num_classes)}


def auroc(positive: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties count one half.

    Args:
      positive: [n] bool.
      score: [n] float, larger = more likely positive.
      weights: [..., n] multiplicities, or None.

    Returns:
      [...] float64; NaN where positives or negatives have no weight.
    """
    pos, neg = _tie_group_weights(positive, score, weights)
    below = np.cumsum(neg, axis=-1) - neg
    return ratio((pos * (below + 0.5 * neg)).sum(-1), pos.sum(-1) * neg.sum(-1))


def average_precision(positive: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision: sum over thresholds of (recall step) * precision, without interpolation.

    Args:
      positive: [n] bool.
      score: [n] float, larger = more likely positive.
      weights: [..., n] multiplicities, or None.

    Returns:
      [...] float64; NaN where positives have no weight.
    """
    pos, neg = (w[..., ::-1] for w in _tie_group_weights(positive, score, weights))
    true_pos, selected = np.cumsum(pos, axis=-1), np.cumsum(pos + neg, axis=-1)
    # Thresholds above every drawn row select nothing; they add no recall, so any finite precision will do.
    at_threshold = true_pos / np.where(selected > 0, selected, 1.0)
    return ratio((pos * at_threshold).sum(-1), pos.sum(-1))


def macro_auroc(labels: np.ndarray, probs: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """AUROC of class 1 for two classes, otherwise the one-vs-rest mean over the classes that occur in `labels`.

    Args:
      labels: [n] int.
      probs: [n, C] float.
      weights: [..., n] multiplicities, or None.

    Returns:
      [...] float64; NaN where any averaged class, or the rest, has no weight.
    """
    return _one_vs_rest(auroc, labels, probs, weights)


def macro_average_precision(labels: np.ndarray, probs: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision of class 1 for two classes, otherwise the one-vs-rest mean, as in `macro_auroc`."""
    return _one_vs_rest(average_precision, labels, probs, weights)


def confusion_matrix(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Weighted counts of (true class, predicted class).

    Args:
      labels: [n] int.
      predicted: [n] int.
      num_classes: C.
      weights: [..., n] multiplicities, or None.

    Returns:
      [..., C, C] float64; rows are true classes.
    """
    weights = _weights(weights, len(labels))
    cell = np.asarray(labels) * num_classes + np.asarray(predicted)
    one_hot = np.zeros((len(cell), num_classes * num_classes))
    one_hot[np.arange(len(cell)), cell] = 1.0
    return (weights @ one_hot).reshape(*weights.shape[:-1], num_classes, num_classes)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Share of correct decisions. `confusion` [..., C, C] -> [...]."""
    return ratio(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def balanced_accuracy(confusion: np.ndarray, present: np.ndarray | None = None) -> np.ndarray:
    """Mean recall over the classes `present` (default: all). [..., C, C] -> [...]; NaN if one has no cases."""
    recalls = ratio(diagonal(confusion), confusion.sum(-1))
    return (recalls if present is None else recalls[..., present]).mean(-1)


def macro_f1(confusion: np.ndarray, present: np.ndarray | None = None) -> np.ndarray:
    """Mean of the per-class F1 over the classes `present` (default: all). [..., C, C] -> [...]."""
    scores = ratio(2 * diagonal(confusion), confusion.sum(-1) + confusion.sum(-2))
    return (scores if present is None else scores[..., present]).mean(-1)


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean of the per-class F1 weighted by the true cases of each class (cocofnet_hmkd.md, section 11).

    A class without true cases has weight 0; one with cases that is never predicted has F1 0.

    Args:
      confusion: [..., C, C].

    Returns:
      [...]; NaN without cases.
    """
    support = confusion.sum(-1)
    scores = ratio(2 * diagonal(confusion), support + confusion.sum(-2))
    return ratio((np.where(support > 0, scores, 0.0) * support).sum(-1), support.sum(-1))


def quadratic_kappa(confusion: np.ndarray) -> np.ndarray:
    """Agreement of ordered classes beyond chance: disagreements count with the square of their distance.

    1 - sum w O / sum w E with w = (i - j)^2, O the confusion matrix and E that of independent margins (Cohen 1968).

    Args:
      confusion: [..., C, C], classes in their order.

    Returns:
      [...]; NaN where all cases, true and predicted, are in one class.
    """
    classes = np.arange(confusion.shape[-1])
    weight = (classes[:, None] - classes) ** 2
    total = confusion.sum((-2, -1))[..., None, None]
    expected = ratio(confusion.sum(-1)[..., :, None] * confusion.sum(-2)[..., None, :], total)
    return 1.0 - ratio((weight * confusion).sum((-2, -1)), (weight * expected).sum((-2, -1)))


def precision(confusion: np.ndarray) -> np.ndarray:
    """TP / (TP + FP) of class 1. [..., 2, 2] -> [...]; NaN if nothing is predicted positive."""
    return ratio(confusion[..., 1, 1], confusion[..., :, 1].sum(-1))


def recall(confusion: np.ndarray) -> np.ndarray:
    """TP / (TP + FN) of class 1. [..., 2, 2] -> [...]; NaN without positives."""
    return ratio(confusion[..., 1, 1], confusion[..., 1, :].sum(-1))


def specificity(confusion: np.ndarray) -> np.ndarray:
    """TN / (TN + FP). [..., 2, 2] -> [...]; NaN without negatives."""
    return ratio(confusion[..., 0, 0], confusion[..., 0, :].sum(-1))


def f1(confusion: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN) of class 1. [..., 2, 2] -> [...]; NaN with no true and no predicted positive."""
    return ratio(2 * confusion[..., 1, 1], confusion[..., 1, :].sum(-1) + confusion[..., :, 1].sum(-1))


def cohen_kappa(confusion: np.ndarray) -> np.ndarray:
    """Agreement beyond chance, (p_o - p_e) / (1 - p_e), unweighted. [..., C, C] -> [...]; NaN where p_e = 1."""
    total = confusion.sum((-2, -1))
    expected = ratio((confusion.sum(-1) * confusion.sum(-2)).sum(-1), total * total)
    return ratio(accuracy(confusion) - expected, 1.0 - expected)


def brier(labels: np.ndarray, probs: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Brier score: mean squared error of the probabilities; lower is better.

    Args:
      labels: [n] int.
      probs: [n, C] float.
      weights: [..., n] multiplicities, or None.

    Returns:
      [...] float64: mean (p_1 - y)^2 for two classes, otherwise the mean over rows of sum_c (p_c - y_c)^2.
    """
    weights = _weights(weights, len(labels))
    error = ((probs - np.eye(probs.shape[1])[labels]) ** 2).sum(-1)
    # Two classes: both columns hold the same squared error; the usual definition counts it once.
    error = error / 2 if probs.shape[1] == 2 else error
    return ratio(weights @ error, weights.sum(-1))


def undefined_reason(name: str, labels: np.ndarray, probs: np.ndarray) -> str:
    """Why a metric is NaN on these predictions, in plain words.

    Args:
      name: metric name.
      labels: [n] int.
      probs: [n, C] float.

    Returns:
      The reason; for a macro metric that is defined but leaves out absent classes, a note that says so; else "".
    """
    labels, probs, _ = checked(labels, probs, None)
    counts = np.bincount(labels, minlength=probs.shape[1])
    if np.isnan(classification_metrics(labels, probs)[name]):
        if np.count_nonzero(counts) == 1:
            return f"only class {int(counts.argmax())} occurs ({len(labels)} rows)"
        return "no row is predicted positive" if name == "precision" else "0 / 0"
    absent = np.flatnonzero(counts == 0)
    if len(absent) and name in ("auroc", "average_precision", "balanced_accuracy", "macro_f1"):
        return f"mean over the {np.count_nonzero(counts)} classes that occur; absent: {absent.tolist()}"
    return ""


def checked(
    labels: np.ndarray, probs: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels [n] int64, probs [n, C] float64 and weights [..., n].

    Raises:
      ValueError: wrong shapes, labels outside [0, C), or probabilities that are not finite.
    """
    labels, probs = np.asarray(labels), np.asarray(probs, np.float64)
    if probs.ndim != 2 or probs.shape[1] < 2 or labels.shape != probs.shape[:1] or not len(labels):
        raise ValueError(f"expected labels [n] and probs [n, C >= 2] with n >= 1, got {labels.shape} and {probs.shape}")
    if not np.isfinite(probs).all():
        raise ValueError(f"probs row {int(np.argmax(~np.isfinite(probs).all(1)))} is not finite")
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(f"labels must be in [0, {probs.shape[1]}), got {labels.min()}..{labels.max()}")
    return labels.astype(np.int64), probs, _weights(weights, len(labels))


def _weights(weights: np.ndarray | None, n: int) -> np.ndarray:
    return np.ones(n) if weights is None else np.asarray(weights, np.float64)


def _tie_group_weights(
    positive: np.ndarray, score: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at each distinct score, ascending: two arrays [..., groups]."""
    order = np.argsort(score, kind="stable")
    ordered = np.asarray(score)[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    weights = _weights(weights, len(order))[..., order]
    positive = np.asarray(positive, np.float64)[order]
    return (
        np.add.reduceat(weights * positive, starts, axis=-1),
        np.add.reduceat(weights * (1.0 - positive), starts, axis=-1),
    )


def _one_vs_rest(metric, labels: np.ndarray, probs: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    if probs.shape[1] == 2:
        return metric(labels == 1, probs[:, 1], weights)
    return np.mean([metric(labels == c, probs[:, c], weights) for c in np.unique(labels)], axis=0)


def diagonal(confusion: np.ndarray) -> np.ndarray:
    """[..., C, C] -> [..., C]."""
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    out = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out
