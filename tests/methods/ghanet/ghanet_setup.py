"""Small G-HANet runs, batches and the golden case shared by the tests of the method."""

import contextlib

import golden_fill as gf
import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.methods.ghanet import torch_keys
from histokd_jax.methods.ghanet.config import FAITHFUL, default_config
from histokd_jax.methods.ghanet.method import make_method, make_run
from histokd_jax.types import DataSpec

FEAT, BINS = 6, 4
GROUPS = (3, 2, 4)
SIZES = (10, 5, 23, 15)
GOLDEN_GROUPS = (7, 11, 5, 13, 9, 4)


def faithful_config(**overrides):
    config = default_config()
    config.update_from_flattened_dict(dict(FAITHFUL))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def small_config(preset=FAITHFUL, **overrides):
    """Narrow networks; `overrides` are dotted keys with `__` for the dot."""
    config = default_config()
    config.update_from_flattened_dict(dict(preset))
    small = {"feat_dim": FEAT, "chunk": 8}
    config.update_from_flattened_dict({f"data.{k}": v for k, v in small.items()})
    model = {"dim": 16, "heads": 2, "head_dim": 4, "ffn_mult": 2, "tokens": len(GROUPS)}
    config.update_from_flattened_dict({f"model.{k}": v for k, v in model.items()})
    config.train.b = len(SIZES)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def spec(groups=GROUPS, bins=BINS, feat=FEAT):
    return DataSpec(feat, bins, sum(groups), "survival", tuple(groups))


def small_run(preset=FAITHFUL, groups=GROUPS, **overrides):
    return make_run(small_config(preset, **overrides), spec(groups))


def small_method(preset=FAITHFUL, groups=GROUPS, **overrides):
    return make_method(small_config(preset, **overrides), spec(groups))


def bags(sizes=SIZES, seed=0, feat=FEAT):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, feat)).astype(np.float32) for n in sizes]


def slot_fields(slots, seed=1, groups=GROUPS):
    rng = np.random.default_rng(seed)
    return {
        "weight": np.ones(slots, np.float32),
        "label": (np.arange(slots) % BINS).astype(np.int32),
        "event": (np.arange(slots) % 2).astype(np.float32),
        "time_months": rng.exponential(20, slots).astype(np.float32),
        "genes": rng.normal(size=(slots, sum(groups))).astype(np.float32),
    }


def packed(patches, row=8, fill=np.nan, rows=None):
    """Bags as one stream cut into rows; slides may span rows."""
    sizes = [len(p) for p in patches]
    rows = rows or -(-sum(sizes) // row)
    pad, feat = rows * row - sum(sizes), patches[0].shape[1]
    x = np.concatenate([*patches, np.full((pad, feat), fill, patches[0].dtype)])
    ids = np.concatenate([np.repeat(np.arange(1, len(sizes) + 1), sizes), np.zeros(pad)])
    positions = np.concatenate([*(np.arange(n) for n in sizes), np.zeros(pad)])
    return {
        "patches": x.reshape(rows, row, feat),
        "segment_ids": ids.astype(np.int32).reshape(rows, row),
        "positions": positions.astype(np.int32).reshape(rows, row),
    }


def padded(patches, length=None, fill=np.nan):
    """One bag per row."""
    length = length or max(len(p) for p in patches)
    x = np.full((len(patches), length, patches[0].shape[1]), fill, patches[0].dtype)
    ids, positions = np.zeros(x.shape[:2], np.int32), np.zeros(x.shape[:2], np.int32)
    for i, p in enumerate(patches):
        x[i, : len(p)], ids[i, : len(p)], positions[i, : len(p)] = p, i + 1, np.arange(len(p))
    return {"patches": x, "segment_ids": ids, "positions": positions}


def batch(layout=packed, sizes=SIZES, seed=0, **kw):
    return layout(bags(sizes, seed), **kw) | slot_fields(len(sizes), seed + 1)


def precision_context(precision):
    return jax.enable_x64(True) if precision == gf.FLOAT64 else contextlib.nullcontext()


def golden_state(folder):
    """{checkpoint key: float64 array} of the golden fill; tokens are noise without scaling."""
    rows = gf.key_table_file(folder / "g_hanet_fill.tsv")
    rules = {row["key"]: gf.noise if row["kind"] == "token" else gf.fill for row in rows}
    return {row["key"].split(":", 1)[1]: rules[row["key"]](row["key"], row["shape"]) for row in rows}


def golden_params(folder, precision):
    params = torch_keys.from_torch(golden_state(folder), GOLDEN_GROUPS)
    return jax.tree.map(lambda x: jnp.asarray(x, precision), params)


def golden_batch(case, precision):
    """The bag as one row, death in bin 2, and the targets; plus the name of the bag."""
    name = next(k for k in case["inputs"] if k.startswith("x_path"))
    x = gf.inputs(name, tuple(case["inputs"][name]))
    genes = np.concatenate([gf.inputs(f"omics/{i}", (g,)) for i, g in enumerate(GOLDEN_GROUPS)])
    n = len(x)
    return name, {
        "patches": jnp.asarray(x, precision)[None],
        "segment_ids": jnp.ones((1, n), jnp.int32),
        "positions": jnp.arange(n, dtype=jnp.int32)[None],
        "weight": jnp.ones(1, jnp.float32),
        "label": jnp.array([2], jnp.int32),
        "event": jnp.ones(1, jnp.float32),
        "time_months": jnp.ones(1, jnp.float32),
        "genes": jnp.asarray(genes, precision)[None],
    }
