"""The head `mlp256` of More From Less (A6): batch norm, 256 ReLU units, batch norm, softmax; many seeds at once.

Adam at 1e-3 (epsilon 1e-7), batches of 128, 100 epochs, the last epoch is reported. "faithful" keeps Keras' running
averages of the batch norms (momentum 0.99), which few labels do not move far from their start: with one batch an epoch
a third of the first guess is left after 100. "corrected" takes the statistics of all labelled rows after training.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

FAITHFUL, CORRECTED = "faithful", "corrected"
PROTOCOLS = (CORRECTED, FAITHFUL)
MOMENTUM = 0.99


@dataclasses.dataclass(frozen=True)
class MlpRecipe:
    """How a head is trained.

    Attributes:
      hidden: width of the hidden layer.
      epochs, batch, lr: of Adam.
      eps: of the batch norms.
      protocol: "corrected" or "faithful", see above.
    """

    hidden: int = 256
    epochs: int = 100
    batch: int = 128
    lr: float = 1e-3
    eps: float = 1e-3
    protocol: str = CORRECTED

    def __post_init__(self):
        if min(self.hidden, self.epochs, self.batch) < 1 or self.lr <= 0 or self.protocol not in PROTOCOLS:
            raise ValueError(f"{self}: expected positive sizes and a protocol in {PROTOCOLS}")


class _State(NamedTuple):
    params: Any
    stats: Any
    adam: Any


def train_mlp(
    views: np.ndarray, clean: np.ndarray, label: np.ndarray, rows: np.ndarray, num_classes: int,
    seeds: np.ndarray, recipe: MlpRecipe,
) -> np.ndarray:  # fmt: skip
    """Trains one head per seed, all in one program.

    Args:
      views: [V, N, D] features of augmented views; epoch e learns from view e modulo V. V = 1 without augmentation.
      clean: [N, D] features that are classified.
      label: [N] int.
      rows: [S, m] labelled rows of every seed; -1 fills up.
      num_classes: C.
      seeds: [S] int, of initialisation and order.
      recipe: see `MlpRecipe`.

    Returns:
      [S, N, C] float32 probabilities of all rows after the last epoch.
    """
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    args = (jnp.asarray(views, jnp.float32), jnp.asarray(clean, jnp.float32), jnp.asarray(label, jnp.int32))
    found = _train(*args, jnp.asarray(rows, jnp.int32), keys, recipe=recipe, num_classes=num_classes)
    return np.asarray(found)


@functools.partial(jax.jit, static_argnames=("recipe", "num_classes"))
def _train(views, clean, label, rows, keys, *, recipe: MlpRecipe, num_classes: int):
    one = functools.partial(_train_one, recipe, num_classes, views, clean, label)
    return jax.vmap(one)(rows, keys)


def _train_one(recipe, num_classes, views, clean, label, rows, key):
    optimiser = optax.adam(recipe.lr, eps=1e-7)
    start, order = jax.random.split(key)
    params = init(start, clean.shape[1], recipe.hidden, num_classes)
    state = _State(params, init_stats(clean.shape[1], recipe.hidden), optimiser.init(params))
    epoch = functools.partial(_epoch, recipe, optimiser, views, label, rows, order)
    state = jax.lax.fori_loop(0, recipe.epochs, epoch, state)
    stats = state.stats
    if recipe.protocol == CORRECTED:
        last = views[(recipe.epochs - 1) % views.shape[0]]
        stats = population_stats(state.params, last[rows], rows >= 0, recipe.eps)
    return jax.nn.softmax(apply(state.params, stats, clean, recipe.eps))


def _epoch(recipe, optimiser, views, label, rows, key, number, state):
    """All labelled rows once, in a new order; the last batch may be smaller, as Keras has it."""
    steps = -(-rows.shape[0] // recipe.batch)
    noise = jax.random.uniform(jax.random.fold_in(key, number), rows.shape)
    shuffled = rows[jnp.argsort(jnp.where(rows >= 0, noise, jnp.inf))]
    shuffled = jnp.pad(shuffled, (0, steps * recipe.batch - len(shuffled)), constant_values=-1)
    view = views[number % views.shape[0]]

    def step(state, chosen):
        return _step(recipe, optimiser, view[chosen], label[chosen], chosen >= 0, state), None

    return jax.lax.scan(step, state, shuffled.reshape(steps, recipe.batch))[0]


def _step(recipe, optimiser, x, label, mask, state: _State) -> _State:
    def loss(params):
        logits, batch_stats = apply_train(params, x, mask, recipe.eps)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.sum(jnp.where(mask, each, 0.0)) / jnp.maximum(jnp.sum(mask), 1), batch_stats

    gradient, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    update, adam = optimiser.update(gradient, state.adam, state.params)
    stats = jax.tree.map(lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new, state.stats, batch_stats)
    new = _State(optax.apply_updates(state.params, update), stats, adam)
    # A batch without rows (another seed has more of them) changes nothing.
    return jax.tree.map(lambda a, b: jnp.where(jnp.any(mask), a, b), new, state)


def init(key: jax.Array, inputs: int, hidden: int, num_classes: int) -> dict[str, Any]:
    """Glorot-uniform kernels, zero biases, batch norms of scale 1 and offset 0."""
    glorot = jax.nn.initializers.glorot_uniform()
    first, second = jax.random.split(key)
    return {
        "norm0": {"scale": jnp.ones(inputs), "offset": jnp.zeros(inputs)},
        "dense0": {"kernel": glorot(first, (inputs, hidden)), "bias": jnp.zeros(hidden)},
        "norm1": {"scale": jnp.ones(hidden), "offset": jnp.zeros(hidden)},
        "dense1": {"kernel": glorot(second, (hidden, num_classes)), "bias": jnp.zeros(num_classes)},
    }


def init_stats(inputs: int, hidden: int) -> dict[str, Any]:
    """Running averages before training: mean 0, variance 1."""
    return {name: {"mean": jnp.zeros(d), "var": jnp.ones(d)} for name, d in (("norm0", inputs), ("norm1", hidden))}


def apply(params: Any, stats: Any, x: jax.Array, eps: float) -> jax.Array:
    """[n, D] features -> [n, C] logits with given statistics."""
    hidden = jax.nn.relu(_dense(params["dense0"], _norm(params["norm0"], stats["norm0"], x, eps)))
    return _dense(params["dense1"], _norm(params["norm1"], stats["norm1"], hidden, eps))


def apply_train(params: Any, x: jax.Array, mask: jax.Array, eps: float) -> tuple[jax.Array, Any]:
    """[n, D] features -> ([n, C] logits, statistics of the rows of `mask`, by which they were normalised)."""
    first = _moments(x, mask)
    hidden = jax.nn.relu(_dense(params["dense0"], _norm(params["norm0"], first, x, eps)))
    second = _moments(hidden, mask)
    return _dense(params["dense1"], _norm(params["norm1"], second, hidden, eps)), {"norm0": first, "norm1": second}


def population_stats(params: Any, x: jax.Array, mask: jax.Array, eps: float) -> Any:
    """Statistics of both batch norms over all rows of `mask`."""
    return apply_train(params, x, mask, eps)[1]


def _moments(x: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    count = jnp.maximum(jnp.sum(mask), 1)
    rows = mask[:, None]
    mean = jnp.sum(jnp.where(rows, x, 0.0), axis=0) / count
    var = jnp.sum(jnp.where(rows, (x - mean[None]) ** 2, 0.0), axis=0) / count
    return {"mean": mean, "var": var}


def _norm(params: Any, stats: Any, x: jax.Array, eps: float) -> jax.Array:
    scale = params["scale"] * jax.lax.rsqrt(stats["var"] + eps)
    return (x - stats["mean"][None]) * scale[None] + params["offset"][None]


def _dense(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"][None]
