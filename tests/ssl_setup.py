"""Tiny runs of self-supervised pre-training: configuration, steps, one pass."""

import jax
import numpy as np
import paired_setup
from ml_collections import ConfigDict

from histokd_jax.methods.ssl import method as ssl
from histokd_jax.types import DataSpec

SIDE, B = 16, 8
TINY = {
    "encoder.blocks": (1,),
    "encoder.width": 4,
    "projector.widths": (12, 12),
    "privileged_encoder.widths": (10, 16),
    "augment.preset": "hmkd_faithful",
    "train.b": B,
}


def config(**changes) -> ConfigDict:
    """The defaults with tiny networks and flips alone; `changes` are dotted keys with `__` for the dot."""
    cfg = ssl.default_config()
    cfg.update_from_flattened_dict({**TINY, **{key.replace("__", "."): v for key, v in changes.items()}})
    return cfg


def data_spec(vector=0, side=SIDE):
    return DataSpec(feat_dim=0, num_classes=0, task="representation", image_size=(side, side), vector_size=vector)


def method(vector=0, **changes):
    return ssl.make_method(config(**changes), data_spec(vector))


def make(vector=0, **changes):
    """The object behind the method, with its networks and specs."""
    return ssl.make_run(config(**changes), data_spec(vector))


def batch(n=B, seed=0, vector=0, missing=()):
    rng = np.random.default_rng(seed)
    partner = rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8)
    if vector:
        partner = rng.poisson(3.0, (n, vector)).astype(np.float32)
    has = ~np.isin(np.arange(n), missing)
    partner[~has] = 0
    return {
        "image": rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8),
        "partner": partner,
        "has_partner": has,
        "label": np.zeros(n, np.int32),
        "has_label": np.zeros(n, bool),
        "example": np.arange(n, dtype=np.int32) + 3,
        "weight": np.ones(n, np.float32),
        "slide_index": np.arange(n, dtype=np.int32) + 3,
    }


def init(run, seed=0):
    return paired_setup.once(run.init, jax.random.key(seed))


def loss_and_gradients(run, params, extra, data, key=None):
    """((loss, (metrics, new extra)), gradients) in training mode, as one program."""
    key = jax.random.key(5) if key is None else key

    def loss(params, extra, data):
        outputs, new = run.forward(params, {}, extra, data, key, True, stage="pretrain")
        value, metrics = run.objective(outputs, data, 0, "pretrain")
        return value, (metrics, new)

    return paired_setup.once(jax.value_and_grad(loss, has_aux=True), params, extra, data)


def forward(run, params, extra, data, train=True, key=None):
    key = jax.random.key(5) if key is None else key
    return paired_setup.once(lambda p, e, d: run.forward(p, {}, e, d, key, train), params, extra, data)


def closed_form():
    """a, b, c of F1: float64 [4, 3]."""
    k = np.arange(12.0)
    return [f.reshape(4, 3) for f in (np.sin(0.5 * k + 0.3), np.cos(0.8 * k + 0.6), np.sin(1.1 * k + 0.2))]
