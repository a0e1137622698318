"""The k-th largest value of packed slides against a sort in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.ops.topk import floor_fraction, segment_counts, segment_kth_largest

SIZES = (5, 1, 23, 0, 9)
S = len(SIZES)


def packed(rows=8, length=8, queries=3, seed=0, dtype=np.float32, ties=False):
    """Slides as one stream with padding in between rows, so that they span rows."""
    rng = np.random.default_rng(seed)
    ids = np.zeros(rows * length, np.int32)
    places = np.sort(rng.permutation(rows * length)[: sum(SIZES)])
    ids[places] = np.repeat(np.arange(1, S + 1), SIZES)
    values = rng.normal(size=(queries, rows * length)).astype(dtype)
    values = np.round(values) if ties else values
    values[:, ids == 0] = np.inf
    return values.reshape(queries, rows, length), ids.reshape(rows, length)


def expected(values, ids, k):
    out = np.full((S, values.shape[0]), np.inf)
    for s in range(S):
        own = np.sort(values[:, ids == s + 1], axis=1)[:, ::-1]
        if k[s] >= 1:
            out[s] = own[:, k[s] - 1] if k[s] <= own.shape[1] else -np.inf
    return out


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [(1, 1, 1, 0, 1), (5, 1, 4, 0, 2), (0, 1, 23, 1, 10)])
def test_threshold_equals_that_of_a_sort(k, ties):
    values, ids = packed(ties=ties)
    found = jax.jit(segment_kth_largest, static_argnums=3)(values, ids, jnp.array(k, jnp.int32), S)
    np.testing.assert_array_equal(found, expected(values, ids, k))


def test_float64_order_is_not_rounded():
    with jax.enable_x64(True):
        values, ids = packed(dtype=np.float64)
        values = 1.0 + 1e-12 * values
        k = np.array([2, 1, 7, 0, 3])
        found = segment_kth_largest(jnp.asarray(values), jnp.asarray(ids), jnp.asarray(k, jnp.int32), S)
        np.testing.assert_array_equal(found, expected(values, ids, k))


def test_extreme_values_and_signs_are_ordered():
    row = np.array([-np.inf, -3e38, -1e-45, -0.0, 0.0, 1e-45, 3e38, np.inf], np.float32)
    ids = np.ones((1, 8), np.int32)
    for k in range(1, 9):
        found = segment_kth_largest(jnp.asarray(row[None, None]), jnp.asarray(ids), jnp.array([k], jnp.int32), 1)
        assert found[0, 0] == np.sort(row)[::-1][k - 1]


def test_more_patches_than_a_chunk_are_counted():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 3, 7000)).astype(np.float32)
    ids = rng.integers(0, 4, size=(3, 7000)).astype(np.int32)
    counts = segment_counts(jnp.asarray(ids), 3)
    np.testing.assert_array_equal(counts, np.bincount(ids.reshape(-1), minlength=4)[1:])
    k = floor_fraction(counts, 0.2, ids.size)
    found = np.asarray(segment_kth_largest(jnp.asarray(values), jnp.asarray(ids), k, 3))
    for s in range(3):
        np.testing.assert_array_equal((values[:, ids == s + 1] >= found[s][:, None]).sum(axis=1), int(k[s]))


def test_patches_of_a_slide_on_several_devices():
    values, ids = packed()
    k = jnp.array((2, 1, 9, 0, 4), jnp.int32)
    mesh = jax.make_mesh((4, 2), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = jax.jit(segment_kth_largest, static_argnums=3)(values, ids, k, S)
        counts = jax.jit(segment_counts, static_argnums=1)(ids, S)
    np.testing.assert_array_equal(found, expected(values, ids, k))
    np.testing.assert_array_equal(counts, SIZES)


def test_k_is_the_floor_of_the_double_product():
    counts = np.arange(2001)
    for ratio in (0.2, 0.29, 0.05, 1.0, 1 / 3):
        found = floor_fraction(jnp.asarray(counts), ratio, 2000)
        np.testing.assert_array_equal(found, [int(np.floor(n * ratio)) for n in counts])
    assert int(floor_fraction(jnp.array([100]), 0.29, 100)[0]) == 28


@pytest.mark.parametrize("values,k", [(np.zeros((2, 3)), np.zeros(S)), (np.zeros((1, 8, 8)), np.zeros(S + 1))])
def test_shapes_that_do_not_fit_are_refused(values, k):
    with pytest.raises(ValueError, match="do not fit"):
        segment_kth_largest(jnp.asarray(values, jnp.float32), jnp.zeros((8, 8), jnp.int32), jnp.asarray(k), S)


def test_low_precision_is_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        segment_kth_largest(jnp.zeros((1, 8, 8), jnp.bfloat16), jnp.zeros((8, 8), jnp.int32), jnp.zeros(S), S)
