"""F1 and F2 of More From Less for the method's own loss: golden values, reductions, absent views, shards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ssl_setup as setup
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from histokd_jax.methods.ssl import health
from histokd_jax.methods.ssl import objective as objectives
from histokd_jax.methods.ssl.objective import ObjectiveSpec, example_losses, objective, sharded_losses

A, B, C = setup.closed_form()
TERMS = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def whole(z):
    """Everything is there."""
    every = jnp.ones(len(z[0]), bool)
    return [every] * len(z), every


def losses_of(spec, *z):
    return example_losses(spec, [jnp.asarray(x) for x in z], *whole(z))


def step_loss(spec, *z):
    """The loss of the method on given embeddings."""
    batch = {"image": jnp.zeros((len(z[0]), 2, 2, 3), jnp.uint8), "weight": jnp.ones(len(z[0]))}
    outputs = {f"z_{k}": x for k, x in enumerate(z)} | {f"valid_{k}": jnp.ones(len(z[0]), bool) for k in range(len(z))}
    return objective(spec, ("image",) * len(z), outputs, batch)


def test_F1_branch_sum_of_two_and_three_branches(float64):
    each, terms = losses_of(ObjectiveSpec(), A, B)
    np.testing.assert_allclose(each, [64.9226580215, 122.0683147018, 115.1694924437, 38.6463914160], rtol=1e-8)
    np.testing.assert_allclose([terms[n] for n in TERMS], [2.8039803158, 0.5827499810, 0.5334567250], rtol=1e-8)
    each, terms = losses_of(ObjectiveSpec(), A, B, C)
    np.testing.assert_allclose(each, [120.4224796876, 234.7925198597, 206.4596637277, 69.4874193243], rtol=1e-8)
    np.testing.assert_allclose([terms[n] for n in TERMS], [5.3362713195, 0.9428329079, 0.8129149560], rtol=1e-8)


def test_F1_gradients_of_mean_and_sum_and_the_logged_loss_is_the_mean(float64):
    (loss, _), grad = jax.value_and_grad(lambda a: step_loss(ObjectiveSpec(reduction="mean"), a, B), has_aux=True)(A)
    np.testing.assert_allclose(loss, 85.2017141457, rtol=1e-8)
    np.testing.assert_allclose(grad[0], [-4.9804400208, 2.7270133834, 10.2396170971], rtol=1e-8)
    run = jax.value_and_grad(lambda a, c: step_loss(ObjectiveSpec(), a, B, c), (0, 1), has_aux=True)
    (loss, metrics), (ga, gc) = run(A, C)
    np.testing.assert_allclose(loss, 157.7905206398, rtol=1e-8)
    np.testing.assert_allclose(ga[0], [-16.6933975542, 2.7013170498, 50.5616352174], rtol=1e-8)
    np.testing.assert_allclose(gc[3], [-0.4009319007, -7.1516759311, 36.1045223665], rtol=1e-8)
    assert set(TERMS) <= set(metrics) and "std_unit_2" in metrics


def test_F1_pairwise_original_barlow_and_infonce(float64):
    original = ObjectiveSpec(assembly="pairwise_original", ddof=1, eps=1e-4)
    np.testing.assert_allclose(jnp.mean(losses_of(original, A, B)[0]), 40.5405536208, rtol=1e-8)
    np.testing.assert_allclose(jnp.mean(losses_of(original, A, B, C)[0]), 86.3390985433, rtol=1e-8)
    each, terms = losses_of(ObjectiveSpec(name="barlow"), A, B)
    np.testing.assert_allclose(each, np.full(4, 5.7188677347), rtol=1e-8)
    np.testing.assert_allclose([terms["diagonal"], terms["off_diagonal"]], [5.7172627768, 0.3209915850], rtol=1e-8)
    nce = ObjectiveSpec(name="infonce")
    np.testing.assert_allclose(jnp.mean(losses_of(nce, A, B)[0]), 3.0024950123, rtol=1e-8)
    np.testing.assert_allclose(jnp.mean(losses_of(nce, A, B, C)[0]), 6.3835387943, rtol=1e-8)


def test_barlow_of_three_branches_is_the_sum_over_pairs(float64):
    spec = ObjectiveSpec(name="barlow")
    pairs = [losses_of(spec, x, y)[0][0] for x, y in ((A, B), (A, C), (B, C))]
    np.testing.assert_allclose(losses_of(spec, A, B, C)[0], np.full(4, sum(pairs)), rtol=1e-12)


def numpy_vicreg(z, valid, lam=25.0, mu=25.0, nu=1.0, eps=1e-5):
    """C1 with absent views, by definition in float64: pairs over those that have both, statistics over those there."""
    total = 0.0
    for i in range(len(z)):
        for j in range(len(z)):
            both = valid[i] & valid[j]
            if i != j and both.any():
                total += lam * np.mean((z[i][both] - z[j][both]) ** 2)
        own = z[i][valid[i]]
        total += mu * np.mean(np.maximum(0.0, 1.0 - np.sqrt(own.var(axis=0) + eps)))
        covariance = np.cov(own.T, bias=True)
        total += nu * (np.sum(covariance**2) - np.sum(np.diag(covariance) ** 2)) / own.shape[1]
    return total


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_absent_views_are_masked_out_of_pairs_and_statistics(float64, form):
    rng = np.random.default_rng(0)
    z = [rng.normal(size=(9, 5)) for _ in range(3)]
    real = np.arange(9) < 8
    valid = [real, real, real & (np.arange(9) % 3 > 0)]
    z[2][~valid[2]] = 1e6
    each, _ = example_losses(ObjectiveSpec(form=form), list(map(jnp.asarray, z)), list(map(jnp.asarray, valid)), real)
    np.testing.assert_allclose(np.sum(each) / 8, numpy_vicreg(z, valid), rtol=1e-8)
    assert each[8] == 0.0
    gradient = jax.grad(lambda x: jnp.sum(example_losses(ObjectiveSpec(form=form), [*z[:2], x], valid, real)[0]))(z[2])
    assert not np.any(np.asarray(gradient)[~valid[2]])


@pytest.mark.parametrize("name", ["infonce", "barlow"])
def test_absent_views_of_other_losses_equal_the_subset(float64, name):
    z = [np.random.default_rng(k).normal(size=(8, 5)) for k in range(2)]
    here = np.arange(8) % 4 != 1
    every = np.ones(8, bool)
    each, _ = example_losses(ObjectiveSpec(name=name), z, [every, here], every)
    part = [x[here] for x in z]
    expected, _ = example_losses(ObjectiveSpec(name=name), part, *whole(part))
    np.testing.assert_allclose(np.mean(each), np.mean(expected), rtol=1e-8)


@pytest.mark.parametrize("name", objectives.NAMES)
def test_a_step_without_any_partner_is_finite_and_moves_the_image_branches_alone(name):
    z = [np.random.default_rng(k).normal(size=(6, 4)).astype(np.float32) for k in range(3)]
    every, none = np.ones(6, bool), np.zeros(6, bool)

    def loss(z):
        return jnp.sum(example_losses(ObjectiveSpec(name=name), z, [every, every, none], every)[0])

    value, grads = jax.value_and_grad(loss)(z)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
    assert np.any(grads[0]) and not np.any(grads[2])


@pytest.mark.parametrize("name", objectives.NAMES)
def test_F2_6_one_device_equals_eight_and_the_mean_of_shards_does_not(name):
    rng = np.random.default_rng(1)
    z = [rng.normal(size=(16, 24)).astype(np.float32) for _ in range(3)]
    valid, real = [np.ones(16, bool), np.ones(16, bool), np.arange(16) % 5 > 0], np.ones(16, bool)
    spec = ObjectiveSpec(name=name)
    run = jax.jit(jax.value_and_grad(lambda z, v, r: jnp.mean(example_losses(spec, z, v, r)[0])))
    expected = run(z, valid, real)
    for devices in (2, 4, 8):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        put = jax.tree.map(
            lambda x, m=mesh: jax.device_put(x, NamedSharding(m, PartitionSpec("data"))), (z, valid, real)
        )
        found = run(*put)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        for a, b in zip(found[1], expected[1]):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    parts = sharded_losses(dataclasses.replace(spec, shards=4), z, valid, real)[0]
    assert not np.isclose(np.mean(parts), expected[0], rtol=1e-3)


def test_losses_per_device_are_the_mean_of_the_parts(float64):
    z = [np.random.default_rng(k).normal(size=(8, 3)) for k in range(2)]
    each, terms = sharded_losses(ObjectiveSpec(shards=2), z, *whole(z))
    parts = [losses_of(ObjectiveSpec(), *(x[i : i + 4] for x in z)) for i in (0, 4)]
    np.testing.assert_allclose(each, np.concatenate([p[0] for p in parts]), rtol=1e-12)
    np.testing.assert_allclose(terms["variance"], np.mean([p[1]["variance"] for p in parts]), rtol=1e-12)


def test_C5_chunks_of_the_first_embedding_meet_their_branch_once(float64):
    wide = np.random.default_rng(3).normal(size=(4, 5))
    spec = ObjectiveSpec(split=(3, 2))
    each, terms = losses_of(spec, wide, A, B[:, :2])
    inv = np.mean((wide[:, :3] - A) ** 2, axis=1) + np.mean((wide[:, 3:] - B[:, :2]) ** 2, axis=1)
    rest = 25.0 * terms["variance"] + terms["covariance"]
    np.testing.assert_allclose(each, 25.0 * inv + rest, rtol=1e-8)
    with pytest.raises(ValueError, match=r"width 5 cannot be divided into chunks of \(3, 3\)"):
        losses_of(ObjectiveSpec(split=(3, 3)), wide, A, B)


def test_bad_input_batch_of_one_and_branches_of_different_widths():
    with pytest.raises(ValueError, match="at least 2 branches and 2 examples"):
        losses_of(ObjectiveSpec(), A[:1], B[:1])
    with pytest.raises(ValueError, match=r"different widths: \[\(3, 2\)\]"):
        losses_of(ObjectiveSpec(), A, B[:, :2])


def test_health_of_an_embedding_equals_its_definition():
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(20, 6)) * [3, 1, 1, 0.5, 0.1, 0.0]).astype(np.float32)
    where = np.arange(20) < 17
    found = health.embedding_health(z, where)
    own = z[where].astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(own.T, bias=True))
    unit = own / np.linalg.norm(own, axis=1, keepdims=True)
    np.testing.assert_allclose(found["effective_rank"], values.sum() ** 2 / (values**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(found["std_unit"], unit.std(axis=0).mean() * 6**0.5, rtol=1e-5)
    assert found["dead_dims"] == pytest.approx(1 / 6)


def test_a_collapsed_embedding_and_a_constant_view_are_seen():
    every = np.ones(6, bool)
    found = health.embedding_health(np.full((6, 4), 0.7, np.float32), every)
    assert found["std_unit"] < 1e-3 and found["dead_dims"] == 1.0 and found["effective_rank"] < 1.5
    flat = np.full((6, 3, 3, 3), 255, np.uint8)
    assert health.view_spread(flat, every) == 0.0
    flat[5] = 9
    assert health.view_spread(flat, every) == 246.0 and health.view_spread(flat, np.arange(6) < 5) == 0.0
