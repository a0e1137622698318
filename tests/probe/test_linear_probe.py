"""The linear probe is scikit-learn's logistic regression, solved for many subsets at once."""

import numpy as np
import pytest
from labelled_setup import blobs
from sklearn.linear_model import LogisticRegression

from histokd_jax.probe.linear import fit_linear


def subsets(label, sizes=(60, 30, 12)):
    """Masks of nested subsets that hold every class."""
    return np.stack([np.arange(len(label)) < size for size in sizes])


def sklearn_probs(x, label, mask, l2):
    model = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(x[mask].astype(np.float64), label[mask])
    return model, model.predict_proba(x.astype(np.float64))


@pytest.mark.parametrize("l2", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("classes", [2, 4])
def test_equals_scikit_learn_with_the_same_penalty(classes, l2):
    x, label = blobs(60, classes=classes, seed=classes)
    masks = subsets(label)
    found = fit_linear(x, label, masks, classes, l2)
    assert found.converged.all()
    for row, mask in enumerate(masks):
        model, probs = sklearn_probs(x, label, mask, l2)
        np.testing.assert_allclose(found.probs[row], probs, atol=2e-3)
        difference = found.weights[row] - found.weights[row][:, :1]
        expected = np.c_[np.zeros(6), model.coef_[0]] if classes == 2 else (model.coef_ - model.coef_[:1]).T
        np.testing.assert_allclose(difference, expected, atol=5e-3 * max(1, np.abs(expected).max()))


def test_the_gradient_vanishes_in_float64():
    """An optimality condition that no other solver is needed for."""
    x, label = blobs(60, classes=3, seed=5)
    found = fit_linear(x, label, np.ones((1, 60), bool), 3, 0.5)
    w, b = (np.asarray(part[0], np.float64) for part in (found.weights, found.bias))
    z = x.astype(np.float64) @ w + b
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    residual = p - np.eye(3)[label]
    assert np.abs(x.T @ residual + 0.5 * w).max() < 2e-3 * np.abs(x.T @ (np.eye(3)[label] - 1 / 3)).max()
    assert np.abs(residual.sum(0)).max() < 1e-2


def test_a_masked_row_does_not_matter():
    x, label = blobs(40)
    mask = np.arange(40) < 30
    changed = np.where(mask[:, None], x, 100 * x)
    one, two = (fit_linear(values, label, mask[None], 3) for values in (x, changed))
    np.testing.assert_allclose(one.weights, two.weights, atol=1e-5)


def test_more_features_than_patches_and_separable_classes_converge():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 100)).astype(np.float32)
    label = np.arange(20) % 2
    found = fit_linear(x, label, np.ones((1, 20), bool), 2)
    _, probs = sklearn_probs(x, label, np.ones(20, bool), 1.0)
    assert found.converged.all() and (found.probs[0].argmax(1) == label).all()
    np.testing.assert_allclose(found.probs[0], probs, atol=2e-3)


def test_a_class_without_labels_gets_probability_zero():
    x, label = blobs(30)
    found = fit_linear(x, label, (label < 2)[None], 3)
    assert (found.probs[0, :, 2] == 0).all() and found.converged.all()


def test_bad_penalties_and_single_classes_are_refused():
    x, label = blobs(12)
    with pytest.raises(ValueError, match="--l2 0"):
        fit_linear(x, label, np.ones((1, 12)), 3, 0)
    with pytest.raises(ValueError, match="subset 1 holds labels of fewer than two classes"):
        fit_linear(x, label, np.stack([label >= 0, label == 1]), 3)
