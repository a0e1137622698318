"""Reconstruction losses against NumPy (checks C12 and C13 of the G-HANet specification)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.losses.reconstruction import group_errors, mean_squared_error, scaled_cosine_error

RNG = np.random.default_rng(0)


def pair(g=6, b=4):
    return RNG.normal(size=(b, g)).astype(np.float32), RNG.normal(size=(b, g)).astype(np.float32)


def reference(r, z, power):
    r, z = r.astype(np.float64), z.astype(np.float64)
    cosine = np.sum(r * z, -1) / np.linalg.norm(r, axis=-1) / np.linalg.norm(z, axis=-1)
    return (1 - cosine) ** power, np.mean((r - z) ** 2, -1)


@pytest.mark.parametrize("power", [1, 2, 3.0, 1.5])
def test_errors_equal_the_reference(power):
    r, z = pair()
    sce, mse = reference(r, z, power)
    np.testing.assert_allclose(scaled_cosine_error(r, z, power=power), sce, rtol=1e-5)
    np.testing.assert_allclose(mean_squared_error(r, z), mse, rtol=1e-5)


def test_C12_parallel_orthogonal_and_opposite_vectors():
    r = jnp.array([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
    z = jnp.array([[3.0, 6.0, 0.0], [0.0, 5.0, 0.0], [-2.0, 4.0, -1.0]])
    np.testing.assert_allclose(scaled_cosine_error(r, z), [0.0, 1.0, 8.0], atol=1e-5)
    np.testing.assert_allclose(scaled_cosine_error(17.0 * r, 0.3 * z), scaled_cosine_error(r, z), atol=1e-5)


def test_C13_repeating_the_features_of_a_group_changes_neither_term():
    r, z = pair()
    once, twice = group_errors(r, z, (2, 4)), group_errors(*(np.repeat(a, 2, axis=1) for a in (r, z)), (4, 8))
    for a, b in zip(once, twice):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_groups_are_consecutive_blocks_and_an_empty_one_costs_nothing():
    r, z = pair()
    sce, mse = group_errors(r, z, (1, 0, 5))
    assert sce.shape == mse.shape == (4, 3)
    np.testing.assert_array_equal(sce[:, 1], 0.0)
    np.testing.assert_array_equal(mse[:, 1], 0.0)
    expected = reference(r[:, 1:], z[:, 1:], 3)
    np.testing.assert_allclose(sce[:, 2], expected[0], rtol=1e-5)
    np.testing.assert_allclose(mse[:, 2], expected[1], rtol=1e-5)


def test_masked_rows_reach_neither_value_nor_gradient():
    r, z = pair()
    where = np.array([True, False, True, True])
    dirty = np.where(where[:, None], z, np.nan)

    def total(r, z):
        return sum(jnp.sum(e) for e in group_errors(r, z, (2, 4), where=where))

    np.testing.assert_allclose(total(r, dirty), sum(e[where].sum() for e in group_errors(r, z, (2, 4))), rtol=1e-5)
    gradient = np.asarray(jax.grad(total)(jnp.asarray(r), dirty))
    assert np.isfinite(gradient).all() and not gradient[1].any() and gradient[0].any()


def test_zero_vectors_have_distance_one_and_a_finite_gradient():
    def loss(r):
        return scaled_cosine_error(r, jnp.ones((1, 3)))[0]

    value, gradient = jax.value_and_grad(loss)(jnp.zeros((1, 3)))
    assert value == 1.0 and np.isfinite(gradient).all()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="sum of the group sizes"):
        group_errors(*pair(), (2, 3))
