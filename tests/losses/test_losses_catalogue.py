"""RKD, PKT, FitNet, AT and InfoNCE against published golden values of closed-form arrays."""

import math

import jax
import jax.test_util
import numpy as np
import pytest

from histokd_jax import losses


def array(function, shape):
    return np.vectorize(function)(np.arange(math.prod(shape), dtype=np.float64)).reshape(shape)


ES = array(lambda k: math.sin(0.5 * k + 0.3), (4, 3))
ET = array(lambda k: math.cos(0.8 * k + 0.6), (4, 3))
VT = array(lambda k: math.cos(0.4 * k + 0.1), (4, 6))
A0S = array(lambda k: math.sin(0.3 * k), (4, 3, 4, 4))
A0T = array(lambda k: math.cos(0.37 * k + 0.2), (4, 3, 4, 4))
A1S = array(lambda k: math.sin(0.23 * k + 0.5), (4, 5, 2, 2))
A1T = array(lambda k: math.cos(0.41 * k), (4, 5, 2, 2))
LS = array(lambda k: 2 * math.sin(0.7 * k + 0.1), (4, 5))
LT = array(lambda k: 3 * math.cos(0.9 * k + 0.2), (4, 5))


def rkd_distance(s, t, **kw):
    return losses.rkd_loss(s, t, distance_weight=1.0, angle_weight=0.0, **kw)


def rkd_angle(s, t, **kw):
    return losses.rkd_loss(s, t, distance_weight=0.0, angle_weight=1.0, **kw)


def infonce_half(s, t):
    return losses.infonce_loss(s, t, temperature=0.5)


GOLDEN = [
    (losses.rkd_loss, ES, VT, 9.6354954874),
    (rkd_distance, ES, VT, 0.1296922778),
    (rkd_angle, ES, VT, 0.1278637709),
    (losses.pkt_loss, ES, ET, 0.4427900310),
    (losses.sp_loss, ES, VT, 0.4509720822),
    (losses.sp_loss, A1S.reshape(4, -1), A1T.reshape(4, -1), 0.0218594362),
    (losses.fitnet_loss, A0S, A0T, 1.0121112795),
    (losses.at_loss, A0S, A0T, 0.0236357940),
    (lambda s, t: losses.at_loss(A0S, A0T) + losses.at_loss(s, t), A1S, A1T, 0.0317996285),
    (losses.infonce_loss, ES, ET, 18.1991844707),
    (infonce_half, ES, ET, 3.0024950123),
    (lambda s, t: losses.mutual_kl(s, t, 4.0), LS, LT, 3.3432362793),
    (lambda s, t: losses.mutual_kl(s, t, 1.0), LS, LT, 2.0102687072),
]


@pytest.mark.parametrize("loss,student,teacher,expected", GOLDEN)
@pytest.mark.parametrize("dtype,tol", [("float64", 1e-8), ("float32", 1e-4)])
def test_golden_value(loss, student, teacher, expected, dtype, tol):
    with jax.enable_x64(True):
        value = jax.jit(loss)(student.astype(dtype), teacher.astype(dtype))
    np.testing.assert_allclose(value, expected, rtol=tol, atol=1e-9)


@pytest.mark.parametrize("loss", [losses.rkd_loss, losses.pkt_loss, losses.fitnet_loss], ids=lambda f: f.__name__)
def test_zero_at_equality(loss):
    with jax.enable_x64(True):
        assert abs(loss(ES, ES)) < 1e-6


def test_rkd_invariant_to_similarity_transform():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    with jax.enable_x64(True):
        np.testing.assert_allclose(losses.rkd_loss(2.5 * ES @ q + 1.0, VT), losses.rkd_loss(ES, VT), rtol=1e-9)


def test_pkt_invariant_to_per_sample_scale():
    scale = np.array([0.5, 2.0, 3.0, 1.0])[:, None]
    with jax.enable_x64(True):
        np.testing.assert_allclose(losses.pkt_loss(ES * scale, ET), losses.pkt_loss(ES, ET), rtol=1e-5)


def test_infonce_of_coincident_embeddings_is_log_b():
    with jax.enable_x64(True):
        np.testing.assert_allclose(losses.infonce_loss(np.ones((5, 3)), np.ones((5, 3))), math.log(5), rtol=1e-9)


@pytest.mark.parametrize(
    "loss,inputs", [(losses.rkd_loss, (ES, VT)), (losses.pkt_loss, (ES, ET)), (losses.infonce_loss, (ES, ET))]
)
def test_gradient_matches_finite_differences(loss, inputs):
    with jax.enable_x64(True):
        jax.test_util.check_grads(loss, inputs, order=1, modes=["rev"], atol=1e-5, rtol=1e-5)


def test_at_refuses_pooled_vectors():
    with pytest.raises(ValueError, match="identically zero"):
        losses.at_loss(ES, ET)


def test_fitnet_refuses_unequal_widths():
    with pytest.raises(ValueError, match="equal shapes"):
        losses.fitnet_loss(ES, VT)
