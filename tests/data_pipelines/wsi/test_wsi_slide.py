"""Opening slides and reading tiles: pixels equal OpenSlide's, sizes of pixels, faults name the file."""

import pickle
import sys

import numpy as np
import pytest
import wsi_slides as slides

from data_pipelines.errors import DataError
from data_pipelines.wsi import slide as reading
from data_pipelines.wsi.slide import choose_level, mpp_of, open_slide, read_overview, read_tile

openslide = pytest.importorskip("openslide")


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    """Random pixels: every position is recognised by its values."""
    rgb = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    return slides.write(tmp_path_factory.mktemp("slides") / "random.tiff", rgb), rgb


def test_a_tile_of_level_0_has_its_pixels_unchanged(painted):
    path, rgb = painted
    with open_slide(path) as slide:
        assert slide.dimensions == (900, 700) and slide.level_downsamples[:2] == (1.0, 2.0)
        tile = read_tile(slide, (301, 99), 128, 128)
        np.testing.assert_array_equal(tile, rgb[99:227, 301:429], strict=True)


def test_a_tile_of_another_level_has_its_pixels_unchanged(painted):
    path, rgb = painted
    with open_slide(path) as slide:
        tile = read_tile(slide, (200, 100), 256, 128)
    np.testing.assert_array_equal(tile, slides.halved(rgb)[50:178, 100:228])


def test_a_tile_between_levels_is_reduced_without_aliasing(tmp_path):
    """Stripes of one pixel become their mean, and a ramp stays a ramp, to the rounding of 8 bits."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    ramp = np.repeat(np.linspace(0, 255, 512).round().astype(np.uint8)[None, :, None], 512, 0).repeat(3, 2)
    with open_slide(slides.write(tmp_path / "stripes.tiff", stripes, levels=1)) as slide:
        tile = read_tile(slide, (0, 0), 480, 160).astype(float)
        assert np.abs(tile[:, 4:-4] - 127.5).max() < 8
    with open_slide(slides.write(tmp_path / "ramp.tiff", ramp, levels=1)) as slide:
        tile = read_tile(slide, (0, 0), 500, 200)[100, :, 0].astype(float)
    centres = (np.arange(200) + 0.5) * 2.5 - 0.5
    np.testing.assert_allclose(tile[4:-4], (centres * 255 / 511)[4:-4], atol=1.01)


def test_beyond_the_slide_everything_is_white(painted):
    path, rgb = painted
    with open_slide(path) as slide:
        tile = read_tile(slide, (850, 650), 128, 128)
    np.testing.assert_array_equal(tile[:50, :50], rgb[650:, 850:])
    assert (tile[50:] == 255).all() and (tile[:, 50:] == 255).all()


@pytest.mark.parametrize(
    ("size", "pixels", "level"),
    [(256, 256, 0), (512, 256, 1), (513, 256, 1), (1024, 256, 2), (700, 256, 1), (300, 256, 0), (128, 256, 0)],
)
def test_choice_of_the_level(size, pixels, level):
    assert choose_level((1.0, 2.0005, 4.001), size, pixels)[0] == level


def test_a_slide_travels_by_its_path(painted):
    path, rgb = painted
    with open_slide(path) as slide, pickle.loads(pickle.dumps(slide)) as other:
        np.testing.assert_array_equal(read_tile(other, (3, 5), 64, 64), rgb[5:69, 3:67])


def test_overview_is_the_mean_of_what_a_pixel_covers(painted, monkeypatch):
    """Also where it is put together from blocks, and where the slide has no small level."""
    path, rgb = painted
    monkeypatch.setattr(reading, "_OVERVIEW_BLOCK", 13)
    wanted = rgb.reshape(35, 20, 45, 20, 3).astype(np.float64).mean(axis=(1, 3))
    with open_slide(path) as slide:
        np.testing.assert_allclose(read_overview(slide, 20.0), wanted, atol=1.6)  # levels are rounded to 8 bits
        slide.level_downsamples, slide.level_dimensions = (1.0,), ((900, 700),)
        np.testing.assert_allclose(read_overview(slide, 20.0), wanted, atol=1.01)


@pytest.mark.parametrize(
    ("properties", "wanted"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, (0.25, 0.26)),
        ({"openslide.mpp-x": "0", "openslide.mpp-y": "0", "aperio.MPP": "0.4990"}, (0.499, 0.499)),
        ({"aperio.MPP": "0,2325"}, (0.2325, 0.2325)),
        ({"tiff.XResolution": "40000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"}, (0.25, 0.5)),
        ({"tiff.XResolution": "50800", "tiff.YResolution": "50800", "tiff.ResolutionUnit": "inch"}, (0.5, 0.5)),
        ({"tiff.XResolution": "72", "tiff.YResolution": "72", "tiff.ResolutionUnit": "inch"}, None),
        ({"openslide.mpp-x": "352.8", "openslide.mpp-y": "352.8"}, None),
        ({"tiff.XResolution": "4", "tiff.YResolution": "4"}, None),
        ({"openslide.mpp-x": "nan", "openslide.mpp-y": "inf", "aperio.MPP": "unknown"}, None),
        ({}, None),
    ],
)
def test_size_of_a_pixel(properties, wanted):
    assert mpp_of(properties) == (wanted if wanted is None else pytest.approx(wanted))


def test_size_of_a_pixel_of_written_slides(tmp_path):
    image = slides.glass(256, 256)
    with open_slide(slides.write(tmp_path / "a.tiff", image, mpp=0.25, mpp_y=0.26)) as slide:
        assert slide.mpp_xy == pytest.approx((0.25, 0.26), rel=1e-4) and slide.mpp == pytest.approx(0.255, rel=1e-4)
    with open_slide(slides.write(tmp_path / "b.tiff", image, mpp=None)) as slide:
        assert slide.mpp is None and slide.objective_power is None


def bad_file(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "empty"), (b"no slide at all" * 99, "no whole-slide format"), (b"II*\0\x08\0\0\0\xff\xff", "slide")],
)
def test_files_that_are_no_slides_are_refused_by_name(tmp_path, content, named):
    with pytest.raises(DataError, match=named) as caught:
        open_slide(bad_file(tmp_path / "broken.svs", content))
    assert "broken.svs" in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.svs.*no such slide"):
        open_slide(tmp_path / "nowhere.svs")


def test_damage_within_a_slide_is_reported_with_file_and_place(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    path = slides.write(tmp_path / "damaged.tiff", rgb, levels=1)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    with open_slide(path) as slide, pytest.raises(DataError, match=r"damaged.tiff: level 0 .* at x"):
        for x in range(0, 512, 128):
            for y in range(0, 512, 128):
                read_tile(slide, (x, y), 128, 128)


def test_without_openslide_the_message_says_what_to_install(painted, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(DataError, match=r"pip install 'histokd_jax\[wsi\]'"):
        open_slide(painted[0])
