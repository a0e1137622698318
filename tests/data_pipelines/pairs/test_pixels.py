"""Which image files are kept, converted or refused."""

import io
import struct
import zlib

import numpy as np
import pair_files
import pytest
from PIL import Image

from data_pipelines.pairs import pixels

RGB = pair_files.noise(0)
GREY = RGB[..., 0]


def png(width, height, depth, colour, rows):
    """A PNG written by hand: 16-bit colour cannot be written by Pillow."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_eight_bit_rgb_is_kept_byte_for_byte(kind):
    data = pair_files.encoded(RGB, kind)
    found = pixels.encode(data)
    assert (found.data, found.stored, found.original) == (data, "kept", (16, 16))
    assert found.data is data
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(pixels.decode(found.data), np.asarray(image))


@pytest.mark.parametrize(
    ("mode", "stored", "expected"),
    [
        ("L", "grey to RGB", None),
        ("RGBA", "opaque alpha to RGB", RGB),
        ("1", "black and white to RGB", None),
    ],
)
def test_other_modes_become_rgb_without_loss(mode, stored, expected):
    data = pair_files.encoded(RGB, mode=mode)
    found = pixels.encode(data)
    if expected is None:
        with Image.open(io.BytesIO(data)) as image:
            expected = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
    assert found.stored == stored
    np.testing.assert_array_equal(pixels.decode(found.data), expected)


def test_other_formats_become_png_without_loss():
    found = pixels.encode(pair_files.encoded(RGB, "TIFF"))
    assert found.stored == "TIFF to PNG"
    np.testing.assert_array_equal(pixels.decode(found.data), RGB)


def test_a_palette_becomes_its_colours():
    image = Image.fromarray(RGB).quantize(8)
    out = io.BytesIO()
    image.save(out, format="PNG")
    found = pixels.encode(out.getvalue())
    assert found.stored == "palette to RGB"
    np.testing.assert_array_equal(pixels.decode(found.data), np.asarray(image.convert("RGB")))


def test_resizing_and_cutting_are_recorded():
    found = pixels.encode(pair_files.encoded(pair_files.noise(1, (24, 20))), resize=(16, 32))
    assert (found.height, found.width, found.original, found.stored) == (16, 32, (24, 20), "resized")
    cut = pixels.encode(pair_files.encoded(RGB), box=(2, 4, 10, 16))
    np.testing.assert_array_equal(pixels.decode(cut.data), RGB[4:16, 2:10])
    assert cut.stored == "cut out" and cut.original == (12, 8)
    with pytest.raises(pixels.UnusableImageError, match="box outside"):
        pixels.encode(pair_files.encoded(RGB), box=(2, 4, 17, 16))


ALPHA = np.dstack([RGB, np.where(GREY > 128, 255, 7).astype(np.uint8)])
DEEP = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
REFUSED = {
    "transparent pixels": lambda: pair_files.encoded(ALPHA),
    "more than 8 bits": lambda: pair_files.encoded(DEEP),
    "CMYK colours": lambda: pair_files.encoded(RGB, "JPEG", mode="CMYK"),
    "truncated image": lambda: pair_files.encoded(RGB)[:-40],
    "empty file": lambda: b"",
    "not decodable": lambda: b"this is no image at all, whatever its name says",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unusable_images_are_refused_with_their_reason(reason):
    with pytest.raises(pixels.UnusableImageError) as caught:
        pixels.encode(REFUSED[reason]())
    assert caught.value.reason == reason and caught.value.detail


def test_sixteen_bit_colour_is_refused_although_pillow_opens_it_as_eight():
    rows = [np.full((4, 3), 0x1234, ">u2").tobytes()] * 4
    data = png(4, 4, 16, 2, rows)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
    with pytest.raises(pixels.UnusableImageError, match="more than 8 bits: 16 bits"):
        pixels.encode(data)
    eight = pixels.encode(png(4, 4, 8, 2, [bytes(range(12))] * 4))
    assert eight.stored == "kept"


def test_a_jpeg_cut_short_and_a_rotated_one_are_refused():
    data = pair_files.encoded(pair_files.noise(3, (64, 64)), "JPEG")
    with pytest.raises(pixels.UnusableImageError, match="truncated image"):
        pixels.encode(data[: len(data) // 2])
    exif = Image.Exif()
    exif[274] = 6
    with pytest.raises(pixels.UnusableImageError, match="rotated by EXIF: orientation 6"):
        pixels.encode(pair_files.encoded(RGB, "JPEG", exif=exif))


def test_several_frames_are_refused():
    out = io.BytesIO()
    Image.fromarray(RGB).save(out, format="TIFF", save_all=True, append_images=[Image.fromarray(RGB)])
    with pytest.raises(pixels.UnusableImageError, match="several frames: 2 images"):
        pixels.encode(out.getvalue())
