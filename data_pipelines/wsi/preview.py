"""A picture of what was found on a slide: outlines of tissue and holes, kept and rejected tiles."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.wsi.contours import Region
from data_pipelines.wsi.grid import Candidates
from data_pipelines.wsi.tissue import TissueMap

_TISSUE, _HOLE, _TILE, _TILE_ON_DARK = (0, 140, 60), (0, 90, 220), (30, 30, 30), (200, 200, 200)
_REJECTED = {"blurred": (235, 120, 0), "ink": (200, 0, 160), "black": (110, 110, 110), "edge": (160, 140, 0)}
_LINE, _MARGIN, _FONT = 26, 10, 16


def draw(
    picture: np.ndarray,
    found: TissueMap,
    pieces: Sequence[Region],
    tiles: Candidates,
    *,
    size: int,
    dimensions: tuple[int, int],
    title: str,
) -> bytes:
    """The preview as a PNG.

    Args:
      picture: uint8 [height, width, 3], the slide reduced.
      found: masks, stretched over the slide.
      pieces: the regions of the tissue mask, in its pixels.
      tiles: all positions of the grid.
      size: edge of a tile in level-0 pixels.
      dimensions: (width, height) of the slide in level-0 pixels.
      title: first line of the caption.

    Returns:
      The bytes of the file; equal input gives equal bytes.
    """
    from PIL import Image, ImageDraw

    image = Image.fromarray(_tinted(picture, found))
    pen = ImageDraw.Draw(image)
    scale = np.array([image.width / dimensions[0], image.height / dimensions[1]])
    _draw_tiles(pen, tiles, size, scale, _TILE if picture.mean() > 80 else _TILE_ON_DARK)
    stretch = np.array([image.width / found.tissue.shape[1], image.height / found.tissue.shape[0]])
    for piece in pieces:
        _draw_ring(pen, piece.outer * stretch[None], _TISSUE)
        for ring in piece.holes:
            _draw_ring(pen, ring * stretch[None], _HOLE)
    content = io.BytesIO()
    _with_caption(image, title, tiles).save(content, "PNG")
    return content.getvalue()


def _tinted(picture: np.ndarray, found: TissueMap) -> np.ndarray:
    """The picture with ink and black areas coloured."""
    rows = np.arange(picture.shape[0]) * found.ink.shape[0] // picture.shape[0]
    columns = np.arange(picture.shape[1]) * found.ink.shape[1] // picture.shape[1]
    result = picture.copy()
    for mask, colour in ((found.ink, _REJECTED["ink"]), (found.black, _REJECTED["black"])):
        shown = mask[np.ix_(rows, columns)]
        result[shown] = (0.6 * result[shown] + 0.4 * np.asarray(colour)[None]).astype(np.uint8)
    return result


def _draw_tiles(pen: Any, tiles: Candidates, size: int, scale: np.ndarray, kept: tuple[int, int, int]) -> None:
    # Kept tiles last, so that a rejected neighbour does not hide their edge.
    for reason, colour in (*_REJECTED.items(), ("", kept)):
        for corner in tiles.coords[tiles.verdict == reason]:
            left, top = corner * scale
            right, bottom = (corner + size) * scale
            pen.rectangle([left, top, right, bottom], outline=colour)
            if reason == "blurred":
                pen.line([left, top, right, bottom], fill=colour)


def _draw_ring(pen: Any, ring: np.ndarray, colour: tuple[int, int, int]) -> None:
    points = [tuple(point) for point in ring.tolist()]
    pen.line([*points, points[0]], fill=colour, width=3, joint="curve")


def _with_caption(image: Any, title: str, tiles: Candidates) -> Any:
    """The image with lines of text below it; each kind of tile is named in its colour."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    counts = tiles.rejected()
    parts = [("tissue", _TISSUE), ("holes", _HOLE), (f"{len(tiles.kept())} tiles", _TILE)]
    parts += [(f"{counts[reason]} {reason}", colour) for reason, colour in _REJECTED.items() if counts[reason]]
    width = max(image.width, 480)
    lines = [[(_plain(title), (0, 0, 0))], *_wrapped(parts, font, width - 2 * _MARGIN)]
    whole = Image.new("RGB", (width, image.height + _LINE * len(lines) + _MARGIN), "white")
    whole.paste(image)
    pen = ImageDraw.Draw(whole)
    for row, line in enumerate(lines):
        x, y = _MARGIN, image.height + _MARGIN // 2 + row * _LINE
        for text, colour in line:
            pen.text((x, y), text, fill=colour, font=font)
            x += font.getlength(text + "    ")
    return whole


def _wrapped(parts: Sequence[tuple[str, tuple]], font: Any, width: float) -> list[list[tuple[str, tuple]]]:
    lines, used = [[]], 0.0
    for text, colour in parts:
        length = font.getlength(text + "    ")
        if lines[-1] and used + length > width:
            lines.append([])
            used = 0.0
        lines[-1].append((text, colour))
        used += length
    return lines


def _plain(text: str) -> str:
    """Text that every font has: the built-in one knows few characters beyond ASCII."""
    return text.encode("ascii", "replace").decode()
