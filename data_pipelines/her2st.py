"""Reads the two published her2st sections: counts, spot positions and expression clusters joined per spot."""

from __future__ import annotations

import dataclasses
import pathlib
from types import ModuleType

import numpy as np
import pandas as pd

from data_pipelines.errors import DataError

IMAGES = {"C2": "5714_HE_BT_C2.jpg", "C3": "5714_HE_BT_D1.jpg"}


@dataclasses.dataclass(frozen=True)
class Section:
    """One section: its usable spots and what was left out.

    Attributes:
      name: "C2" or "C3".
      spots: array positions "XxY", sorted as (X, Y).
      pixels: [n, 2] float64 spot centres (x, y) in pixels of the full-resolution image.
      clusters: [n] int32 expression cluster.
      counts: spots x genes, raw counts (index = `spots`).
      dropped: (spot, reason) of every spot that some table names but that cannot be used.
      pitch_px: distance of neighbouring array positions in pixels (least-squares fit over all selected spots).
    """

    name: str
    spots: tuple[str, ...]
    pixels: np.ndarray
    clusters: np.ndarray
    counts: pd.DataFrame
    dropped: tuple[tuple[str, str], ...]
    pitch_px: float

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Slide id of every spot, e.g. "her2st-C2-10x21"."""
        return tuple(f"her2st-{self.name}-{spot}" for spot in self.spots)


def read_section(source: pathlib.Path, name: str, reach_px: float) -> Section:
    """Joins counts, spot positions and cluster annotation of one section; nothing is dropped without a reason.

    Args:
      source: folder that holds `<name>/`.
      name: "C2" or "C3".
      reach_px: half the side of the image window of a spot; spots whose window leaves the image are dropped.

    Returns:
      The section with its usable spots.

    Raises:
      FileNotFoundError: if a source file is missing.
      DataError: if a table lacks a column or names a spot twice.
    """
    folder = source / name
    counts = pd.read_csv(_existing(folder / f"{name}.tsv.gz"), sep="\t", index_col=0)
    selection = _by_spot(folder / f"{name}_selection.tsv", ("pixel_x", "pixel_y"))
    annotation = _by_spot(folder / f"{name}-cluster-annotation.tsv.gz", ("label",))
    if counts.index.has_duplicates:
        raise DataError(f"{folder / f'{name}.tsv.gz'}: spot {_first_duplicate(counts.index)!r} occurs twice")
    width, height = _image_size(_existing(folder / IMAGES[name]))
    usable, dropped = [], []
    for spot in sorted({*counts.index, *selection.index, *annotation.index}, key=_array_position):
        reason = _why_unusable(spot, counts, selection, annotation, (width, height), reach_px)
        dropped.append((spot, reason)) if reason else usable.append(spot)
    return Section(
        name=name,
        spots=tuple(usable),
        pixels=selection.loc[usable, ["pixel_x", "pixel_y"]].to_numpy(np.float64),
        clusters=annotation.loc[usable, "label"].to_numpy(np.int32),
        counts=counts.loc[usable],
        dropped=tuple(dropped),
        pitch_px=spot_pitch(selection),
    )


def spot_pitch(selection: pd.DataFrame) -> float:
    """Distance of neighbouring array positions in pixels: mean slope of pixel position on array index (x and y).

    The median distance to the nearest spot is smaller (271 px against 291 px here), because printed spots scatter
    around the array and a minimum over four neighbours picks the closest one.

    Args:
      selection: columns x, y (array index), pixel_x, pixel_y.

    Returns:
      Pitch in pixels.
    """
    slopes = [np.polyfit(selection[a], selection[f"pixel_{a}"], 1)[0] for a in ("x", "y")]
    return float(np.mean(slopes))


def thin(section: Section, max_spots: int | None) -> Section:
    """At most `max_spots` evenly spaced spots of a section (all of them if None)."""
    if max_spots is None or max_spots >= len(section.spots):
        return section
    rows = np.linspace(0, len(section.spots) - 1, max_spots).astype(int)
    return dataclasses.replace(
        section,
        spots=tuple(section.spots[r] for r in rows),
        pixels=section.pixels[rows],
        clusters=section.clusters[rows],
        counts=section.counts.iloc[rows],
    )


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the her2st files of sections {sorted(IMAGES)}")
    return path


def _by_spot(path: pathlib.Path, needed: tuple[str, ...]) -> pd.DataFrame:
    """Table with columns x, y and `needed`, indexed by the array position "XxY"."""
    table = pd.read_csv(_existing(path), sep="\t")
    missing = [c for c in ("x", "y", *needed) if c not in table]
    if missing:
        raise DataError(f"{path}: no column {missing}; found {list(table.columns)}")
    table.index = table["x"].astype(str) + "x" + table["y"].astype(str)
    if table.index.has_duplicates:
        raise DataError(f"{path}: spot {_first_duplicate(table.index)!r} occurs twice; expected one row per spot")
    return table


def _first_duplicate(index: pd.Index) -> str:
    return index[index.duplicated()][0]


def _array_position(spot: str) -> tuple[int, int]:
    x, y = spot.split("x")
    return int(x), int(y)


def _why_unusable(
    spot: str,
    counts: pd.DataFrame,
    selection: pd.DataFrame,
    annotation: pd.DataFrame,
    image_size: tuple[int, int],
    reach_px: float,
) -> str | None:
    if spot not in counts.index:
        return "no expression counts"
    if spot not in selection.index:
        return "no image position"
    if spot not in annotation.index:
        return "no cluster annotation"
    centre = selection.loc[spot, ["pixel_x", "pixel_y"]].to_numpy(np.float64)
    # One pixel of slack: patch corners are rounded to whole pixels.
    if (centre < reach_px + 1).any() or (centre > np.asarray(image_size) - reach_px - 1).any():
        return "image window leaves the section image"
    return None


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        fix = "install it with: pip install 'histokd_jax[wsi]'"
        raise ImportError(f"reading section images needs Pillow; {fix}") from error
    return Image


def _image_size(path: pathlib.Path) -> tuple[int, int]:
    with open_image(path) as image:
        return image.size


def open_image(path: pathlib.Path):
    """Opens a section image (about 92 megapixels), above Pillow's default guard against decompression bombs.

    Args:
      path: image file.

    Returns:
      A lazy `PIL.Image.Image`, to be closed by the caller.

    Raises:
      ImportError: if Pillow is missing (extra `wsi`).
    """
    pillow = _pillow()
    limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
    try:
        return pillow.open(path)
    finally:
        pillow.MAX_IMAGE_PIXELS = limit
