"""8-bit patches: error bounds, exact cases, zeros."""

import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.ops import quantize


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_error_is_at_most_half_a_step_and_below_one_percent(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 1024)), dtype)
    values, scale = quantize.quantize(x)
    assert values.dtype == jnp.int8 and scale.shape == (64,)
    back = quantize.dequantize(values, scale, jnp.float32)
    lost = np.abs(np.asarray(back) - np.asarray(x, np.float32))
    assert (lost <= np.asarray(scale)[:, None] * 0.5001).all()
    error = np.asarray(quantize.relative_error(x))
    assert 0.005 < error.mean() < 0.01, "Gaussian data lose 0.8 %"


def test_relative_error_is_the_length_of_the_difference():
    x = jnp.asarray([[127.0, 0.4], [127.0, 0.6], [0.0, 0.0]])
    np.testing.assert_allclose(quantize.relative_error(x), [0.4 / 127, 0.4 / 127, 0.0], rtol=1e-3)


def test_values_on_the_grid_and_zeros_are_exact():
    x = jnp.asarray([[127.0, -127.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    values, scale = quantize.quantize(x)
    np.testing.assert_array_equal(quantize.dequantize(values, scale, jnp.float32), x)
    assert scale[1] == 0


def test_the_largest_half_precision_number_survives():
    x = jnp.asarray([[65504.0, -65504.0, 1.0]], jnp.float16)
    back = quantize.dequantize(*quantize.quantize(x), jnp.float16)
    assert np.isfinite(np.asarray(back)).all()
