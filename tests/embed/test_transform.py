"""Tiles become the input of an encoder as Pillow and torchvision do it."""

import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.embed.transform import Stain, prepare
from histokd_jax.encoders.presets import Transform

TILES = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
SMOOTH = np.cumsum(np.cumsum(TILES.astype(np.int64) - 120, 1), 2)
SMOOTH = np.clip(128 + SMOOTH // 40, 0, 255).astype(np.uint8)


def levels(prepared, transform):
    """Pixels on the scale of 0 to 255 behind a normalisation."""
    return (np.asarray(prepared) * np.array(transform.std) + np.array(transform.mean)) * transform.scale


def test_tiles_of_the_input_size_are_only_normalised():
    transform = Transform(size=40, resize=64)
    found = np.asarray(prepare(TILES, transform))
    expected = (TILES / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found, expected, atol=2e-6)
    raw = prepare(TILES, Transform(size=40, resize=40, mean=(0, 0, 0), std=(1, 1, 1), scale=1))
    np.testing.assert_array_equal(raw, TILES)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "size"), [(28, 28), (32, 27), (56, 56), (40, 28)])
@pytest.mark.parametrize("tiles", [TILES, SMOOTH], ids=["noise", "smooth"])
def test_other_tiles_are_resized_and_cropped_as_pillow_does(tiles, method, resize, size):
    from PIL import Image

    transform = Transform(size=size, resize=resize, method=method)
    found = levels(prepare(tiles, transform), transform)
    start = round((resize - size) / 2)
    for tile, result in zip(tiles, found):
        image = Image.fromarray(tile).resize((resize, resize), getattr(Image.Resampling, method.upper()))
        expected = np.asarray(image)[start : start + size, start : start + size]
        assert np.abs(result - expected).max() <= 1.01  # where a sum lies half-way between two levels
        assert (np.abs(result - expected) > 0.01).mean() < 0.05


def test_stain_normalisation_comes_first_and_sees_the_parameters_of_the_slide():
    stain = Stain({"name": "add"}, fit=lambda tiles: None, apply=lambda tiles, p: tiles.astype(jnp.float32) / 2 + p)
    transform = Transform(size=40, resize=40)
    found = levels(prepare(TILES, transform, stain, 3.5), transform)
    np.testing.assert_allclose(found, TILES / 2 + 3.5, atol=1e-3)


@pytest.mark.parametrize(
    "change", [{"size": 300}, {"method": "nearest"}, {"std": (1.0, 0.0, 1.0)}, {"mean": (0.5,)}, {"scale": 0}]
)
def test_impossible_transforms_are_refused(change):
    with pytest.raises(ValueError, match="expected"):
        Transform(**change)
