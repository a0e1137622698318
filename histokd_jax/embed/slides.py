"""Finds the slides and tiles of a cohort and inspects them before anything is embedded."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import bag
from data_pipelines.errors import BagError, DataError
from data_pipelines.planned_writer import Rejected
from data_pipelines.wsi import coords as grids
from data_pipelines.wsi import slide as slides
from data_pipelines.wsi import sources as wsi
from histokd_jax.embed import tiles

MPP_TOLERANCE = 0.1
"""Relative difference of resolutions that are taken for the same, as scanners of a nominal magnification differ."""


class Unusable(DataError):
    """A slide that goes to quarantine.

    Attributes:
      reason: few words, the same for all slides with this fault.
      detail: what was found and what to do.
    """

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclasses.dataclass(frozen=True)
class Source:
    """One slide before it was inspected.

    Attributes:
      slide_id: from the file name.
      file: slide, or folder of images; relative to the root, with forward slashes.
      coords: its coordinate file; None for a folder of images.
    """

    slide_id: str
    file: str
    coords: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class TileFacts:
    """What is known about the tiles of a slide.

    Attributes:
      count: number of tiles.
      patch_size: edge in pixels as read.
      patch_size_level0: edge in level-0 pixels, or None.
      mpp: micrometres per pixel of the tiles, or None.
      magnification: nominal, or None.
      level0_mpp: of the slide, or None.
      overlap: in pixels as read.
      n_bytes: of the slide file, or of all images.
      content: identifies the pixels: OpenSlide's quickhash-1, or a hash over names and sizes of images; "" if unknown.
      coords_sha256: of the coordinates; "" without any.
      state: sizes and times of the files, for a resumption only.
    """

    count: int
    patch_size: int
    patch_size_level0: int | None
    mpp: float | None
    magnification: float | None
    level0_mpp: float | None
    overlap: int
    n_bytes: int
    content: str
    coords_sha256: str
    state: tuple[int, ...] = ()


def find_slides(
    root: pathlib.Path, coords: pathlib.Path, exclude: Sequence[str] = ()
) -> tuple[list[Source], list[Rejected]]:
    """The slides below a folder (or one slide file) with their coordinate files.

    A slide and a coordinate file belong together by their names, or by the slide file that `histokd tile` recorded.

    Args:
      root: folder of slides, or one slide.
      coords: folder of `*_patches.h5`: `patches/`, the folder around it, or a job with one such folder.
      exclude: glob patterns of relative slide files to leave out.

    Returns:
      (slides with coordinates, slides without and coordinates without a slide).

    Raises:
      DataError: nothing there, or one id for several slides.
    """
    found = {source.slide_id: source.file for source in wsi.find_slides(root, exclude=exclude)}
    tables = {_key(path.name.removesuffix(grids.FILE_SUFFIX)): path for path in _coordinate_files(coords)}
    named = {key: found[key] for key in tables if key in found}
    base = root if root.is_dir() else root.parent
    recorded = {key: _recorded(tables[key], base) for key in tables if key not in named}
    named |= {key: file for key, file in recorded.items() if file in found.values()}
    without = [
        Rejected(file, key, "no coordinates", f"there is no {key}{grids.FILE_SUFFIX}; tile the slide first")
        for key, file in found.items()
        if file not in named.values()
    ]
    if root.is_dir() and not exclude:
        detail = "no slide of this name lies in the folder of slides"
        without += [Rejected(tables[key].name, key, "slide missing", detail) for key in tables if key not in named]
    return [Source(key, named[key], tables[key]) for key in sorted(named)], sorted(without)


def _recorded(path: pathlib.Path, base: pathlib.Path) -> str | None:
    """The slide that a coordinate file names, if it is there."""
    try:
        file = grids.read_coords(path).slide_file
    except DataError:
        return None
    return file if file and (base / file).is_file() else None


def find_images(root: pathlib.Path) -> list[Source]:
    """One slide per subfolder with images; or the folder itself, if it holds images.

    Raises:
      DataError: there are none.
    """
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder with one subfolder of tile images per slide")
    if tiles.image_files(root):
        return [Source(_key(root.resolve().name), ".")]
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [Source(_key(p.name), p.name) for p in folders if tiles.image_files(p)]
    if not found:
        raise DataError(f"{root}: neither images ({', '.join(tiles.IMAGES)}) nor subfolders with images")
    return found


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _coordinate_files(folder: pathlib.Path) -> list[pathlib.Path]:
    for pattern in ("", "patches/", "*_overlap/patches/"):
        found = sorted(folder.glob(f"{pattern}*{grids.FILE_SUFFIX}"))
        parents = sorted({path.parent for path in found})
        if len(parents) > 1:
            names = ", ".join(path.relative_to(folder).as_posix() for path in parents)
            raise DataError(f"{folder}: a data set has one kind of tiles, and there are several: {names}; name one")
        if found:
            return found
    raise DataError(f"{folder}: no coordinate files *{grids.FILE_SUFFIX}; write them with histokd tile")


# --- inspection


def inspect_slide(root: pathlib.Path, source: Source, mpp: float | None = None) -> TileFacts:
    """Opens a slide and its coordinate file and compares them.

    Args:
      root: folder of the slides.
      source: the slide.
      mpp: micrometres per pixel of the tiles, if the user says so.

    Raises:
      Unusable: either cannot be read, they do not belong together, or there are no tiles.
    """
    _check_key(source)
    try:
        grid = grids.read_coords(source.coords)
    except DataError as error:
        raise Unusable("bad coordinates", str(error)) from error
    if not len(grid):
        raise Unusable("no tiles", f"{source.coords.name} holds no tiles: no tissue was found in the slide")
    path = root / source.file
    try:
        with slides.open_slide(path) as opened:
            _check_grid(source, grid, opened)
            level0_mpp = grid.level0_mpp or opened.mpp
            content = opened.properties.get("openslide.quickhash-1", "")
    except (Unusable, slides.MissingLibrary):
        raise
    except DataError as error:
        raise Unusable("unreadable slide", str(error)) from error
    values = np.ascontiguousarray(grid.coords, "<i4")
    return TileFacts(
        len(grid),
        grid.patch_size,
        grid.patch_size_level0,
        mpp or _tile_mpp(source, grid, level0_mpp),
        grid.magnification,
        level0_mpp,
        grid.overlap,
        path.stat().st_size,
        content,
        hashlib.sha256(values).hexdigest(),
        _state([path, source.coords]),
    )


def _check_key(source: Source) -> None:
    try:
        bag.check_key(source.slide_id, "slide_id", source.slide_id)
    except BagError as error:
        raise Unusable("bad slide id", str(error)) from error


def _check_grid(source: Source, grid: grids.TileGrid, slide: slides.SlideFile) -> None:
    """Refuses coordinates that were made for another slide."""
    if source.slide_id not in (_key(grid.slide_id), wsi.slide_id_of(grid.slide_id)):
        raise Unusable("coordinates of another slide", f"{source.coords.name} was made for {grid.slide_id!r}")
    recorded = (grid.level0_width, grid.level0_height)
    if None not in recorded and recorded != slide.dimensions:
        raise Unusable(
            "coordinates of another slide",
            f"{source.coords.name} was made for a slide of {recorded[0]} x {recorded[1]} pixels, {source.file} has "
            f"{slide.dimensions[0]} x {slide.dimensions[1]}; tile the slide again",
        )
    outside = np.flatnonzero((grid.coords >= np.array(slide.dimensions)[None]).any(axis=1))
    if outside.size:
        raise Unusable(
            "coordinates of another slide",
            f"tile {outside[0]} of {source.coords.name} lies at {grid.coords[outside[0]].tolist()}, outside "
            f"{source.file} of {slide.dimensions[0]} x {slide.dimensions[1]} pixels; tile the slide again",
        )


def _tile_mpp(source: Source, grid: grids.TileGrid, level0_mpp: float | None) -> float | None:
    """Resolution of the tiles: as recorded, or nominal (10 / magnification), and not against the slide's own."""
    nominal = grid.mpp or (10 / grid.magnification if grid.magnification else None)
    actual = level0_mpp * grid.patch_size_level0 / grid.patch_size if level0_mpp else None
    if nominal and actual and not same_mpp(nominal, actual):
        raise Unusable(
            "contradictory mpp",
            f"{source.coords.name} says {nominal:g} um per pixel, and by the slide it is {actual:.4g}; tile again",
        )
    return nominal or (round(actual, 4) if actual else None)


def same_mpp(one: float, other: float) -> bool:
    """Whether two resolutions differ by less than `MPP_TOLERANCE`."""
    return abs(one - other) <= MPP_TOLERANCE * max(one, other)


def inspect_images(root: pathlib.Path, source: Source, mpp: float | None = None) -> TileFacts:
    """Inspects a folder of tile images.

    Args:
      root: folder of the folders.
      source: the slide.
      mpp: micrometres per pixel of the tiles, if the user says so.

    Raises:
      Unusable: the first image cannot be read or is not square, or two tiles have one position.
    """
    _check_key(source)
    files = tiles.image_files(root / source.file)
    try:
        height, width = tiles.read_image(files[0]).shape[:2]
    except DataError as error:
        raise Unusable("unreadable tile", str(error)) from error
    if height != width:
        raise Unusable("tiles are not square", f"{files[0].name} has {width} x {height} pixels; cut square tiles")
    coords = tiles.coordinates_of(files)
    if coords is not None and len(np.unique(coords, axis=0)) < len(coords):
        raise Unusable("bad coordinates", f"two images of {source.slide_id} have the same coordinates in their names")
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    return TileFacts(
        len(files),
        width,
        None,
        mpp,
        None,
        None,
        0,
        sum(path.stat().st_size for path in files),
        hashlib.sha256(listing.encode()).hexdigest(),
        hashlib.sha256(np.ascontiguousarray(coords, "<i4")).hexdigest() if coords is not None else "",
        _state(files),
    )


def _state(files: Sequence[pathlib.Path]) -> tuple[int, ...]:
    found = [os.stat(path) for path in files]
    return (sum(status.st_size for status in found), max(status.st_mtime_ns for status in found))


def open_tiles(root: pathlib.Path, source: Source) -> tiles.TileSource:
    """The tiles of a slide, opened.

    Raises:
      DataError: they cannot be opened.
    """
    if source.coords is None:
        files = tiles.image_files(root / source.file)
        return tiles.ImageTiles(files, tiles.read_image(files[0]).shape[0])
    return tiles.SlideTiles(slides.open_slide(root / source.file), grids.read_coords(source.coords))


def coordinates(root: pathlib.Path, source: Source) -> np.ndarray | None:
    """int32 [n, 2] in level-0 pixels, in the order of the tiles; None where images do not tell."""
    if source.coords is None:
        return tiles.coordinates_of(tiles.image_files(root / source.file))
    return np.asarray(grids.read_coords(source.coords).coords, np.int32)


def facts_for_table(slide_id: str, case_id: str, source: Source, facts: TileFacts) -> dict[str, Any]:
    """What sources.csv records about a slide, without times and folders."""
    values: Mapping[str, Any] = dataclasses.asdict(facts)
    kept = {name: value for name, value in values.items() if name != "state"}
    coords = source.coords.name if source.coords is not None else ""
    return {"slide_id": slide_id, "case_id": case_id, "file": source.file, "coords_file": coords, **kept}
