"""Checks 2 to 5, 7 to 10 and 12 of the loss catalogue, for every entry of the table.

Where the number of examples does not matter it is 4, so that few shapes are compiled.
"""

import jax
import jax.numpy as jnp
import jax.test_util
import loss_arrays as la
import numpy as np
import pytest

from histokd_jax import losses
from histokd_jax.losses import catalogue, maps

# Not 0 at equality: by definition (joint embeddings, dependence, logarithm of a sum), or with learned variances.
NONZERO = {"infonce", "infonce_pairs", "vicreg", "vicreg_original", "barlow", "hsic", "srd", "generalised", "vid"}
NONZERO |= {"kdcl", "ab", "ofd"}  # kdcl: the target is no peer; ab, ofd: s = t may lie inside the margin


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", sorted(set(la.STATELESS) - NONZERO))
def test_check_2_zero_at_equality(name, float64):
    s, _ = la.pair(name, 4)
    assert abs(la.value(name, s, s)) < 1e-6


def test_check_2_vid_at_equality_is_half_the_mean_log_variance(float64):
    s, _ = la.pair("vid", 4)
    np.testing.assert_allclose(la.value("vid", s, s), 0.5 * np.log(5.0), rtol=1e-9)


def test_check_2_ab_and_ofd_are_zero_behind_their_margins(float64):
    t = la.pair("ab", 4)[1]
    assert abs(la.value("ab", np.where(t > 0, 2.0, -2.0), t)) == 0.0
    margin = losses.ofd_margin(jnp.ones(5), jnp.zeros(5))
    assert abs(la.value("ofd", np.maximum(t, margin), t)) < 1e-12


@pytest.mark.parametrize("name", sorted(n for n in la.STATELESS if catalogue.CATALOGUE[n].reads == catalogue.LOGITS))
def test_check_3_losses_on_logits_hold_the_teacher_constant(name, float64):
    s, t = map(jnp.asarray, la.pair(name, 4))
    gradient = jax.grad(lambda x: la.value(name, s, x))(t)
    trained = catalogue.CATALOGUE[name].trains_teacher
    assert (np.abs(gradient).max() > 0) if trained else not np.any(gradient)


DEGENERATE = {
    "zeros": lambda x: np.zeros_like(x),
    "constant": lambda x: np.full_like(x, 0.7),
    "repeated": lambda x: np.repeat(x[:1], len(x), axis=0),
    "confident": lambda x: 100.0 * (np.arange(x.size).reshape(x.shape) % x.shape[-1] == 0) - 50.0,
}


@pytest.mark.parametrize("name", la.STATELESS)
def test_check_4_gradients_are_finite_on_degenerate_input(name):
    def total(s, t):
        return la.value(name, s, t)

    gradient = jax.jit(jax.value_and_grad(total, (0, 1)))
    for b in (2, 4):
        s, t = jax.tree.map(np.float32, la.pair(name, b))
        for make in DEGENERATE.values():
            for case in ((make, None), (None, make), (make, make)):
                inputs = (x if f is None else jax.tree.map(f, x) for f, x in zip(case, (s, t)))
                assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient(*inputs))), case


# kdcl's target is built from the student too and held constant: its gradient is no total derivative.
@pytest.mark.parametrize("name", la.quick(set(la.STATELESS) - {"kdcl"}))
def test_check_7_gradient_matches_finite_differences(name, float64):
    s, t = la.pair(name, 4, seed=3, scale=0.6)
    # The default bandwidth of MMD follows the data but is held constant in the gradient.
    fixed = {"bandwidths": (1.0, 2.0)} if name == "mmd" else {}

    def total(x):
        return la.value(name, x, t, **fixed)

    x = jax.tree.map(jnp.asarray, s)
    direction = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(9).normal(size=a.shape)), x)
    step = 1e-6

    def moved(h):
        return total(jax.tree.map(lambda a, d: a + h * d, x, direction))

    numeric = (moved(step) - moved(-step)) / (2 * step)
    if name == "dml":
        numeric = numeric_of_own_part(x, t, direction, step)
    exact = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(total)(x), direction)))
    np.testing.assert_allclose(exact, numeric, rtol=2e-5, atol=1e-7)


def numeric_of_own_part(x, t, direction, step):
    """DML holds each network constant in the other's term."""
    own = [jnp.mean(losses.dml_loss((x + h * direction, t))[0]) for h in (step, -step)]
    return (own[0] - own[1]) / (2 * step)


@pytest.mark.parametrize("name", la.STATELESS)
def test_masked_equals_subset_in_value_and_gradient_whatever_the_masked_rows_hold(name, float64):
    entry = catalogue.CATALOGUE[name]
    s, t = la.pair(name, 6)
    where = np.array([True, False, True, True, False, True])
    rows = lambda x: x[where]  # noqa: E731
    spoiled = jax.tree.map(lambda x: np.where(where.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan), (s, t))
    if entry.needs == (catalogue.LABEL,):
        # The labels of the kept rows, which the subset numbers anew.
        def subset_value(a, b):
            found = entry.function(a, b, jnp.arange(6)[where] % 6, where=None)
            return jnp.mean(found)
    else:

        def subset_value(a, b):
            return la.value(name, a, b)

    masked = jax.value_and_grad(lambda a: la.value(name, a, spoiled[1], where=jnp.asarray(where)))
    value, gradient = masked(jax.tree.map(jnp.asarray, spoiled[0]))
    expected, expected_gradient = jax.value_and_grad(lambda a: subset_value(a, jax.tree.map(rows, t)))(
        jax.tree.map(lambda x: jnp.asarray(x[where]), s)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
    for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient)):
        np.testing.assert_allclose(found[where], wanted, rtol=1e-7, atol=1e-10)
        np.testing.assert_array_equal(found[~where], 0.0)


@pytest.mark.parametrize("name", la.quick(la.STATELESS, la.QUICK | {"cc_product"}))
def test_check_8_permuting_the_batch_changes_nothing_but_the_product_form(name, float64):
    entry, order = catalogue.CATALOGUE[name], np.array([3, 0, 1, 2])
    s, t = la.pair(name, 4)
    if catalogue.LABEL in entry.needs:
        found = jnp.mean(entry.function(s[order], t[order], jnp.asarray(order % 6)))
    else:
        found = la.value(name, *jax.tree.map(lambda x: x[order], (s, t)))
    same = np.isclose(found, la.value(name, s, t), rtol=1e-9)
    assert same != entry.ordered


@pytest.mark.parametrize("name", la.STATELESS)
def test_values_are_per_example_where_the_table_says_so(name):
    s, t = jax.tree.map(np.float32, la.pair(name, 4))
    found = jax.eval_shape(lambda a, b: la.value(name, a, b, each=True), s, t)
    assert found.shape == ((4,) if catalogue.CATALOGUE[name].per_example else ()) and found.dtype == jnp.float32


@pytest.mark.parametrize("name", la.quick(n for n in la.STATELESS if not catalogue.CATALOGUE[n].couples_batch))
def test_check_9_losses_that_do_not_couple_are_means_of_per_shard_values(name, float64):
    s, t = la.pair(name, 6)
    extra = la.extras(name, jax.tree.leaves(s)[0], 6)
    if catalogue.LABEL in catalogue.CATALOGUE[name].needs:
        function = catalogue.CATALOGUE[name].function
        parts = [jnp.mean(function(s[k : k + 3], t[k : k + 3], extra[0][k : k + 3])) for k in (0, 3)]
    else:
        parts = [la.value(name, *jax.tree.map(lambda x, k=k: x[k : k + 3], (s, t))) for k in (0, 3)]
    np.testing.assert_allclose(np.mean(parts), la.value(name, s, t), rtol=1e-10)


def rotation(d, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


@pytest.mark.parametrize("name", ["rkd", "sp", "cc", "pkt", "cka", "hsic"])
@pytest.mark.parametrize("seed", range(3))
def test_check_5_invariant_to_rotation(name, seed, float64):
    s, t = la.pair(name, 6, seed)
    np.testing.assert_allclose(la.value(name, s @ rotation(5, seed), t), la.value(name, s, t), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["rkd", "sp", "cka"])
def test_check_5_invariant_to_global_scale(name, float64):
    s, t = la.pair(name, 6)
    np.testing.assert_allclose(la.value(name, 3.7 * s, t), la.value(name, s, t), rtol=1e-7)


@pytest.mark.parametrize("name", ["rkd", "coral", "mmd", "cka"])
def test_check_5_translation(name, float64):
    s, t = la.pair(name, 6)
    both = name == "mmd"
    np.testing.assert_allclose(la.value(name, s + 2.0, t + 2.0 * both), la.value(name, s, t), rtol=1e-7)


@pytest.mark.parametrize("name", ["pkt", "cosine", "at", "nst", "ft", "infonce_pairs", "cc"])
def test_check_5_invariant_to_the_positive_scale_of_an_example(name, float64):
    s, t = la.pair(name, 4)
    scale = np.array([0.5, 2.0, 3.0, 10.0]).reshape(-1, *[1] * (s.ndim - 1))
    np.testing.assert_allclose(la.value(name, s * scale, t), la.value(name, s, t), rtol=1e-5)


@pytest.mark.parametrize("name", ["at", "nst"])
def test_check_5_invariant_to_channel_permutation_and_sign(name, float64):
    s, t = la.pair(name, 4)
    changed = -s[:, [2, 0, 1]]
    np.testing.assert_allclose(la.value(name, changed, t), la.value(name, s, t), rtol=1e-10)


@pytest.mark.parametrize("name,change", [("kd", 1.0), ("standardised_kd", 2.5)])
def test_check_5_logit_rows(name, change, float64):
    s, t = la.pair(name, 4)
    moved = change * s + np.arange(4.0)[:, None]
    np.testing.assert_allclose(la.value(name, moved, t), la.value(name, s, t), rtol=1e-6)
    assert not np.isclose(la.value(name, s * np.linspace(1, 2, 6), t), la.value(name, s, t))


def test_kd_at_high_temperature_is_the_squared_difference_of_centred_logits(float64):
    s, t = la.pair("kd", 4)
    centred = lambda z: z - z.mean(1, keepdims=True)  # noqa: E731
    expected = np.mean(np.sum((centred(s) - centred(t)) ** 2, axis=1)) / (2 * 6)
    np.testing.assert_allclose(jnp.mean(losses.kd_loss(s, t, temperature=1e4)), expected, rtol=1e-3)


def test_dist_is_bounded_and_invariant_to_affine_probabilities(float64):
    for seed in range(5):
        s, t = la.pair("dist", 4, seed, scale=3.0)
        assert 0.0 <= losses.dist_loss(s, t) <= 4.0


def test_kdcl_targets_are_no_worse_than_any_peer(float64):
    rng, y = np.random.default_rng(0), jnp.arange(8) % 5
    peers = tuple(rng.normal(size=(8, 5)) * 2 for _ in range(3))
    own = jnp.stack([losses.cross_entropy(p, y) for p in peers])
    for kind in ("naive", "min_logit", "linear"):
        target = losses.kdcl_target(peers, y, kind=kind)
        assert np.all(losses.cross_entropy(target, y) <= own.min(0) + 1e-3), kind
    weights = jnp.array([0.2, 0.3, 0.5])
    general = losses.kdcl_target(peers, y, kind="general", weights=weights)
    np.testing.assert_allclose(general, 0.2 * peers[0] + 0.3 * peers[1] + 0.5 * peers[2])
    with pytest.raises(ValueError, match="weights are given exactly"):
        losses.kdcl_target(peers, y, weights=weights)


def test_one_and_dml_of_identical_networks(float64):
    z, gate = np.random.default_rng(0).normal(size=(3, 5)), np.full((3, 3), 1 / 3)
    np.testing.assert_allclose(losses.gated_ensemble((z, z, z), gate), z)
    assert np.abs(losses.one_terms((z, z, z), gate, jnp.zeros(3, jnp.int32))[1]).max() < 1e-4
    assert not np.any(jax.grad(lambda x: jnp.sum(losses.mutual_loss(x, x)))(z).round(12))
    np.testing.assert_allclose(losses.one_ramp(80.0), 1.0)
    np.testing.assert_allclose(losses.one_ramp(0.0), np.exp(-5.0), rtol=1e-6)


def test_unbiased_hsic_against_the_explicit_sum_and_cka_of_independent_data(float64):
    s, t = la.pair("hsic", 7)
    k, l = s @ s.T, t @ t.T
    np.fill_diagonal(k, 0), np.fill_diagonal(l, 0)
    one = np.ones(7)
    expected = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / (6 * 5) - 2 / 5 * one @ k @ l @ one
    np.testing.assert_allclose(losses.hsic(s, t, unbiased=True), expected / (7 * 4), rtol=1e-9)
    assert losses.cka(s, t) > 0.2 > abs(losses.cka(s, t, unbiased=True)) / 2, "the biased form is large for few rows"
    with pytest.raises(ValueError, match="b >= 4"):
        losses.cka(s[:3], t[:3], unbiased=True)


def test_mmd_bandwidth_is_the_median_of_distinct_pairs(float64):
    from histokd_jax.losses import kernels

    s, t = la.pair("mmd", 4)
    both = np.concatenate([s, t])
    square = ((both[:, None] - both[None]) ** 2).sum(-1)
    median = np.median(square[~np.eye(8, dtype=bool)])
    np.testing.assert_allclose(kernels.median_bandwidths(s, t, multiples=(1.0, 2.0)), [median, 2 * median], rtol=1e-9)


def adaptive_reference(x, size):
    h, w = x.shape[2:]
    out = np.zeros((*x.shape[:2], size, size))
    for i in range(size):
        for j in range(size):
            rows, cols = slice(i * h // size, -(-(i + 1) * h // size)), slice(j * w // size, -(-(j + 1) * w // size))
            out[:, :, i, j] = x[:, :, rows, cols].mean((2, 3))
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_check_10_adaptive_pooling_of_sizes_that_do_not_divide(size, float64):
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 5))
    np.testing.assert_allclose(maps.adaptive_average_pool(x, (size, size)), adaptive_reference(x, size), rtol=1e-12)


@pytest.mark.parametrize("name", ["at", "ft", "nst", "vid"])
def test_check_10_student_larger_and_smaller(name, float64):
    rng = np.random.default_rng(0)
    large, small = rng.normal(size=(2, 3, 5, 5)), rng.normal(size=(2, 3, 2, 2))
    pooled = adaptive_reference(large, 2)
    for s, t, s2, t2 in ((large, small, pooled, small), (small, large, small, pooled)):
        np.testing.assert_allclose(la.value(name, s, t), la.value(name, s2, t2), rtol=1e-9)


def test_check_10_fsp_rejects_unequal_channels():
    lower, upper = np.ones((2, 3, 4, 4)), np.ones((2, 5, 2, 2))
    with pytest.raises(ValueError, match="fsp_loss needs equal channels.*connector that maps 5 to 4"):
        losses.fsp_loss((lower, upper), (lower, np.ones((2, 4, 2, 2))))


def test_check_12_vid_variance_converges_to_the_mean_squared_residual(float64):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(64, 3)), rng.normal(size=(64, 3)) * np.array([0.5, 1.0, 3.0])
    rho = jnp.full(3, losses.vid_rho())
    np.testing.assert_allclose(rho[0], 4.9932291827, rtol=1e-9)
    gradient = jax.jit(jax.grad(lambda r: jnp.mean(losses.vid_loss(s, t, r))))
    for _ in range(4000):
        rho = rho - 3.0 * gradient(rho)
    np.testing.assert_allclose(jax.nn.softplus(rho) + 1e-5, ((s - t) ** 2).mean(0), rtol=1e-3)


@pytest.mark.parametrize("name", la.quick(set(la.STATELESS) - {"fsp"}, {"kd", "sp", "mmd"}))
def test_losses_are_vmap_safe(name, float64):
    pairs = [la.pair(name, 4, seed) for seed in (0, 1)]
    s, t = (np.stack([p[k] for p in pairs]) for k in (0, 1))
    found = jax.vmap(lambda a, b: la.value(name, a, b))(s, t)
    np.testing.assert_allclose(found, [la.value(name, *p) for p in pairs], rtol=1e-9)


def test_widths_may_differ_exactly_where_the_table_says_so():
    for name in la.STATELESS:
        entry = catalogue.CATALOGUE[name]
        if entry.reads != catalogue.VECTOR:
            continue
        s, t = np.ones((4, 5), np.float32), np.ones((4, 3), np.float32)
        if entry.same_width:
            with pytest.raises(ValueError, match=r"\(4, 5\)|\[5, 3\]|width"):
                jax.eval_shape(lambda a, b, n=name: la.value(n, a, b), s, t)
        else:
            assert jax.eval_shape(lambda a, b, n=name: la.value(n, a, b), s, t).shape == (), name


def test_unknown_term_lists_the_known_ones_with_the_nearest():
    with pytest.raises(
        ValueError, match="term 'vicregg' is unknown; did you mean 'vicreg'.*Known terms: ab, at, barlow"
    ):
        catalogue.entry("vicregg")
    with pytest.raises(ValueError, match="'kdsvd' is not offered: its value depends"):
        catalogue.entry("kdsvd")
    with pytest.raises(ValueError, match="'kd' has no option 'tau'; it has .'temperature'."):
        catalogue.checked_options("kd", {"tau": 1})


def test_a_batch_of_one_is_refused_by_every_coupled_loss():
    for name in la.COUPLED:
        if name in ("ickd", "srd"):  # coupled through a division or a logarithm only: defined for one example
            continue
        with pytest.raises(ValueError, match="b >= 2|batch"):
            la.value(name, *jax.tree.map(np.float32, la.pair(name, 1)))
