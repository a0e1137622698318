"""Image files as stored in pair datasets: 8-bit RGB, kept as they are wherever possible.

| in the file                                        | stored                                              |
|----------------------------------------------------|-----------------------------------------------------|
| 8-bit RGB, PNG or JPEG                             | the bytes of the file                               |
| 8-bit RGB, another format                          | PNG (lossless)                                      |
| grey, black and white, palette without transparency| PNG, RGB with equal channels or the palette's colour|
| RGBA or grey + alpha, opaque everywhere            | PNG, without the alpha channel                      |
| any transparent pixel                              | refused: what lies behind is unknown                |
| 16 or 32 bits per channel                          | refused: the window to 8 bits is a choice           |
| CMYK, Lab, HSV                                     | refused: needs the colour profile of the printer    |
| several frames, rotation by EXIF                   | refused: pairs would not lie on each other          |
| cut short, not decodable                           | refused                                             |

Every pixel of every file is decoded once before anything is written.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
from typing import Any

import numpy as np

from data_pipelines.errors import DataError

KEPT_FORMATS = ("PNG", "JPEG")
CONVERTED = {"L": "grey", "1": "black and white", "P": "palette", "RGBA": "opaque alpha", "LA": "opaque alpha"}
REFUSED = {"CMYK": "CMYK colours", "LAB": "Lab colours", "HSV": "HSV colours", "YCbCr": "YCbCr colours"}
_PNG_DEPTH = 24  # Byte of the bit depth: signature, length and name of the header chunk, width, height.
_PNG_END, _TRAILER = b"IEND\xaeB`\x82", 1 << 16
_TIFF_BITS, _EXIF_ORIENTATION = 258, 274


class UnusableImageError(DataError):
    """An image that cannot be stored.

    Attributes:
      reason: a few words, equal for equal faults.
      detail: more.
    """

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An image as it is stored.

    Attributes:
      data: PNG or JPEG of an 8-bit RGB image.
      height, width: of the stored image, in pixels.
      original: (height, width) in the file.
      stored: "kept", or what was changed, e.g. "grey to RGB, resized".
    """

    data: bytes
    height: int
    width: int
    original: tuple[int, int]
    stored: str


def encode(
    data: bytes, *, resize: tuple[int, int] | None = None, box: tuple[int, int, int, int] | None = None
) -> Encoded:
    """Checks the content of an image file and brings it into the form in which it is stored.

    Args:
      data: content of the file.
      resize: (height, width) of the stored image, Lanczos-filtered; None keeps the size.
      box: (left, top, right, bottom) in pixels, cut out before; None takes all.

    Returns:
      The stored form.

    Raises:
      UnusableImageError: it cannot be stored, see the table above.
    """
    image = _open(data)
    changes = [CONVERTED[image.mode] + " to RGB"] if image.mode in CONVERTED else []
    rgb = _to_rgb(image)
    if box is not None:
        rgb = _cut(rgb, box)
        changes.append("cut out")
    original = (rgb.height, rgb.width)
    if resize is not None and original != tuple(resize):
        rgb = rgb.resize((resize[1], resize[0]), _pillow().Resampling.LANCZOS)
        changes.append("resized")
    if not changes and image.format in KEPT_FORMATS:
        return Encoded(data, rgb.height, rgb.width, original, "kept")
    if not changes:
        changes = [f"{image.format} to PNG"]
    return Encoded(to_png(np.asarray(rgb)), rgb.height, rgb.width, original, ", ".join(changes))


def decode(data: bytes) -> np.ndarray:
    """[H, W, 3] uint8 of a stored image.

    Raises:
      ValueError: the bytes are no such image.
    """
    try:
        with _pillow().open(io.BytesIO(data)) as image:
            image.load()
            if image.mode != "RGB":
                raise ValueError(f"the stored image has mode {image.mode}, expected RGB")
            return np.asarray(image)
    except (OSError, SyntaxError, struct.error) as error:
        raise ValueError(f"the stored image cannot be decoded ({error})") from error


def to_png(pixels: np.ndarray) -> bytes:
    """PNG (lossless) of [H, W, 3] uint8."""
    out = io.BytesIO()
    _pillow().fromarray(np.ascontiguousarray(pixels)).save(out, format="PNG", compress_level=6)
    return out.getvalue()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("image pairs need Pillow: pip install pillow, or 'histokd_jax[wsi]'") from error
    return Image


def _open(data: bytes) -> Any:
    """The decoded image, after the checks that need no pixels."""
    module = _pillow()
    if not data:
        raise UnusableImageError("empty file", "0 bytes")
    try:
        image = module.open(io.BytesIO(data))
        _check_header(image, data)
        image.load()
        if image.format == "PNG" and _PNG_END not in data[-_TRAILER:]:
            # Pillow does not mind if all pixels are there; other decoders do.
            raise UnusableImageError("truncated image", "the PNG has no end marker")
    except UnusableImageError:
        raise
    except module.DecompressionBombError as error:
        raise UnusableImageError("too large", str(error)) from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        text = str(error)
        cut = "truncated" in text.lower() or "unexpected end" in text.lower() or "broken" in text.lower()
        raise UnusableImageError("truncated image" if cut else "not decodable", text) from error
    return image


def _check_header(image: Any, data: bytes) -> None:
    bits = _bits(image, data)
    if bits > 8 or image.mode in ("F", "I") or image.mode.startswith("I;"):
        detail = (
            f"{bits if bits > 8 else 32} bits per channel; convert the files to 8 bits with a window of your choice"
        )
        raise UnusableImageError("more than 8 bits", detail)
    if image.mode in REFUSED:
        raise UnusableImageError(REFUSED[image.mode], "convert the files to RGB with the profile they were made for")
    if image.mode not in ("RGB", *CONVERTED):
        raise UnusableImageError("unknown colour mode", f"{image.mode}; convert the files to 8-bit RGB")
    if getattr(image, "n_frames", 1) > 1:
        raise UnusableImageError("several frames", f"{image.n_frames} images in one file; give one file per image")
    turn = image.getexif().get(_EXIF_ORIENTATION, 1)
    if turn not in (0, 1):
        raise UnusableImageError("rotated by EXIF", f"orientation {turn}; apply it to the pixels and remove the tag")


def _bits(image: Any, data: bytes) -> int:
    """Bits per channel in the file: 16-bit colour PNG opens as 8 bits without a word."""
    if image.format == "PNG" and len(data) > _PNG_DEPTH:
        return data[_PNG_DEPTH]
    if image.format == "TIFF":
        bits = image.tag_v2.get(_TIFF_BITS, (8,))
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 16 if image.mode.startswith("I;16") else 8


def _to_rgb(image: Any) -> Any:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA"):
        lowest = image.getchannel("A").getextrema()[0]
        if lowest < 255:
            detail = f"opacity down to {lowest} of 255; put the images on a background of your choice"
            raise UnusableImageError("transparent pixels", detail)
    if image.mode == "RGB" and "transparency" in image.info:
        raise UnusableImageError("transparent pixels", "one colour counts as transparent; remove the tRNS chunk")
    return image if image.mode == "RGB" else image.convert("RGB")


def _cut(image: Any, box: tuple[int, int, int, int]) -> Any:
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise UnusableImageError("box outside", f"{box} of an image of {image.width} x {image.height} pixels")
    return image.crop(box)


def header_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """(height, width) by the header of a file, or None if it has none; pixels are not decoded."""
    try:
        with _pillow().open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, struct.error):
        return None
