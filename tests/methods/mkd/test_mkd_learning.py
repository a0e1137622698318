"""Check M of the specification: the full objective learns a planted signal at the stated pace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from histokd_jax.methods.mkd.config import default_config
from histokd_jax.methods.mkd.method import make_method
from histokd_jax.types import DataSpec

PATIENTS, PATCHES, B, STEPS = 32, 24, 16, 400


def unit(rng, d):
    v = rng.normal(size=d)
    return (v / np.linalg.norm(v)).astype(np.float32)


def cohort(seed=0):
    rng = np.random.default_rng(seed)
    label = (np.arange(PATIENTS) % 2).astype(np.int32)
    sign = (2 * label - 1).astype(np.float32)
    patches = rng.normal(size=(PATIENTS, PATCHES, 1024)).astype(np.float32)
    patches[:, :4] += 6 * sign[:, None, None] * unit(rng, 1024)
    genes = rng.normal(size=(PATIENTS, 8192)).astype(np.float32)
    genes += 10 * sign[:, None] * unit(rng, 8192)
    return jnp.asarray(patches), jnp.asarray(genes), jnp.asarray(label)


def as_batch(patches, genes, label):
    n = label.shape[0]
    ids = jnp.broadcast_to(jnp.arange(1, n + 1, dtype=jnp.int32)[:, None], (n, PATCHES))
    positions = jnp.broadcast_to(jnp.arange(PATCHES, dtype=jnp.int32)[None], (n, PATCHES))
    fields = {"patches": patches, "segment_ids": ids, "positions": positions}
    return fields | {"genes": genes, "label": label, "weight": jnp.ones(n, jnp.float32)}


def train(method, data):
    """Scans the 400 steps in one program; returns (parameters, metrics per step)."""
    tx = optax.adamw(2e-4, weight_decay=1e-5)

    def step(carry, key):
        params, state = carry
        rows = jax.random.permutation(key, PATIENTS)[:B]
        batch = as_batch(*(x[rows] for x in data))

        def loss(params):
            out, _ = method.forward(params, {}, {}, batch, None, False)
            return method.objective(out, batch, 0, "online")

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        values = {k: metrics[k][0] for k in ("ce_p", "ce_m", "ce_g", "or")}
        return (optax.apply_updates(params, updates), state), values

    params, _ = method.init(jax.random.key(0))
    (params, _), history = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(1), STEPS))
    return params, history


@pytest.mark.slow
def test_check_M_learning_smoke():
    method, data = make_method(default_config(), DataSpec(1024, 2, 8192)), cohort()
    params, history = jax.jit(lambda: train(method, data))()
    ce = np.asarray(history["ce_p"] + history["ce_m"] + history["ce_g"])
    assert 2.0 < ce[0] < 2.5 and 3.3 < history["or"][0] < 4.2
    assert 0.8 < ce[95:105].mean() < 1.4
    assert ce[-20:].mean() < 0.3 and ce[-1] < 0.3
    assert history["or"][-1] < 0.1
    batch = as_batch(*data)
    for mode in ("pathology", "both", "genomics"):
        prob = method.predict(params, {}, {}, batch, mode)["prob"]
        np.testing.assert_array_equal(jnp.argmax(prob, axis=-1), data[2])
