"""Patch embeddings in 8 bits: one scale per patch, symmetric, rounded to nearest."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LEVELS = 127


def quantize(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds each patch to 255 levels between minus and plus its largest magnitude.

    Args:
      patches: [n, D] float, finite.

    Returns:
      (values [n, D] int8, scale [n] float32); a patch of zeros has scale 0.
    """
    x = patches.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LEVELS
    step = jnp.where(scale > 0, scale, 1.0)
    return jnp.clip(jnp.round(x / step[:, None]), -LEVELS, LEVELS).astype(jnp.int8), scale


def dequantize(values: jax.Array, scale: jax.Array, dtype: jnp.dtype | str) -> jax.Array:
    """Inverse of `quantize` up to rounding.

    Args:
      values: [n, D] int8.
      scale: [n] float32.
      dtype: wanted dtype.

    Returns:
      [n, D] of `dtype`.
    """
    return (values.astype(jnp.float32) * scale[:, None]).astype(dtype)


def relative_error(patches: jax.Array) -> jax.Array:
    """[n] float32: length of what `quantize` loses of each patch [n, D], in units of the patch's own length."""
    values, scale = quantize(patches)
    x = patches.astype(jnp.float32)
    lost = jnp.linalg.norm(dequantize(values, scale, patches.dtype).astype(jnp.float32) - x, axis=-1)
    length = jnp.linalg.norm(x, axis=-1)
    return jnp.where(length > 0, lost / jnp.where(length > 0, length, 1.0), 0.0)
