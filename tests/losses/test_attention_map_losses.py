"""HM-KD's losses: the property checks L1 to L3 and L6 of its specification, and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.losses import attention_map_distance, cosine_distance, logit_kl

RNG = np.random.default_rng(0)
MAPS = RNG.normal(size=(4, 6, 6))
FEATURES = RNG.normal(size=(4, 7))
LOGITS = RNG.normal(size=(4, 5))
LOSSES = {attention_map_distance: MAPS, cosine_distance: FEATURES, logit_kl: LOGITS}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def reference_at(s, t):
    out = []
    for a, b in zip(s, t):
        phi = [x.ravel() ** 2 / max(np.linalg.norm(x.ravel() ** 2), 1e-12) for x in (a, b)]
        out.append(((phi[0] - phi[1]) ** 2).sum())
    return np.array(out)


def reference_kl(s, t, temperature):
    p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True) for z in (t, s))
    return temperature**2 * (p * np.log(p / q)).sum(-1)


def test_values_equal_those_of_plain_numpy():
    other = np.roll(MAPS, 1, axis=0) + 0.3
    np.testing.assert_allclose(attention_map_distance(MAPS, other), reference_at(MAPS, other), rtol=1e-12)
    f = np.roll(FEATURES, 1, axis=0)
    cos = (FEATURES * f).sum(-1) / np.linalg.norm(FEATURES, axis=-1) / np.linalg.norm(f, axis=-1)
    np.testing.assert_allclose(cosine_distance(FEATURES, f), 1 - cos, rtol=1e-11)
    np.testing.assert_allclose(logit_kl(LOGITS, LOGITS[::-1]), reference_kl(LOGITS, LOGITS[::-1], 5.0), rtol=1e-10)


def test_L1_attention_maps_are_compared_without_sign_and_scale_and_within_bounds():
    for factor in (1.0, 3.0, -0.5):
        np.testing.assert_allclose(attention_map_distance(factor * MAPS, MAPS), 0.0, atol=1e-24)
    apart = attention_map_distance(MAPS, MAPS[::-1])
    assert ((apart > 0) & (apart < 2)).all()
    left, right = np.zeros((1, 6, 6)), np.zeros((1, 6, 6))
    left[0, :3], right[0, 3:] = MAPS[0, :3], MAPS[0, 3:]
    np.testing.assert_allclose(attention_map_distance(left, right), 2.0, rtol=1e-12)


def test_L2_cosine_of_equal_opposite_and_repeated_features():
    np.testing.assert_allclose(cosine_distance(FEATURES, FEATURES), 0.0, atol=1e-11)
    np.testing.assert_allclose(cosine_distance(FEATURES, -FEATURES).sum(), 2 * len(FEATURES), rtol=1e-11)
    twice = np.concatenate([FEATURES, FEATURES])
    once, again = cosine_distance(FEATURES, FEATURES[::-1]), cosine_distance(twice, np.tile(FEATURES[::-1], (2, 1)))
    np.testing.assert_allclose(again.sum(), 2 * once.sum(), rtol=1e-12)


def test_L3_kl_is_blind_to_shifts_and_carries_the_square_of_the_temperature():
    shift = np.arange(4.0)[:, None]
    np.testing.assert_allclose(logit_kl(LOGITS + shift, LOGITS), 0.0, atol=1e-12)
    np.testing.assert_allclose(
        logit_kl(LOGITS, LOGITS[::-1], 5.0), 25 * logit_kl(LOGITS / 5, LOGITS[::-1] / 5, 1.0), rtol=1e-12
    )


def test_L6_an_all_zero_map_is_finite_in_value_and_gradient():
    zero = np.zeros_like(MAPS)
    np.testing.assert_allclose(attention_map_distance(zero, MAPS), 1.0, rtol=1e-12)
    np.testing.assert_allclose(attention_map_distance(zero, zero), 0.0)
    gradient = jax.grad(lambda a: attention_map_distance(a, MAPS).sum())(jnp.asarray(zero))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_gradients_equal_differences_and_the_teacher_gets_none(loss):
    s, t = LOSSES[loss], LOSSES[loss][::-1]
    gradient = np.asarray(jax.grad(lambda s: loss(s, t).sum())(jnp.asarray(s)))
    step = np.zeros_like(s)
    step.flat[5] = 1e-6
    difference = (loss(s + step, t).sum() - loss(s - step, t).sum()) / 2e-6
    np.testing.assert_allclose(gradient.flat[5], difference, rtol=1e-6, atol=1e-9)
    assert not np.asarray(jax.grad(lambda t: loss(s, t).sum())(jnp.asarray(t))).any()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_masked_rows_are_exactly_zero_whatever_they_hold(loss):
    s, t = LOSSES[loss].copy(), LOSSES[loss][::-1].copy()
    where = np.array([True, False, True, False])
    kept = loss(s[where], t[where])
    s[~where], t[~where] = np.nan, np.inf
    value, pull = jax.vjp(lambda s: loss(s, t, where=where), jnp.asarray(s))
    np.testing.assert_array_equal(np.asarray(value)[~where], 0.0)
    np.testing.assert_allclose(np.asarray(value)[where], kept, rtol=1e-12)
    gradient = np.asarray(pull(jnp.ones(4))[0])
    assert np.isfinite(gradient).all() and not gradient[~where].any()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_a_teacher_of_other_widths_is_named(loss):
    s = LOSSES[loss]
    with pytest.raises(ValueError, match="was the teacher trained with other widths"):
        loss(s, s[..., :-1])
