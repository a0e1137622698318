"""Quantiles of marked values against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.ops.image.quantiles import masked_quantiles

LEVELS = (0.0, 0.01, 0.5, 0.99, 1.0)


@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "signed zeros"])
@pytest.mark.parametrize("size", [1, 2, 37, 1000])
def test_quantiles_are_those_of_numpy(kind, size):
    rng = np.random.default_rng(size)
    values = {
        "normal": rng.normal(size=size),
        "ties": np.round(rng.normal(size=size)),
        "constant": np.full(size, -3.25),
        "signed zeros": rng.choice([-0.0, 0.0, -1e-38, 1e30], size),
    }[kind].astype(np.float32)
    mask = rng.random(size) < 0.6
    mask[0] = True
    found = jax.jit(masked_quantiles, static_argnums=2)(values, mask, LEVELS)
    np.testing.assert_allclose(found, np.quantile(values[mask].astype(np.float64), LEVELS), rtol=1e-5, atol=1e-6)


def test_rows_are_independent_and_no_value_gives_zero():
    values = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    mask = np.ones((3, 50), bool)
    mask[1] = False
    mask[2, 7:] = False
    found = jax.vmap(lambda v, m: masked_quantiles(v, m, LEVELS))(jnp.asarray(values), jnp.asarray(mask))
    np.testing.assert_allclose(found[0], np.quantile(values[0], LEVELS), atol=1e-5)
    np.testing.assert_array_equal(found[1], np.zeros(5))
    np.testing.assert_allclose(found[2], np.quantile(values[2, :7], LEVELS), atol=1e-5)
