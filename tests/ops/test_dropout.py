"""Dropout masks: their rate, their independence, and that they depend on the identity of a patch only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.ops import dropout

UNITS, PATCHES = 64, 2048


def mask(seed=1, slot=1, layer=0, rate=0.25, positions=None, units=UNITS):
    """[units, n] bool: which activations of one bag are kept."""
    positions = jnp.arange(PATCHES) if positions is None else positions
    ones = jnp.ones((units, len(positions)))
    ids = jnp.full(len(positions), slot, jnp.int32)
    return np.asarray(dropout.hash_dropout(ones, jnp.uint32(seed), ids, positions, rate, layer)) > 0


def correlation(a, b):
    return abs(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_keep_rate_and_mean(rate):
    values = np.asarray(
        dropout.hash_dropout(
            jnp.ones((UNITS, PATCHES)), jnp.uint32(3), jnp.ones(PATCHES, jnp.int32), jnp.arange(PATCHES), rate, 0
        )
    )
    n = values.size
    # Five standard errors of a Bernoulli mean.
    bound = 5 * np.sqrt(rate * (1 - rate) / n)
    assert abs((values > 0).mean() - (1 - rate)) < bound
    assert abs(values.mean() - 1) < bound / (1 - rate)
    np.testing.assert_allclose(np.unique(values), [0, 1 / (1 - rate)], rtol=1e-6)


def test_keep_rate_holds_for_every_unit_and_every_patch():
    kept = mask(rate=0.25)
    np.testing.assert_allclose(kept.mean(axis=1), 0.75, atol=5 * np.sqrt(0.1875 / PATCHES))
    np.testing.assert_allclose(kept.mean(axis=0), 0.75, atol=5.5 * np.sqrt(0.1875 / UNITS))


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"seed": 2**31 + 1}, {"slot": 2}, {"layer": 1}, {"layer": 2}, {"seed": 2, "slot": 2}]
)
def test_masks_of_other_seeds_slots_and_layers_are_independent(other):
    assert correlation(mask(), mask(**other)) < 5 / np.sqrt(UNITS * PATCHES)


def test_masks_of_neighbouring_units_and_patches_are_independent():
    kept, bound = mask(), 5 / np.sqrt(UNITS * PATCHES)
    for shift in (1, 2, 32):
        assert correlation(kept[shift:], kept[:-shift]) < bound * 1.5
        assert correlation(kept[:, shift:], kept[:, :-shift]) < bound


def test_no_two_patches_of_a_step_share_a_mask():
    slots = [mask(slot=s, positions=jnp.arange(256)).T for s in range(1, 9)]
    rows = np.packbits(np.concatenate(slots), axis=1)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_mask_does_not_depend_on_the_layout():
    """Packed, reordered and cut streams draw the same mask for the same patch of the same slide."""
    rng = np.random.default_rng(0)
    ids, positions = np.repeat([1, 2, 3], [50, 7, 30]), np.concatenate([np.arange(n) for n in (50, 7, 30)])
    h = jnp.asarray(rng.standard_normal((8, len(ids))), jnp.float32)

    def drop(order):
        return np.asarray(
            dropout.hash_dropout(
                h[:, order], jnp.uint32(5), jnp.asarray(ids[order]), jnp.asarray(positions[order]), 0.5, 1
            )
        )

    whole = drop(np.arange(len(ids)))
    order = rng.permutation(len(ids))
    np.testing.assert_array_equal(drop(order), whole[:, order])
    np.testing.assert_array_equal(drop(np.flatnonzero(ids == 2)), whole[:, ids == 2])


def test_slot_mask_of_a_slide_does_not_depend_on_the_number_of_slots():
    few, many = (dropout.slot_keep_mask((n, 3, 5), jnp.uint32(9), 0.5, 0) for n in (4, 16))
    np.testing.assert_array_equal(few, many[:4])


def test_slot_dropout_rate_mean_and_independent_layers():
    v = jnp.ones((64, 16, 32))
    first, second = (np.asarray(dropout.slot_dropout(v, jnp.uint32(4), 0.25, layer)) for layer in (0, 1))
    assert abs(first.mean() - 1) < 5 * np.sqrt(0.25 / 0.75 / v.size)
    assert correlation(first > 0, second > 0) < 5 / np.sqrt(v.size)
    assert len(np.unique(np.packbits((first > 0).reshape(64, -1), axis=1), axis=0)) == 64


@pytest.mark.parametrize("shape", [(4, 8)])
def test_rate_zero_returns_the_input(shape):
    v = jnp.ones(shape)
    seed = jnp.uint32(0)
    assert dropout.slot_dropout(v, seed, 0.0, 0) is v
    assert dropout.slot_alpha_dropout(v, seed, 0.0, 0) is v
    assert dropout.hash_dropout(v, seed, jnp.ones(8, jnp.int32), jnp.arange(8), 0.0, 0) is v


def test_dtype_is_kept():
    v = jnp.ones((4, 8), jnp.bfloat16)
    seed = jnp.uint32(1)
    assert dropout.slot_dropout(v, seed, 0.5, 0).dtype == jnp.bfloat16
    assert dropout.slot_alpha_dropout(v, seed, 0.5, 0).dtype == jnp.bfloat16
    assert dropout.hash_dropout(v, seed, jnp.ones(8, jnp.int32), jnp.arange(8), 0.5, 0).dtype == jnp.bfloat16


def test_gradient_is_the_mask():
    v = jnp.arange(1.0, 65.0).reshape(4, 16)
    out = dropout.slot_dropout(v, jnp.uint32(2), 0.5, 0)
    grad = jax.grad(lambda v: dropout.slot_dropout(v, jnp.uint32(2), 0.5, 0).sum())(v)
    np.testing.assert_allclose(grad, np.where(np.asarray(out) != 0, 2.0, 0.0))


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_check_G5_alpha_dropout_keeps_mean_and_variance(rate):
    """A million draws of a standard normal stay at mean 0 +- 0.01 and variance 1 +- 0.02."""
    v = jnp.asarray(np.random.default_rng(0).standard_normal((1000, 1000)), jnp.float32)
    out = np.asarray(dropout.slot_alpha_dropout(v, jnp.uint32(7), rate, 0), np.float64)
    assert abs(out.mean()) < 0.01
    assert abs(out.var() - 1) < 0.02


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_check_G5_alpha_dropout_formula(rate):
    """Kept values a x + b, dropped ones a alpha' + b, with a and b written from the formula in float64."""
    alpha = -1.0507009873554805 * 1.6732632423543772
    scale = ((1 - rate) * (1 + rate * alpha**2)) ** -0.5
    shift = -scale * alpha * rate
    v = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)
    seed = jnp.uint32(3)
    keep = np.asarray(dropout.slot_keep_mask(v.shape, seed, rate, 2))
    want = scale * np.where(keep, v.astype(np.float64), alpha) + shift
    np.testing.assert_allclose(dropout.slot_alpha_dropout(jnp.asarray(v), seed, rate, 2), want, rtol=1e-5, atol=1e-6)
    assert keep.any() and not keep.all()
