"""Initial memories: check 14, and the sample of patches behind them."""

import jax.numpy as jnp
import momkd_setup as setup
import numpy as np
import pytest

from histokd_jax.methods.momkd.initialisation import Pool, class_pools, spherical_kmeans


def unit_vectors(n, d, seed=0):
    return setup.unit(np.random.default_rng(seed).normal(size=(n, d)))


def reference_kmeans(x, n, iterations):
    centres = x[:n].copy()
    for _ in range(iterations):
        label = np.array([int(np.argmax([v @ c for c in centres])) for v in x])
        for j in range(n):
            if (label == j).any():
                total = x[label == j].sum(axis=0)
                centres[j] = total / np.linalg.norm(total)
    return centres


def test_kmeans_equals_a_plain_version_and_finds_separate_groups():
    x = unit_vectors(60, 4)
    np.testing.assert_allclose(spherical_kmeans(x, 5, 20), reference_kmeans(x, 5, 20), atol=1e-6)
    rng = np.random.default_rng(1)
    groups = np.eye(4)[rng.permutation(np.repeat(np.arange(4), 30))]
    groups = groups[np.concatenate([[int(np.argmax(groups[:, j])) for j in range(4)], np.arange(120)])]
    found = spherical_kmeans(setup.unit(groups + 0.02 * rng.normal(size=groups.shape)), 4)
    np.testing.assert_allclose(found @ np.eye(4), np.eye(4), atol=0.05)


def test_an_empty_cluster_keeps_its_centre():
    x = np.concatenate([np.tile([[1.0, 0.0]], (2, 1)), unit_vectors(5, 2)])
    found = spherical_kmeans(x, 2, 1)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    # Of two equal centres the first takes all vectors.
    np.testing.assert_allclose(found[1], [1, 0], atol=1e-7)
    with pytest.raises(ValueError, match="k-means of 8 codes.*has 7.*model.codes"):
        spherical_kmeans(x, 8)


def test_the_pool_is_a_uniform_sample_that_does_not_depend_on_the_order_of_slides_or_patches():
    bags = {slide: np.stack([np.full(n, slide), np.arange(n)], axis=1) for slide, n in ((3, 40), (5, 10), (9, 50))}

    def pool(order, seed=0, size=25):
        found = Pool(size, seed)
        for slide in order:
            positions = np.random.default_rng(slide).permutation(len(bags[slide])) if order[0] == 9 else None
            positions = np.arange(len(bags[slide])) if positions is None else positions
            found.add(slide, positions, bags[slide][positions])
        return found.vectors

    np.testing.assert_array_equal(pool([3, 5, 9]), pool([9, 3, 5]))
    assert len(pool([3, 5, 9])) == 25 and len(np.unique(pool([3, 5, 9]), axis=0)) == 25
    assert not np.array_equal(pool([3, 5, 9]), pool([3, 5, 9], seed=1))
    counts = sum(np.bincount(pool([3, 5, 9], seed=s)[:, 0].astype(int), minlength=10) for s in range(200))
    np.testing.assert_allclose(counts[[3, 5, 9]] / counts.sum(), [0.4, 0.1, 0.5], atol=0.02)
    assert len(pool([5], size=25)) == 10


def test_C14_each_class_uses_its_own_slides_only():
    vectors = np.array([[0.0], [0], [1], [1], [2], [9]], np.float32)
    step = (
        vectors,
        np.array([1, 1, 2, 2, 3, 0]),
        np.array([0, 1, 0, 1, 0, 0]),
        np.array([7, 8, -1]),
        np.array([0, 1, 1]),
    )
    negative, positive = class_pools([step], 10, 0)
    assert set(negative.vectors.ravel()) == {0.0} and set(positive.vectors.ravel()) == {1.0}


def batches(found=None):
    return lambda: iter([setup.batch(seed=0, sizes=(30, 40, 35, 20), noise=found)])


@pytest.mark.parametrize("update", ["gradient", "ema", "fixed"])
def test_C14_prepared_codes_are_unit_norm_reproducible_and_of_the_right_class(update):
    run = setup.small_run(memory__update_by=update)
    params, extra = setup.init(run)
    first, second = (run.codes(*run.prepare(params, extra, batches(noise), 3)) for noise in (None, 4))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(np.linalg.norm(first, axis=2), 1, rtol=1e-5)
    other = run.codes(*run.prepare(params, extra, batches(), 4))
    assert not np.array_equal(first, other)
    batch = next(batches()())
    sphere = setup.details(run, params, extra, batch)["patches"].sphere
    segments = batch["segment_ids"].reshape(-1)
    for label in (0, 1):
        mine = np.isin(segments, np.flatnonzero(batch["label"] == label) + 1)
        rng = [np.random.default_rng([3, s]).random(n) for s, n in enumerate((30, 40, 35, 20)) if s % 2 == label]
        x = np.asarray(sphere)[mine][np.argsort(np.concatenate(rng))]
        np.testing.assert_allclose(first[label], reference_kmeans(x.astype(float), 4, 20), atol=2e-4)


def test_codes_stay_random_unit_vectors_without_kmeans():
    method = setup.small_method(memory__init="random")
    assert method.prepare is None
    codes = setup.init(method)[0]["MEMORY"]["codes"]
    np.testing.assert_allclose(jnp.linalg.norm(codes, axis=2), 1, rtol=1e-5)
