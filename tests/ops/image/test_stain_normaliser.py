"""The normaliser object: fitting a reference and a slide, its file, its messages; real images where they are given."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stain_reference as ref
from image_reference import STAINS, tissue
from PIL import Image

from histokd_jax.ops.image import stain_normaliser as stain
from histokd_jax.ops.image.stain_normaliser import METHODS

REFERENCE = tissue(48, 48, 9)
TILES = np.stack([tissue(24, 24, seed, white=0.3 * (seed % 2)) for seed in range(4)])


@pytest.mark.parametrize("method", METHODS)
def test_a_normaliser_runs_inside_jit_with_a_slide_or_tile_by_tile(method):
    normaliser = stain.fit_target(method, REFERENCE)
    source = stain.fit_tiles(method, TILES)
    found = jax.jit(lambda x: normaliser(x, source))(TILES)
    assert found.dtype == jnp.uint8 and found.shape == TILES.shape
    expected = jax.jit(stain.module_of(method).transform)(TILES, source, normaliser.target)
    np.testing.assert_array_equal(found, expected)
    single = jax.jit(lambda x: normaliser(x, dtype=jnp.float32))(TILES)
    assert single.dtype == jnp.float32 and not np.allclose(single, found, atol=1.0)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_gives_the_same_bits(method, tmp_path):
    normaliser = stain.fit_target(method, REFERENCE)
    stain.write(normaliser, tmp_path / "stain.json")
    again = stain.read(tmp_path / "stain.json")
    assert again.method == method
    for a, b in zip(normaliser.target, again.target):
        np.testing.assert_array_equal(a, b)
    assert again.target.valid.dtype == bool


@pytest.mark.parametrize("method", METHODS)
def test_normalisation_brings_the_same_tissue_in_other_stains_together(method):
    purple = np.array([[0.75, 0.60, 0.25], [0.25, 0.85, 0.45]])
    other = np.stack([tissue(24, 24, s, 0.3 * (s % 2), stains=purple, strength=(1.4, 0.7)) for s in range(4)])
    assert not np.allclose(purple, STAINS)
    normaliser = stain.fit_target(method, REFERENCE)
    run = jax.jit(lambda x, source: normaliser(x, source, jnp.float32))
    first, second = (np.asarray(run(t, stain.fit_tiles(method, t))) for t in (TILES, other))
    before = np.abs(TILES.astype(float) - other).mean()
    assert np.abs(first - second).mean() < 0.5 * before


@pytest.mark.parametrize(("total", "wanted"), [(10, 10), (10, 30), (1000, 99), (224 * 224 * 7, 5000), (6, 5)])
def test_spread_indices_are_distinct_and_even(total, wanted):
    found = stain.spread_indices(total, wanted)
    assert len(found) == min(total, wanted) == len(set(found.tolist())) and found.min() >= 0 and found.max() < total
    if wanted > 50 and total > wanted:
        share = np.histogram(found, bins=10, range=(0, total))[0] / len(found)
        assert np.abs(share - 0.1).max() < 0.04


def test_a_reference_without_tissue_is_refused_by_name():
    with pytest.raises(ValueError, match="glass.png: macenko finds no stained tissue in it; choose a tile"):
        stain.fit_target("macenko", np.full((8, 8, 3), 255, np.uint8), "glass.png")


def test_unknown_methods_and_tiles_of_another_form_are_refused():
    with pytest.raises(ValueError, match="unknown stain normalisation 'khan'; known are macenko, reinhard, vahadane"):
        stain.fit_tiles("khan", TILES)
    with pytest.raises(ValueError, match="tiles are float64 of shape"):
        stain.fit_tiles("macenko", TILES.astype(float))
    with pytest.raises(ValueError, match=r"tiles are uint8 of shape \(24, 24, 3\)"):
        stain.fit_tiles("macenko", TILES[0])


def record():
    return json.loads(stain.to_json(stain.fit_target("macenko", REFERENCE)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="x"), "s.json: expected a stain normalisation of format 'histokd-stain/1'"),
        (lambda r: r.update(method="khan"), "s.json: method is 'khan'; expected one of macenko"),
        (lambda r: r["target"].pop("maximum"), "s.json: target of macenko must have the fields stains, maximum, valid"),
        (lambda r: r["target"].update(maximum=[1.0]), r"s.json: target.maximum is \[1.0\]; expected .*shape \(2,\)"),
        (lambda r: r["target"].update(stains="a"), "s.json: target.stains is 'a'"),
        (lambda r: r["target"].update(maximum=[1.0, float("nan")]), "s.json: target.maximum is"),
    ],
)
def test_files_that_are_something_else_are_refused(change, message, tmp_path):
    broken = record()
    change(broken)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=message):
        stain.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="s.json is no JSON"):
        stain.read(path)


def load(path, box=None):
    return np.asarray(Image.open(path).convert("RGB").crop(box) if box else Image.open(path).convert("RGB"))


@pytest.mark.real_data
def test_real_source_on_real_target_is_that_of_double_precision(real_data):
    folder = real_data / "stain_reference"
    source, target = (load(folder / f"torchstain_{name}.png") for name in ("source", "target"))
    normaliser = stain.fit_target("macenko", target)
    found = np.asarray(normaliser(source[None], stain.fit_tiles("macenko", source[None], source.size)))[0]
    exact = ref.macenko_transform(source, ref.macenko_fit(source), ref.macenko_fit(target))
    assert np.abs(found - np.clip(exact, 0, 255)).max() < 0.6
