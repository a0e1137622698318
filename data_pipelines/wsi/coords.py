"""Tile coordinates of a slide, and the HDF5 files that hold them in the layout of TRIDENT; CLAM's are read, too."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines import bag, table_files
from data_pipelines.errors import DataError
from data_pipelines.importers.header import import_h5py, read_arrays, read_header

FILE_SUFFIX = "_patches.h5"


@dataclasses.dataclass(frozen=True, eq=False)
class TileGrid:
    """The tiles of one slide.

    Attributes:
      slide_id: id of the slide.
      coords: int32 [n, 2], (x, y) of the top left corners in level-0 pixels; n may be 0.
      patch_size: edge of a tile in pixels as it is to be read.
      patch_size_level0: edge of a tile in level-0 pixels.
      mpp: micrometres per pixel of the tiles, or None where the file does not say.
      magnification: nominal magnification of the tiles (10 / mpp), or None.
      level0_mpp: micrometres per level-0 pixel, or None.
      overlap: of neighbouring tiles in pixels as they are read.
      level0_width, level0_height: of the slide, or None.
      slide_file: the slide, relative to the folder of slides, with forward slashes; or None.
      rejected: reason -> number of tiles that were left out for it.
    """

    slide_id: str
    coords: np.ndarray
    patch_size: int
    patch_size_level0: int
    mpp: float | None = None
    magnification: float | None = None
    level0_mpp: float | None = None
    overlap: int = 0
    level0_width: int | None = None
    level0_height: int | None = None
    slide_file: str | None = None
    rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def overlap_level0(self) -> int:
        """Overlap of neighbouring tiles in level-0 pixels."""
        return round(self.overlap * self.patch_size_level0 / self.patch_size)

    @property
    def level0_magnification(self) -> float | None:
        """Magnification of level 0 from which TRIDENT computes `patch_size_level0`; None without a magnification."""
        if self.magnification is None:
            return None
        return self.magnification * self.patch_size_level0 / self.patch_size


def job_folder(magnification: float, patch_size: int, overlap: int) -> str:
    """Name of the folder of all slides with the same kind of tiles, e.g. "20x_256px_0px_overlap"."""
    return f"{round(magnification, 4):g}x_{patch_size}px_{overlap}px_overlap"


def coords_file(job: pathlib.Path, grid: TileGrid) -> pathlib.Path:
    """Where the coordinates of a slide lie: `job/20x_256px_0px_overlap/patches/SLIDE_patches.h5`.

    Raises:
      DataError: the slide id is no file name, or the magnification is not known.
    """
    bag.check_key(grid.slide_id, "slide_id", grid.slide_id)
    if grid.magnification is None:
        raise DataError(f"slide {grid.slide_id!r}: the magnification of the tiles is not known")
    folder = job / job_folder(grid.magnification, grid.patch_size, grid.overlap)
    return folder / "patches" / f"{grid.slide_id}{FILE_SUFFIX}"


def write_coords(path: pathlib.Path, grid: TileGrid) -> None:
    """Writes a coordinate file that TRIDENT, CLAM-style readers and `histokd embed` open; appears whole or not at all.

    Equal grids give equal bytes.

    Args:
      path: the file, see `coords_file`; missing parent folders are created.
      grid: the tiles.

    Raises:
      DataError: coordinates of another shape or type, or outside the slide; h5py is missing.
      StorageError: the disk is full or not writable.
    """
    _check(grid)
    content = io.BytesIO()
    with import_h5py().File(content, "w") as file:
        rows = max(1, min(len(grid), 4096))
        values = np.asarray(grid.coords, np.int64).reshape(-1, 2)
        data = file.create_dataset("coords", data=values, chunks=(rows, 2), maxshape=(None, 2))
        for name, value in _attributes(grid, path).items():
            data.attrs[name] = "None" if value is None else value
    table_files.write_bytes(path, content.getvalue())


def read_coords(path: pathlib.Path) -> TileGrid:
    """Reads a coordinate file of this library, of TRIDENT (also its legacy form) or of CLAM's `patches/`.

    Args:
      path: the file.

    Returns:
      The tiles; what a foreign file does not record is None.

    Raises:
      DataError: unreadable, no `coords`, coordinates that are no whole level-0 pixels, or an unknown tile size.
    """
    path = pathlib.Path(path)
    import_h5py()  # A missing library is no fault of the file.
    try:
        header = read_header(path)
        if "coords" not in header.arrays:
            raise DataError(f"there is no array 'coords'; the file holds {header.listed()}")
        coords = _whole_pixels(read_arrays(path, ["coords"])[0])
        grid = _from_attributes(path, coords, header.of("coords"))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read as tile coordinates: {error}") from error
    return grid


def _attributes(grid: TileGrid, path: pathlib.Path) -> dict[str, Any]:
    """TRIDENT's attributes, then our own."""
    return {
        "patch_size": grid.patch_size,
        "patch_size_level0": grid.patch_size_level0,
        "level0_magnification": _whole(grid.level0_magnification),
        "target_magnification": _whole(grid.magnification),
        "overlap": grid.overlap,
        "name": grid.slide_id,
        # TRIDENT records an absolute folder here; a name keeps the file equal on every machine.
        "savetodir": path.parent.parent.name,
        "level0_width": grid.level0_width,
        "level0_height": grid.level0_height,
        "mpp": grid.mpp,
        "level0_mpp": grid.level0_mpp,
        "slide_file": grid.slide_file,
        "rejected": json.dumps(dict(grid.rejected), sort_keys=True),
    }


def _whole(value: float | None) -> float | int | None:
    """Whole numbers as integers, as TRIDENT writes them."""
    return int(round(value)) if value is not None and abs(value - round(value)) < 1e-9 else value


def _check(grid: TileGrid) -> None:
    coords = np.asarray(grid.coords)
    if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iu":
        raise DataError(
            f"slide {grid.slide_id!r}: coords are {coords.dtype} {list(coords.shape)}, expected integers [n, 2]"
        )
    if grid.patch_size < 1 or grid.patch_size_level0 < 1 or not 0 <= grid.overlap < grid.patch_size:
        raise DataError(
            f"slide {grid.slide_id!r}: patch_size {grid.patch_size}, patch_size_level0 {grid.patch_size_level0}, "
            f"overlap {grid.overlap}; expected sizes of at least 1 and 0 <= overlap < patch_size"
        )
    bounds = [grid.level0_width, grid.level0_height]
    limit = np.array([np.iinfo(np.int32).max if edge is None else edge for edge in bounds])
    outside = np.flatnonzero(((coords < 0) | (coords >= limit[None])).any(axis=1))
    if outside.size:
        raise DataError(
            f"slide {grid.slide_id!r}: tile {outside[0]} at {coords[outside[0]].tolist()} lies outside the slide of "
            f"{grid.level0_width} x {grid.level0_height} pixels"
        )


def _whole_pixels(values: np.ndarray) -> np.ndarray:
    values = values[0] if values.ndim == 3 and values.shape[0] == 1 else values
    if values.size == 0:
        return np.zeros((0, 2), np.int32)
    if values.ndim != 2 or values.shape[1] != 2:
        raise DataError(f"coords have shape {list(values.shape)}, expected [n, 2]")
    limit = np.iinfo(np.int32).max
    if values.dtype.kind not in "iuf" or not ((values >= 0) & (values <= limit) & (values % 1 == 0)).all():
        raise DataError("coords are no whole numbers of level-0 pixels (negative, fractional, NaN or too large)")
    return values.astype(np.int32)


def _from_attributes(path: pathlib.Path, coords: np.ndarray, found: Mapping[str, Any]) -> TileGrid:
    known = {name: value for name, value in found.items() if value not in (None, "None")}
    size = _positive(known, "patch_size")
    if size is None:
        raise DataError(
            f"the attribute patch_size of coords is {known.get('patch_size')!r}, expected a positive number"
        )
    scale = _legacy_scale(known)
    level0 = _positive(known, "patch_size_level0") or (size * scale if scale else None)
    if level0 is None:
        raise DataError("coords record neither patch_size_level0 nor a patch_level with its downsample")
    width, height = _dimensions(known, scale)
    overlap = known.get("overlap", 0)
    name = known.get("name")
    rejected = known.get("rejected")
    return TileGrid(
        slide_id=name if isinstance(name, str) and name else path.name.removesuffix(FILE_SUFFIX).removesuffix(".h5"),
        coords=coords,
        patch_size=round(size),
        patch_size_level0=round(level0),
        mpp=_positive(known, "mpp"),
        magnification=_positive(known, "target_magnification"),
        level0_mpp=_positive(known, "level0_mpp"),
        overlap=int(overlap) if isinstance(overlap, (int, float)) else 0,
        level0_width=width,
        level0_height=height,
        slide_file=known.get("slide_file"),
        rejected=rejected if isinstance(rejected, Mapping) else {},
    )


def _legacy_scale(known: Mapping[str, Any]) -> float | None:
    """Level-0 pixels per tile pixel in the files of CLAM: the downsample of the level, times one of the user."""
    if "patch_level" not in known:
        return None
    extra = _positive(known, "custom_downsample") or 1.0
    downsample = known.get("downsample", 1.0 if known["patch_level"] == 0 else None)
    downsample = downsample[0] if isinstance(downsample, list) and downsample else downsample
    return None if downsample is None else float(downsample) * extra


def _dimensions(known: Mapping[str, Any], scale: float | None) -> tuple[int | None, int | None]:
    """Width and height of level 0; CLAM records those of the level of the tiles."""
    if _positive(known, "level0_width") and _positive(known, "level0_height"):
        return int(known["level0_width"]), int(known["level0_height"])
    level = known.get("level_dim")
    if scale and isinstance(level, list) and len(level) == 2:
        scale /= _positive(known, "custom_downsample") or 1.0
        return round(level[0] * scale), round(level[1] * scale)
    return None, None


def _positive(known: Mapping[str, Any], name: str) -> float | None:
    value = known.get(name)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return value if usable else None
