"""Flips and standardisation of a step of pairs (check M10 of the specification)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.methods.hmkd import images
from histokd_jax.ops.image import presets

KEY = jax.random.key(5)
EXAMPLES = jnp.arange(4000, dtype=jnp.int32)


@pytest.mark.parametrize("mode,together", [("independent", 0.25), ("paired", 1.0), ("none", 1.0)])
def test_M10_both_stains_are_flipped_alike_with_the_stated_frequency(mode, together):
    flips = images.draw_flips(jax.random.key(0), EXAMPLES, mode)
    agree = np.asarray((flips.image == flips.partner).all(-1))
    assert abs(agree.mean() - together) < 0.03
    expected = 0.0 if mode == "none" else 0.5
    for bits in flips:
        np.testing.assert_allclose(np.asarray(bits).mean(0), expected, atol=0.03)


def test_draws_depend_on_key_and_example_alone():
    key = jax.random.key(3)
    whole = images.draw_flips(key, EXAMPLES[:64], "independent")
    order = np.random.default_rng(0).permutation(64)[:17]
    part = images.draw_flips(key, EXAMPLES[:64][order], "independent")
    for a, b in zip(whole, part):
        np.testing.assert_array_equal(np.asarray(a)[order], b)
    other = images.draw_flips(jax.random.key(4), EXAMPLES[:64], "independent")
    assert (np.asarray(other.image) != np.asarray(whole.image)).any()


def test_flips_equal_those_of_numpy():
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 3), np.uint8)
    flags = np.array(list(itertools.product((False, True), repeat=2)))
    expected = [x[0], x[1][::-1], x[2][:, ::-1], x[3][::-1, ::-1]]
    np.testing.assert_array_equal(images.apply_flips(jnp.asarray(x), jnp.asarray(flags)), expected)


@pytest.mark.parametrize("mode,count", [("independent", 16), ("paired", 4), ("none", 1)])
def test_every_draw_is_a_variant_and_finds_its_place(mode, count):
    known = images.variants(mode)
    assert len(set(known)) == len(known) == count
    flips = images.draw_flips(jax.random.key(1), EXAMPLES[:300], mode)
    index = np.asarray(images.variant_index(flips, mode))
    assert set(index) == set(range(count))
    for i, image, partner in zip(index, np.asarray(flips.image), np.asarray(flips.partner)):
        assert known[i] == (tuple(image), tuple(partner))


def test_standardisation_equals_the_definition():
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    expected = (x / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(images.standardise(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 4), np.uint8), np.zeros((2, 4, 4, 3))]
)
def test_images_that_are_no_8_bit_rgb_are_refused(bad):
    with pytest.raises(ValueError, match=r"must be \[B, H, W, 3\] uint8"):
        images.apply_flips(jnp.asarray(bad), jnp.zeros((2, 2), bool))


def test_presets_move_both_stains_alike_or_apart():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3), np.uint8))
    for name, share in (("hmkd_paired_flips", 1.0), ("hmkd_faithful", 0.25)):
        given = KEY, EXAMPLES[:64], x, presets.recipe(name)
        image, partner = (np.asarray(images.follow_recipe(*given, partner)) for partner in (False, True))
        assert image.dtype == np.uint8 and (image != np.asarray(x)).any()
        assert abs((image == partner).all((1, 2, 3)).mean() - share) < 0.2


def test_stain_jitter_changes_colours_of_the_image_alone():
    x = jnp.full((4, 4, 4, 3), 120, jnp.uint8)
    given = KEY, EXAMPLES[:4], x, presets.recipe("stain_jitter")
    image, partner = (np.asarray(images.follow_recipe(*given, partner)) for partner in (False, True))
    assert np.abs(image - 120.0).max() > 0.5 and (partner == 120).all()


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="data.flip_mode = 'both' is unknown"):
        images.draw_flips(jax.random.key(0), EXAMPLES[:2], "both")
