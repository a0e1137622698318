"""Checks A to D of the MKD specification: cross entropy, SP, CORAL, orthogonality, mutual learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax import losses

H_P = np.array([[1.0, 0.0], [0.0, 2.0]])
H_M = np.array([[1.0, 1.0], [1.0, 0.0]])
H_G = np.array([[0.0, 1.0], [-1.0, 1.0]])
Z_P = np.array([[2.0, 0.0], [0.0, 1.0]])
Z_M = np.array([[1.0, 0.0], [0.0, 3.0]])
Z_G = np.array([[0.0, 0.0], [1.0, -1.0]])
Y = np.array([0, 1])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(d, seed=1):
    return np.linalg.qr(draw(d, d, seed=seed))[0]


def sp_reference(a, b):
    def unit_gram(x):
        gram = x @ x.T
        return gram / np.maximum(np.linalg.norm(gram, axis=1, keepdims=True), 1e-12)

    return np.sum((unit_gram(a) - unit_gram(b)) ** 2) / len(a) ** 2


def coral_reference(a, b):
    d = a.shape[1]
    mean = np.sum((a.mean(0) - b.mean(0)) ** 2) / d
    return mean + np.sum((np.cov(a.T) - np.cov(b.T)) ** 2) / d**2


def close(actual, expected, tol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype,tol", [("float64", 6e-11), ("float32", 1e-5)])
def test_check_A_numeric_fixture(dtype, tol):
    p, m, g, zp, zm, zg = (jnp.asarray(x, dtype) for x in (H_P, H_M, H_G, Z_P, Z_M, Z_G))
    sp = [losses.sp_loss(p, m), losses.sp_loss(p, g)]
    close(sp, [0.1992330139, 0.1992330139], tol)
    skd = 2 * sum(sp)
    close(skd, 0.7969320556, tol)
    coral = [losses.coral_loss(m, p), losses.coral_loss(g, p), losses.coral_loss(g, m)]
    close(coral, [1.375, 2.0, 1.375], tol)
    pairs = [losses.non_orthogonality(a, b) for a, b in ((m, p), (g, p), (g, m))]
    close(pairs, [0.5, 1.0, 0.0], tol)
    orth = losses.orth_loss(p, m, g)
    close(orth, 0.25, tol)
    ce = [jnp.mean(losses.cross_entropy(z, Y)) for z in (zp, zm, zg)]
    close(ce, [0.2200948493, 0.1809245195, 1.4100375958], tol)
    close(sum(ce), 1.8110569646, tol)
    kl = [losses.mutual_kl(*pair, 4.0) for pair in ((zp, zm), (zm, zp), (zp, zg), (zg, zp))]
    close(kl, [0.2900096195, 0.2985648343, 0.7970939018, 0.8005584156], tol)
    close(sum(kl), 2.1862267711, tol)
    close(sum(ce) + sum(coral) + orth + skd + sum(kl), 9.7942157914, tol)


def test_check_B1_sp_zero_at_equality():
    a = draw(5, 3)
    close(losses.sp_loss(a, a), 0.0)


def test_sp_matches_numpy():
    a, b = draw(6, 4), draw(6, 7, seed=2)
    close(losses.sp_loss(a, b), sp_reference(a, b))


def test_check_B2_skd_rotation_invariance():
    a, b = draw(6, 4), draw(6, 5, seed=2)
    base = losses.sp_loss(a, b)
    close(losses.sp_loss(a @ rotation(4), b), base)
    close(losses.sp_loss(a, b @ rotation(5)), base)


@pytest.mark.parametrize("scale", [3.0, -0.2])
def test_check_B3_skd_scale_invariance(scale):
    a, b = draw(6, 4), draw(6, 4, seed=2)
    close(losses.sp_loss(scale * a, b), losses.sp_loss(a, b))


def test_check_B4_skd_not_invariant_to_per_sample_scaling():
    a, b = draw(6, 4), draw(6, 4, seed=2)
    scaled = a * np.array([5.0, 1, 1, 1, 1, 1])[:, None]
    assert abs(losses.sp_loss(scaled, b) - losses.sp_loss(a, b)) > 1e-3


def test_check_B5_skd_symmetric():
    a, b = draw(6, 4), draw(6, 3, seed=2)
    close(losses.sp_loss(a, b), losses.sp_loss(b, a))


@pytest.mark.parametrize("seed", range(10))
def test_check_B6_skd_bounds(seed):
    b = 3 + seed
    a, c = draw(b, 2, seed=seed), draw(b, 2, seed=seed + 100)
    assert 0 <= losses.sp_loss(a, c) <= 4 / b
    assert losses.sp_loss(np.abs(a), np.abs(c)) <= 2 / b + 1e-12


def test_check_B7_skd_joint_permutation():
    a, b, order = draw(6, 4), draw(6, 4, seed=2), np.array([3, 1, 5, 0, 2, 4])
    close(losses.sp_loss(a[order], b[order]), losses.sp_loss(a, b))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_check_B8_skd_finite_for_zero_row(dtype):
    a, b = draw(5, 4).astype(dtype), draw(5, 4, seed=2).astype(dtype)
    a[2] = 0
    value, grads = jax.value_and_grad(losses.sp_loss, (0, 1))(a, b)
    close(value, sp_reference(a.astype("float64"), b.astype("float64")), 1e-6)
    for g in grads:
        assert np.all(np.isfinite(g)) and np.abs(g).max() < 10


def orthogonal_triplets(b=5, d=9):
    q = np.stack([rotation(d, seed=i)[:, :3].T for i in range(b)])
    return q[:, 0], q[:, 1], q[:, 2]


def test_check_C1_or_zero_for_orthogonal_triplets():
    close(losses.orth_loss(*orthogonal_triplets()), 0.0)


@pytest.mark.parametrize("form,power", [("inner_abs_of_mean", 2), ("inner_mean_of_abs", 2), ("cosine_abs_of_mean", 0)])
def test_check_C2_or_scales_quadratically(form, power):
    x = [draw(5, 4, seed=i) for i in range(3)]
    base = losses.orth_loss(*x, form=form)
    close(losses.orth_loss(*(3.0 * v for v in x), form=form), 3.0**power * base)


def test_check_C3_or_sign_flip():
    p, m, g = (draw(5, 4, seed=i) for i in range(3))
    close(losses.orth_loss(p, m, -g), losses.orth_loss(p, m, g))


def test_check_C4_or_forms_differ_on_cancelling_products():
    a, b = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [-1.0, 0.0]])
    close(losses.orth_loss(a, b, alpha=0.7, form="inner_abs_of_mean"), 0.0)
    close(losses.orth_loss(a, b, alpha=0.7, form="inner_mean_of_abs"), 0.7)


def test_or_cosine_form_matches_numpy():
    a, b = draw(6, 4), draw(6, 4, seed=2)
    cosine = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    close(losses.orth_loss(a, b, alpha=6.0, form="cosine_abs_of_mean"), 6 * abs(cosine.mean()))


def test_or_subgradient_at_zero_is_zero():
    p, m, _ = orthogonal_triplets()
    grad = jax.grad(losses.orth_loss)(np.zeros_like(p), m)
    np.testing.assert_array_equal(grad, 0.0)


def test_check_C5_coral_zero_for_permuted_copy():
    a = draw(6, 4)
    close(losses.coral_loss(a, a[::-1]), 0.0)


def test_coral_matches_numpy():
    a, b = draw(6, 4), draw(6, 4, seed=2) + 0.5
    close(losses.coral_loss(a, b), coral_reference(a, b))


def test_check_C6_coral_common_rotation():
    a, b, q = draw(6, 4), draw(6, 4, seed=2) + 0.5, rotation(4)
    base = losses.coral_loss(a, b)
    close(losses.coral_loss(a @ q, b @ q), base)
    assert abs(losses.coral_loss(a @ q, b) - base) > 1e-3


COUPLED = [
    losses.sp_loss,
    losses.coral_loss,
    losses.orth_loss,
    losses.rkd_loss,
    losses.pkt_loss,
    losses.infonce_loss,
]


@pytest.mark.parametrize("loss", COUPLED, ids=lambda f: f.__name__)
def test_check_C7_single_sample_is_refused(loss):
    with pytest.raises(ValueError, match="b >= 2"):
        loss(np.ones((1, 3)), np.ones((1, 3)))


def test_check_D1_kl_zero_up_to_a_row_constant():
    z = draw(5, 3)
    close(losses.mutual_kl(z, z + draw(5, 1, seed=3)), 0.0)


def test_check_D2_kl_gradient_identity():
    a, b, temperature = draw(5, 3), draw(5, 3, seed=2), 4.0
    grad_a, grad_b = jax.grad(losses.mutual_kl, (0, 1))(a, b, temperature)
    expected = temperature / 5 * (jax.nn.softmax(a / temperature) - jax.nn.softmax(b / temperature))
    close(grad_a, expected)
    np.testing.assert_array_equal(grad_b, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_check_D3_kl_positive(seed):
    assert losses.mutual_kl(draw(5, 3, seed=seed), draw(5, 3, seed=seed + 50)) > 0


TWO_SIDED = {
    "sp": losses.sp_loss,
    "coral": losses.coral_loss,
    "or": losses.orth_loss,
    "kl": losses.mutual_kl,
    "rkd": losses.rkd_loss,
    "pkt": losses.pkt_loss,
    "fitnet": losses.fitnet_loss,
    "infonce": losses.infonce_loss,
}


@pytest.mark.parametrize("name", TWO_SIDED)
def test_mask_equals_subset(name):
    """Masked rows, NaN included, change neither value nor gradient and receive a gradient of exactly zero."""
    loss, keep = TWO_SIDED[name], np.array([True, False, True, True, False, True])
    a, b = draw(6, 4), draw(6, 4, seed=2)
    dirty_a, dirty_b = (np.where(keep[:, None], x, np.nan) for x in (a, b))
    value, grads = jax.value_and_grad(lambda x, y: loss(x, y, where=keep), (0, 1))(dirty_a, dirty_b)
    expected, expected_grads = jax.value_and_grad(lambda x, y: loss(x, y), (0, 1))(a[keep], b[keep])
    close(value, expected)
    for g, e in zip(grads, expected_grads):
        close(g[keep], e)
        np.testing.assert_array_equal(g[~keep], 0.0)


def test_cross_entropy_mask_and_reference():
    z, y, keep = draw(4, 3), np.array([0, 2, 1, 7]), np.array([True, True, True, False])
    z[3] = np.nan
    expected = [np.log(np.exp(z[i]).sum()) - z[i, y[i]] for i in range(3)]
    value = losses.cross_entropy(z, y, where=keep)
    close(value[:3], expected)
    assert value[3] == 0
    grad = jax.grad(lambda x: losses.cross_entropy(x, y, where=keep).sum())(z)
    assert np.all(np.isfinite(grad)) and np.all(grad[3] == 0)


@pytest.mark.parametrize("name", TWO_SIDED)
def test_finite_on_degenerate_input(name):
    """All zeros, constants and confident values have finite values and gradients in float32."""
    for a, b in ((np.zeros((3, 4)), np.ones((3, 4))), (50 * np.eye(3, 4), -50 * np.eye(3, 4)), (np.ones((2, 4)),) * 2):
        value, grads = jax.value_and_grad(TWO_SIDED[name], (0, 1))(a.astype("float32"), b.astype("float32"))
        assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads)


def test_losses_accumulate_bfloat16_in_float32():
    a, b = (jnp.asarray(draw(6, 4, seed=i), jnp.bfloat16) for i in (0, 2))
    value = losses.sp_loss(a, b)
    assert value.dtype == jnp.float32
    close(value, sp_reference(np.asarray(a, "float64"), np.asarray(b, "float64")), 1e-6)


def test_unknown_orthogonality_form():
    with pytest.raises(ValueError, match="inner_abs_of_mean"):
        losses.orth_loss(draw(3, 2), draw(3, 2), form="cosine")
