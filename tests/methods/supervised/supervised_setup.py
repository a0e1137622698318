"""Small supervised runs and batches shared by the tests of the method."""

import numpy as np

from histokd_jax.methods.supervised.config import default_config
from histokd_jax.methods.supervised.method import make_method
from histokd_jax.types import DataSpec

FEAT, GENES, CLASSES = 6, 10, 4
SIZES = (19, 1, 7, 3)
NARROW = {
    "snn": {"widths": (8, 8)},
    "deepsets": {"width": 8, "rho": 16},
    "abmil": {"width": 8, "attn": 5, "rho": 16},
    "deepattnmisl": {"clusters": 3, "width": 8, "attn": 5, "rho": 16},
    "clam_sb": {"width": 8, "attn": 5},
    "clam_mb": {"width": 8, "attn": 5},
    "dsmil": {"query": 5},
}
"""Small widths of every network; rho is a multiple of the scale 8 of the bilinear fusion."""


def small_config(name="abmil", **overrides):
    """Default config with narrow networks; `overrides` are dotted keys with `__` for the dot."""
    config = default_config()
    config.update_from_flattened_dict({"data.feat_dim": FEAT, "data.chunk": 8, "model.name": name})
    for network, options in NARROW.items():
        config.update_from_flattened_dict({f"model.{network}.{k}": v for k, v in options.items()})
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def small_method(name="abmil", task="survival", **overrides):
    return make_method(small_config(name, **overrides), DataSpec(FEAT, CLASSES, GENES, task))


def bags(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, FEAT)).astype(np.float32) for n in sizes]


def slot_fields(slots, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "weight": np.ones(slots, np.float32),
        "label": (np.arange(slots) % CLASSES).astype(np.int32),
        "time_months": rng.uniform(1, 50, slots).astype(np.float32),
        "event": (np.arange(slots) % 2 == 0).astype(np.float32),
        "genes": rng.normal(size=(slots, GENES)).astype(np.float32),
        "has_genes": np.ones(slots, bool),
    }


def rows(patches, order=None, row=8, fill=np.nan):
    """Bags as one stream cut into rows of 8, the rest of the last row is padding; slides may span rows.

    `order` permutes the stream. Clusters are a function of the patch, so they move with it.
    """
    sizes = [len(p) for p in patches]
    x = np.concatenate(patches)
    ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    positions = np.concatenate([np.arange(n) for n in sizes])
    clusters = (np.abs(x[:, 0]) * 1000).astype(np.int32) % 3
    if order is not None:
        x, ids, positions, clusters = (t[order] for t in (x, ids, positions, clusters))
    count = -(-len(x) // row)
    pad = count * row - len(x)
    x = np.concatenate([x, np.full((pad, FEAT), fill, np.float32)])
    ids, positions, clusters = (np.concatenate([t, np.zeros(pad)]) for t in (ids, positions, clusters))
    return {
        "patches": x.reshape(count, row, FEAT),
        "segment_ids": ids.astype(np.int32).reshape(count, row),
        "positions": positions.astype(np.int32).reshape(count, row),
        "clusters": clusters.astype(np.int32).reshape(count, row),
    }


def batch(sizes=SIZES, seed=0, **kw):
    return rows(bags(sizes, seed), **kw) | slot_fields(len(sizes), seed + 1)


def one_bag(i, sizes=SIZES, seed=0):
    """Slide i of `batch` alone, in rows that hold nothing else."""
    patches = bags(sizes, seed)[i]
    fields = slot_fields(len(sizes), seed + 1)
    return rows([patches]) | {k: v[i : i + 1] for k, v in fields.items()}
