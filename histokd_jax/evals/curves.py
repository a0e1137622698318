"""ROC, precision-recall and calibration curves with bootstrap bands, on fixed grids (NumPy, float64)."""

from __future__ import annotations

import dataclasses

import numpy as np

GRID = np.linspace(0.0, 1.0, 101)


@dataclasses.dataclass(frozen=True)
class Band:
    """A curve on `GRID` with a pointwise band.

    Attributes:
      x: [101] abscissa.
      mean: [101] mean over folds (and, with more than two classes, over one-vs-rest curves).
      low: [101] lower end of the pointwise band, NaN without resamples.
      high: [101] upper end.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Reliability curve.

    Attributes:
      confidence: [k] mean predicted probability in each non-empty bin.
      observed: [k] observed frequency in that bin.
      low: [k] lower end of the 95 % Wilson interval of `observed`.
      high: [k] upper end.
      count: [k] int, rows in the bin.
      ece: expected calibration error: mean over rows of |observed - confidence| of their bin.
    """

    confidence: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray
    ece: float


def roc_on_grid(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """True-positive rate at each false-positive rate of `GRID`, linear between thresholds.

    Args:
      positive: [n] bool.
      score: [n] float.
      weights: [n] multiplicities.

    Returns:
      [101] float64; NaN throughout if a class has no weight. Vertical segments take their upper end, except that the
      curve starts at (0, 0).
    """
    true_pos, false_pos = _cumulative(positive, score, weights)
    if not true_pos[-1] or not false_pos[-1]:
        return np.full(len(GRID), np.nan)
    tpr, fpr = np.r_[0.0, true_pos / true_pos[-1]], np.r_[0.0, false_pos / false_pos[-1]]
    # At a repeated x np.interp returns the last y, i.e. the upper end of a vertical segment.
    curve = np.interp(GRID, fpr, tpr)
    curve[0] = 0.0
    return curve


def precision_on_grid(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Precision of the strictest threshold whose recall reaches each value of `GRID` (no interpolation).

    Args:
      positive: [n] bool.
      score: [n] float.
      weights: [n] multiplicities.

    Returns:
      [101] float64; NaN throughout without positives.
    """
    true_pos, false_pos = _cumulative(positive, score, weights)
    if not true_pos[-1]:
        return np.full(len(GRID), np.nan)
    reached = np.searchsorted(true_pos / true_pos[-1], GRID - 1e-12)
    # Recall 0 is reached by selecting nothing; the first threshold with a positive is shown instead.
    reached[0] = reached[1]
    return true_pos[reached] / (true_pos[reached] + false_pos[reached])


def curve_band(
    curve, labels: np.ndarray, probs: np.ndarray, fold: np.ndarray, weights: np.ndarray, *, level: float = 0.95
) -> Band:
    """Fold-averaged curve with a pointwise percentile band.

    Args:
      curve: `roc_on_grid` or `precision_on_grid`.
      labels: [n] int.
      probs: [n, C] float.
      fold: [n] int.
      weights: [B, n] resamples (may be [0, n]: no band).
      level: coverage of the band at each abscissa.

    Returns:
      Mean curve and band; curves of folds where a class is absent are left out.
    """
    mean = _fold_mean_curve(curve, labels, probs, fold, np.ones(len(labels)))
    resampled = np.array([_fold_mean_curve(curve, labels, probs, fold, row) for row in weights])
    resampled = resampled[~np.isnan(resampled).any(axis=1)] if len(resampled) else resampled
    if not len(resampled):
        nothing = np.full(len(GRID), np.nan)
        return Band(GRID, mean, nothing, nothing)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Band(GRID, mean, low, high)


def calibration(labels: np.ndarray, probs: np.ndarray, *, bins: int = 10) -> Calibration:
    """Reliability curve in bins of equal width, rows of all folds pooled.

    Args:
      labels: [n] int.
      probs: [n, C] float. Two classes: probability of class 1 against its frequency. More: probability of the
        predicted class against the accuracy (top-label calibration).
      bins: number of bins of [0, 1].

    Returns:
      The curve over non-empty bins, and the expected calibration error.
    """
    if probs.shape[1] == 2:
        score, hit = probs[:, 1], labels == 1
    else:
        score, hit = probs.max(axis=1), probs.argmax(axis=1) == labels
    index = np.minimum((score * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    used = count > 0
    confidence = np.bincount(index, score, bins)[used] / count[used]
    observed = np.bincount(index, hit, bins)[used] / count[used]
    low, high = _wilson(observed, count[used])
    ece = float((count[used] * np.abs(observed - confidence)).sum() / len(labels))
    return Calibration(confidence, observed, low, high, count[used], ece)


def _fold_mean_curve(curve, labels: np.ndarray, probs: np.ndarray, fold: np.ndarray, weights: np.ndarray) -> np.ndarray:
    curves = []
    for k in np.unique(fold):
        rows = fold == k
        present = np.unique(labels[rows])
        if len(present) < 2:
            continue
        classes = [1] if probs.shape[1] == 2 else present
        curves += [np.mean([curve(labels[rows] == c, probs[rows, c], weights[rows]) for c in classes], axis=0)]
    return np.mean(curves, axis=0) if curves else np.full(len(GRID), np.nan)


def _cumulative(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives at each distinct threshold that selects anything, from strict to lenient."""
    order = np.argsort(-score, kind="stable")
    order = order[weights[order] > 0]
    ordered, hit, weight = score[order], positive[order], weights[order]
    last = np.r_[ordered[1:] != ordered[:-1], True]
    return np.cumsum(weight * hit)[last], np.cumsum(weight * ~hit)[last]


def _wilson(share: np.ndarray, count: np.ndarray, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half
