"""Sharpness of tiles: which of them are out of focus."""

from __future__ import annotations

import numpy as np

BLUR_MPP = 1.0
"""Micrometres per pixel at which sharpness is judged: nuclei show, and little has to be read."""
_NOISE = 5.0
_MIN_TILES = 8
_FLOOR = 0.4


def sharpness(tile: np.ndarray) -> float:
    """Energy of the Laplacian of the luminance, relative to the energy of its gradient (Tenengrad).

    The ratio depends little on stain, contrast and on how much of the tile is glass: defocus takes away fine structure
    and leaves the coarse.

    Args:
      tile: uint8 [height, width, 3], at least 3 pixels wide and high.

    Returns:
      At least 0; white noise has 20, tissue in focus at 1 um per pixel 3 to 6, defocused by 2 um 0.2 to 0.4.
    """
    light = tile.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    centre = light[1:-1, 1:-1]
    laplacian = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * centre
    across, down = light[1:-1, 2:] - light[1:-1, :-2], light[2:, 1:-1] - light[:-2, 1:-1]
    gradient = (across**2 + down**2).mean() / 4
    return float((laplacian**2).mean() / (gradient + _NOISE))


def blurred(values: np.ndarray, share: float) -> np.ndarray:
    """Which tiles are out of focus.

    Args:
      values: [n] sharpness of the tiles of one slide.
      share: of the slide's typical sharpness (its upper quartile) below which a tile is blurred; 0: none is.

    Returns:
      bool [n]. Below the absolute floor of 0.4 a tile is blurred even where all are.
    """
    if share == 0 or not len(values):
        return np.zeros(len(values), bool)
    typical = np.percentile(values, 75) if len(values) >= _MIN_TILES else 0.0
    return values < max(share * typical, _FLOOR)
