"""Augmentation of expression vectors (More From Less B5) against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.ops.image import vectors
from histokd_jax.ops.image.augment import augment
from histokd_jax.ops.image.presets import gene_steps
from histokd_jax.ops.image.steps_vector import GaussianNoise, LogNormalise, MaskGenes, PermuteGenes

K = 5020
KEYS = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(64))


@pytest.fixture(scope="module")
def counts():
    return np.random.default_rng(0).poisson(4.0, K).astype(np.uint8)


def test_F3_6_masking_zeroes_a_fraction_below_a_fifth_and_keeps_survivors(counts):
    values = counts.astype(np.float32) + 1
    found = np.asarray(jax.vmap(MaskGenes(), (0, None))(KEYS, values))
    zeroed = found == 0
    np.testing.assert_array_equal(np.where(zeroed, values, found), np.broadcast_to(values, found.shape))
    fractions = zeroed.mean(1)
    assert fractions.max() <= 0.2 + 3 * np.sqrt(0.2 * 0.8 / K)
    assert abs(fractions.mean() - 0.1) < 3 * 0.2 / np.sqrt(12 * 64), "one rate per example, uniform"
    assert fractions.std() > 0.04, "the rate is drawn per example, not fixed"


def test_F3_6_corrected_update_changes_only_the_chosen_genes(counts):
    values = np.arange(1, K + 1, dtype=np.float32)
    step = PermuteGenes()
    for key in KEYS[:4]:
        drawn = {name: np.asarray(v) for name, v in step.numbers(key, (K,)).items()}
        chosen = drawn["order"][: drawn["chosen"]]
        assert 0 <= drawn["chosen"] <= 0.1 * K and len(set(drawn["order"])) == K
        found = np.asarray(step(key, values))
        rest = np.setdiff1d(np.arange(K), chosen)
        np.testing.assert_array_equal(found[rest], values[rest])
        np.testing.assert_array_equal(found[chosen], values[np.roll(chosen, -1)])
        if len(chosen) > 1:
            assert (found[chosen] != values[chosen]).all(), "every chosen gene gets the value of another one"


@pytest.mark.parametrize("chosen", [0, 1, 2, 7])
def test_permuting_few_genes(chosen):
    order = jnp.array([3, 1, 6, 0, 2, 5, 4])
    found = vectors.permute_chosen(jnp.arange(7.0), order, jnp.int32(chosen))
    expected = np.arange(7.0)
    picked = np.asarray(order[:chosen])
    expected[picked] = picked[np.r_[1 : len(picked), 0]] if chosen else []
    np.testing.assert_array_equal(found, expected)


def test_noise_is_standard_normal_and_independent():
    noise = np.asarray(jax.vmap(lambda key: GaussianNoise().numbers(key, (K,))["noise"])(KEYS))
    assert abs(noise.mean()) < 3 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 3 * np.sqrt(2 / noise.size)
    assert np.abs(np.corrcoef(noise[:8]) - np.eye(8)).max() < 5 / np.sqrt(K)
    found = GaussianNoise(sigma=2.0)(KEYS[0], jnp.zeros(K))
    np.testing.assert_allclose(found, 2 * noise[0], rtol=1e-6)


def test_log_normalisation_is_that_of_double_precision(counts):
    expected = np.log1p(counts / counts.sum() * 1e4)
    np.testing.assert_allclose(LogNormalise()(KEYS[0], counts), expected, atol=1e-5)
    np.testing.assert_array_equal(vectors.log_normalise(jnp.zeros(5), 1e4), np.zeros(5))


def test_faithful_preset_is_masking_and_noise_on_raw_counts(counts):
    example = jnp.arange(3)
    batch = jnp.asarray(np.stack([counts] * 3))
    found = np.asarray(
        jax.jit(augment, static_argnums=3)(jax.random.key(0), example, batch, gene_steps("genes_faithful"))
    )
    assert found.dtype == np.float32 and found.shape == (3, K)
    assert abs((found - counts).mean()) < 1.0 and not np.array_equal(found[0], found[1])
    assert [type(s).__name__ for s in gene_steps("genes_corrected")] == [
        "LogNormalise", "MaskGenes", "PermuteGenes", "GaussianNoise",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskGenes(rate=(0.3, 0.2)), "MaskGenes: rate is"),
        (lambda: PermuteGenes(rate=(0.0, 1.5)), r"PermuteGenes: rate is .*within \[0, 1\]"),
        (lambda: GaussianNoise(sigma=-1.0), "GaussianNoise: sigma is"),
        (lambda: LogNormalise(total=0.0), "LogNormalise: total is 0.0"),
        (lambda: gene_steps("raw"), "unknown augmentation of genes 'raw'; known are genes_none"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
