"""Tiny networks and closed-form numbers for the tests of CoCoFNet and its student."""

import csv
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.methods.hmkd import torch_keys
from histokd_jax.nn.paired.networks import Student, Teacher
from histokd_jax.nn.paired.spec import PairedSpec

TINY = PairedSpec(
    widths=(32, 40, 48, 64),
    stem_patch=2,
    teacher_depths=(1, 0, 0, 0),
    student_depths=(1, 0, 0, 0),
    mlp_ratio=2,
    refine_min=4,
    head_hidden=8,
)
"""16 pixels give grids of 8, 4, 2 and 1. One block per stream: compilation is what such tests wait for."""
NETWORKS = {"teacher": Teacher, "student": Student}


# Programs that run once: LLVM's optimisations cost more than they save.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def once(function, *args):
    """`function(*args)`, compiled quickly as one program."""
    return jax.jit(function).lower(*args).compile(QUICK)(*args)


def training(module, variables, *args):
    """(outputs, new statistics) in training mode."""
    return once(lambda v, *a: module.apply(v, *a, True, mutable=["batch_stats"]), variables, *args)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def noise(stream, count):
    """The closed-form numbers of section 16: unit variance, a function of stream and index."""
    h = np.arange(1, count + 1, dtype=np.uint32) * np.uint32(2654435761)
    h = h + np.uint32((40503 * (stream + 1)) & 0xFFFFFFFF)
    for _ in range(2):
        h ^= h >> np.uint32(16)
        h *= np.uint32(73244475)
    h ^= h >> np.uint32(16)
    return math.sqrt(3.0) * (h / 2.0**31 - 1.0)


def fill(stream, key, shape):
    """One tensor of the fill rule."""
    u = noise(stream, math.prod(shape)).reshape(shape)
    if len(shape) >= 2:
        return 0.5 * u / math.sqrt(math.prod(shape[1:]))
    if key.endswith("running_var"):
        return 1.0 + 0.25 * u
    return 1.0 + 0.1 * u if key.endswith("weight") else 0.1 * u


def key_table(folder, model):
    """[(key, shape, index or None, kind)] of a network, in the order of the companion table."""
    with open(folder / "cocofnet_hmkd_keys.tsv", newline="") as f:
        rows = [row for row in csv.DictReader(f, delimiter="\t") if row["model"] == model]
    for row in rows:
        counter = row["index"] == "-"
        shape = () if counter else tuple(int(n) for n in row["shape"].split("x"))
        yield row["key"], shape, None if counter else int(row["index"]), row["kind"]


def golden_state(folder, model):
    """The filled state dict of the companion table, float64."""
    first = {"teacher": 0, "student": 100_000}[model]
    rows = [row for row in key_table(folder, model) if row[2] is not None]
    return {key: fill(first + index, key, shape) for key, shape, index, _ in rows}


def tiny_state(model, spec=TINY, seed=0):
    """A random state dict of a small network under the authors' names, float64."""
    tiles = (jnp.zeros((2, 16, 16, 3)),) * (2 if model == "teacher" else 1)
    shapes = jax.eval_shape(NETWORKS[model](spec).init, jax.random.key(0), *tiles)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape), shapes)
    named = torch_keys.to_torch(zeros["params"], zeros["batch_stats"], spec, model)
    return {key: fill(1000 * seed + i, key, value.shape) for i, (key, value) in enumerate(named.items())}


def variables(state, model, spec=TINY, dtype=None):
    """The state dict as Linen variables."""
    params, stats = torch_keys.from_torch(state, spec, model)
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    return {"params": cast(params), "batch_stats": cast(stats)}


def tile(stream, batch=2, side=16, width=None):
    """Channel-first noise images [B, 3, H, W]."""
    shape = (batch, 3, side, width or side)
    return noise(stream, math.prod(shape)).reshape(shape)


def last(x):
    """Channels first to channels last."""
    return jnp.asarray(np.moveaxis(x, 1, -1))
