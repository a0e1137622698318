"""Check 1 of the loss catalogue and F1 of More From Less: golden values, float64 and float32, eager and compiled."""

import math

import jax
import jax.numpy as jnp
import loss_arrays as la
import numpy as np
import pytest
from loss_arrays import A0S, A0T, A1S, A1T, C3, ES, ET, LS, LT, VT, Y

from histokd_jax import losses


def mean(function, **options):
    return lambda *args: jnp.mean(function(*args, **options))


def part(function, k, **options):
    return lambda *args: jnp.mean(function(*args, **options)[k])


HEAD = la.array(lambda k: math.cos(0.45 * k + 0.2), (5, 3))
BIAS = la.array(lambda k: 0.1 * math.sin(k), (5,))
THIRD = la.array(lambda k: math.sin(1.3 * k + 0.4), (4, 5))
GATE = np.asarray(la.array(lambda k: math.sin(0.9 * k + 0.2), (4, 3)))
GATE = np.exp(GATE) / np.exp(GATE).sum(1, keepdims=True)
SIGMAS = (0.25, 0.5, 1.0, 2.0, 4.0)


def srrl(s, t, weight=1.0):
    heads = (x @ jnp.asarray(HEAD.T, x.dtype) + jnp.asarray(BIAS, x.dtype)[None, :] for x in (s, t))
    return jnp.mean(losses.srrl_loss(s, t, *heads, weight=weight))


def ab_two(a0s, a0t, a1s, a1t):
    first, second = losses.doubling_weights(2)
    return jnp.mean(first * losses.ab_loss(a0s, a0t) + second * losses.ab_loss(a1s, a1t))


def vid(s, t):
    # Three identity layers with ReLU between them.
    return jnp.mean(losses.vid_loss(jax.nn.relu(s), t, jnp.full(3, losses.vid_rho(), s.dtype)))


def ofd(s, t):
    return jnp.mean(losses.ofd_loss(s, t, jnp.full(3, -0.5, s.dtype)))


def kdcl(s, t):
    return jnp.mean(losses.kdcl_loss(s, losses.kdcl_target((s, t), Y), temperature=2.0))


def one(k):
    return lambda a, b, c, g: jnp.mean(losses.one_terms((a, b, c), g, Y)[k])


def dml(k):
    return lambda a, b: jnp.mean(losses.dml_loss((a, b))[k])


GOLDEN = {
    "kd T=4": (mean(losses.kd_loss), (LS, LT), 3.3432362793),
    "kd T=1": (mean(losses.kd_loss, temperature=1.0), (LS, LT), 2.0102687072),
    "dkd": (lambda s, t: jnp.mean(losses.dkd_loss(s, t, Y)), (LS, LT), 25.7678671166),
    "tckd": (lambda s, t: jnp.mean(losses.dkd_terms(s, t, Y)[0]), (LS, LT), 0.7132245745),
    "nckd": (lambda s, t: jnp.mean(losses.dkd_terms(s, t, Y)[1]), (LS, LT), 3.1318303178),
    "dist": (losses.dist_loss, (LS, LT), 3.2144190178),
    "dist inter": (part(losses.dist_terms, 0), (LS, LT), 1.5571070859),
    "dist intra": (part(losses.dist_terms, 1), (LS, LT), 1.6573119319),
    "dist tau=4": (lambda s, t: losses.dist_loss(s, t, temperature=4.0), (LS, LT), 51.2604599960),
    "standardised kd": (mean(losses.standardised_kd_loss), (LS, LT), 1.2445411850),
    "dml first": (dml(0), (LS, LT), 2.0102687072),
    "dml second": (dml(1), (LS, LT), 2.4448416617),
    "generalised": (lambda s, t: jnp.mean(losses.generalised_distillation_loss(s, t, Y)), (LS, LT), 2.0882781632),
    "fitnet": (losses.fitnet_loss, (A0S, A0T), 1.0121112795),
    "at": (losses.at_loss, (A0S, A0T), 0.0236357940),
    "at two": (lambda a, b, c, d: losses.at_loss(a, b) + losses.at_loss(c, d), (A0S, A0T, A1S, A1T), 0.0317996285),
    "at pooled": (losses.at_loss, (A0S, A1T), 0.0058978454),
    "at paper": (lambda s, t: losses.at_loss(s, t, form="paper"), (A0S, A0T), 0.6112665553),
    "sp maps": (losses.sp_loss, (A1S.reshape(4, -1), A1T.reshape(4, -1)), 0.0218594362),
    "sp": (losses.sp_loss, (ES, VT), 0.4509720822),
    "sp l1": (lambda s, t: losses.sp_loss(s, t, norm="l1"), (ES, VT), 0.1250422826),
    "cc product": (losses.cc_product_loss, (ES, ET), 3.1076472167),
    "cc bilinear": (lambda s, t: losses.cc_kernel_loss(s, t, form="bilinear"), (ES, ET), 0.4209015204),
    "cc gaussian": (lambda s, t: losses.cc_kernel_loss(s, t, form="kernel_fro"), (ES, ET), 0.1275540523),
    "rkd": (losses.rkd_loss, (ES, VT), 9.6354954874),
    "rkd distance": (lambda s, t: losses.rkd_loss(s, t, distance_weight=1, angle_weight=0), (ES, VT), 0.1296922778),
    "rkd angle": (lambda s, t: losses.rkd_loss(s, t, distance_weight=0, angle_weight=1), (ES, VT), 0.1278637709),
    "pkt": (losses.pkt_loss, (ES, ET), 0.4427900310),
    "ab two": (ab_two, (A0S, A0T, A1S, A1T), 0.2026349308),
    "ab": (mean(losses.ab_loss), (A0S, A0T), 0.2182519156),
    "ft": (mean(losses.ft_loss), (A0S, A0T), 0.1358095803),
    "fsp": (lambda a, b, c, d: jnp.mean(losses.fsp_loss((a, c), (b, d))), (A0S, A0T, A1S, A1T), 0.0316092405),
    "fsp td": (
        lambda a, b, c, d: jnp.mean(losses.fsp_loss((a, c), (b, d), form="column_norms")),
        (A0S, A0T, A1S, A1T),
        4.0545776803,
    ),
    "nst": (mean(losses.nst_loss), (A0S, A0T), 0.5902263139),
    "nst pooled": (mean(losses.nst_loss), (A0S, A1T), 0.5571850745),
    "vid": (vid, (A0S, A0T), 0.8796373696),
    "hcl A0": (mean(losses.hcl_loss), (A0S, A0T), 0.7418349087),
    "hcl A1": (mean(losses.hcl_loss), (A1S, A1T), 1.0008301699),
    "ofd": (ofd, (A0S, A0T), 39.3173435433),
    "ickd": (losses.ickd_loss, (A0S, A0T), 0.3324428908),
    "srrl": (srrl, (ES, ET), 5.8083505696),
    "srrl features": (lambda s, t: srrl(s, t, 0.0), (ES, ET), 1.4019901579),
    "one ce": (one(0), (LS, LT, THIRD, GATE), 9.4936372265),
    "one kl": (one(1), (LS, LT, THIRD, GATE), 2.1678871892),
    "kdcl": (kdcl, (LS, LT), 0.3621217482),
    "coral": (losses.classic_coral_loss, (ES, ET), 0.0096383672),
    "mmd one": (lambda s, t: losses.mmd_loss(s, t, bandwidths=(1.0,)), (ES, ET), 0.0690916734),
    "mmd": (lambda s, t: losses.mmd_loss(s, t, bandwidths=SIGMAS), (ES, ET), 0.4089672634),
    "cmd": (losses.cmd_loss, (ES, ET), 1.2117846045),
    "cmd r=2": (lambda s, t: losses.cmd_loss(s, t, value_range=2.0), (ES, ET), 0.2075181242),
    "hsic": (losses.hsic, (ES, VT), 0.6995806949),
    "cka": (losses.cka, (ES, VT), 0.1286946544),
    "cosine": (mean(losses.cosine_loss), (ES, ET), 1.3637688851),
    "infonce 0.07": (losses.infonce_loss, (ES, ET), 18.1991844707),
    "infonce 0.5": (lambda s, t: losses.infonce_loss(s, t, temperature=0.5), (ES, ET), 3.0024950123),
    "vicreg original": (mean(losses.vicreg_pairwise_loss), (ES, ET), 40.5405536208),
    "barlow 0.0051": (losses.barlow_loss, (ES, ET), 5.7188998339),
    # F1 of More From Less: a, b are ES, ET.
    "F1 vicreg mean": (mean(losses.vicreg_loss), (ES, ET), 85.2017141457),
    "F1 vicreg inv": (part(losses.vicreg_terms, 0), (ES, ET), 2.8039803158),
    "F1 vicreg var": (part(losses.vicreg_terms, 1), (ES, ET), 0.5827499810),
    "F1 vicreg cov direct": (part(losses.vicreg_terms, 2, form="direct"), (ES, ET), 0.5334567250),
    "F1 vicreg cov gram": (part(losses.vicreg_terms, 2, form="gram"), (ES, ET), 0.5334567250),
    "F1 vicreg three": (mean(losses.vicreg_loss), (ES, ET, C3), 157.7905206398),
    "F1 vicreg three inv": (part(losses.vicreg_terms, 0), (ES, ET, C3), 5.3362713195),
    "F1 vicreg three var": (part(losses.vicreg_terms, 1), (ES, ET, C3), 0.9428329079),
    "F1 vicreg three cov": (part(losses.vicreg_terms, 2), (ES, ET, C3), 0.8129149560),
    "F1 original": (mean(losses.vicreg_pairwise_loss), (ES, ET), 40.5405536208),
    "F1 pairwise_original": (mean(losses.vicreg_pairwise_loss), (ES, ET, C3), 86.3390985433),
    "F1 barlow diagonal": (part(losses.barlow_terms, 0), (ES, ET), 5.7172627768),
    "F1 barlow rest direct": (part(losses.barlow_terms, 1, form="direct"), (ES, ET), 0.3209915850),
    "F1 barlow rest gram": (part(losses.barlow_terms, 1, form="gram"), (ES, ET), 0.3209915850),
    "F1 barlow 0.005": (lambda s, t: losses.barlow_loss(s, t, off_diagonal=0.005), (ES, ET), 5.7188677347),
    "F1 infonce": (mean(losses.infonce_pairs_loss), (ES, ET), 3.0024950123),
    "F1 infonce three": (mean(losses.infonce_pairs_loss), (ES, ET, C3), 6.3835387943),
}
LOOSE = {"pkt", "rkd", "rkd distance", "rkd angle"}


@pytest.fixture(scope="module")
def compiled():
    """{dtype: {name: value}}, every loss in one compiled program per dtype."""
    found = {}
    for dtype in ("float64", "float32"):
        with jax.enable_x64(True):
            args = {name: [jnp.asarray(a, dtype) for a in entry[1]] for name, entry in GOLDEN.items()}
            found[dtype] = jax.jit(lambda given: {name: GOLDEN[name][0](*given[name]) for name in given})(args)
    return found


@pytest.mark.parametrize("name", GOLDEN)
def test_check_1_golden_values_float64_and_float32_eager_and_compiled(name, compiled):
    function, args, expected = GOLDEN[name]
    with jax.enable_x64(True):
        # Ten printed digits; the tolerance of the specification is 1e-8.
        np.testing.assert_allclose(function(*map(jnp.asarray, args)), expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(compiled["float64"][name], expected, rtol=1e-8, atol=1e-10)
    assert compiled["float32"][name].dtype == jnp.float32
    np.testing.assert_allclose(compiled["float32"][name], expected, rtol=1e-4 if name in LOOSE else 1e-5)


def test_F1_loss_per_sample():
    with jax.enable_x64(True):
        two, three = losses.vicreg_loss(ES, ET), losses.vicreg_loss(ES, ET, C3)
    np.testing.assert_allclose(two, [64.9226580215, 122.0683147018, 115.1694924437, 38.6463914160], rtol=1e-9)
    np.testing.assert_allclose(three, [120.4224796876, 234.7925198597, 206.4596637277, 69.4874193243], rtol=1e-9)


def test_F1_gradients():
    with jax.enable_x64(True):
        mean_grad = jax.grad(lambda a: jnp.mean(losses.vicreg_loss(a, ET)))(jnp.asarray(ES))
        a_grad, c_grad = jax.grad(lambda a, c: jnp.sum(losses.vicreg_loss(a, ET, c)), (0, 1))(
            *map(jnp.asarray, (ES, C3))
        )
    np.testing.assert_allclose(mean_grad[0], [-4.9804400208, 2.7270133834, 10.2396170971], rtol=1e-9)
    np.testing.assert_allclose(a_grad[0], [-16.6933975542, 2.7013170498, 50.5616352174], rtol=1e-9)
    np.testing.assert_allclose(c_grad[3], [-0.4009319007, -7.1516759311, 36.1045223665], rtol=1e-9)


def test_F1_infonce_directions():
    def direction(a, b):
        logits = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T / 0.5
        return np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))

    np.testing.assert_allclose([direction(ES, ET), direction(ET, ES)], [3.0163431514, 2.9886468731], rtol=1e-9)


def test_check_6_kd_is_the_sum_of_its_decoupled_terms():
    with jax.enable_x64(True):
        t = jax.nn.softmax(jnp.asarray(LT) / 4.0)
        binary, others = losses.dkd_terms(LS, LT, Y)
        own = t[jnp.arange(4), Y]
        np.testing.assert_allclose(binary + (1.0 - own) * others, losses.kd_loss(LS, LT), rtol=1e-10)


def test_check_6_gradient_of_kd():
    with jax.enable_x64(True):
        found = jax.grad(lambda s: jnp.mean(losses.kd_loss(s, LT)))(jnp.asarray(LS))
        expected = 4.0 * (jax.nn.softmax(LS / 4.0) - jax.nn.softmax(LT / 4.0)) / 4.0
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)
