"""A small convolutional network on one stain or both, as a `Method`: one stage, one mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from histokd_jax.types import CLASSIFICATION, Batch, DataSpec, Method, Mode, Outputs, Params, Stage

__all__ = ["TASKS", "default_config", "make_method", "validate"]

TASKS = (CLASSIFICATION,)
GROUP, BATCH = "group", "batch"
NORMS = (GROUP, BATCH)
NETWORK, STATS = "network", "batch_stats"
FIELDS: Mapping[str, tuple[str, ...]] = {
    "image": ("image",),
    "partner": ("partner",),
    "both": ("image", "partner"),
}
"""`model.inputs` -> the image fields that the network reads; also the name of its mode."""


def default_config() -> ml_collections.ConfigDict:
    """All keys that this method reads."""
    return ml_collections.ConfigDict(dict(model=dict(inputs="image", widths=(16, 32, 64, 128), norm=GROUP, groups=4)))


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses unknown values.

    Raises:
      ValueError: naming the key, its value and what is expected.
    """
    model = config.model
    if model.inputs not in FIELDS:
        raise ValueError(f"model.inputs={model.inputs!r} is unknown; choose one of {tuple(FIELDS)}")
    if model.norm not in NORMS:
        raise ValueError(f"model.norm={model.norm!r} is unknown; choose one of {NORMS}")
    if not model.widths or any(width < 1 or width % model.groups for width in model.widths):
        raise ValueError(f"model.widths={tuple(model.widths)}: expected multiples of model.groups={model.groups}")


class Network(nn.Module):
    """Strided convolutions, norm, GELU; average pooling; linear.

    Attributes:
      widths: channels after every halving of the resolution.
      norm: one of `NORMS`; the running average of a batch norm gives the new value the weight 0.1.
      groups: of the group norm.
      num_classes: C.
    """

    widths: tuple[int, ...]
    norm: str
    groups: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, channels] in [-1, 1] -> (logits [B, C], features [B, widths[-1]])."""
        for width in self.widths:
            x = nn.Conv(width, (3, 3), strides=(2, 2), use_bias=False)(x)
            if self.norm == BATCH:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            else:
                x = nn.GroupNorm(num_groups=self.groups)(x)
            x = nn.gelu(x, approximate=False)
        features = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes)(features), features


def make_method(config: ml_collections.ConfigDict, data: DataSpec) -> Method:
    """Builds the classifier.

    Args:
      config: with the keys of `default_config`.
      data: number of classes and image size.

    Raises:
      ValueError: an unknown switch; no images; sides that the strides do not divide.
    """
    validate(config)
    fields = FIELDS[config.model.inputs]
    _check(config, data, fields)
    network = Network(tuple(config.model.widths), config.model.norm, config.model.groups, data.num_classes)
    mode = Mode(config.model.inputs, (NETWORK,), fields)

    def init(key: jax.Array) -> tuple[Params, Any]:
        found = network.init(key, jnp.zeros((1, *data.image_size, 3 * len(fields))))
        return {NETWORK: found["params"]}, {NETWORK: found[STATS]} if STATS in found else {}

    def run(params: Params, extra: Any, batch: Batch, key: jax.Array | None) -> tuple[Outputs, Any]:
        x = jnp.concatenate([batch[field].astype(jnp.float32) / 127.5 - 1.0 for field in fields], axis=-1)
        if key is not None:
            x = _flipped(x, key, batch["example"])
        variables = {"params": params[NETWORK], **({STATS: extra[NETWORK]} if extra else {})}
        found, new = network.apply(variables, x, key is not None, mutable=[STATS])
        outputs = dict(zip(("logits", "embedding"), found))
        return outputs, ({NETWORK: new[STATS]} if extra else {})

    def forward(params, frozen, extra, batch, key, train, stage="train"):
        del frozen, stage
        outputs, new = run(params, extra, batch, key if train else None)
        return outputs, new if train else extra

    def predict(params, frozen, extra, batch, mode_name, key=None):
        del frozen, key
        if mode_name != mode.name:
            raise ValueError(f"mode {mode_name!r} is not available in this run; it has {mode.name!r}")
        found, _ = run(params, extra, batch, None)
        return {**found, "prob": jax.nn.softmax(found["logits"])}

    return Method(
        name="image_classifier",
        init=init,
        forward=forward,
        objective=_objective,
        predict=predict,
        modes=(mode,),
        stages=(Stage("train", (NETWORK,), (mode.name,)),),
        requires=(*fields, "label", "has_label", "example", "weight"),
        batch_coupled=config.model.norm == BATCH,
    )


def _objective(outputs: Outputs, batch: Batch, step: jax.Array, stage: str) -> tuple[jax.Array, dict]:
    """Mean cross entropy over the labelled examples of the step, and the accuracy on them."""
    del step, stage
    log_prob = jax.nn.log_softmax(outputs["logits"].astype(jnp.float32))
    where = batch["weight"] * batch["has_label"]
    loss = -jnp.sum(where * jnp.take_along_axis(log_prob, batch["label"][:, None], axis=1)[:, 0])
    right = jnp.sum(where * (jnp.argmax(log_prob, axis=1) == batch["label"]))
    count = jnp.sum(where)
    return loss / jnp.maximum(count, 1.0), {"cross_entropy": (loss, count), "accuracy": (right, count)}


def _flipped(x: jax.Array, key: jax.Array, example: jax.Array) -> jax.Array:
    """Both flips with probability 1/2 each, a function of the key and the number of the example alone."""
    bits = jax.vmap(lambda number: jax.random.bernoulli(jax.random.fold_in(key, number), 0.5, (2,)))(example)
    for axis in (0, 1):
        x = jnp.where(bits[:, axis, None, None, None], jnp.flip(x, axis + 1), x)
    return x


def _check(config: ml_collections.ConfigDict, data: DataSpec, fields: tuple[str, ...]) -> None:
    if data.image_size is None:
        raise ValueError("image_classifier reads image pairs: set data.kind=pairs and give such a data set")
    if data.num_classes < 2:
        raise ValueError(f"classification needs at least 2 classes, the data set has {data.num_classes}")
    if "partner" in fields and data.vector_size:
        raise ValueError(
            f"model.inputs={config.model.inputs} needs partner images, not vectors: set data.partner=image"
        )
    stride = 2 ** len(config.model.widths)
    if any(side % stride for side in data.image_size):
        raise ValueError(
            f"images of {data.image_size} pixels cannot be halved {len(config.model.widths)} times: sides must be "
            f"multiples of {stride}; import them with `histokd pairs --resize`, or give fewer model.widths"
        )
