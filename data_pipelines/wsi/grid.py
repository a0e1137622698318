"""Where the tiles of a slide lie, and which of them hold tissue; arithmetic on numbers and masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.wsi.tissue import TissueMap

REASONS = ("background", "ink", "black", "blurred", "edge")
"""Why a tile is left out; "edge": it holds tissue, but reaches beyond the slide."""
_MAX_INK = 0.1


@dataclasses.dataclass(frozen=True)
class TileOptions:
    """The tiles that are wanted.

    Attributes:
      mpp: micrometres per pixel of the tiles.
      patch_size: edge in pixels.
      overlap: of neighbouring tiles in pixels.
      min_tissue: share of a tile that must be tissue.
      mpp_tolerance: a level (or a slide) whose pixels differ by no more than this share is taken as it is.
      sharpness: a tile whose sharpness is below this share of the slide's typical one is blurred; 0 keeps all.
    """

    mpp: float = 0.5
    patch_size: int = 256
    overlap: int = 0
    min_tissue: float = 0.5
    mpp_tolerance: float = 0.02
    sharpness: float = 0.2

    def __post_init__(self):
        checks = {
            "mpp": 0.01 <= self.mpp <= 50,
            "patch_size": 8 <= self.patch_size <= 16384,
            "overlap": 0 <= self.overlap < self.patch_size,
            "min_tissue": 0 < self.min_tissue <= 1,
            "mpp_tolerance": 0 <= self.mpp_tolerance < 0.5,
            "sharpness": 0 <= self.sharpness < 1,
        }
        for name, good in checks.items():
            if not good:
                raise DataError(
                    f"tile option {name} is {getattr(self, name)}; expected mpp in [0.01, 50], patch_size in "
                    f"[8, 16384], 0 <= overlap < patch_size, 0 < min_tissue <= 1, mpp_tolerance in [0, 0.5), "
                    f"sharpness in [0, 1)"
                )

    @property
    def magnification(self) -> float:
        """Nominal magnification, 10 / mpp."""
        return 10 / self.mpp


def size_level0(options: TileOptions, level0_mpp: float, downsamples: Sequence[float]) -> int:
    """Edge of a tile in level-0 pixels.

    Args:
      options: of the tiles.
      level0_mpp: micrometres per level-0 pixel.
      downsamples: of the levels.

    Returns:
      The edge for exactly the wanted mpp; or, if a level is within the tolerance of it, the edge for which the tile is
      read from that level without resampling.

    Raises:
      DataError: the slide is coarser than the tiles, by more than the tolerance.
    """
    wanted = options.mpp / level0_mpp
    nearest = min(downsamples, key=lambda scale: abs(scale / wanted - 1))
    if abs(nearest / wanted - 1) <= options.mpp_tolerance:
        wanted = nearest
    if wanted < 1 and round(options.patch_size * wanted) < options.patch_size:
        raise DataError(
            f"the slide has {level0_mpp:.4g} um per pixel and the tiles are to have {options.mpp:g}: they would be "
            f"magnified; choose a larger --target-mpp, or raise --mpp-tolerance"
        )
    return max(1, round(options.patch_size * wanted))


def positions(edge: int, size: int, step: int) -> np.ndarray:
    """Starts of tiles along one edge of a slide: multiples of the step, the last one may reach beyond the edge.

    Args:
      edge: of the slide in level-0 pixels.
      size: of a tile.
      step: size less the overlap.

    Returns:
      int64 [n]; together the tiles cover the edge.
    """
    count = 1 if edge <= size else math.ceil((edge - size) / step) + 1
    return np.arange(count, dtype=np.int64) * step


def coverage(mask: np.ndarray, corners: np.ndarray, size: int, dimensions: tuple[int, int]) -> np.ndarray:
    """Share of every tile that a mask covers, exact also where tiles cut through pixels of the mask.

    Args:
      mask: bool [height, width], stretched over the whole slide.
      corners: int [n, 2], (x, y) in level-0 pixels.
      size: edge of a tile in level-0 pixels.
      dimensions: (width, height) of the slide in level-0 pixels.

    Returns:
      float64 [n] in [0, 1]; what lies beyond the slide is not covered.
    """
    height, width = mask.shape
    summed = np.zeros((height + 1, width + 1))
    summed[1:, 1:] = mask.cumsum(0, dtype=np.float64).cumsum(1)
    scale = np.array([width / dimensions[0], height / dimensions[1]])
    low = corners * scale[None]
    high = np.minimum((corners + size) * scale[None], [[width, height]])
    area = (
        _integral(summed, high[:, 0], high[:, 1])
        - _integral(summed, low[:, 0], high[:, 1])
        - _integral(summed, high[:, 0], low[:, 1])
        + _integral(summed, low[:, 0], low[:, 1])
    )
    return np.clip(area / (size**2 * scale[0] * scale[1]), 0, 1)


def _integral(summed: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The integral of the mask from (0, 0) to (x, y): linear within a pixel in either direction."""
    column = np.minimum(x.astype(int), summed.shape[1] - 2)
    row = np.minimum(y.astype(int), summed.shape[0] - 2)
    u, v = x - column, y - row
    upper = summed[row, column] * (1 - u) + summed[row, column + 1] * u
    lower = summed[row + 1, column] * (1 - u) + summed[row + 1, column + 1] * u
    return upper * (1 - v) + lower * v


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """All positions of the grid, judged by the masks.

    Attributes:
      coords: int32 [n, 2], (x, y) in level-0 pixels, row by row.
      verdict: [n] of text, "" for tiles to keep.
    """

    coords: np.ndarray
    verdict: np.ndarray

    def kept(self) -> np.ndarray:
        """int32 [m, 2], the tiles to keep."""
        return self.coords[self.verdict == ""]

    def rejected(self) -> dict[str, int]:
        """Number of tiles by reason, for all of `REASONS`."""
        return {reason: int((self.verdict == reason).sum()) for reason in REASONS}


def candidates(found: TissueMap, dimensions: tuple[int, int], size: int, overlap: int, min_tissue: float) -> Candidates:
    """Judges every position of the grid by what covers it.

    Args:
      found: the masks.
      dimensions: (width, height) of the slide in level-0 pixels.
      size: edge of a tile in level-0 pixels.
      overlap: of tiles in level-0 pixels.
      min_tissue: share of a tile that must be tissue.

    Returns:
      One verdict per position. A tile that has too little tissue only because ink or black covers it counts as such.
    """
    across, down = (positions(edge, size, size - overlap) for edge in dimensions)
    corners = np.stack(np.meshgrid(across, down), axis=-1).reshape(-1, 2)
    tissue, ink, black = (coverage(mask, corners, size, dimensions) for mask in (found.tissue, found.ink, found.black))
    verdict = np.full(len(corners), "", dtype="<U10")
    beyond = (corners + size > np.asarray(dimensions)[None]).any(axis=1)
    verdict[beyond] = "edge"
    verdict[ink > _MAX_INK] = "ink"
    verdict[tissue + ink + black < min_tissue] = "background"
    short = (tissue < min_tissue) & (verdict != "background")
    verdict[short] = np.where(ink[short] >= black[short], "ink", "black")
    return Candidates(corners.astype(np.int32), verdict)
