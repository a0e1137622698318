"""Small MKD runs and batches shared by the tests of the method."""

import numpy as np

from histokd_jax.methods.mkd.config import default_config
from histokd_jax.methods.mkd.method import make_method
from histokd_jax.types import DataSpec

FEAT, GENES, CLASSES = 6, 16, 2
SIZES = (5, 1, 7, 3)


def small_config(**overrides):
    """Default config with narrow networks; `overrides` are dotted keys with `__` for the dot."""
    config = default_config()
    config.update_from_flattened_dict(
        {"data.feat_dim": FEAT, "genes.top_k": GENES, "genes.token_size": 4, "model.d": 8, "model.attn": 4}
    )
    config.data.chunk = 8
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def small_method(**overrides):
    return make_method(small_config(**overrides), DataSpec(FEAT, CLASSES, GENES))


def bags(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, FEAT)).astype(np.float32) for n in sizes]


def slot_fields(slots, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "weight": np.ones(slots, np.float32),
        "label": (np.arange(slots) % CLASSES).astype(np.int32),
        "genes": rng.normal(size=(slots, GENES)).astype(np.float32),
        "cnv": rng.normal(size=(slots, GENES)).astype(np.float32),
    }


def packed(patches, row=8, fill=np.nan):
    """Bags as one stream cut into rows; slides may span rows."""
    sizes = [len(p) for p in patches]
    rows = -(-sum(sizes) // row)
    pad = rows * row - sum(sizes)
    x = np.concatenate([*patches, np.full((pad, FEAT), fill, np.float32)])
    ids = np.concatenate([np.repeat(np.arange(1, len(sizes) + 1), sizes), np.zeros(pad)])
    positions = np.concatenate([*(np.arange(n) for n in sizes), np.zeros(pad)])
    return {
        "patches": x.reshape(rows, row, FEAT),
        "segment_ids": ids.astype(np.int32).reshape(rows, row),
        "positions": positions.astype(np.int32).reshape(rows, row),
    }


def padded(patches, length=None, fill=np.nan):
    """One bag per row."""
    length = length or max(len(p) for p in patches)
    x = np.full((len(patches), length, FEAT), fill, np.float32)
    ids, positions = np.zeros(x.shape[:2], np.int32), np.zeros(x.shape[:2], np.int32)
    for i, p in enumerate(patches):
        x[i, : len(p)], ids[i, : len(p)], positions[i, : len(p)] = p, i + 1, np.arange(len(p))
    return {"patches": x, "segment_ids": ids, "positions": positions}


def batch(layout=packed, sizes=SIZES, seed=0, **kw):
    return layout(bags(sizes, seed), **kw) | slot_fields(len(sizes), seed + 1)
