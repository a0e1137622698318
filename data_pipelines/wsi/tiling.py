"""Tiles one slide: the function that a command, a worker process or a Beam worker calls for every slide."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipelines import table_files
from data_pipelines.errors import DataError
from data_pipelines.wsi import contours, focus, grid, preview, tissue
from data_pipelines.wsi.coords import FILE_SUFFIX, TileGrid, coords_file, job_folder, write_coords
from data_pipelines.wsi.grid import Candidates, TileOptions
from data_pipelines.wsi.slide import MissingLibrary, SlideFile, open_slide, read_overview, read_tile
from data_pipelines.wsi.sources import SlideSource
from data_pipelines.wsi.tissue import NoTissue, TissueMap, TissueOptions

CONTOURS, PREVIEWS = "contours_geojson", "previews"
_MAX_OVERVIEW_PIXELS = 16e6
_PREVIEW_EDGE = 1600
_MAX_ASPECT = 1.05
_TILE_SHARE = 8


@dataclasses.dataclass(frozen=True)
class TilingOptions:
    """Everything that decides the tiles of a slide.

    Attributes:
      tiles: size, overlap and thresholds of tiles.
      tissue: how tissue is found.
      mpp: micrometres per level-0 pixel of slides that do not record it; None: such slides are refused.
    """

    tiles: TileOptions = TileOptions()
    tissue: TissueOptions = TissueOptions()
    mpp: float | None = None

    def folder(self, job: pathlib.Path) -> pathlib.Path:
        """Folder of all slides with this kind of tiles."""
        return job / job_folder(self.tiles.magnification, self.tiles.patch_size, self.tiles.overlap)


@dataclasses.dataclass(frozen=True, eq=False)
class SlideTiles:
    """What was found on a slide.

    Attributes:
      tiles: the coordinates.
      pieces: outlines of the tissue in pixels of `tissue`.
      tissue: masks.
      candidates: all positions of the grid.
      row: what tiles.csv records.
      picture: uint8 [height, width, 3] for the preview.
    """

    tiles: TileGrid
    pieces: list[contours.Region]
    tissue: TissueMap
    candidates: Candidates
    row: Mapping[str, Any]
    picture: np.ndarray


def tile_slide(root: pathlib.Path, source: SlideSource, options: TilingOptions, *, threads: int = 1) -> SlideTiles:
    """Finds the tissue of a slide and its tiles.

    Args:
      root: folder of the slides.
      source: one of them.
      options: see there.
      threads: that read tiles to judge their sharpness.

    Returns:
      The tiles and what they were derived from; equal input gives equal output.

    Raises:
      NoTissue: the slide goes to quarantine, for its reason: unreadable, no mpp, pixels not square, too coarse, dark
        background, no tissue, or no tile left.
    """
    try:
        with open_slide(root / source.file) as slide:
            return _tile(slide, source, options, threads)
    except (NoTissue, MissingLibrary):
        raise
    except DataError as error:
        raise NoTissue("unreadable", str(error).replace(f"{root / source.file}: ", "")) from error


def write_outputs(job: pathlib.Path, found: SlideTiles) -> None:
    """Writes the coordinates, the outlines and the preview of a slide, each atomically.

    Args:
      job: the folder of all results.
      found: from `tile_slide`.

    Raises:
      StorageError: the disk is full or not writable.
    """
    paths = output_files(coords_file(job, found.tiles).parent.parent, found.tiles.slide_id)
    dimensions = (found.tiles.level0_width, found.tiles.level0_height)
    height, width = found.tissue.tissue.shape
    collection = contours.geojson(found.pieces, (dimensions[0] / width, dimensions[1] / height))
    table_files.write_bytes(paths["contours"], json.dumps(collection, separators=(",", ":")).encode() + b"\n")
    picture = preview.draw(
        found.picture,
        found.tissue,
        found.pieces,
        found.candidates,
        size=found.tiles.patch_size_level0,
        dimensions=dimensions,
        title=f"{found.tiles.slide_id}: {found.tiles.patch_size} px at {found.tiles.mpp:g} um/px",
    )
    table_files.write_bytes(paths["preview"], picture)
    write_coords(paths["coords"], found.tiles)


def output_files(folder: pathlib.Path, slide_id: str) -> dict[str, pathlib.Path]:
    """The files of a slide, "coords", "contours" and "preview", in the folder of its kind of tiles."""
    return {
        "coords": folder / "patches" / f"{slide_id}{FILE_SUFFIX}",
        "contours": folder / CONTOURS / f"{slide_id}.geojson",
        "preview": folder / PREVIEWS / f"{slide_id}.png",
    }


def _tile(slide: SlideFile, source: SlideSource, options: TilingOptions, threads: int) -> SlideTiles:
    mpp, mpp_source = level0_mpp(slide, source, options.mpp)
    size = _size_level0(options.tiles, mpp, slide)
    overview_mpp = _overview_mpp(slide, mpp, options)
    overview = read_overview(slide, overview_mpp / mpp)
    actual = float(np.sqrt(np.prod(slide.dimensions) / np.prod(overview.shape[:2]))) * mpp
    found = tissue.segment(overview, actual, options.tissue)
    overlap = round(options.tiles.overlap * size / options.tiles.patch_size)
    judged = grid.candidates(found, slide.dimensions, size, overlap, options.tiles.min_tissue)
    judged = _without_blurred(slide, judged, size, size * mpp, options.tiles, threads)
    counts = judged.rejected()
    if not len(judged.kept()):
        raise NoTissue("no tiles", f"{found.tissue_mm2:.3g} mm2 of tissue, but no tile is left: {_listed(counts)}")
    pieces = contours.regions(found.tissue)
    tiles = TileGrid(
        slide_id=source.slide_id,
        coords=judged.kept(),
        patch_size=options.tiles.patch_size,
        patch_size_level0=size,
        mpp=options.tiles.mpp,
        magnification=options.tiles.magnification,
        level0_mpp=mpp,
        overlap=options.tiles.overlap,
        level0_width=slide.dimensions[0],
        level0_height=slide.dimensions[1],
        slide_file=source.file,
        rejected=counts,
    )
    row = _row(tiles, mpp_source, found, pieces, len(judged.coords))
    return SlideTiles(tiles, pieces, found, judged, row, _picture(slide, overview))


def level0_mpp(slide: SlideFile, source: SlideSource, default: float | None) -> tuple[float, str]:
    """Micrometres per level-0 pixel and where they come from: "table", "slide" or "--mpp".

    Raises:
      NoTissue: it is not known, or the pixels are not square.
    """
    if source.mpp is not None:
        return source.mpp, "table"
    both = slide.mpp_xy
    if both is not None and max(both) / min(both) > _MAX_ASPECT:
        raise NoTissue(
            "pixels not square",
            f"{both[0]:g} x {both[1]:g} um; square tiles would distort them. If that is a mistake of the file, give "
            f"the right value in a column mpp of --slides",
        )
    if both is not None:
        return slide.mpp, "slide"
    if default is not None:
        return default, "--mpp"
    power = slide.objective_power
    hint = f"; its objective is {power:g}x, which suggests --mpp {10 / power:g}" if power else ""
    raise NoTissue(
        "no mpp",
        f"the slide does not record the size of its pixels; give --mpp, or a column mpp in the table of --slides{hint}",
    )


def _size_level0(options: TileOptions, mpp: float, slide: SlideFile) -> int:
    try:
        return grid.size_level0(options, mpp, slide.level_downsamples)
    except DataError as error:
        raise NoTissue("too coarse", str(error)) from error


def _overview_mpp(slide: SlideFile, mpp: float, options: TilingOptions) -> float:
    """Of the overview: as wanted, finer for small tiles, coarser for slides that would not fit into memory."""
    tile_um = options.tiles.patch_size * options.tiles.mpp
    wanted = min(options.tissue.mpp, tile_um / _TILE_SHARE)
    smallest = mpp * float(np.sqrt(np.prod(np.asarray(slide.dimensions, float)) / _MAX_OVERVIEW_PIXELS))
    return max(wanted, smallest, mpp)


def _without_blurred(
    slide: SlideFile, judged: Candidates, size: int, tile_um: float, options: TileOptions, threads: int
) -> Candidates:
    kept = np.flatnonzero(judged.verdict == "")
    if not options.sharpness or not len(kept):
        return judged
    pixels = min(options.patch_size, max(8, round(tile_um / focus.BLUR_MPP)))

    def one(index: int) -> float:
        return focus.sharpness(read_tile(slide, judged.coords[index], size, pixels))

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            values = list(pool.map(one, kept))
    else:
        values = [one(index) for index in kept]
    verdict = judged.verdict.copy()
    verdict[kept[focus.blurred(np.asarray(values), options.sharpness)]] = "blurred"
    return dataclasses.replace(judged, verdict=verdict)


def _picture(slide: SlideFile, overview: np.ndarray) -> np.ndarray:
    """For the preview: the overview reduced, or, of small slides, a finer one."""
    from PIL import Image

    longest = max(overview.shape[:2])
    if longest < _PREVIEW_EDGE * 0.6:
        return read_overview(slide, max(1.0, max(slide.dimensions) / _PREVIEW_EDGE))
    image = Image.fromarray(overview)
    image.thumbnail((_PREVIEW_EDGE, _PREVIEW_EDGE))
    return np.asarray(image)


def _row(
    tiles: TileGrid, mpp_source: str, found: TissueMap, pieces: list[contours.Region], n_grid: int
) -> dict[str, Any]:
    threshold = None if np.isnan(found.threshold) else round(found.threshold, 5)
    return {
        "slide_id": tiles.slide_id,
        "file": tiles.slide_file,
        "n_tiles": len(tiles),
        "n_grid": n_grid,
        **tiles.rejected,
        "level0_width": tiles.level0_width,
        "level0_height": tiles.level0_height,
        "level0_mpp": round(tiles.level0_mpp, 6),
        "mpp_source": mpp_source,
        "patch_size_level0": tiles.patch_size_level0,
        "tile_mpp": round(tiles.patch_size_level0 * tiles.level0_mpp / tiles.patch_size, 6),
        "tissue_mm2": round(found.tissue_mm2, 4),
        "n_regions": len(pieces),
        "n_holes": sum(len(piece.holes) for piece in pieces),
        "threshold": threshold,
    }


COLUMNS = ("slide_id", "file", "n_tiles", "n_grid", *grid.REASONS, "level0_width", "level0_height", "level0_mpp")
COLUMNS += ("mpp_source", "patch_size_level0", "tile_mpp", "tissue_mm2", "n_regions", "n_holes", "threshold")
"""Of tiles.csv."""


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "the slide is too small"
