"""Flips, turns and crops against NumPy, SciPy and Pillow, for odd and even sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_reference import picture, resize, rotate_bilinear, rotate_nearest
from PIL import Image

from histokd_jax.ops.image import geometry

SIZES = [(16, 16), (15, 15), (12, 17), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_flips_are_those_of_numpy(size, dtype):
    image = picture(*size, dtype=dtype)
    for horizontal in (False, True):
        for vertical in (False, True):
            found = jax.jit(geometry.flip)(image, horizontal, vertical)
            expected = image[:, ::-1] if horizontal else image
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, expected[::-1] if vertical else expected)


@pytest.mark.parametrize("side", [16, 15, 1])
def test_quarter_turns_are_those_of_numpy(side):
    image = picture(side, side)
    for quarters in range(4):
        found = jax.jit(geometry.rotate_quarters)(image, quarters)
        np.testing.assert_array_equal(found, np.rot90(image, quarters))
        assert found.dtype == np.uint8


def test_quarter_turns_need_squares():
    with pytest.raises(ValueError, match="12 x 17 pixels cannot be turned .*crop to squares"):
        geometry.rotate_quarters(jnp.asarray(picture(12, 17)), 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, 2.0, 3.1, -0.7])
def test_nearest_rotation_is_that_of_double_precision(size, angle):
    image = picture(*size)
    expected, tie = rotate_nearest(image, angle, fill=7)
    found = np.asarray(jax.jit(geometry.rotate, static_argnums=(2, 3))(image, angle, "nearest", 7))
    assert found.dtype == np.uint8 and tie.mean() < 0.05 or angle == 0 or size == (1, 1)
    np.testing.assert_array_equal(found[~tie], expected[~tie])


@pytest.mark.parametrize("side", [16, 15])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_rotation_by_right_angles_is_exact_and_counter_clockwise(side, interpolation):
    image = picture(side, side)
    for quarters in range(4):
        found = geometry.rotate(image, jnp.float32(quarters * np.pi / 2), interpolation)
        np.testing.assert_allclose(found, np.rot90(image, quarters), atol=0 if interpolation == "nearest" else 2e-3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("angle", [0.3, 2.0, -0.7])
def test_bilinear_rotation_is_that_of_scipy(size, angle):
    image = picture(*size)
    found = jax.jit(geometry.rotate, static_argnums=(2, 3))(image, angle, "bilinear", 9.0)
    np.testing.assert_allclose(found, rotate_bilinear(image, angle, 9.0), atol=2e-3)


WINDOWS = [(0, 0, 16, 21), (2, 3, 9, 17), (15, 20, 1, 1), (5, 0, 3, 12)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [(16, 21), (8, 8), (31, 7)])
def test_crop_and_resize_is_that_of_double_precision(window, size):
    image = picture(16, 21)
    top, left, height, width = window
    found = jax.jit(geometry.crop_resize, static_argnums=(5,))(image, *window, size)
    cut = image[top : top + height, left : left + width].astype(np.float64)
    np.testing.assert_allclose(found, resize(cut, size), atol=1e-3)


@pytest.mark.parametrize("window", WINDOWS)
def test_enlarging_is_that_of_pillow(window):
    image = picture(16, 21)
    top, left, height, width = window
    found = np.asarray(geometry.crop_resize(image, *map(jnp.int32, window), (32, 30)))
    for c in range(3):
        plane = Image.fromarray(image[top : top + height, left : left + width, c].astype(np.float32))
        expected = np.asarray(plane.resize((30, 32), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(found[..., c], expected, atol=1e-3)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_the_whole_image_in_its_own_size_is_itself(interpolation):
    image = picture(16, 21)
    window = (jnp.int32(0), jnp.int32(0), jnp.int32(16), jnp.int32(21))
    found = geometry.crop_resize(image, *window, (16, 21), interpolation)
    np.testing.assert_array_equal(found, image)


def test_nearest_crop_takes_pixels_of_the_window_and_keeps_the_dtype():
    image = picture(16, 21)
    found = np.asarray(geometry.crop_resize(image, *map(jnp.int32, (4, 5, 6, 7)), (9, 14), "nearest"))
    rows = 4 + np.floor((np.arange(9) + 0.5) * 6 / 9).astype(int)
    columns = 5 + np.floor((np.arange(14) + 0.5) * 7 / 14).astype(int)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, image[rows][:, columns])


def test_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match="interpolation is 'cubic'; expected 'bilinear' or 'nearest'"):
        geometry.rotate(jnp.zeros((4, 4, 3)), 0.0, "cubic")
