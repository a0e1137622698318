"""Initial memories: spherical k-means on the patches of each class, by the untrained encoder (specification 4)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def spherical_kmeans(vectors: np.ndarray, n: int, iterations: int = 20) -> np.ndarray:
    """Centres of k-means by cosine.

    The first n vectors are the initial centres, so they should come in random order. A centre without vectors keeps its
    place.

    Args:
      vectors: [m, S] float unit vectors, m >= n.
      n: number of centres.
      iterations: passes over the vectors.

    Returns:
      [n, S] float32 unit vectors.

    Raises:
      ValueError: fewer vectors than centres.
    """
    if len(vectors) < n:
        raise ValueError(
            f"k-means of {n} codes needs as many patches, a class has {len(vectors)}: lower model.codes, or use "
            "memory.init = 'random'"
        )
    vectors = np.asarray(vectors, np.float64)
    centres = _unit(vectors[:n])
    for _ in range(iterations):
        nearest = np.argmax(vectors @ centres.T, axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, vectors)
        # Vectors that cancel out leave their centre where it is, as if it had none.
        used = np.linalg.norm(sums, axis=1) > 1e-12
        centres[used] = _unit(sums[used])
    return centres.astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class Pool:
    """A uniform random sample, of bounded size, of the patches of one class.

    Every patch draws a number from the seed, its slide and its place, and those with the smallest numbers are kept, in
    that order: the sample does not depend on how slides were packed.

    Args:
      size: most patches that are kept.
      seed: of the numbers.
    """

    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed
        self._priority, self._vectors = np.zeros(0), np.zeros((0, 0), np.float32)

    def add(self, slide: int, positions: np.ndarray, vectors: np.ndarray) -> None:
        """Offers all patches of a slide.

        Args:
          slide: number of the slide.
          positions: [m] int, index of each patch within its bag: all of 0..m-1.
          vectors: [m, S].
        """
        numbers = np.random.default_rng([self._seed, slide]).random(len(positions))[positions]
        priority = np.concatenate([self._priority, numbers])
        kept = np.argsort(priority, kind="stable")[: self._size]
        known = self._vectors if len(self._vectors) else np.zeros((0, vectors.shape[1]), np.float32)
        self._priority, self._vectors = priority[kept], np.concatenate([known, vectors])[kept]

    @property
    def vectors(self) -> np.ndarray:
        """[m, S] float32 what is kept, in random order."""
        return self._vectors


def class_pools(
    steps: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]], size: int, seed: int
) -> tuple[Pool, Pool]:
    """Samples of the patches of class 0 and of class 1.

    Args:
      steps: of each step (vectors [N, S], segment ids [N], positions [N], slide_index [slots], label [slots]).
      size: most patches per class.
      seed: of the samples.
    """
    pools = Pool(size, seed), Pool(size, seed)
    for vectors, segments, positions, slides, labels in steps:
        for slot in np.flatnonzero(slides >= 0):
            mine = segments == slot + 1
            pools[int(labels[slot])].add(int(slides[slot]), positions[mine], vectors[mine])
    return pools
