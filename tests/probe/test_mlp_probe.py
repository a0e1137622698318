"""The head of More From Less (A6) against a float64 reference of its own."""

import jax
import numpy as np
import pytest
from labelled_setup import blobs

from histokd_jax.probe import mlp
from histokd_jax.probe.mlp import MlpRecipe, train_mlp

EPS = 1e-3


def reference(params, x, label, clean, epochs, lr, faithful):
    """Full-batch training in NumPy, float64: batch norm, dense, ReLU, batch norm, dense, softmax; Adam."""
    p = {f"{a}/{b}": np.asarray(v, np.float64) for a, group in params.items() for b, v in group.items()}
    m, v = ({k: np.zeros_like(value) for k, value in p.items()} for _ in range(2))
    stats = {"norm0": (np.zeros(x.shape[1]), np.ones(x.shape[1]))}
    stats["norm1"] = tuple(f(len(p["dense0/bias"])) for f in (np.zeros, np.ones))
    n = len(x)

    def forward(x, use=None):
        cache = {}
        h = x
        for i in (0, 1):
            mean, var = (h.mean(0), h.var(0)) if use is None else use[f"norm{i}"]
            cache[f"norm{i}"] = (mean, var)
            cache[f"hat{i}"] = (h - mean) / np.sqrt(var + EPS)
            cache[f"in{i}"] = cache[f"hat{i}"] * p[f"norm{i}/scale"] + p[f"norm{i}/offset"]
            h = cache[f"in{i}"] @ p[f"dense{i}/kernel"] + p[f"dense{i}/bias"]
            if i == 0:
                cache["pre"], h = h, np.maximum(h, 0)
        e = np.exp(h - h.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True), cache

    for t in range(1, epochs + 1):
        probs, c = forward(x)
        g, d = {}, (probs - np.eye(probs.shape[1])[label]) / n
        for i in (1, 0):
            g[f"dense{i}/kernel"], g[f"dense{i}/bias"] = c[f"in{i}"].T @ d, d.sum(0)
            d = d @ p[f"dense{i}/kernel"].T
            g[f"norm{i}/scale"], g[f"norm{i}/offset"] = (d * c[f"hat{i}"]).sum(0), d.sum(0)
            hat, d = c[f"hat{i}"], d * p[f"norm{i}/scale"]
            d = (d - d.mean(0) - hat * (d * hat).mean(0)) / np.sqrt(c[f"norm{i}"][1] + EPS)
            d = d * (c["pre"] > 0) if i == 1 else d
        for k in p:
            m[k], v[k] = 0.9 * m[k] + 0.1 * g[k], 0.999 * v[k] + 0.001 * g[k] ** 2
            p[k] = p[k] - lr * (m[k] / (1 - 0.9**t)) / (np.sqrt(v[k] / (1 - 0.999**t)) + 1e-7)
        stats = {k: tuple(0.99 * a + 0.01 * b for a, b in zip(stats[k], c[k])) for k in stats}
    return forward(clean, stats if faithful else forward(x)[1])[0]


@pytest.mark.parametrize("protocol", ["faithful", "corrected"])
def test_A6_head_equals_a_float64_reference(protocol):
    x, label = blobs(24, width=4)
    recipe = MlpRecipe(hidden=8, epochs=6, batch=32, lr=0.02, protocol=protocol)
    rows = np.full((1, 32), -1)
    rows[0, :18] = np.arange(18)
    found = train_mlp(x[None], x, label, rows, 3, np.array([7]), recipe)[0]
    start, _ = jax.random.split(jax.random.key(7))
    params = mlp.init(start, 4, 8, 3)
    expected = reference(params, x[:18].astype(np.float64), label[:18], x, 6, 0.02, protocol == "faithful")
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_A6_defaults_are_those_of_the_specification():
    recipe = MlpRecipe()
    assert (recipe.hidden, recipe.epochs, recipe.batch, recipe.lr, recipe.eps) == (256, 100, 128, 1e-3, 1e-3)
    params = mlp.init(jax.random.key(0), 2048, 256, 9)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2 * 2048 + 2048 * 256 + 256 + 2 * 256 + 256 * 9 + 9


def test_seeds_side_by_side_equal_seeds_alone():
    x, label = blobs(30, width=4)
    recipe = MlpRecipe(hidden=8, epochs=3, batch=8)
    rows = np.stack([np.arange(20), np.arange(5, 25)])
    both = train_mlp(x[None], x, label, rows, 3, np.array([0, 1]), recipe)
    for s in range(2):
        alone = train_mlp(x[None], x, label, rows[s : s + 1], 3, np.array([s]), recipe)[0]
        np.testing.assert_allclose(both[s], alone, atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_filled_up_rows_change_nothing():
    x, label = blobs(16, width=4)
    recipe = MlpRecipe(hidden=8, epochs=4, batch=32)
    rows, far = np.arange(10)[None], np.where(np.arange(16)[:, None] < 10, x, 1e6).astype(np.float32)
    padded = np.pad(rows, ((0, 0), (0, 22)), constant_values=-1)
    found = train_mlp(far[None], x, label, padded, 3, np.array([0]), recipe)
    np.testing.assert_allclose(found, train_mlp(x[None], x, label, rows, 3, np.array([0]), recipe), atol=1e-5)


def test_each_epoch_sees_its_view():
    """With two views and two epochs both matter, the second batch of statistics being that of the last view."""
    x, label = blobs(16, width=4)
    recipe, rows = MlpRecipe(hidden=8, epochs=2, batch=16, lr=0.05), np.arange(16)[None]
    run = lambda *views: train_mlp(np.stack(views), x, label, rows, 3, np.array([0]), recipe)  # noqa: E731
    one, two = x + 0.5, 2 * x[:, ::-1]
    assert np.abs(run(one, two) - run(two, one)).max() > 1e-3
    np.testing.assert_allclose(run(one, two, x), run(one, two), atol=1e-6)
