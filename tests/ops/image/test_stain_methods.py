"""Macenko, Reinhard and Vahadane against float64 references; sources per tile and per slide; degenerate tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stain_reference as ref
from image_reference import STAINS, tissue
from sklearn.decomposition import DictionaryLearning

from histokd_jax.ops.image import macenko, reinhard, stains, vahadane

MODULES = {"macenko": macenko, "reinhard": reinhard, "vahadane": vahadane}
FIT = {name: jax.jit(module.fit) for name, module in MODULES.items()}
TRANSFORM = {name: jax.jit(module.transform, static_argnames="dtype") for name, module in MODULES.items()}
TILE, OTHER = tissue(31, 40, 0), tissue(31, 40, 1, white=0.4)
OTHER = np.clip(OTHER.astype(float) * [1.05, 0.85, 1.0], 0, 255).astype(np.uint8)


@functools.cache
def fitted(name, other=False):
    return FIT[name]((OTHER if other else TILE).reshape(-1, 3))


def transformed(name, dtype=jnp.float32, tile=TILE):
    return np.asarray(TRANSFORM[name](tile[None], fitted(name), fitted(name, True), dtype=dtype))[0]


def pair(params):
    return tuple(np.asarray(v, np.float64) for v in params[:2])


def check_rounding(found, exact):
    """uint8 results differ from the rounded float64 ones by one level at most, and only where that is near a tie."""
    assert found.dtype == np.uint8
    expected = np.clip(np.round(exact), 0, 255)
    wrong = found != expected
    near = np.abs(exact - np.floor(exact) - 0.5) < 0.02
    assert not (wrong & ~near).any() and np.abs(found - expected).max() <= 1 and wrong.mean() < 0.01


def test_macenko_fit_is_that_of_double_precision():
    found, (expected, maximum) = fitted("macenko"), ref.macenko_fit(TILE)
    assert bool(found.valid)
    np.testing.assert_allclose(found.stains, expected, atol=2e-5)
    np.testing.assert_allclose(found.maximum, maximum, rtol=1e-4)


def test_macenko_transform_is_that_of_double_precision():
    exact = ref.macenko_transform(TILE, pair(fitted("macenko")), pair(fitted("macenko", True)))
    np.testing.assert_allclose(transformed("macenko"), exact, rtol=2e-4)
    check_rounding(transformed("macenko", jnp.uint8), exact)


def test_macenko_options_reach_the_fit():
    options = functools.partial(macenko.fit, background=255.0, least_density=0.3, percentile=5.0)
    found = jax.jit(options)(TILE.reshape(-1, 3))
    expected, maximum = ref.macenko_fit(TILE, 255.0, 0.3, 5.0)
    np.testing.assert_allclose(found.stains, expected, atol=2e-5)
    np.testing.assert_allclose(found.maximum, maximum, rtol=1e-4)


def test_reinhard_is_that_of_double_precision():
    mean, std = ref.reinhard_fit(TILE)
    np.testing.assert_allclose(fitted("reinhard").mean, mean, atol=2e-3)
    np.testing.assert_allclose(fitted("reinhard").std, std, atol=2e-3)
    exact = ref.reinhard_transform(TILE, pair(fitted("reinhard")), pair(fitted("reinhard", True)))
    np.testing.assert_allclose(transformed("reinhard"), exact, atol=3e-2)
    found = transformed("reinhard", jnp.uint8)
    assert np.abs(found - np.round(exact)).max() <= 1 and (found != np.round(exact)).mean() < 0.02


def test_vahadane_amounts_are_the_exact_non_negative_lasso():
    od = np.concatenate([ref.density(TILE, 255).reshape(-1, 3)[::7], np.random.default_rng(0).normal(0, 1, (200, 3))])
    basis = np.array([[0.60, 0.72, 0.35], [0.12, 0.95, 0.28]])
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    for sparsity in (0.0, 0.01, 0.3):
        found = vahadane.sparse_amounts(jnp.asarray(od.T, jnp.float32), jnp.asarray(basis, jnp.float32), sparsity)
        np.testing.assert_allclose(found.T, ref.sparse_amounts(od, basis, sparsity), atol=2e-5)


def test_vahadane_objective_never_rises_and_reaches_that_of_scikit_learn():
    pixels = TILE.reshape(-1, 3)[::3]
    pixels = pixels[np.asarray(stains.is_tissue(pixels.T))]
    od = np.maximum(ref.density(pixels, 255), 0)
    current, _ = jax.jit(vahadane.initial_stains)(jnp.asarray(pixels), jnp.ones(len(pixels), bool))
    update = jax.jit(vahadane.update_stains, static_argnums=2)
    values = [ref.objective(od, np.asarray(current, np.float64), 0.1)]
    for _ in range(100):
        current = update(jnp.asarray(od.T, jnp.float32), current, 0.1)
        if len(values) < 8:
            values.append(ref.objective(od, np.asarray(current, np.float64), 0.1))
    assert (np.diff(values) <= 1e-4 * values[0]).all() and values[1] < values[0]
    learner = DictionaryLearning(
        2, alpha=0.1, fit_algorithm="cd", transform_algorithm="lasso_cd", positive_code=True, positive_dict=True,
        max_iter=100, random_state=0,
    )  # fmt: skip
    learnt = learner.fit(od).components_
    learnt /= np.linalg.norm(learnt, axis=1, keepdims=True)
    best = ref.objective(od, np.asarray(current, np.float64), 0.1)
    np.testing.assert_allclose(vahadane.objective(jnp.asarray(od.T, jnp.float32), current, 0.1), best, rtol=1e-4)
    assert best <= ref.objective(od, learnt, 0.1) * 1.001
    found = FIT["vahadane"](jnp.asarray(pixels))
    np.testing.assert_allclose(found.stains, stains.red_first(current), atol=1e-4)


def test_vahadane_transform_and_maximum_are_those_of_double_precision():
    source = pair(fitted("vahadane"))
    od = ref.density(TILE, 255).reshape(-1, 3)[np.asarray(stains.is_tissue(TILE.reshape(-1, 3).T))]
    amounts = ref.sparse_amounts(np.maximum(od, 0), source[0], 0.01)
    np.testing.assert_allclose(source[1], np.percentile(amounts, 99, axis=0), rtol=1e-4)
    exact = ref.vahadane_transform(TILE, source, pair(fitted("vahadane", True)))
    np.testing.assert_allclose(transformed("vahadane"), exact, rtol=3e-4)
    check_rounding(transformed("vahadane", jnp.uint8), exact)


@pytest.mark.parametrize("name", ["macenko", "vahadane"])
def test_simulated_stains_are_found_again(name):
    tile = tissue(64, 64, 3, noise=0.005, pure=0.3)
    found = FIT[name](tile.reshape(-1, 3))
    assert (ref.angle(np.asarray(found.stains), STAINS) < 3).all(), "haematoxylin first, a few degrees apart"


@pytest.mark.parametrize("name", list(MODULES))
def test_a_tile_on_its_own_target_is_itself(name):
    flat = TILE.copy()
    if name != "reinhard":  # a colour in the plane of the stains, which is all that those methods represent
        source = pair(fitted(name))
        amounts = np.random.default_rng(0).uniform(0.1, 1.0, (*TILE.shape[:2], 2))
        background = 240 if name == "macenko" else 255
        flat = np.round(background * np.exp(-(amounts @ source[0]))).astype(np.uint8)
    found = np.asarray(TRANSFORM[name](flat[None], fitted(name), fitted(name)))[0]
    # Vahadane's sparsity of 0.01 takes a little of every amount away.
    assert np.abs(found.astype(int) - flat).max() <= (5 if name == "vahadane" else 1)


@pytest.mark.parametrize("name", list(MODULES))
def test_sources_may_be_one_per_slide_or_one_per_tile(name):
    tiles = np.stack([tissue(24, 24, seed) for seed in range(3)])
    each = jax.jit(jax.vmap(MODULES[name].fit))(tiles.reshape(3, -1, 3))
    target = fitted(name, True)
    together = np.asarray(TRANSFORM[name](tiles, each, target, dtype=jnp.float32))
    for i in range(3):
        own = FIT[name](tiles[i].reshape(-1, 3))
        alone = TRANSFORM[name](tiles[i : i + 1], own, target, dtype=jnp.float32)
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-3, atol=0.05)
    with pytest.raises(ValueError, match=r"source parameters for \(3,\) tiles, images \(2, 24, 24, 3\)"):
        MODULES[name].transform(tiles[:2], each, target)


@pytest.mark.parametrize("name", list(MODULES))
def test_the_mask_equals_taking_the_subset(name):
    pixels = np.concatenate([TILE.reshape(-1, 3), OTHER.reshape(-1, 3)])
    mask = np.arange(len(pixels)) < TILE.size // 3
    found = FIT[name](pixels, mask)
    for a, b in zip(found, fitted(name)):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def one_stain(noise):
    rng = np.random.default_rng(0)
    amounts = rng.gamma(2.0, 0.35, (24, 24, 1)) + 0.3
    od = amounts * np.array([0.6, 0.72, 0.35]) + noise * rng.normal(size=(24, 24, 3))
    return np.clip(np.round(240 * np.exp(-od)), 0, 255).astype(np.uint8)


DEGENERATE = {
    "white": np.full((24, 24, 3), 255, np.uint8),
    "black": np.zeros((24, 24, 3), np.uint8),
    "one colour": np.broadcast_to(np.array([180, 90, 160], np.uint8), (24, 24, 3)),
    "grey": np.full((24, 24, 3), 120, np.uint8),
    "one pixel of tissue": np.where(np.arange(576).reshape(24, 24, 1) == 5, np.uint8(90), np.uint8(250)).repeat(3, -1),
}


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("kind", list(DEGENERATE))
def test_tiles_without_two_stains_are_returned_unchanged(name, kind):
    tile = DEGENERATE[kind]
    found = FIT[name](tile.reshape(-1, 3))
    assert not bool(found.valid) and all(np.isfinite(np.asarray(v)).all() for v in found)
    for source, target in ((found, fitted(name)), (fitted(name), found)):
        np.testing.assert_array_equal(TRANSFORM[name](tile[None], source, target)[0], tile)


@pytest.mark.parametrize("name", ["macenko", "vahadane"])
def test_one_stain_is_no_two(name):
    found = FIT[name](one_stain(0.0).reshape(-1, 3))
    assert not bool(found.valid)
    np.testing.assert_allclose(found.stains, stains.fallback_stains())


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("kind", ["white", "black", "one colour"])
def test_such_tiles_of_a_stained_slide_stay_finite(name, kind):
    tile = DEGENERATE[kind]
    found = np.asarray(TRANSFORM[name](tile[None], fitted(name), fitted(name, True), dtype=jnp.float32))
    assert np.isfinite(found).all()
    if kind == "white" and name != "reinhard":
        assert found.min() > 225, "glass stays glass"


@pytest.mark.parametrize("name", list(MODULES))
def test_other_images_are_refused(name):
    with pytest.raises(ValueError, match="images have the shape"):
        MODULES[name].transform(TILE, fitted(name), fitted(name))


def test_the_published_target_has_unit_stains():
    target = macenko.published_target()
    np.testing.assert_allclose(np.linalg.norm(target.stains, axis=1), 1, atol=1e-6)
    assert bool(target.valid) and target.stains[0, 0] > target.stains[1, 0]
