"""Maps of evidence against arithmetic by hand."""

import encoder_reference as reference
import jax
import numpy as np
import pytest
from labelled_setup import EDGE, RESNET, pictures, resnet

from histokd_jax.embed.transform import prepare
from histokd_jax.encoders import loading
from histokd_jax.encoders.presets import Encoder, Transform
from histokd_jax.nn.encoders import build
from histokd_jax.nn.encoders.resnet import ResNet
from histokd_jax.probe import maps, overlay

ENCODERS = {name: Encoder(name, spec, Transform(size=28, resize=28)) for name, spec in reference.TINY.items()}
DEEP = [name for name, encoder in ENCODERS.items() if encoder.spec.depth > 1]


def probe(width, classes=3, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(width, classes)), rng.normal(size=classes)


def test_map_of_a_resnet_is_its_class_activation_map():
    loaded, (images, _) = resnet(), pictures(2)
    weights, bias = probe(loaded.encoder.features)
    classes = np.array([0, 2, 1, 1])
    found, logits = maps.class_maps(loaded, images, weights, bias, classes)
    inputs = prepare(images, RESNET.transform)
    grid = np.asarray(ResNet(RESNET.spec).apply(loaded.variables, inputs, method=ResNet.feature_map), np.float64)
    h, w = grid.shape[1:3]
    expected = np.einsum("bhwd,db->bhw", grid, weights[:, classes]) / (h * w)
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(logits, grid.mean((1, 2)) @ weights + bias, rtol=1e-4, atol=1e-4)
    assert (expected < 0).any() and found.max() > 0


@pytest.mark.parametrize(
    "name", [name if name in ("uni2_h", "virchow2") else pytest.param(name, marks=pytest.mark.slow) for name in DEEP]
)
def test_split_of_a_transformer_gives_its_embedding(name):
    loaded, (images, _) = loading.random(ENCODERS[name], 0), pictures(1, edge=28)
    module = build.build(loaded.encoder.spec)
    expected = module.apply(loaded.variables, prepare(images, loaded.encoder.transform))
    np.testing.assert_allclose(maps.embedding_of_split(loaded, images), expected, atol=1e-5)


def test_map_of_a_transformer_weighs_tokens_by_the_mean_gradient():
    """The gradient by finite differences: the mean over positions is the slope along a common shift of a channel."""
    loaded, (images, _) = loading.random(ENCODERS["plain"], 3), pictures(1, edge=28)
    spec, image = loaded.encoder.spec, images[:1]
    weights, bias = probe(spec.features)
    found, _ = maps.class_maps(loaded, image, weights, bias, np.array([2]))
    tokens, features = maps._split_vit(loaded.variables, prepare(image, loaded.encoder.transform), spec)
    features, tokens, step = jax.jit(features), np.asarray(tokens), 1e-2
    patches = slice(spec.prefix, None)
    slope = np.empty(spec.width)
    for d in range(spec.width):
        ends = []
        for sign in (1, -1):
            moved = tokens.copy()
            moved[:, patches, d] += sign * step
            ends.append(float((np.asarray(features(moved)) @ weights + bias)[0, 2]))
        slope[d] = (ends[0] - ends[1]) / (2 * step) / spec.grid**2
    expected = np.maximum(tokens[0, patches] @ slope, 0).reshape(spec.grid, spec.grid)
    np.testing.assert_allclose(found[0], expected, atol=2e-2 * max(expected.max(), 1e-3))


def test_a_transformer_of_one_block_is_refused():
    with pytest.raises(ValueError, match="need two blocks, no_qkv_bias has 1"):
        maps.check_maps(ENCODERS["no_qkv_bias"])


def test_images_of_a_batch_do_not_mix():
    loaded, (images, _) = resnet(), pictures(2)
    weights, bias = probe(loaded.encoder.features)
    classes = np.array([0, 2, 1, 1])
    together = maps.class_maps(loaded, images, weights, bias, classes)[0]
    alone = maps.class_maps(loaded, images[1:2], weights, bias, classes[1:2])[0]
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)


def test_a_map_is_laid_over_the_part_of_the_tile_that_the_encoder_sees():
    encoder = Encoder("cropped", RESNET.spec, Transform(size=32, resize=40))
    assert maps.shown_area(encoder, 32) == (0.0, 32.0)
    offset, shown = maps.shown_area(encoder, 80)
    assert (offset, shown) == (8.0, 64.0)
    heat = overlay.stretched(np.ones((2, 2)), 80, offset, shown)
    assert (heat[8:72, 8:72] == 1).all() and heat.sum() == 64**2


def test_stretching_is_bilinear_between_the_centres_of_the_cells():
    heat = overlay.stretched(np.array([[0.0, 1.0]]), 8, 0.0, 8.0)
    np.testing.assert_allclose(heat[3], np.clip((np.arange(8) + 0.5 - 2) / 4, 0, 1))


def test_an_overlay_leaves_pixels_without_evidence_alone():
    image = pictures(1)[0][0]
    heat = np.zeros((EDGE, EDGE))
    np.testing.assert_array_equal(overlay.overlaid(image, heat), image)
    heat[5, 6] = 3.0
    changed = (overlay.overlaid(image, heat) != image).any(-1)
    assert changed.sum() == 1 and changed[5, 6]
