"""Maps laid over images, without a plotting library."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

_RAMP = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)
"""Dark violet to light yellow, monotone in lightness, so that it also reads in grey."""


def stretched(grid: np.ndarray, edge: int, offset: float, shown: float) -> np.ndarray:
    """A map on the pixels of its image, bilinear between the centres of its cells.

    Args:
      grid: [h, w] float.
      edge: of the square image in pixels.
      offset, shown: the square of the image that the map covers, see `maps.shown_area`.

    Returns:
      [edge, edge] float64; 0 outside the covered square.
    """
    centre = np.arange(edge) + 0.5 - offset
    rows, columns = (centre / shown * size - 0.5 for size in grid.shape)
    at = np.meshgrid(rows, columns, indexing="ij")
    values = ndimage.map_coordinates(np.asarray(grid, np.float64), at, order=1, mode="nearest")
    inside = (centre >= 0) & (centre < shown)
    return np.where(inside[:, None] & inside[None], values, 0.0)


def overlaid(image: np.ndarray, heat: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """An image with a map on top; where the map is 0 the image shows through unchanged.

    Args:
      image: [e, e, 3] uint8.
      heat: [e, e] >= 0, scaled to its own maximum.
      strength: opacity at the maximum.

    Returns:
      [e, e, 3] uint8.
    """
    share = heat / max(float(heat.max()), 1e-12)
    place = share * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    colour = _RAMP[low] + (place - low)[..., None] * (_RAMP[low + 1] - _RAMP[low])
    opacity = (strength * np.sqrt(share))[..., None]
    return np.rint((1 - opacity) * image + opacity * colour).astype(np.uint8)
