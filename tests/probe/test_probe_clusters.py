"""Principal components and clusters of embeddings."""

import sys
import types

import numpy as np
import pytest
from labelled_setup import blobs
from sklearn.decomposition import PCA

from histokd_jax.probe import clusters
from histokd_jax.probe.clusters import ClusterOptions, principal_components


@pytest.mark.parametrize("shape", [(40, 6), (10, 30)])
def test_principal_components_equal_scikit_learn(shape):
    x = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1)
    scores, shares = principal_components(x)
    model = PCA(2, svd_solver="full").fit(x)
    expected = model.transform(x)
    sign = np.sign((scores * expected).sum(0))
    np.testing.assert_allclose(scores, expected * sign, atol=1e-8)
    np.testing.assert_allclose(shares, model.explained_variance_ratio_, atol=1e-10)


def test_constant_and_single_features_have_components():
    assert not principal_components(np.ones((5, 3)))[0].any()
    scores, shares = principal_components(np.arange(4.0)[:, None])
    np.testing.assert_allclose(scores, [[-1.5, 0], [-0.5, 0], [0.5, 0], [1.5, 0]])
    np.testing.assert_allclose(shares, [1, 0])


@pytest.fixture
def fake_umap(monkeypatch):
    """A stand-in that takes the first two columns: what is tested is what is made of the points."""
    asked = {}

    class UMAP:
        def __init__(self, **options):
            asked.update(options)

        def fit_transform(self, x):
            return x[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    return asked


def test_A8_numbers_of_well_separated_clouds(fake_umap):
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 40)
    x = 100.0 * label[:, None] + rng.normal(size=(120, 4))
    x[0] = 5000.0  # far from everything: noise
    found = clusters.cluster(x, label, ClusterOptions(min_samples=5, min_size=10, seed=4))
    assert fake_umap == {"n_components": 2, "n_neighbors": 15, "min_dist": 0.0, "random_state": 4}
    assert found["n_labels"] == found["n_clusters"] + 1 and found["cluster"][0] == -1
    assert found["share_assigned"] == np.mean(found["cluster"] >= 0)
    assert found["n_clusters"] >= 3 and found["points"].shape == (120, 2)


def test_A8_defaults():
    assert ClusterOptions() == ClusterOptions(neighbours=15, min_samples=100, min_size=200)


def test_too_few_patches_name_the_settings():
    x, label = blobs(60)
    with pytest.raises(ValueError, match="60 patches are fewer than the 200.*--cluster-min-size 200"):
        clusters.cluster(x, label, ClusterOptions())


def test_without_umap_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(clusters.NotInstalledError, match=r"pip install 'histokd_jax\[clusters\]'"):
        clusters.require_umap()
