"""Standardisation and rounding against double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_reference import picture

from histokd_jax.ops.image import pixels


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (1, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_standardise_is_that_of_double_precision(size, dtype):
    image = picture(*size, dtype=dtype)
    found = jax.jit(pixels.standardise)(image)
    expected = (image / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(pixels.to_uint8(pixels.unstandardise(found)), image.astype(np.uint8))


def test_standardise_in_half_precision_rounds_once():
    image = picture(8, 8)
    found = pixels.standardise(image[None], dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found, pixels.standardise(image[None]).astype(jnp.bfloat16))


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0.5,) * 3, (0.5, 0.0, 0.5)), ((0.5,) * 4, (1.0,) * 3)])
def test_constants_that_do_not_fit_are_refused(mean, std):
    with pytest.raises(ValueError, match="do not fit images of shape .*one number per channel, each std positive"):
        pixels.standardise(jnp.zeros((2, 4, 4, 3)), mean, std)


def test_rounding_goes_to_the_nearest_level_and_halves_to_the_even_one():
    found = pixels.to_uint8(jnp.array([-3.0, 0.49, 0.5, 1.5, 2.5, 254.51, 300.0]))
    np.testing.assert_array_equal(found, [0, 0, 0, 2, 2, 255, 255])
    assert found.dtype == jnp.uint8


@pytest.mark.parametrize("shape", [(4, 4, 3), (2, 4, 4), (2, 4, 4, 4), (2, 0, 4, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"tiles have the shape .*expected \[batch, height, width, 3\]"):
        pixels.check_images(jnp.zeros(shape), "tiles")


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="images are int32; expected uint8, or float32"):
        pixels.check_images(jnp.zeros((1, 4, 4, 3), jnp.int32))
