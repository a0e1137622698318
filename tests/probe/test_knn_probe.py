"""Nearest neighbours equal scikit-learn's."""

import numpy as np
import pytest
from labelled_setup import blobs
from sklearn.neighbors import KNeighborsClassifier

from histokd_jax.probe.knn import TEMPERATURE, knn_probabilities


@pytest.mark.parametrize("votes", ["uniform", "similarity"])
def test_equals_scikit_learn_by_cosine(votes):
    x, label = blobs(70, width=5)
    train, queries = np.arange(70) < 50, np.arange(50, 70)
    masks = np.stack([train, np.arange(70) < 21])
    found = knn_probabilities(x, label, masks, queries, (1, 5, 7), 3, votes)
    assert found.shape == (3, 2, 20, 3)
    weights = "uniform" if votes == "uniform" else lambda distance: np.exp(-distance / TEMPERATURE)
    for s, mask in enumerate(masks):
        for i, k in enumerate((1, 5, 7)):
            model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
            expected = model.fit(x[mask].astype(np.float64), label[mask]).predict_proba(x[queries].astype(np.float64))
            np.testing.assert_allclose(found[i, s], expected, atol=1e-4)


def test_fewer_labels_than_neighbours_let_all_vote():
    x, label = blobs(20)
    mask = np.arange(20) < 6
    found = knn_probabilities(x, label, mask[None], np.array([10, 11]), (15, 50), 3)
    np.testing.assert_allclose(found, 1 / 3, atol=1e-6)


def test_bad_k_is_refused():
    x, label = blobs(6)
    with pytest.raises(ValueError, match="expected k >= 1"):
        knn_probabilities(x, label, np.ones((1, 6), bool), np.arange(2), (0,), 3)
