"""Where tiles come from: slides with coordinate files, or folders of ready-cut images."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.wsi import slide as slides
from data_pipelines.wsi.coords import TileGrid

IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
_AT = re.compile(r"\((\d+)\s*,\s*(\d+)\)|(?:^|_)x?(\d+)_y?(\d+)$")


class TileSource(Protocol):
    """The tiles of one slide; reading is thread-safe."""

    def read(self, index: int) -> np.ndarray:
        """uint8 [h, h, 3] of one tile. Raises DataError."""

    def close(self) -> None:
        """Releases the file."""


@dataclasses.dataclass(frozen=True)
class SlideTiles:
    """Tiles cut from a slide as they are needed.

    Attributes:
      slide: an open slide.
      grid: where its tiles lie.
    """

    slide: slides.SlideFile
    grid: TileGrid

    def read(self, index: int) -> np.ndarray:
        """See `TileSource`."""
        grid = self.grid
        return slides.read_tile(self.slide, grid.coords[index], grid.patch_size_level0, grid.patch_size)

    def close(self) -> None:
        """See `TileSource`."""
        self.slide.close()


@dataclasses.dataclass(frozen=True)
class ImageTiles:
    """Tiles that were cut before, one image each.

    Attributes:
      files: in the order of the tiles.
      edge: of every image in pixels.
    """

    files: Sequence[pathlib.Path]
    edge: int

    def read(self, index: int) -> np.ndarray:
        """See `TileSource`."""
        pixels = read_image(self.files[index])
        if pixels.shape[:2] != (self.edge, self.edge):
            height, width = pixels.shape[:2]
            raise DataError(
                f"{self.files[index]}: {width} x {height} pixels, the first tile of its slide has {self.edge} x "
                f"{self.edge}; tiles of one data set have one size"
            )
        return pixels

    def close(self) -> None:
        """See `TileSource`."""


def read_image(path: pathlib.Path) -> np.ndarray:
    """uint8 [h, w, 3] of an image file.

    Raises:
      DataError: it cannot be decoded.
    """
    slides.import_openslide()
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}; restore it from a copy") from error


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The images directly within a folder, sorted by name."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGES and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def coordinates_of(files: Sequence[pathlib.Path]) -> np.ndarray | None:
    """int32 [n, 2] level-0 coordinates from names like `Tile_(1024,2048).jpg` or `1024_2048.png`.

    Args:
      files: the tiles.

    Returns:
      None if not every name has them.
    """
    matches = [_AT.search(path.stem) for path in files]
    if not all(matches):
        return None
    return np.array([[int(part) for part in m.groups() if part is not None] for m in matches], np.int64).astype(
        np.int32
    )
