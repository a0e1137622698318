"""Small MoMKD runs and batches of the tests of the method, and a NumPy network written from the specification."""

import jax
import numpy as np

from data_pipelines.neighbours import neighbour_offsets
from histokd_jax.methods.momkd.config import default_config
from histokd_jax.methods.momkd.method import make_method, make_run
from histokd_jax.types import DataSpec

FEAT, GENES, K = 6, 10, 3
SIZES = (9, 5, 12, 3)
SMALL = {
    "data.feat_dim": FEAT,
    "graph.k": K,
    "genes.top_k": GENES,
    "model.d": 8,
    "model.d_gene": 6,
    "model.gene_hidden": 7,
    "model.sphere": 5,
    "model.codes": 4,
    "model.head_hidden": 6,
}
DATA = DataSpec(FEAT, 2, GENES)


def small_config(**overrides):
    """Default config with narrow networks; `overrides` are dotted keys with `__` for the dot."""
    config = default_config()
    config.update_from_flattened_dict(SMALL)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return config


def small_method(**overrides):
    return make_method(small_config(**overrides), DATA)


def small_run(**overrides):
    return make_run(small_config(**overrides), DATA)


def init(run, seed=0):
    """Compiled `Method.init`: operations one by one would each be compiled."""
    return jax.jit(run.init)(jax.random.key(seed))


def predict(run, params, extra, batch):
    """Compiled prediction from slides."""
    return jax.jit(lambda p, e, b: run.predict(p, {}, e, b, "pathology"))(params, extra, batch)


def attention(run, params, extra, batch):
    """Compiled attention map."""
    return np.asarray(jax.jit(lambda p, e, b: run.attention(p, {}, e, b, "pathology"))(params, extra, batch))


def details(run, params, extra, batch):
    """Compiled `MoMkd.details`."""
    return jax.jit(run.details)(params, extra, batch)


def bags(sizes=SIZES, seed=0, width=FEAT):
    """(patches, coordinates) of every slide."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, width)).astype(np.float32), rng.integers(0, 1000, (n, 2))) for n in sizes]


def slot_fields(slots, seed=1, label=None):
    rng = np.random.default_rng(seed)
    return {
        "weight": np.ones(slots, np.float32),
        "slide_index": np.arange(slots, dtype=np.int32),
        "label": (np.arange(slots) % 2 if label is None else np.full(slots, label)).astype(np.int32),
        "genes": rng.normal(size=(slots, GENES)).astype(np.float32),
    }


def packed(found, row=8, k=K, noise=None):
    """Bags as one stream cut into rows, so that slides span rows; `noise` seeds arbitrary padding."""
    sizes = [len(x) for x, _ in found]
    rows = -(-sum(sizes) // row) + 1
    n, width = rows * row, found[0][0].shape[1]
    rng = np.random.default_rng(noise)
    batch = {
        "patches": np.full((n, width), np.nan if noise is not None else 0, np.float32),
        "segment_ids": np.zeros(n, np.int32),
        "positions": np.zeros(n, np.int32) if noise is None else rng.integers(0, 99, n).astype(np.int32),
        "neighbours": np.zeros((n, k), np.int32) if noise is None else rng.integers(-n, n, (n, k)).astype(np.int32),
    }
    start = 0
    for slot, (x, coords) in enumerate(found):
        at = slice(start, start + len(x))
        batch["patches"][at], batch["segment_ids"][at] = x, slot + 1
        batch["positions"][at], batch["neighbours"][at] = np.arange(len(x)), neighbour_offsets(coords, k)
        start += len(x)
    return {name: value.reshape(rows, row, *value.shape[1:]) for name, value in batch.items()}


def batch(sizes=SIZES, seed=0, label=None, **options):
    return packed(bags(sizes, seed), **options) | slot_fields(len(sizes), seed + 1, label)


def layer_norm(p, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def reference_gat(p, x, edges):
    """GATv2 of section 3.1, edge by edge; `edges` holds (source, target) pairs without self-loops."""
    source, target, out = linear(p["source"], x), linear(p["target"], x), np.zeros((len(x), len(p["bias"])))
    heads, width = p["att"].shape
    for i in range(len(x)):
        incoming = [s for s, t in edges if t == i] + [i]
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            raw = source[incoming][:, part] + target[i, part]
            score = np.where(raw > 0, raw, 0.2 * raw) @ p["att"][h]
            weight = np.exp(score - score.max())
            out[i, part] = (weight / weight.sum()) @ source[incoming][:, part]
    return out + p["bias"]


def reference_slide(p, codes, x, edges, tau=0.2):
    """(logits, attention, F, q) of one slide by sections 3.1, 3.2, 3.5 and 3.6, without dropout."""

    def elu(v):
        return np.where(v > 0, v, np.expm1(v))

    h_1 = elu(layer_norm(p["norm_1"], reference_gat(p["gat_1"], x, edges))) + linear(p["residual"], x)
    h_2 = elu(layer_norm(p["norm_2"], reference_gat(p["gat_2"], h_1, edges))) + h_1
    f = np.maximum(h_1, h_2)
    q = unit(linear(p["patch_proj"], f))
    score = (q @ unit(codes[1]).T).max(axis=1) - (q @ unit(codes[0]).T).max(axis=1)
    weight = np.exp((score - score.max()) / tau)
    weight /= weight.sum()
    hidden = np.maximum(linear(p["head_dense"], layer_norm(p["head_norm"], weight @ f)), 0)
    return linear(p["head_out"], hidden), weight, f, q


def listed_edges(coords, k=K, direction="centre_to_neighbour"):
    """Set of (source, target) of a slide, from the k nearest others."""
    n = len(coords)
    if n <= k:
        return set()
    square = ((coords[:, None] - coords[None]) ** 2).sum(axis=2).astype(float)
    np.fill_diagonal(square, np.inf)
    listed = {(c, int(j)) for c in range(n) for j in np.argsort(square[c], kind="stable")[:k]}
    turned = {(j, c) for c, j in listed}
    return {"centre_to_neighbour": listed, "neighbour_to_centre": turned, "symmetric": listed | turned}[direction]
