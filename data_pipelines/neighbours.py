"""Spatial neighbours of patches: the lists from which graph networks make their edges (MoMKD specification, section 2).

A list depends on the coordinates alone: ties are broken by (y, x), so that it is the same whatever order the patches
are stored in.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from data_pipelines.errors import DataError

# More candidates than neighbours: on a grid the last ring is then complete, and ties in it can be seen.
_SPARE = 13


def neighbour_lists(coords: np.ndarray, k: int) -> np.ndarray:
    """The k nearest other patches of every patch, by Euclidean distance, nearest first.

    Args:
      coords: [n, 2] integers (x, y), level-0 pixels.
      k: neighbours per patch, at least 1.

    Returns:
      [n, k] int32 rows of `coords`; -1 everywhere if there are at most k patches, which have no graph.

    Raises:
      DataError: k below 1, or patches without coordinates (stored as -1).
    """
    coords = np.asarray(coords)
    if k < 1 or coords.ndim != 2 or coords.shape[1] != 2:
        raise DataError(f"neighbours need coords [n, 2] and k >= 1; got {coords.shape} and k = {k}")
    n = len(coords)
    if n <= k:
        return np.full((n, k), -1, np.int32)
    if (coords < 0).all():
        raise DataError(
            f"a slide of {n} patches has no coordinates (-1 is stored), which its neighbour graph needs: import the "
            "features again with their coordinates"
        )
    points = coords.astype(np.int64)
    candidates = cKDTree(points.astype(np.float64)).query(points, k=min(n, k + _SPARE))[1]
    out, open_end = _nearest(points, np.arange(n), candidates, k)
    for row in np.flatnonzero(open_end) if candidates.shape[1] < n else ():
        # The last ring has more members than candidates: all patches are compared.
        out[row] = _nearest(points, np.array([row]), np.arange(n)[None], k)[0][0]
    return out.astype(np.int32)


def _nearest(points: np.ndarray, rows: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """([r, k] the nearest candidates of some rows, [r] whether there may be others at the distance of the last)."""
    square = ((points[candidates] - points[rows][:, None]) ** 2).sum(axis=2)
    farthest = square.max(axis=1)
    square[candidates == rows[:, None]] = np.iinfo(np.int64).max
    x, y = points[candidates, 0], points[candidates, 1]
    order = np.lexsort((candidates, x, y, square), axis=-1)[:, :k]
    last = np.take_along_axis(square, order[:, -1:], axis=1)[:, 0]
    return np.take_along_axis(candidates, order, axis=1), last >= farthest


def neighbour_offsets(coords: np.ndarray, k: int, slide: np.ndarray | None = None) -> np.ndarray:
    """How many places further on each neighbour of a patch lies, for patches that are read one after the other.

    Offsets, unlike places, do not change when a bag is packed elsewhere.

    Args:
      coords: [n, 2] integers, in the order of reading.
      k: neighbours per patch.
      slide: [n] int number of the slide of each patch, for bags of several slides; neighbours lie on the same slide.

    Returns:
      [n, k] int32, never 0 for a neighbour; 0 where there is none.

    Raises:
      DataError: as `neighbour_lists`.
    """
    own = np.arange(len(coords), dtype=np.int32)
    out = np.zeros((len(coords), k), np.int32)
    for members in _members(own, slide):
        lists = neighbour_lists(np.asarray(coords)[members], k)
        out[members] = np.where(lists >= 0, members[lists] - members[:, None], 0)
    return out


def _members(own: np.ndarray, slide: np.ndarray | None) -> list[np.ndarray]:
    return [own] if slide is None else [own[slide == number] for number in np.unique(slide)]
