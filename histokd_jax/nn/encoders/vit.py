"""Vision transformer on NHWC images; products in any dtype, norms and softmax in float32."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.encoders.specs import CLS, MEAN, SWIGLU, ViTSpec

ATTENTIONS = ("xla", "cudnn")
"""Implementations of the attention; "cudnn" is fused, for half precision on GPUs."""

_KERNEL = nn.initializers.lecun_normal()


class ViT(nn.Module):
    """A vision transformer without a head.

    Kernels start as LeCun's (a deviation of one over the root of the inputs, so that small networks work, too), tokens
    and positions as timm's. Layer scale starts at 1: with the published 1e-5 an untrained network would give all images
    the same embedding.

    Attributes:
      spec: the architecture.
      dtype: of the products' operands and results; None keeps float32. Parameters, residual sums, norms and the softmax
        stay float32.
      attention: one of `ATTENTIONS`.
    """

    spec: ViTSpec
    dtype: jnp.dtype | None = None
    attention: str = "xla"

    def setup(self) -> None:
        """Declares the layers; the blocks are one, with a leading axis of the depth on its parameters."""
        spec = self.spec
        self.patch_embed = _dense(spec.width, self.dtype)
        if spec.class_token:
            self.cls_token = self.param("cls_token", nn.initializers.normal(1e-6), (1, spec.width))
        if spec.registers:
            self.reg_token = self.param("reg_token", nn.initializers.normal(1e-6), (spec.registers, spec.width))
        self.pos_embed = self.param("pos_embed", nn.initializers.truncated_normal(0.02), (spec.positions, spec.width))
        scanned = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=spec.depth, metadata_params={}
        )
        self.blocks = scanned(spec, self.dtype, self.attention)
        if spec.norm != "none":
            self.norm = _norm(spec)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Embeds images.

        Args:
          images: [B, h, w, 3] float, normalised; h and w multiples of the patch.

        Returns:
          [B, features] float32.

        Raises:
          ValueError: an edge is no multiple of the patch.
        """
        spec, tokens = self.spec, self.tokens(images)
        parts = [tokens[:, 0]] if spec.pool != MEAN else []
        if spec.pool != CLS:
            parts.append(jnp.mean(tokens[:, spec.prefix :], axis=1))
        pooled = jnp.concatenate(parts, axis=-1)
        return self.norm(pooled) if spec.norm == "pooled" else pooled

    def tokens(self, images: jax.Array) -> jax.Array:
        """All tokens of images: class token, registers, patches in rows; behind the final norm if it is of tokens.

        Args:
          images: [B, h, w, 3] float, normalised.

        Returns:
          [B, T, D] float32.
        """
        spec = self.spec
        spec.check_image(*images.shape[1:3])
        x = self.patch_embed(patches_of(images, spec.patch)).astype(jnp.float32)
        prefix = [self.cls_token] if spec.class_token else []
        prefix += [self.reg_token] if spec.registers else []
        x = _with_positions(spec, x, prefix, self.pos_embed, [size // spec.patch for size in images.shape[1:3]])
        x, _ = self.blocks(x)
        return self.norm(x) if spec.norm == "tokens" else x


class Block(nn.Module):
    """One block: `x += scale * attention(norm(x))`, then `x += scale * mlp(norm(x))`.

    Attributes:
      spec, dtype, attention: as `ViT`.
    """

    spec: ViTSpec
    dtype: jnp.dtype | None = None
    attention: str = "xla"

    def setup(self) -> None:
        """Declares the layers."""
        spec = self.spec
        self.norm1, self.norm2 = _norm(spec), _norm(spec)
        self.qkv = _dense(3 * spec.width, self.dtype, spec.qkv_bias)
        self.proj = _dense(spec.width, self.dtype)
        self.fc1, self.fc2 = _dense(spec.hidden, self.dtype), _dense(spec.width, self.dtype)
        if spec.layer_scale:
            self.scale1 = self.param("scale1", nn.initializers.ones, (spec.width,))
            self.scale2 = self.param("scale2", nn.initializers.ones, (spec.width,))

    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """[B, T, D] float32 to the same; the second value is what a scan collects."""
        x = x + self._scaled(self._attend(self.norm1(x)), "scale1")
        return x + self._scaled(self._mlp(self.norm2(x)), "scale2"), None

    def _scaled(self, branch: jax.Array, name: str) -> jax.Array:
        branch = branch.astype(jnp.float32)
        return branch * getattr(self, name)[None, None] if self.spec.layer_scale else branch

    def _attend(self, x: jax.Array) -> jax.Array:
        packed = self.qkv(x).reshape(*x.shape[:2], 3, self.spec.heads, -1)
        q, k, v = (packed[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v, implementation=self.attention)
        return self.proj(mixed.reshape(x.shape))

    def _mlp(self, x: jax.Array) -> jax.Array:
        h = self.fc1(x)
        if self.spec.mlp == SWIGLU:
            gate, value = jnp.split(h, 2, axis=-1)
            return self.fc2(jax.nn.silu(gate) * value)
        return self.fc2(jax.nn.gelu(h, approximate=False))


def patches_of(images: jax.Array, patch: int) -> jax.Array:
    """[B, h, w, c] -> [B, (h/p) (w/p), p p c]: patches in rows, each as rows of pixels."""
    b, h, w, c = images.shape
    cut = images.reshape(b, h // patch, patch, w // patch, patch, c)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def resized_positions(positions: jax.Array, prefix: int, grid: int, rows: int, columns: int) -> jax.Array:
    """Position embeddings of another grid, bicubic with antialiasing, as timm's dynamic_img_size.

    Args:
      positions: [prefix + grid * grid, D].
      prefix: rows that belong to no patch; kept.
      grid: edge of the present grid.
      rows: of the new grid.
      columns: of the new grid.

    Returns:
      [prefix + rows * columns, D].
    """
    if (rows, columns) == (grid, grid):
        return positions
    width = positions.shape[1]
    square = positions[prefix:].reshape(grid, grid, width)
    resized = jax.image.resize(square, (rows, columns, width), "cubic", antialias=True)
    return jnp.concatenate([positions[:prefix], resized.reshape(rows * columns, width)])


def _with_positions(
    spec: ViTSpec, x: jax.Array, prefix: list[jax.Array], positions: jax.Array, grid: list[int]
) -> jax.Array:
    """Patch tokens [B, N, D] -> all tokens with their position embeddings [B, T, D]."""
    covered = spec.prefix if spec.embed_prefix else 0
    positions = resized_positions(positions, covered, spec.grid, *grid)[None]
    if not spec.embed_prefix:
        x = x + positions
    if prefix:
        first = jnp.concatenate(prefix)[None]
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape[1:])), x], axis=1)
    return x + positions if spec.embed_prefix else x


def _dense(features: int, dtype: jnp.dtype | None, use_bias: bool = True) -> nn.Dense:
    return nn.Dense(features, use_bias, dtype=dtype, kernel_init=_KERNEL)


def _norm(spec: ViTSpec) -> nn.LayerNorm:
    return nn.LayerNorm(spec.eps, dtype=jnp.float32, use_fast_variance=False)
