"""Training of small bag networks on the classic benchmarks: all folds of all seeds as one program.

The ordinary trainer reads one stored data set for all folds, while these benchmarks are standardised on the training
bags of every fold, and their bags of about five instances train one by one. So the loop is here: the bags lie on the
device once, padded to one length; a training is given its moments, its bags and its key; a step is one bag.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines.mil_classic import MilBags, moments
from histokd_jax.methods.supervised.networks import NetworkSpec, network
from histokd_jax.nn.affine import TORCH_DEFAULT, Affine
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.redraw import redraw
from histokd_jax.ops.dropout import hash_dropout
from histokd_jax.ops.pooling import SEGMENT

PROJECTOR = (256, 128)
"""Layers before the network's own projection to 64: the 256-128-64 instance network of the published comparison."""
_FIRST_LAYER = 100  # dropout layers of the projector, beyond those of any network
_SHORT = 8  # most bags have no more instances; they need not be computed at the length of the largest


@dataclasses.dataclass(frozen=True)
class Model:
    """A bag network of this comparison.

    Attributes:
      name: key of the table of networks.
      options: what replaces its defaults; `dropout` comes from the recipe.
      max_weight: weight of the loss on the largest instance score (DSMIL), the rest is on the bag.
    """

    name: str
    options: Mapping[str, Any]
    max_weight: float = 0.0


MODELS = {
    "abmil": Model("abmil", {"width": 64, "attn": 64, "rho": 0, "gated": False}),
    "gated_abmil": Model("abmil", {"width": 64, "attn": 64, "rho": 0, "gated": True}),
    "deepsets": Model("deepsets", {"width": 64, "rho": 64, "pool": "mean"}),
    "dsmil": Model("dsmil", {}, max_weight=0.5),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Optimisation: Adam with L2 in the gradient, one bag per step, a fixed number of epochs, last state.

    Attributes:
      lr: learning rate.
      wd: L2 weight.
      epochs: passes over the training bags.
      dropout: of all layers.
    """

    lr: float
    wd: float
    epochs: int = 100
    dropout: float = 0.25


class SmallBagNet(nn.Module):
    """An instance network in front of a bag network.

    Attributes:
      feat_dim: width of an instance.
      inner: the bag network, on instances of width `widths[-1]`.
      widths: of the layers.
      rate: dropout after each layer.
    """

    feat_dim: int
    inner: nn.Module
    widths: tuple[int, ...] = PROJECTOR
    rate: float = 0.0

    @nn.compact
    def __call__(self, bags: Bags, seed: jax.Array | None = None) -> dict[str, jax.Array]:
        """What the inner network returns, see `histokd_jax.methods.supervised.networks`."""
        rows, length, _ = bags.patches.shape
        h = bags.patches
        for i, width in enumerate(self.widths):
            h = jax.nn.relu(Affine(h.shape[-1], width, TORCH_DEFAULT, name=f"layer_{i}")(h))
            if seed is not None:
                columns = h.reshape(rows * length, width).T
                ids, positions = bags.segment_ids.reshape(-1), bags.positions.reshape(-1)
                dropped = hash_dropout(columns, seed, ids, positions, self.rate, _FIRST_LAYER + i)
                h = dropped.T.reshape(rows, length, width)
        return self.inner(bags._replace(patches=h), None, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """One model on one benchmark.

    Attributes:
      net: the network, one output.
      initializer: None, or how its kernels are drawn anew.
      recipe: optimisation.
      max_weight: see `Model`.
      x: [N, L, D] float32 instances, padded with 0.
      size: [N] int32 instances of every bag.
      label: [N] float32.
    """

    net: SmallBagNet
    initializer: str | None
    recipe: Recipe
    max_weight: float
    x: jax.Array
    size: jax.Array
    label: jax.Array

    def logits(self, params: Any, x: jax.Array, size: jax.Array, seed: jax.Array | None = None):
        """Logits of some bags, and their largest instance scores where the network has such.

        Args:
          params: of the network.
          x: [n, L, D] standardised.
          size: [n] int32.
          seed: for dropout.

        Returns:
          ([n], [n] or None).
        """
        position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        slot = jnp.arange(1, len(x) + 1, dtype=jnp.int32)[:, None]
        bags = Bags(x, jnp.where(position < size[:, None], slot, 0), position, len(x))
        outputs = self.net.apply({"params": params}, bags, seed)
        largest = outputs.get("max_logits")
        return outputs["logits"][:, 0], None if largest is None else largest[:, 0]

    def loss(self, params: Any, x: jax.Array, size: jax.Array, label: jax.Array, seed: jax.Array) -> jax.Array:
        """Binary cross-entropy of one bag."""
        bag, largest = self.logits(params, x[None], size[None], seed)
        loss = optax.sigmoid_binary_cross_entropy(bag[0], label)
        if not self.max_weight:
            return loss
        return (1 - self.max_weight) * loss + self.max_weight * optax.sigmoid_binary_cross_entropy(largest[0], label)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with the L2 term added to the gradient."""
        return optax.chain(optax.add_decayed_weights(self.recipe.wd), optax.adam(self.recipe.lr))

    def train(self, mean: jax.Array, scale: jax.Array, rows: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One training.

        Args:
          mean: [D] of the training instances.
          scale: [D].
          rows: [T] training bags.
          key: of initialisation, order and dropout.

        Returns:
          (logits of all bags [N], mean loss of every epoch [epochs]).
        """
        start, order_key, dropout_key = jax.random.split(key, 3)
        params, optimizer = self._init(start), self.optimizer()

        def epoch(carry, number):
            order = jax.random.permutation(jax.random.fold_in(order_key, number), rows)
            seeds = jax.random.bits(jax.random.fold_in(dropout_key, number), rows.shape, jnp.uint32)
            carry, losses = jax.lax.scan(functools.partial(self._step, optimizer, mean, scale), carry, (order, seeds))
            return carry, losses.mean()

        carry, losses = jax.lax.scan(epoch, (params, optimizer.init(params)), jnp.arange(self.recipe.epochs))
        bag, _ = self.logits(carry[0], _standardised(self.x, mean, scale), self.size)
        return bag, losses

    def _init(self, key: jax.Array) -> Any:
        example = Bags(self.x[:1], jnp.ones_like(self.x[:1, :, 0], jnp.int32), jnp.zeros((1, self.x.shape[1]), int), 1)
        params = self.net.init(key, example)["params"]
        return params if self.initializer is None else redraw(params, jax.random.fold_in(key, 1), self.initializer)

    def _step(self, optimizer, mean, scale, carry, drawn):
        (params, state), (row, seed) = carry, drawn
        size, label = self.size[row], self.label[row]

        def gradient(length: int, params: Any):
            x = _standardised(self.x[row, :length], mean, scale)
            return jax.value_and_grad(self.loss)(params, x, size, label, seed)

        lengths = sorted({min(_SHORT, self.x.shape[1]), self.x.shape[1]})
        branches = [functools.partial(gradient, length) for length in lengths]
        loss, grads = jax.lax.switch((size > lengths[0]).astype(jnp.int32), branches, params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss


def _standardised(x: jax.Array, mean: jax.Array, scale: jax.Array) -> jax.Array:
    axes = (1,) * (x.ndim - 1)
    return (x - mean.reshape(*axes, -1)) / scale.reshape(*axes, -1)


def make_trainer(bags: MilBags, model: Model, recipe: Recipe) -> Trainer:
    """A model on a benchmark, with its bags on the device."""
    entry = network(model.name)
    options = {**entry.options, **model.options}
    options |= {name: recipe.dropout for name in ("dropout",) if name in options}
    length = max(len(x) for x in bags.features)
    spec = NetworkSpec(feat_dim=PROJECTOR[-1], num_outputs=1, chunk=length, pool=SEGMENT)
    padded = np.zeros((len(bags.label), length, bags.feat_dim), np.float32)
    for row, x in zip(padded, bags.features):
        row[: len(x)] = x
    return Trainer(
        SmallBagNet(bags.feat_dim, entry.build(spec, options), rate=recipe.dropout),
        entry.initializer(options),
        recipe,
        model.max_weight,
        jnp.asarray(padded),
        jnp.asarray([len(x) for x in bags.features], jnp.int32),
        jnp.asarray(bags.label, jnp.float32),
    )


def folds(label: np.ndarray, n_folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, test rows) of a shuffled, stratified cross-validation."""
    from sklearn.model_selection import StratifiedKFold

    split = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    return list(split.split(np.zeros(len(label)), label))


def cross_validate(
    bags: MilBags,
    model: Model,
    recipe: Recipe,
    seeds: Sequence[int],
    n_folds: int,
    loop: str,
) -> dict[str, list[list[float]]]:
    """Trains every fold of every seed in one program.

    Args:
      bags: the benchmark.
      model: the network.
      recipe: optimisation.
      seeds: of splits and trainings.
      n_folds: folds of each seed.
      loop: "map" (one after the other, for CPU) or "vmap" (side by side).

    Returns:
      Per seed and fold: "accuracy" and "auroc" of the test bags in the last epoch, and "train_loss" of that epoch.
    """
    from sklearn.metrics import roc_auc_score

    splits = [(seed, *part) for seed in seeds for part in folds(bags.label, n_folds, seed)]
    longest = max(len(train) for _, train, _ in splits)
    inputs = [_inputs(bags, train, longest, seed, number) for number, (seed, train, _) in enumerate(splits)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
    logits, losses = jax.jit(_looped(make_trainer(bags, model, recipe).train, loop))(*stacked)
    logits, losses = np.asarray(logits), np.asarray(losses)
    found: dict[str, list[float]] = {"accuracy": [], "auroc": [], "train_loss": []}
    for (_, _, test), scores, loss in zip(splits, logits, losses):
        found["accuracy"].append(float(np.mean((scores[test] > 0) == bags.label[test])))
        found["auroc"].append(float(roc_auc_score(bags.label[test], scores[test])))
        found["train_loss"].append(float(loss[-1]))
    return {name: np.reshape(values, (len(seeds), n_folds)).tolist() for name, values in found.items()}


def _inputs(bags: MilBags, train: np.ndarray, longest: int, seed: int, number: int):
    """Arguments of `Trainer.train`; a shorter training part repeats one of its bags, so that all have one shape."""
    mean, scale = moments(bags, train)
    rng = np.random.default_rng([seed, number])
    rows = np.concatenate([train, rng.choice(train, longest - len(train), replace=False)])
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jnp.asarray(mean, jnp.float32), jnp.asarray(scale, jnp.float32), jnp.asarray(rows, jnp.int32), key


def _looped(train: Callable, loop: str) -> Callable:
    if loop == "vmap":
        return jax.vmap(train)
    return lambda *stacked: jax.lax.map(lambda one: train(*one), stacked)
