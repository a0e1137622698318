"""Structure of embeddings without labels: principal components, and clusters of More From Less (A8)."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """The settings of A8.

    Attributes:
      neighbours: of UMAP (2 components, minimum distance 0).
      min_samples, min_size: of HDBSCAN, with leaf selection.
      seed: of UMAP, which then runs on one thread.
    """

    neighbours: int = 15
    min_samples: int = 100
    min_size: int = 200
    seed: int = 0


class NotInstalledError(ValueError):
    """An optional library is missing; the message names the extra."""


def principal_components(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components.

    Args:
      features: [n, D], n >= 2.

    Returns:
      ([n, 2] float64 scores; of each component the entry of its direction that is largest in size is positive,
      [2] shares of the variance). Missing components (D = 1) are 0.
    """
    centred = np.asarray(features, np.float64) - np.mean(features, axis=0, dtype=np.float64)
    # The smaller of the two Gram matrices: at most D x D, or n x n for few patches.
    scores, variance = np.zeros((len(centred), 2)), np.zeros(2)
    total = (centred**2).sum()
    if not total:
        return scores, variance
    if centred.shape[1] <= len(centred):
        values, directions = np.linalg.eigh(centred.T @ centred)
    else:
        values, left = np.linalg.eigh(centred @ centred.T)
        directions = centred.T @ left / np.sqrt(np.maximum(values, np.finfo(float).tiny))
    for i, column in enumerate(np.argsort(-values)[:2]):
        direction = directions[:, column]
        direction = direction * np.sign(direction[np.argmax(np.abs(direction))])
        scores[:, i], variance[i] = centred @ direction, max(values[column], 0.0) / total
    return scores, variance


def require_umap() -> Any:
    """The module umap.

    Raises:
      NotInstalledError: it is not there; names the extra.
    """
    try:
        return importlib.import_module("umap")
    except ImportError as error:
        raise NotInstalledError(
            f"--clusters needs UMAP ({error}): pip install 'histokd_jax[clusters]'. Without it there is the picture of "
            "principal components, which is always made"
        ) from error


def cluster(features: np.ndarray, label: np.ndarray, options: ClusterOptions) -> dict[str, Any]:
    """UMAP to two dimensions, then HDBSCAN on the points.

    Args:
      features: [n, D] finite.
      label: [n] int classes, only to describe the clusters.
      options: see `ClusterOptions`.

    Returns:
      "points" [n, 2], "cluster" [n] (-1: noise), "n_labels" (distinct labels, noise counted as one, A8),
      "n_clusters", "share_assigned", "adjusted_rand" of the assigned points against the classes (None: none assigned).

    Raises:
      NotInstalledError: without UMAP.
      ValueError: fewer patches than the settings need; says which.
    """
    n = len(features)
    least = max(options.min_samples + 1, options.min_size, options.neighbours + 1)
    if min(options.neighbours, options.min_samples) < 1 or options.min_size < 2:
        raise ValueError(f"{options}: expected at least 1 neighbour and sample, and clusters of at least 2")
    if n < least:
        raise ValueError(
            f"--clusters: {n} patches are fewer than the {least} that the settings need (--cluster-neighbours "
            f"{options.neighbours}, --cluster-min-samples {options.min_samples}, --cluster-min-size "
            f"{options.min_size}); give smaller ones, which are recorded"
        )
    umap = require_umap()
    from sklearn.cluster import HDBSCAN
    from sklearn.metrics import adjusted_rand_score

    reducer = umap.UMAP(n_components=2, n_neighbors=options.neighbours, min_dist=0.0, random_state=options.seed)
    points = np.asarray(reducer.fit_transform(features), np.float64)
    # scikit-learn counts the point itself, the package hdbscan, which A8 means, does not.
    density = HDBSCAN(
        min_cluster_size=options.min_size,
        min_samples=options.min_samples + 1,
        cluster_selection_method="leaf",
        copy=True,
    )
    found = density.fit_predict(points)
    assigned = found >= 0
    agreement = float(adjusted_rand_score(label[assigned], found[assigned])) if assigned.any() else None
    return {
        "points": points,
        "cluster": found,
        "n_labels": len(np.unique(found)),
        "n_clusters": len(np.unique(found[assigned])),
        "share_assigned": float(assigned.mean()),
        "adjusted_rand": agreement,
    }
