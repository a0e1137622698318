"""Check 9 and F2-6: coupled losses over 1, 2, 4, 8 devices are one loss, and not the mean of per-shard losses."""

import functools

import jax
import jax.numpy as jnp
import loss_arrays as la
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from histokd_jax import losses
from histokd_jax.losses import catalogue

B = 16


@functools.cache
def gradient_of(name):
    return jax.jit(jax.value_and_grad(functools.partial(la.value, name), (0, 1)))


def sharded(inputs, devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))), inputs)


@pytest.mark.parametrize("name", la.COUPLED)
def test_check_9_sharded_equals_unsharded_in_value_and_gradient(name):
    inputs = jax.tree.map(np.float32, la.pair(name, B, seed=5))
    expected = gradient_of(name)(*inputs)
    found = gradient_of(name)(*sharded(inputs, 8))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", la.COUPLED)
def test_check_9_other_numbers_of_devices(name, devices):
    inputs = jax.tree.map(np.float32, la.pair(name, B, seed=5))
    expected, found = gradient_of(name)(*inputs), gradient_of(name)(*sharded(inputs, devices))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", la.COUPLED)
def test_F2_6_guard_the_mean_of_per_shard_losses_is_another_number(name):
    inputs = jax.tree.map(np.float32, la.pair(name, B, seed=5))
    whole, _ = gradient_of(name)(*inputs)
    shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), inputs)
    parts = jax.jit(jax.vmap(functools.partial(la.value, name)))(*shards)
    assert not np.isclose(np.mean(parts), whole, rtol=1e-3)


def test_F2_6_branch_sums_of_three_branches():
    branches = [np.random.default_rng(k).normal(size=(B, 40)).astype(np.float32) for k in range(3)]
    for loss in (losses.vicreg_loss, losses.infonce_pairs_loss):
        run = jax.jit(jax.value_and_grad(lambda z, f=loss: jnp.mean(f(*z))))
        (v1, g1), (v8, g8) = run(branches), run(sharded(branches, 8))
        np.testing.assert_allclose(v8, v1, rtol=1e-5)
        for a, b in zip(g8, g1):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_crd_over_eight_devices_is_one_transition():
    rng = np.random.default_rng(0)
    s, t = (rng.normal(size=(B, 4)).astype(np.float32) for _ in range(2))
    state = losses.crd_init(jax.random.key(0), 40, 4)
    index = rng.permutation(40)[:B].astype(np.int32)
    contrast = losses.draw_contrast(jax.random.key(1), index, jnp.arange(40) % 5, 6)
    run = jax.jit(losses.crd_loss)
    expected = run(state, s, t, index, contrast)
    found = run(state, *sharded((s, t, index, np.asarray(contrast)), 8))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_table_of_coupled_losses_is_not_empty():
    assert len(la.COUPLED) >= 15 and catalogue.CATALOGUE["kd"].couples_batch is False
