"""Fine-tuning: the encoder learns together with a linear head on the labelled images.

Batch norms keep their running averages (their scales and offsets learn): with few labels the averages of a batch would
be noise. Adam, one rate for the encoder and one for the head; the head starts at zero; the last epoch is reported.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from histokd_jax.embed.transform import prepare
from histokd_jax.encoders.loading import LoadedEncoder
from histokd_jax.encoders.presets import Encoder
from histokd_jax.nn.encoders import build
from histokd_jax.ops.image import augment
from histokd_jax.ops.image.steps import Step

PARAMS, STATS = "params", "batch_stats"


@dataclasses.dataclass(frozen=True)
class FinetuneRecipe:
    """How an encoder is fine-tuned.

    Attributes:
      epochs: over the labelled images.
      batch: images per step; the last of an epoch is filled up with images that do not count.
      lr: of the encoder.
      head_lr: of the head.
      pipeline: augmentation of training images on 0..255.
    """

    epochs: int = 20
    batch: int = 32
    lr: float = 1e-4
    head_lr: float = 1e-3
    pipeline: tuple[Step, ...] = ()

    def __post_init__(self):
        if min(self.epochs, self.batch) < 1 or min(self.lr, self.head_lr) <= 0:
            raise ValueError(f"{self}: expected at least one epoch and image, and positive rates")


def finetune(
    loaded: LoadedEncoder, images: np.ndarray, label: np.ndarray, train: np.ndarray, test: np.ndarray,
    num_classes: int, seed: int, recipe: FinetuneRecipe,
) -> np.ndarray:  # fmt: skip
    """Trains one encoder with its head and classifies.

    Args:
      loaded: where it starts; its own variables stay as they are.
      images: [N, e, e, 3] uint8.
      label: [N] int.
      train: labelled rows.
      test: rows to classify.
      num_classes: C.
      seed: of order and augmentation.
      recipe: see `FinetuneRecipe`.

    Returns:
      [len(test), C] float32 probabilities.
    """
    fixed = {name: value for name, value in loaded.variables.items() if name != PARAMS}
    learned = {"encoder": jax.tree.map(jnp.asarray, loaded.variables[PARAMS]), "head": _head(loaded, num_classes)}
    optimiser = _optimiser(recipe)
    adam, key = optimiser.init(learned), jax.random.key(seed)
    rng = np.random.default_rng([seed, len(train)])
    for epoch in range(recipe.epochs):
        order = rng.permutation(train)
        for start in range(0, len(order), recipe.batch):
            rows = order[start : start + recipe.batch]
            counted = np.arange(recipe.batch) < len(rows)
            rows = np.resize(rows, recipe.batch)
            step_key = jax.random.fold_in(jax.random.fold_in(key, epoch), start)
            learned, adam = _step(
                learned, adam, fixed, images[rows], label[rows], counted, rows, step_key,
                encoder=loaded.encoder, recipe=recipe,
            )  # fmt: skip
    return classify(loaded.encoder, learned, fixed, images, test, recipe.batch)


def classify(
    encoder: Encoder, learned: Any, fixed: Mapping[str, Any], images: np.ndarray, rows: np.ndarray, batch: int
) -> np.ndarray:
    """[len(rows), C] probabilities, in batches of one shape."""
    found = []
    for start in range(0, len(rows), batch):
        own = rows[start : start + batch]
        probs = _probabilities(learned, fixed, images[np.resize(own, batch)], encoder=encoder)
        found.append(np.asarray(probs)[: len(own)])
    return np.concatenate(found)


def _head(loaded: LoadedEncoder, num_classes: int) -> dict[str, jax.Array]:
    return {"kernel": jnp.zeros((loaded.encoder.features, num_classes)), "bias": jnp.zeros(num_classes)}


def _optimiser(recipe: FinetuneRecipe) -> optax.GradientTransformation:
    rates = {"encoder": optax.adam(recipe.lr), "head": optax.adam(recipe.head_lr)}
    return optax.multi_transform(rates, lambda params: {name: name for name in params})


def _logits(encoder: Encoder, learned: Any, fixed: Mapping[str, Any], images: jax.Array) -> jax.Array:
    module = build.build(encoder.spec)
    variables = {PARAMS: learned["encoder"], **fixed}
    features = module.apply(variables, prepare(images, encoder.transform))
    return features @ learned["head"]["kernel"] + learned["head"]["bias"][None]


@functools.partial(jax.jit, static_argnames=("encoder", "recipe"))
def _step(learned, adam, fixed, images, label, counted, rows, key, *, encoder: Encoder, recipe: FinetuneRecipe):
    images = augment.augment(key, rows.astype(jnp.int32), images.astype(jnp.float32), recipe.pipeline)

    def loss(learned):
        logits = _logits(encoder, learned, fixed, images)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return jnp.sum(jnp.where(counted, each, 0.0)) / jnp.sum(counted)

    update, adam = _optimiser(recipe).update(jax.grad(loss)(learned), adam, learned)
    return optax.apply_updates(learned, update), adam


@functools.partial(jax.jit, static_argnames=("encoder",))
def _probabilities(learned, fixed, images, *, encoder: Encoder):
    return jax.nn.softmax(_logits(encoder, learned, fixed, images))
