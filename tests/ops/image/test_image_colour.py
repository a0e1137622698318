"""Colour arithmetic against double precision, the standard library's HSV and scikit-image."""

import jax.numpy as jnp
import numpy as np
import pytest
from image_reference import in_hsv, picture
from skimage import color

from histokd_jax.ops.image import colour, density, photometric

IMAGE = picture(15, 18)
REAL = IMAGE.astype(np.float64)


def test_zeros_take_the_noise_element_by_element():
    image = IMAGE.copy()
    image[:4], image[5, 5] = 0, (0, 9, 0)
    noise = np.random.default_rng(1).uniform(0, 256, image.shape).astype(np.float32)
    found = np.asarray(photometric.fill_zeros(image, noise))
    np.testing.assert_array_equal(found, np.where(image == 0, noise, image.astype(np.float32)))
    assert (found[:4] > 0).all() and found[5, 5, 1] == 9


@pytest.mark.parametrize("threshold", [0.01, 0.6, 100.0])
def test_solarise_keeps_what_lies_below(threshold):
    found = photometric.solarise(IMAGE, jnp.float32(threshold))
    np.testing.assert_array_equal(found, np.where(REAL < threshold, REAL, 255 - REAL))


def test_brightness_and_contrast_are_those_of_double_precision():
    np.testing.assert_allclose(photometric.brightness(IMAGE, jnp.float32(-7.3)), REAL - 7.3, atol=1e-4)
    mean = REAL.mean((0, 1))
    for factor in (0.6, 1.4):
        found = photometric.contrast(IMAGE, jnp.float32(factor))
        np.testing.assert_allclose(found, (REAL - mean) * factor + mean, atol=1e-3)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 10.0])
def test_saturation_is_that_of_colorsys(factor):
    found = photometric.saturation(IMAGE, jnp.float32(factor))
    expected = in_hsv(IMAGE, lambda h, s, v: (h, min(s * factor, 1.0), v))
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.05, 0.5])
def test_hue_is_that_of_colorsys(shift):
    found = photometric.hue(IMAGE, jnp.float32(shift))
    expected = in_hsv(IMAGE, lambda h, s, v: ((h + shift) % 1, s, v))
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_hsv_does_not_depend_on_the_scale():
    hue, saturation, value = colour.rgb_to_hsv(jnp.asarray(IMAGE, jnp.float32))
    small = colour.rgb_to_hsv(jnp.asarray(IMAGE, jnp.float32) / 255)
    np.testing.assert_allclose(hue, small[0], atol=1e-5)
    np.testing.assert_allclose(saturation, small[1], atol=1e-5)
    np.testing.assert_allclose(np.stack([hue, saturation, value / 255], -1), color.rgb2hsv(IMAGE), atol=1e-5)


def test_values_outside_the_scale_stay_finite():
    image = jnp.asarray([[[-20.0, 30.0, 300.0], [-5.0, -5.0, -9.0], [0.0, 0.0, 0.0]]])
    for found in (photometric.saturation(image, jnp.float32(1.3)), photometric.hue(image, jnp.float32(0.1))):
        assert np.isfinite(np.asarray(found)).all()
    np.testing.assert_allclose(photometric.saturation(image, jnp.float32(1.3))[0, 1], [-5.0, -5.0, -5.0])


def test_lab_is_that_of_scikit_image_both_ways():
    lab = colour.rgb_to_lab(IMAGE)
    np.testing.assert_allclose(lab, color.rgb2lab(IMAGE), atol=2e-3)
    np.testing.assert_allclose(colour.lightness(IMAGE), color.rgb2lab(IMAGE)[..., 0], atol=1e-3)
    np.testing.assert_allclose(colour.lab_to_rgb(lab), REAL, atol=2e-2)


def test_lab_beyond_the_gamut_is_clipped():
    lab = np.array([[[50.0, 120.0, -120.0], [120.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-5.0, 0.0, 0.0]]])
    found = np.asarray(colour.lab_to_rgb(jnp.asarray(lab, jnp.float32)))
    assert found.min() >= 0 and found.max() <= 255.001 and np.isfinite(found).all()
    np.testing.assert_allclose(found[0, 1:], [[255] * 3, [0] * 3, [0] * 3], atol=0.05)


def test_optical_density_is_that_of_double_precision_and_black_is_finite():
    found = density.optical_density(IMAGE, 240.0)
    np.testing.assert_allclose(found, -np.log(np.maximum(REAL, 1) / 240), atol=1e-5)
    np.testing.assert_allclose(density.from_density(found, 240.0), np.maximum(REAL, 1), rtol=1e-5)


def test_stains_are_those_of_scikit_image_up_to_its_unit():
    image = np.maximum(IMAGE, 1)
    found = np.asarray(density.rgb_to_hed(image))
    # scikit-image divides by ln(1e-6) and clips negative amounts.
    np.testing.assert_allclose(np.maximum(found, 0) / -np.log(1e-6), color.rgb2hed(image), atol=1e-5)
    np.testing.assert_allclose(density.hed_to_rgb(found), image, rtol=2e-5)


def test_stain_jitter_is_that_of_double_precision():
    image = np.maximum(IMAGE, 1).astype(np.float64)
    scale, offset = np.array([0.8, 1.1, 1.2]), np.array([0.1, -0.2, 0.05])
    basis = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    amounts = np.linalg.solve(basis.T, -np.log(image / 255).reshape(-1, 3).T).T
    expected = 255 * np.exp(-(amounts * scale + offset) @ basis).reshape(image.shape)
    found = photometric.jitter_stains(IMAGE, *(jnp.asarray(v, jnp.float32) for v in (scale, offset)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
