"""Opens whole-slide images with OpenSlide and reads square tiles of any size from any pyramid."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError

_MPP_RANGE = (0.01, 50.0)
"""Plausible micrometres per pixel. TIFF writers that know no resolution record 72 or 96 dpi: 353 or 265 um."""
_MPP_KEYS = (("openslide.mpp-x", "openslide.mpp-y"), ("aperio.MPP", "aperio.MPP"))
_POWER_KEYS = ("openslide.objective-power", "aperio.AppMag", "hamamatsu.SourceLens")
_UM_PER_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0}
_OVERVIEW_BLOCK = 512


class MissingLibrary(DataError):
    """OpenSlide or Pillow is not installed: no fault of any slide."""


class SlideFile:
    """An open slide; a context manager. Pickled by its path, so that a worker process opens it again.

    Reading is thread-safe: one object may serve several reader threads.

    Attributes:
      path: the file.
      dimensions: (width, height) of level 0 in pixels.
      level_dimensions: (width, height) of every level, finest first.
      level_downsamples: level-0 pixels per pixel of every level.
      properties: what OpenSlide reports, text by name.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self._handle = _open(self.path)
        self.dimensions: tuple[int, int] = tuple(self._handle.dimensions)
        self.level_dimensions = tuple(tuple(size) for size in self._handle.level_dimensions)
        self.level_downsamples = tuple(float(scale) for scale in self._handle.level_downsamples)
        self.properties: Mapping[str, str] = dict(self._handle.properties)

    def __enter__(self) -> SlideFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_slide, (self.path,)

    def close(self) -> None:
        """Closes the file; the slide cannot be read any more."""
        self._handle.close()

    @property
    def mpp_xy(self) -> tuple[float, float] | None:
        """Micrometres per level-0 pixel across and down, or None where the slide does not record them."""
        return mpp_of(self.properties)

    @property
    def mpp(self) -> float | None:
        """Micrometres per level-0 pixel, the mean of both directions; None where the slide does not record it."""
        both = self.mpp_xy
        return None if both is None else (both[0] + both[1]) / 2

    @property
    def objective_power(self) -> float | None:
        """Nominal magnification of the objective, or None."""
        found = (_number(self.properties.get(key)) for key in _POWER_KEYS)
        return next((value for value in found if value is not None), None)

    def read_rgb(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Any:
        """A region over a white background.

        Args:
          location: (x, y) of its top left corner in level-0 pixels.
          level: number of the level.
          size: (width, height) in pixels of the level; what lies outside the slide is white.

        Returns:
          PIL image, RGB. Opaque pixels are those that OpenSlide returns.

        Raises:
          DataError: the region cannot be decoded.
        """
        import openslide

        try:
            region = self._handle.read_region(location, level, size)
        except (openslide.OpenSlideError, ValueError, OSError) as error:
            raise DataError(
                f"{self.path}: level {level} cannot be read at x {location[0]}, y {location[1]}: {error}; the file is "
                f"damaged, restore it from a copy"
            ) from error
        return _over_white(region)


def open_slide(path: str | pathlib.Path) -> SlideFile:
    """Opens a whole-slide image.

    Args:
      path: svs, tiff, ndpi, mrxs, scn, bif, DICOM, ... whatever OpenSlide reads.

    Returns:
      The slide; close it, or use it in a `with` statement.

    Raises:
      DataError: the file is missing, empty, damaged or of no format that OpenSlide reads.
      MissingLibrary: OpenSlide is not installed.
    """
    return SlideFile(path)


def read_tile(slide: SlideFile, location_level0: Sequence[int], size_level0: int, out_px: int) -> np.ndarray:
    """Reads a square tile, from the level that fits best.

    A level that holds the tile in `out_px` pixels is returned as it is; otherwise the next finer level is reduced with
    an antialiasing (bicubic, support scaled) filter.

    Args:
      slide: an open slide.
      location_level0: (x, y) of the top left corner in level-0 pixels.
      size_level0: edge in level-0 pixels.
      out_px: edge of the result in pixels.

    Returns:
      uint8 [out_px, out_px, 3], RGB over white.

    Raises:
      DataError: the region cannot be decoded.
    """
    level, edge = choose_level(slide.level_downsamples, size_level0, out_px)
    location = (int(location_level0[0]), int(location_level0[1]))
    if round(edge) == out_px:
        return np.array(slide.read_rgb(location, level, (out_px, out_px)))
    pixels = math.ceil(edge - 1e-6)
    region = slide.read_rgb(location, level, (pixels, pixels))
    limit = min(edge, float(pixels))
    return np.array(region.resize((out_px, out_px), _pil().Resampling.BICUBIC, box=(0.0, 0.0, limit, limit)))


def choose_level(downsamples: Sequence[float], size_level0: int, out_px: int) -> tuple[int, float]:
    """The level from which to read a tile, and the edge of the tile in its pixels.

    Args:
      downsamples: of the levels, finest first.
      size_level0: edge in level-0 pixels.
      out_px: edge wanted.

    Returns:
      A level on which the tile has `out_px` pixels to the nearest pixel, if there is one; else the coarsest level that
      is finer than wanted; else (the tile must be magnified) level 0. And the edge there, not rounded.
    """
    edges = [size_level0 / scale for scale in downsamples]
    exact = [level for level, edge in enumerate(edges) if round(edge) == out_px]
    finer = [level for level, edge in enumerate(edges) if edge > out_px]
    level = exact[0] if exact else (finer[-1] if finer else 0)
    return level, edges[level]


def read_overview(slide: SlideFile, downsample: float) -> np.ndarray:
    """The whole slide reduced, read block by block so that a slide without a small level also fits into memory.

    Args:
      slide: an open slide.
      downsample: level-0 pixels per pixel of the result; rounded so that the result has whole pixels.

    Returns:
      uint8 [height, width, 3]; every pixel is the mean of what it covers.

    Raises:
      DataError: a region cannot be decoded.
    """
    width, height = (max(1, round(edge / downsample)) for edge in slide.dimensions)
    finer = [level for level, scale in enumerate(slide.level_downsamples) if scale <= downsample * 1.001]
    level = finer[-1] if finer else 0
    result = np.empty((height, width, 3), np.uint8)
    for y in range(0, height, _OVERVIEW_BLOCK):
        for x in range(0, width, _OVERVIEW_BLOCK):
            block = result[y : y + _OVERVIEW_BLOCK, x : x + _OVERVIEW_BLOCK]
            block[:] = _overview_block(slide, level, (x, y), block.shape[1::-1], (width, height))
    return result


def _overview_block(
    slide: SlideFile, level: int, start: tuple[int, int], size: tuple[int, int], whole: tuple[int, int]
) -> np.ndarray:
    """One block of an overview; `start`, `size`, `whole` in pixels of the overview."""
    scales = [edge / count for edge, count in zip(slide.level_dimensions[level], whole)]
    first = [at * scale for at, scale in zip(start, scales)]
    last = [(at + count) * scale for at, count, scale in zip(start, size, scales)]
    corner = [math.floor(value + 1e-6) for value in first]
    pixels = [max(1, math.ceil(b - 1e-6) - a) for a, b in zip(corner, last)]
    location = tuple(round(value * slide.level_downsamples[level]) for value in corner)
    region = slide.read_rgb(location, level, tuple(pixels))
    box = (*(max(0.0, a - c) for a, c in zip(first, corner)), *(min(b - c, p) for b, c, p in zip(last, corner, pixels)))
    return np.asarray(region.resize(size, _pil().Resampling.BOX, box=box))


def mpp_of(properties: Mapping[str, str]) -> tuple[float, float] | None:
    """Micrometres per pixel in x and y by the properties of a slide; None where no plausible value is recorded.

    Args:
      properties: as OpenSlide reports them.

    Returns:
      The first of: OpenSlide's own values, Aperio's, the resolution tags of the TIFF.
    """
    for keys in _MPP_KEYS:
        values = [_number(properties.get(key)) for key in keys]
        if all(value is not None and _MPP_RANGE[0] <= value <= _MPP_RANGE[1] for value in values):
            return values[0], values[1]
    return _tiff_mpp(properties)


def _tiff_mpp(properties: Mapping[str, str]) -> tuple[float, float] | None:
    unit = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", "").casefold())
    density = [_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
    if unit is None or None in density:
        return None
    values = [unit / value for value in density]
    return (values[0], values[1]) if all(_MPP_RANGE[0] <= value <= _MPP_RANGE[1] for value in values) else None


def import_openslide() -> Any:
    """The module openslide.

    Raises:
      MissingLibrary: it, or the C library that it needs, or Pillow is not installed.
    """
    try:
        import openslide
        import PIL.Image  # noqa: F401
    except (ImportError, OSError) as error:
        raise MissingLibrary(
            f"whole-slide images need OpenSlide and Pillow, which are not installed ({error}): pip install "
            f"'histokd_jax[wsi]'"
        ) from error
    return openslide


def _open(path: pathlib.Path) -> Any:
    openslide = import_openslide()
    if not path.is_file():
        raise DataError(f"{path}: there is no such slide file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the slide file is empty (zero bytes); copy it again")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise DataError(
            f"{path}: no whole-slide format that OpenSlide reads (svs, tiled pyramidal tiff, ndpi, mrxs, scn, bif, "
            f"DICOM), or the file is damaged"
        ) from error
    except (openslide.OpenSlideError, OSError, ValueError) as error:
        reason = str(error).replace(f"Reading {path}: ", "")
        raise DataError(f"{path}: OpenSlide cannot open it: {reason}; the file is damaged or incomplete") from error


def _over_white(region: Any) -> Any:
    if region.mode == "RGB":
        return region
    alpha = region.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return region.convert("RGB")
    white = _pil().new("RGB", region.size, "white")
    white.paste(region, mask=alpha)
    return white


def _pil() -> Any:
    from PIL import Image

    return Image


def _number(text: str | None) -> float | None:
    """A positive finite number from a property, or None."""
    try:
        value = float(str(text).replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
