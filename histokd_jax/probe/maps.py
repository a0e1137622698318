"""Grad-CAM style maps: where in an image a linear probe finds the evidence for a class.

With A the feature map [h, w, D] and y the logit of the class, the map is `relu(sum_d a_d A_d)` with a_d the mean over
positions of dy / dA_d (Selvaraju et al. 2017; methods/more_from_less.md, A8). A is the output of the last stage of a
ResNet, whose pooled features the probe reads, so that a_d is the probe's weight over the number of positions. Of a
transformer it is the patch tokens in front of the last block: behind it the class token alone carries the embedding,
and the gradient of every patch token is zero.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from histokd_jax.embed.transform import prepare
from histokd_jax.encoders.loading import LoadedEncoder
from histokd_jax.encoders.presets import Encoder
from histokd_jax.nn.encoders.resnet import ResNet
from histokd_jax.nn.encoders.specs import CLS, MEAN, ResNetSpec, ViTSpec
from histokd_jax.nn.encoders.vit import Block, ViT


def class_maps(
    loaded: LoadedEncoder, images: np.ndarray, weights: np.ndarray, bias: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Maps of the evidence for one class per image.

    Args:
      loaded: the encoder.
      images: [B, e, e, 3] uint8.
      weights: [D, C] of a linear probe on the raw embedding.
      bias: [C].
      classes: [B] int, the class whose evidence is shown.

    Returns:
      ([B, h, w] float32 >= 0 on the grid of the encoder, [B, C] float32 logits).

    Raises:
      ValueError: a transformer with a single block has no tokens in front of its last one with a context.
    """
    check_maps(loaded.encoder)
    found = _maps(
        loaded.variables, jnp.asarray(images), jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32),
        jnp.asarray(classes, jnp.int32), encoder=loaded.encoder,
    )  # fmt: skip
    return np.asarray(found[0]), np.asarray(found[1])


def check_maps(encoder: Encoder) -> None:
    """Refuses encoders without maps, see `class_maps`."""
    if isinstance(encoder.spec, ViTSpec) and encoder.spec.depth < 2:
        raise ValueError(f"maps of a transformer need two blocks, {encoder.name} has {encoder.spec.depth}")


@functools.partial(jax.jit, static_argnames=("encoder",))
def _maps(variables, images, weights, bias, classes, *, encoder: Encoder):
    with jax.default_matmul_precision("highest"):
        split = _split_resnet if isinstance(encoder.spec, ResNetSpec) else _split_vit
        grid, features = split(variables, prepare(images, encoder.transform), encoder.spec)

        def logit(grid):
            logits = features(grid) @ weights + bias[None]
            # Images do not mix, so the gradient of the sum holds that of every image.
            return jnp.sum(jnp.take_along_axis(logits, classes[:, None], axis=1)), logits

        gradient, logits = jax.grad(logit, has_aux=True)(grid)
        if isinstance(encoder.spec, ViTSpec):
            grid, gradient = (_patches(encoder, x) for x in (grid, gradient))
        channel = jnp.mean(gradient, axis=(1, 2), keepdims=True)
        return jax.nn.relu(jnp.sum(channel * grid, axis=-1)), logits


def _split_resnet(variables: Mapping[str, Any], images: jax.Array, spec: ResNetSpec):
    """(feature map [B, h, w, D], from it to the embedding)."""
    grid = ResNet(spec).apply(variables, images, method=ResNet.feature_map)
    return grid, lambda grid: jnp.mean(grid, axis=(1, 2))


def _split_vit(variables: Mapping[str, Any], images: jax.Array, spec: ViTSpec):
    """(tokens in front of the last block [B, T, D], from them to the embedding)."""
    params = variables["params"]
    lower = dataclasses.replace(spec, depth=spec.depth - 1, norm="none")
    below = {name: value for name, value in params.items() if name != "norm"}
    below["blocks"] = jax.tree.map(lambda x: x[:-1], params["blocks"])
    tokens = ViT(lower).apply({"params": below}, images, method=ViT.tokens)
    last = jax.tree.map(lambda x: x[-1], params["blocks"])

    def features(tokens: jax.Array) -> jax.Array:
        out, _ = Block(spec).apply({"params": last}, tokens)
        norm = nn.LayerNorm(spec.eps, dtype=jnp.float32, use_fast_variance=False).apply
        own = {"params": params.get("norm", {})}
        out = norm(own, out) if spec.norm == "tokens" else out
        parts = [out[:, 0]] if spec.pool != MEAN else []
        parts += [jnp.mean(out[:, spec.prefix :], axis=1)] if spec.pool != CLS else []
        pooled = jnp.concatenate(parts, axis=-1)
        return norm(own, pooled) if spec.norm == "pooled" else pooled

    return tokens, features


def _patches(encoder: Encoder, tokens: jax.Array) -> jax.Array:
    """[B, T, D] -> [B, g, g, D] of the patch tokens."""
    grid = encoder.transform.size // encoder.spec.patch
    return tokens[:, encoder.spec.prefix :].reshape(tokens.shape[0], grid, grid, -1)


def embedding_of_split(loaded: LoadedEncoder, images: np.ndarray) -> np.ndarray:
    """[B, features] by way of the split; equals the encoder's own embedding."""
    return np.asarray(_through_split(loaded.variables, jnp.asarray(images), encoder=loaded.encoder))


@functools.partial(jax.jit, static_argnames=("encoder",))
def _through_split(variables, images, *, encoder: Encoder):
    split = _split_resnet if isinstance(encoder.spec, ResNetSpec) else _split_vit
    grid, features = split(variables, prepare(images, encoder.transform), encoder.spec)
    return features(grid)


def shown_area(encoder: Encoder, edge: int) -> tuple[float, float]:
    """(offset, edge) in pixels of the square of a tile of `edge` px that the encoder sees."""
    transform = encoder.transform
    if edge == transform.size:
        return 0.0, float(edge)
    factor = edge / transform.resize
    return round((transform.resize - transform.size) / 2) * factor, transform.size * factor
