"""The backbone block, the same in teacher and student, and a level of such blocks (specification, section 4)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.paired.attention import GlobalUnit
from histokd_jax.nn.paired.local_unit import LocalUnit
from histokd_jax.nn.paired.primitives import BatchNorm, Conv, Depthwise, PatchEmbed, gelu
from histokd_jax.nn.paired.spec import PairedSpec


class Refine(nn.Module):
    """Depth-wise 3x3 and a bottleneck, a norm behind each (section 4.4).

    Attributes:
      features: C.
      spec: the architecture.
    """

    features: int
    spec: PairedSpec

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to the same shape."""
        spec, inner = self.spec, self.spec.refine_width(self.features)
        h = Depthwise(self.features, 3, spec.dtype, spec.depthwise_form, name="depth")(x)
        h = gelu(BatchNorm(self.features, spec.norm, name="depth_norm")(h, train))
        h = Conv(self.features, inner, dtype=spec.dtype, name="reduce")(h)
        h = gelu(BatchNorm(inner, spec.norm, name="reduce_norm")(h, train))
        h = Conv(inner, self.features, dtype=spec.dtype, name="expand")(h)
        return BatchNorm(self.features, spec.norm, name="expand_norm")(h, train)


class Mlp(nn.Module):
    """Two 1x1 convolutions without bias; norms behind them in cross blocks only (sections 4.1 and 5.1).

    Attributes:
      features: C.
      spec: the architecture.
      norms: whether there are norms.
    """

    features: int
    spec: PairedSpec
    norms: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to the same shape."""
        spec, hidden = self.spec, self.spec.mlp_ratio * self.features
        h = gelu(Conv(self.features, hidden, use_bias=False, dtype=spec.dtype, name="expand")(x))
        if self.norms:
            h = BatchNorm(hidden, spec.norm, name="expand_norm")(h, train)
        h = Conv(hidden, self.features, use_bias=False, dtype=spec.dtype, name="reduce")(h)
        return BatchNorm(self.features, spec.norm, name="reduce_norm")(h, train) if self.norms else h


class Block(nn.Module):
    """Position encoding, hybrid token mixer, MLP (section 4.1).

    Attributes:
      features: C, even.
      spec: the architecture.
    """

    features: int
    spec: PairedSpec

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] to the same shape."""
        spec, half = self.spec, self.features // 2
        x = x + Depthwise(self.features, 7, spec.dtype, spec.depthwise_form, name="position")(x)
        u = BatchNorm(self.features, spec.norm, name="norm1")(x, train)
        near = LocalUnit(half, spec, name="local")(u[..., :half], train)
        far = GlobalUnit(half, spec, name="global")(u[..., half:], train)
        y = jnp.concatenate([near, far], axis=-1)
        x = x + y + Refine(self.features, spec, name="refine")(y, train)
        h = BatchNorm(self.features, spec.norm, name="norm2")(x, train)
        return x + Mlp(self.features, spec, name="mlp")(h, train)


class Level(nn.Module):
    """A patch layer and some blocks.

    Attributes:
      inputs: channels of the input.
      features: C.
      patch: side of a patch.
      depth: number of blocks.
      spec: the architecture.
    """

    inputs: int
    features: int
    patch: int
    depth: int
    spec: PairedSpec

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, inputs] to [B, H // patch, W // patch, C]."""
        x = self.patch_embed(name="patch")(x, train)
        for i in range(self.depth):
            x = Block(self.features, self.spec, name=f"block_{i}")(x, train)
        return x

    @nn.nowrap
    def patch_embed(self, **place: Any) -> PatchEmbed:
        """The patch layer, as a submodule of a `name`, or unbound with `parent=None`."""
        return PatchEmbed(self.inputs, self.features, self.patch, self.spec.norm, self.spec.dtype, **place)
