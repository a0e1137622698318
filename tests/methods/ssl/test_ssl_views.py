"""Views of a step: pipelines of A4 and B5, privileged sources, shared geometry, validation; F3 checks 5 and 6."""

import jax
import jax.numpy as jnp
import numpy as np
import paired_setup
import pytest
import ssl_setup as setup

from histokd_jax.methods.ssl import config as settings
from histokd_jax.methods.ssl import method as ssl
from histokd_jax.methods.ssl import views
from histokd_jax.ops.image import presets
from histokd_jax.ops.image.steps_vector import GaussianNoise, LogNormalise, MaskGenes, PermuteGenes


def seen(run, data, key=0, train=True):
    """(inputs, valid) of all branches, as NumPy."""
    key = None if key is None else jax.random.key(key)
    found = paired_setup.once(lambda d: views.make_views(run.views, key, d, train), data)
    return jax.tree.map(np.asarray, found)


def preset_config(values, **changes):
    cfg = setup.config(augment__preset="a4", **changes)
    cfg.update_from_flattened_dict({k: v for k, v in values.items() if not k.startswith("train.")})
    return cfg


def test_the_switches_of_part_E_give_the_presets_of_the_augmentations():
    for values, name in ((settings.FAITHFUL, "mfl_faithful"), (settings.CORRECTED, "mfl_corrected")):
        assert views.image_recipe(preset_config(values).augment) == presets.recipe(name)
    assert views.image_recipe(setup.config(augment__preset="a4").augment) == presets.recipe("mfl_faithful")
    assert views.image_recipe(setup.config(augment__preset="hmkd_paired_flips").augment).shared_geometry


def test_B5_gene_steps_follow_deviations_21_and_22():
    def steps(**changes):
        return views.vector_pipeline(setup.config(**changes).augment)

    assert steps(augment__gene_update="none") == presets.gene_steps("genes_faithful")
    assert steps(augment__gene_noise="after_log") == presets.gene_steps("genes_corrected")
    assert steps() == (MaskGenes(), PermuteGenes(), GaussianNoise())
    assert steps(augment__privileged="none", augment__gene_noise="after_log") == (LogNormalise(),)


def test_F3_6_genes_are_masked_and_permuted_in_the_method_itself():
    run = setup.make(vector=400)
    run_quiet = ssl.make_run(setup.config(), setup.data_spec(400))
    pipeline = tuple(step for step in run.views.pipelines[2] if not isinstance(step, GaussianNoise))
    quiet = views.dataclasses.replace(run_quiet.views, pipelines=(*run.views.pipelines[:2], pipeline))
    data = setup.batch(vector=400)
    data["partner"] = data["partner"] + np.arange(1, 401, dtype=np.float32) * 10
    out = np.asarray(paired_setup.once(lambda d: views.make_views(quiet, jax.random.key(0), d, True)[0][2], data))
    changed = out != data["partner"]
    zero = out == 0
    assert (zero.mean(axis=1) < 0.27).all() and zero.any()
    assert (changed & ~zero).mean(axis=1).max() < 0.11 and (changed & ~zero).any()


@pytest.mark.slow
def test_F3_5_released_views_stay_within_0_and_255_and_differ_between_branches():
    run = setup.make(augment__preset="a4")
    inputs, _ = seen(run, setup.batch(n=12))
    assert all(x.min() >= 0 and x.max() <= 255 and x.dtype == np.float32 for x in inputs)
    assert not np.allclose(inputs[0], inputs[1])


def test_draws_depend_on_key_example_and_branch_alone():
    run, data = setup.make(), setup.batch()
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    first, _ = seen(run, data)
    moved, _ = seen(run, {k: v[order] for k, v in data.items()})
    for a, b in zip(first, moved):
        np.testing.assert_array_equal(a[order], b)
    assert np.any(first[0] != first[1]), "independent branches"
    assert np.any(first[0] != seen(run, data, key=1)[0][0])
    np.testing.assert_array_equal(seen(run, data, key=None)[0][0], seen(run, data, key=None)[0][0])


def test_shared_geometry_moves_all_views_alike_and_independent_geometry_does_not():
    data = setup.batch()
    data["partner"] = data["image"].copy()
    for shared in (True, False):
        inputs, _ = seen(setup.make(augment__shared_geometry=shared), data)
        assert np.array_equal(inputs[0], inputs[2]) == shared
    with pytest.raises(ValueError, match="does not move the privileged one"):
        settings.validate(setup.config(augment__preset="a4", augment__shared_geometry=True, augment__privileged="none"))


@pytest.mark.parametrize("vector", [0, 7])
def test_B9_privileged_sources(vector):
    data = setup.batch(vector=vector, missing=(2,))
    if not vector:
        data["partner"][:] = np.arange(setup.B, dtype=np.uint8)[:, None, None, None]
    plain = {"augment__preset": "none", "augment__privileged": "none"}
    real, valid = seen(setup.make(vector, **plain), data)
    np.testing.assert_array_equal(real[2], data["partner"].astype(np.float32))
    np.testing.assert_array_equal(valid[2], data["has_partner"])
    assert valid[0].all()
    blank, _ = seen(setup.make(vector, privileged__source="blank", **plain), data)
    assert np.unique(blank[2]).tolist() == [0.0 if vector else 128.0]
    shuffled, where = seen(setup.make(vector, privileged__source="shuffled", **plain), data)
    giver = [np.flatnonzero((shuffled[2][i] == real[2]).reshape(setup.B, -1).all(axis=1)) for i in range(setup.B)]
    assert all(len(g) == 1 and g[0] != i for i, g in enumerate(giver)), "nobody keeps its own view"
    np.testing.assert_array_equal(where[2], data["has_partner"][np.concatenate(giver)])
    noise, _ = seen(setup.make(vector, privileged__source="noise", **plain), data)
    again, _ = seen(setup.make(vector, privileged__source="noise", **plain), data, key=1)
    assert np.any(noise[2] != again[2]) and np.any(noise[2][0] != noise[2][1])


def test_validation_is_augmented_as_released_or_plain():
    data = setup.batch()
    plain, _ = seen(setup.make(augment__validation="plain"), data, key=None, train=False)
    np.testing.assert_array_equal(plain[0], data["image"].astype(np.float32))
    released, _ = seen(setup.make(), data, key=None, train=False)
    assert np.any(released[0] != plain[0])
    genes = setup.make(vector=7, augment__validation="plain", augment__gene_noise="after_log")
    counts = setup.batch(vector=7)
    found, _ = seen(genes, counts, key=None, train=False)
    x = counts["partner"].astype(np.float64)
    np.testing.assert_allclose(found[2], np.log1p(x * 1e4 / x.sum(axis=1, keepdims=True)), rtol=1e-5)


def test_deviation_9_standardised_input():
    data = setup.batch()
    found, _ = seen(setup.make(encoder__input="standardised", augment__preset="none"), data)
    expected = (data["image"] / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


def test_privileged_only_reads_no_image():
    run, data = setup.make(layout__name="privileged_only"), setup.batch()
    del data["image"]
    inputs, _ = seen(run, data)
    assert len(inputs) == 2 and np.any(inputs[0] != inputs[1])


def test_bad_input_a_vector_of_another_length_and_images_that_are_none():
    run = setup.make(vector=7)
    with pytest.raises(ValueError, match=r"vectors must be \[B, 7\], as in training; got \(8, 9\)"):
        views.make_views(run.views, None, setup.batch(vector=9), True)
    bad = setup.batch() | {"partner": jnp.zeros((8, 16, 16, 3), jnp.float32)}
    with pytest.raises(ValueError, match=r"partner must be \[B, H, W, 3\] uint8"):
        views.make_views(setup.make().views, None, bad, True)
