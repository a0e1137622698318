"""From a specification to its module."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.encoders.resnet import ResNet
from histokd_jax.nn.encoders.specs import ResNetSpec, Spec
from histokd_jax.nn.encoders.vit import ViT


def build(spec: Spec, dtype: jnp.dtype | None = None, attention: str = "xla") -> nn.Module:
    """The module of a specification; `module.apply(variables, images)` gives [B, features] float32.

    Args:
      spec: the architecture.
      dtype: of products and convolutions; None for float32.
      attention: implementation of the attention of transformers, see `vit.ATTENTIONS`.
    """
    return ResNet(spec, dtype) if isinstance(spec, ResNetSpec) else ViT(spec, dtype, attention)


def shapes(spec: Spec) -> dict:
    """The tree of `jax.ShapeDtypeStruct` of a specification's variables: "params", and "batch_stats" if it has any."""
    image = jax.ShapeDtypeStruct((1, spec.image, spec.image, 3), jnp.float32)
    return jax.eval_shape(build(spec).init, jax.random.key(0), image)


def init(spec: Spec, seed: int) -> dict:
    """Random variables of a specification.

    Args:
      spec: the architecture.
      seed: equal seeds give equal values.
    """
    # The values do not depend on the size of the image; a small one keeps a convolutional network cheap.
    edge = 32 if isinstance(spec, ResNetSpec) else spec.image
    return jax.jit(build(spec).init)(jax.random.key(seed), jnp.zeros((1, edge, edge, 3)))
