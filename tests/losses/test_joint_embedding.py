"""F2 of More From Less: properties of VICReg, Barlow Twins, InfoNCE and the split embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_arrays import ES, ET

from histokd_jax import losses


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(b=6, d=4, n=3, seed=0):
    return [np.random.default_rng(seed + k).normal(size=(b, d)) for k in range(n)]


@pytest.mark.parametrize("n,expected", [(2, 49.8418861), (3, 74.7628292)])
def test_F2_1_collapse(n, expected):
    branches = [jnp.full((5, 4), 0.3)] * n
    np.testing.assert_allclose(losses.vicreg_loss(*branches), expected, rtol=1e-8)
    gradients = jax.grad(lambda *z: jnp.sum(losses.vicreg_loss(*z)), tuple(range(n)))(*branches)
    assert all(np.isfinite(g).all() for g in gradients)


def test_F2_2_branch_order_and_batch_order():
    a, b, c = draw()
    order = np.array([2, 0, 5, 1, 4, 3])
    for loss in (losses.vicreg_loss, losses.vicreg_pairwise_loss, losses.infonce_pairs_loss):
        np.testing.assert_allclose(loss(c, a, b), loss(a, b, c), rtol=1e-10)
        np.testing.assert_allclose(loss(a[order], b[order], c[order]), loss(a, b, c)[order], rtol=1e-10)
    np.testing.assert_allclose(losses.barlow_loss(a[order], b[order]), losses.barlow_loss(a, b), rtol=1e-10)


def test_F2_3_constants():
    a, b, c = draw()
    shift = np.arange(4.0)
    base = losses.vicreg_terms(a, b, c)
    for found, expected in zip(losses.vicreg_terms(a + shift, b + shift, c + shift), base):
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    inv, var, cov = losses.vicreg_terms(a + shift, b, c)
    np.testing.assert_allclose([var, cov], base[1:], rtol=1e-9)
    assert not np.allclose(inv, base[0])


def test_F2_4_variance_term_is_zero_above_its_target():
    z = jnp.asarray(5.0 * draw(n=1)[0])
    assert jnp.all(jnp.var(z, axis=0) >= 1 - 1e-5)
    value, gradient = jax.value_and_grad(losses.variance_hinge)(z)
    assert value == 0.0 and not np.any(gradient)


def test_F2_5_infonce():
    a, b, _ = draw()
    scale = np.linspace(0.1, 7, 6)[:, None]
    np.testing.assert_allclose(losses.infonce_pairs_loss(a * scale, b), losses.infonce_pairs_loss(a, b), rtol=1e-10)
    same = np.ones((6, 3))
    np.testing.assert_allclose(losses.infonce_pairs_loss(same, same, same), 3 * np.log(6), rtol=1e-10)


def test_F2_7_gram_and_direct_form_agree_in_float32_with_their_gradients():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(64, 512)), jnp.float32)
    (v1, g1), (v2, g2) = (
        jax.value_and_grad(lambda x, f=form: losses.covariance_penalty(x, form=f))(z) for form in ("direct", "gram")
    )
    np.testing.assert_allclose(v1, v2, rtol=1e-4)
    np.testing.assert_allclose(g1, g2, rtol=1e-4, atol=1e-4 * np.abs(g1).max())


def test_gram_and_direct_form_agree_with_a_mask_in_float64():
    a, b, _ = draw(b=8, d=11)
    where = jnp.asarray(np.arange(8) % 3 > 0)
    for function in (losses.covariance_penalty,):
        np.testing.assert_allclose(function(a, form="direct", where=where), function(a, form="gram", where=where))
    direct, gram = (losses.barlow_terms(a, b, form=f, where=where) for f in ("direct", "gram"))
    np.testing.assert_allclose(direct, gram, rtol=1e-9)


def test_F2_8_barlow_of_decorrelated_unit_variance():
    z = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], float)
    diagonal, rest = losses.barlow_terms(z, z)
    np.testing.assert_allclose(diagonal, 2 * (1 / 1.0001**2 - 1) ** 2, rtol=1e-9)
    np.testing.assert_allclose(rest, 0.0, atol=1e-15)


def test_barlow_is_invariant_to_affine_maps_of_dimensions():
    a, b, _ = draw(b=8)
    moved = 100 * a * np.array([1.0, 2.0, 3.0, 4.0]) + 5
    np.testing.assert_allclose(losses.barlow_loss(moved, b), losses.barlow_loss(100 * a, b), rtol=1e-4)
    other = losses.barlow_loss(a, b, normalisation="batch_norm")
    np.testing.assert_allclose(other, losses.barlow_loss(a, b), rtol=1e-2)


def test_F2_9_sum_and_mean_reduction_clip_to_the_same_direction():
    a, b = map(jnp.asarray, (ES, ET))

    def clipped(reduce, limit):
        g = jax.grad(lambda x: reduce(losses.vicreg_loss(x, b)))(a)
        return g * jnp.minimum(1.0, limit / jnp.linalg.norm(g))

    np.testing.assert_allclose(clipped(jnp.sum, 1.0), 4 * clipped(jnp.mean, 1.0 / 4), rtol=1e-10)


def test_F2_10_third_branch_a_copy():
    a, b, _ = draw()
    inv = losses.vicreg_terms(a, b, b)[0]
    np.testing.assert_allclose(jnp.mean(inv), 2 * 2 * np.mean((a - b) ** 2), rtol=1e-10)


def test_split_embedding_aligns_each_chunk_with_its_branch_once():
    a, b, _ = draw()
    wide = np.concatenate([a, b[:, :2]], axis=1)
    inv_only = dict(variance=0.0, covariance=0.0, invariance=1.0)
    found = losses.vicreg_split_loss(wide, b, C := draw(d=2, n=1, seed=7)[0], **inv_only)
    expected = np.mean((a - b) ** 2, axis=1) + np.mean((b[:, :2] - C) ** 2, axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    spread = losses.vicreg_split_loss(wide, b, C, invariance=0.0)[0]
    expected = 25 * sum(map(losses.variance_hinge, (wide, b, C))) + sum(map(losses.covariance_penalty, (wide, b, C)))
    np.testing.assert_allclose(spread, expected, rtol=1e-10)
    pairs = losses.infonce_pairs_loss(a, b) + losses.infonce_pairs_loss(b[:, :2], C)
    np.testing.assert_allclose(losses.infonce_split_loss(wide, b, C), pairs, rtol=1e-10)


def test_bad_input_embedding_width_not_divisible_by_the_split():
    with pytest.raises(ValueError, match=r"width 5 cannot be divided into chunks of \(3, 3\), which sum to 6"):
        losses.vicreg_split_loss(np.ones((4, 5)), ES, ET)


def test_bad_input_batch_of_one_and_other_widths():
    with pytest.raises(ValueError, match="needs b >= 2, got b = 1"):
        losses.vicreg_loss(ES[:1], ET[:1])
    with pytest.raises(ValueError, match=r"branches of one width, got \[3, 6\]"):
        losses.vicreg_loss(ES, np.ones((4, 6)))
    with pytest.raises(ValueError, match="two or more branches"):
        losses.infonce_pairs_loss(ES)
    with pytest.raises(ValueError, match="covariance form 'fast' is unknown"):
        losses.covariance_penalty(ES, form="fast")


def test_constant_view_is_seen_in_the_embedding_std():
    assert losses.embedding_std(np.ones((5, 3))) == 0.0
    z = draw(b=50, n=1)[0]
    np.testing.assert_allclose(losses.embedding_std(z), z.std(0).mean(), rtol=1e-10)
