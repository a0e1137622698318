"""Outlines of masks as polygons with holes, and their GeoJSON for QuPath."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A connected piece of a mask.

    Attributes:
      outer: int [n, 2], corners (x, y) on pixel edges, not closed; positive area by the shoelace formula.
      holes: the same with negative area.
    """

    outer: np.ndarray
    holes: tuple[np.ndarray, ...]

    @property
    def area(self) -> float:
        """Area without the holes, in square pixels."""
        return signed_area(self.outer) + sum(signed_area(ring) for ring in self.holes)


def signed_area(ring: np.ndarray) -> float:
    """Area of a ring [n, 2] by the shoelace formula; negative if it runs the other way round."""
    x, y = np.asarray(ring, np.float64).T
    return float(0.5 * np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def well_composed(mask: np.ndarray) -> np.ndarray:
    """The mask with pixels added until no two of its pixels touch at a corner only.

    The outlines of such a mask never touch themselves or each other, so that their polygons are valid.

    Args:
      mask: bool [height, width].

    Returns:
      bool [height, width].
    """
    mask = mask.copy()
    while True:
        a, b, c, d = mask[:-1, :-1], mask[:-1, 1:], mask[1:, :-1], mask[1:, 1:]
        falling, rising = a & d & ~b & ~c, b & c & ~a & ~d
        if not (falling.any() or rising.any()):
            return mask
        b |= falling
        a |= rising


def regions(mask: np.ndarray) -> list[Region]:
    """The pieces of a well-composed mask with their holes, the largest first.

    Args:
      mask: bool [height, width], see `well_composed`.

    Returns:
      One region per piece; the sum of their areas is the number of pixels of the mask.
    """
    labels, count = ndimage.label(mask)
    starts, ends, owners = _edges(labels)
    outers, holes = [None] * count, [[] for _ in range(count)]
    for ring, owner in _rings(starts, ends, owners, mask.shape[1] + 1):
        if signed_area(ring) > 0:
            outers[owner - 1] = ring
        else:
            holes[owner - 1].append(ring)
    found = [Region(outer, tuple(inner)) for outer, inner in zip(outers, holes)]
    return sorted(found, key=lambda region: -region.area)


def geojson(pieces: Sequence[Region], scale: tuple[float, float]) -> dict[str, Any]:
    """A GeoJSON feature collection that QuPath imports as annotations of the class "Tissue".

    Args:
      pieces: regions of a mask.
      scale: level-0 pixels per pixel of the mask, across and down.

    Returns:
      JSON-able; coordinates are level-0 pixels, rings are closed, outer rings and holes run in opposite senses.
    """
    features = []
    for number, piece in enumerate(pieces, 1):
        rings = [_closed(ring, scale) for ring in (piece.outer, *piece.holes)]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {
                    "objectType": "annotation",
                    "name": f"Tissue {number}",
                    "classification": {"name": "Tissue", "color": [0, 160, 80]},
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _closed(ring: np.ndarray, scale: tuple[float, float]) -> list[list[int]]:
    points = np.rint(ring * np.asarray(scale)[None]).astype(int).tolist()
    return [*points, points[0]]


def _edges(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directed pixel edges between foreground and background, the foreground on the same side of all.

    Returns:
      start and end vertices as y * (width + 1) + x, and the label of the pixel.
    """
    width = labels.shape[1] + 1
    padded = np.pad(labels, 1)
    parts = []
    # (shift of the neighbour, offset of the first corner, offset of the second), clockwise as seen with y down
    for (dy, dx), first, second in (
        ((-1, 0), (0, 0), (0, 1)),
        ((0, 1), (0, 1), (1, 1)),
        ((1, 0), (1, 1), (1, 0)),
        ((0, -1), (1, 0), (0, 0)),
    ):
        neighbour = padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        y, x = np.nonzero((labels > 0) & (neighbour == 0))
        start = (y + first[0]) * width + x + first[1]
        parts.append((start, (y + second[0]) * width + x + second[1], labels[y, x]))
    return tuple(np.concatenate(column) for column in zip(*parts))


def _rings(starts: np.ndarray, ends: np.ndarray, owners: np.ndarray, width: int) -> list[tuple[np.ndarray, int]]:
    """Chains edges to rings of corners; every vertex starts one edge at most, because the mask is well composed."""
    order = np.argsort(starts)
    starts, ends, owners = starts[order], ends[order], owners[order]
    following = np.searchsorted(starts, ends).tolist()
    seen = np.zeros(len(starts), bool)
    rings = []
    for first in range(len(starts)):
        if seen[first]:
            continue
        chain, at = [], first
        while not seen[at]:
            seen[at] = True
            chain.append(at)
            at = following[at]
        vertices = starts[chain]
        rings.append((_corners(np.stack([vertices % width, vertices // width], axis=1)), int(owners[first])))
    return rings


def _corners(points: np.ndarray) -> np.ndarray:
    """Without the points on straight stretches."""
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[(before != after).any(axis=1)]
