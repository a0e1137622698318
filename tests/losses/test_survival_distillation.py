"""Hazard and rank distillation against plain loops, identities, gradients and masks."""

import jax
import jax.test_util
import numpy as np
import pytest

from histokd_jax import losses

RNG = np.random.default_rng(1)
S, T = RNG.normal(size=(6, 4)), RNG.normal(size=(6, 4))
BINS = np.array([0, 1, 2, 3, 3, 1])
WHERE = np.array([True, False, True, True, False, True])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def distribution(logits):
    """K + 1 probabilities per patient: death in each bin, or survival of all."""
    h = sigmoid(logits)
    s = np.concatenate([np.ones((len(h), 1)), np.cumprod(1 - h, axis=1)], axis=1)
    return np.concatenate([s[:, :-1] * h, s[:, -1:]], axis=1)


def numpy_hazard_kl(s, t, bins, temperature):
    p, q = sigmoid(t / temperature), sigmoid(s / temperature)
    kl = temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    return np.array([row[: y + 1].mean() for row, y in zip(kl, bins, strict=True)])


def numpy_order(s, t, temperature):
    total = weight = 0.0
    for i in range(len(s)):
        for j in range(i):
            hi, lo = (i, j) if t[i] > t[j] else (j, i)
            total += (t[hi] - t[lo]) * np.log1p(np.exp(-(s[hi] - s[lo]) / temperature))
            weight += t[hi] - t[lo]
    return total / weight


def test_at_risk_ends_with_the_bin_of_follow_up():
    np.testing.assert_array_equal(losses.at_risk_mask(np.array([0, 2]), 4), [[1, 0, 0, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_hazard_kl_matches_the_plain_loop(temperature):
    with jax.enable_x64(True):
        mask = losses.at_risk_mask(BINS, 4)
        value = losses.hazard_kl(S, T, at_risk=mask, temperature=temperature)
        whole = losses.hazard_kl(S, T, temperature=temperature)
    np.testing.assert_allclose(value, numpy_hazard_kl(S, T, BINS, temperature), rtol=1e-10)
    np.testing.assert_allclose(whole, numpy_hazard_kl(S, T, np.full(6, 3), temperature), rtol=1e-10)


def test_event_distribution_kl_is_the_kl_of_the_distributions():
    p, q = distribution(T), distribution(S)
    np.testing.assert_allclose(p.sum(1), 1.0)
    with jax.enable_x64(True):
        value = losses.event_distribution_kl(S, T)
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum(1), rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_risk_order_loss_matches_the_plain_loop(temperature):
    with jax.enable_x64(True):
        value = losses.risk_order_loss(S[:, 0], T[:, 0], temperature=temperature)
        scaled = losses.risk_order_loss(S[:, 0] + 3.0, 5.0 * T[:, 0] - 1.0, temperature=temperature)
    np.testing.assert_allclose(value, numpy_order(S[:, 0], T[:, 0], temperature), rtol=1e-10)
    np.testing.assert_allclose(scaled, value, rtol=1e-10)


def test_following_the_gradient_of_the_order_loss_sorts_like_the_target():
    risk, target = S[:, 0].copy(), T[:, 0]
    with jax.enable_x64(True):
        step = jax.jit(jax.grad(lambda x: losses.risk_order_loss(x, target)))
        for _ in range(400):
            risk = risk - 2.0 * step(risk)
    np.testing.assert_array_equal(np.argsort(risk), np.argsort(target))


def order(s, t, **kw):
    return losses.risk_order_loss(s[:, 0], t[:, 0], **kw)


ALL = [losses.hazard_kl, losses.event_distribution_kl, order]


@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_gradient_goes_to_the_trained_side_only(loss):
    with jax.enable_x64(True):
        jax.test_util.check_grads(lambda s: loss(s, T).sum(), (S,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
        np.testing.assert_array_equal(jax.grad(lambda t: loss(S, t).sum())(T), 0.0)


@pytest.mark.parametrize("loss", ALL, ids=lambda f: f.__name__)
def test_masked_rows_do_not_count(loss):
    dirty = [np.where(WHERE[:, None], x, np.nan) for x in (S, T)]
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(lambda s: loss(s, dirty[1], where=WHERE).sum())(dirty[0])
        expected, inner = jax.value_and_grad(lambda s: loss(s, T[WHERE]).sum())(S[WHERE])
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient[WHERE], inner, rtol=1e-10, atol=1e-15)
    np.testing.assert_array_equal(gradient[~WHERE], 0.0)


@pytest.mark.parametrize("loss", [losses.hazard_kl, losses.event_distribution_kl], ids=lambda f: f.__name__)
def test_zero_at_equality_and_finite_when_saturated(loss):
    with jax.enable_x64(True):
        np.testing.assert_allclose(loss(T, T), 0.0, atol=1e-14)
    extreme = np.array([[-80.0, 80.0, -80.0, 80.0]], np.float32)
    value, gradient = jax.value_and_grad(lambda s: loss(s, -extreme).sum())(extreme)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("where", [None, np.arange(6) == 2], ids=["equal_risks", "one_patient"])
def test_a_target_that_ranks_nobody_gives_zero(where):
    target = np.ones(6, np.float32) if where is None else T[:, 0].astype(np.float32)
    value, gradient = jax.value_and_grad(lambda s: losses.risk_order_loss(s, target, where=where))(
        S[:, 0].astype(np.float32)
    )
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="b >= 2"):
        losses.risk_order_loss(S[:1, 0], T[:1, 0])
