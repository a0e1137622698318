"""Tiny runs of HM-KD: configuration, steps of image pairs, one training step."""

import importlib

import jax
import numpy as np
import optax
import paired_setup
from ml_collections import ConfigDict

from histokd_jax.methods.hmkd import method as hmkd
from histokd_jax.types import DataSpec

named = importlib.import_module("configs.hmkd")
SIDE = 16
CLASSES = 4
TINY = {
    "model.widths": (32, 40, 48, 64),
    "model.stem_patch": 2,
    "model.teacher_depths": (1, 0, 0, 0),
    "model.student_depths": (1, 0, 0, 0),
    "model.mlp_ratio": 2,
    "model.refine_min": 4,
    "model.head_hidden": 8,
    "train.b": 4,
}


def config(**changes) -> ConfigDict:
    """The defaults with tiny networks; `changes` are dotted keys with `__` for the dot."""
    cfg = hmkd.default_config()
    cfg.update_from_flattened_dict({**TINY, **{key.replace("__", "."): v for key, v in changes.items()}})
    return cfg


def method(**changes):
    return hmkd.make_method(config(**changes), DataSpec(feat_dim=0, num_classes=CLASSES))


def batch(n=4, seed=0, side=SIDE):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, side, side, 3), np.uint8),
        "partner": rng.integers(0, 256, (n, side, side, 3), np.uint8),
        "has_partner": np.ones(n, bool),
        "label": (np.arange(n) % CLASSES).astype(np.int32),
        "has_label": np.ones(n, bool),
        "example": np.arange(n, dtype=np.int32),
        "weight": np.ones(n, np.float32),
        "slide_index": np.arange(n, dtype=np.int32),
    }


def init(run):
    """Initial (params, extra) of a method."""
    return paired_setup.once(run.init, jax.random.key(0))


def forward(run, params, frozen, extra, data, key=None, train=False):
    """Outputs of the student's stage."""
    return paired_setup.once(lambda p, f, e, b: run.forward(p, f, e, b, key, train)[0], params, frozen, extra, data)


def predict(run, params, extra, data, mode, what="predict"):
    """`Method.predict`, or another function of the same arguments."""
    return paired_setup.once(lambda p, e, b: getattr(run, what)(p, {}, e, b, mode), params, extra, data)


def warmed(tree, seed=1):
    """Parameters with larger kernels: at the initial ones all maps are nearly zero."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        x = np.asarray(x)
        wide = 0.5 / np.sqrt(max(x.size // x.shape[-1], 1))
        return (rng.normal(size=x.shape) * wide).astype(np.float32) if x.ndim >= 2 else x

    return jax.tree.map(leaf, tree)


def gradients(run, stage, params, extra, data, key=None, frozen=None):
    """((loss, (metrics, new extra)), gradients of all parameters) in training mode."""

    def loss(params):
        outputs, new = run.forward(params, frozen or {}, extra, data, key, True, stage=stage)
        value, metrics = run.objective(outputs, data, 0, stage)
        return value, (metrics, new)

    return paired_setup.once(jax.value_and_grad(loss, has_aux=True), params)


def norm(tree):
    return float(optax.tree.norm(tree))
