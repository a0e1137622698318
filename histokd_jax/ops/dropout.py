"""Dropout whose mask is a pure function of (seed, slot, patch position, unit, layer).

A framework's dropout draws one array of random bits, so the mask of a slide depends on where it lies in the batch. Here
each element hashes its own identity: packed, padded and gradient-cached steps, one device or many, draw the same masks
(specification of MKD, section 13), and nothing has to be stored for the backward pass.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Alpha dropout (Klambauer et al., NeurIPS 2017): the negative saturation value of SELU.
ALPHA_PRIME = -1.7580993408473766

_UNIT_STEP, _SLOT_STEP, _LAYER_STEP = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D  # odd constants spread consecutive integers


def mix32(x: jax.Array) -> jax.Array:
    """A bijective finaliser of 32-bit integers with low avalanche bias.

    Args:
      x: uint32, any shape.

    Returns:
      uint32 of the same shape.
    """
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _keep(row: jax.Array, unit: jax.Array, rate: float) -> jax.Array:
    """Bernoulli(1 - rate) mask from broadcastable uint32 row and unit hashes."""
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return mix32(row ^ unit) >= threshold


def _unit_hash(size: int, seed: jax.Array, layer: int) -> jax.Array:
    layer_seed = mix32(jnp.asarray(seed, jnp.uint32) + jnp.uint32((layer * _LAYER_STEP) & 0xFFFFFFFF))
    return mix32(jnp.arange(1, size + 1, dtype=jnp.uint32) * jnp.uint32(_UNIT_STEP) + layer_seed)


def _slot_hash(slots: jax.Array, seed: jax.Array) -> jax.Array:
    return mix32(slots.astype(jnp.uint32) * jnp.uint32(_SLOT_STEP) ^ jnp.asarray(seed, jnp.uint32))


def hash_dropout(
    h: jax.Array, seed: jax.Array, segment_ids: jax.Array, positions: jax.Array, rate: float, layer: int
) -> jax.Array:
    """Inverted dropout of patch activations.

    Args:
      h: [H, n] activations, feature-major.
      seed: [] uint32, one per step and network.
      segment_ids: [n] int32, slot of each patch.
      positions: [n] int32, index of each patch within its bag.
      rate: drop probability in [0, 1); 0 returns `h` itself.
      layer: number of the dropout layer, so that layers draw independent masks.

    Returns:
      [H, n] in the dtype of `h`.
    """
    if not rate:
        return h
    row = mix32(_slot_hash(segment_ids, seed) + positions.astype(jnp.uint32) * jnp.uint32(_UNIT_STEP))
    keep = _keep(row[None, :], _unit_hash(h.shape[0], seed, layer)[:, None], rate)
    return jnp.where(keep, h / jnp.asarray(1.0 - rate, h.dtype), jnp.zeros((), h.dtype))


def slot_keep_mask(shape: tuple[int, ...], seed: jax.Array, rate: float, layer: int) -> jax.Array:
    """Bernoulli(1 - rate) mask for slot-level arrays.

    Args:
      shape: (S, ...); the trailing axes are the units.
      seed: [] uint32.
      rate: drop probability in [0, 1).
      layer: number of the dropout layer.

    Returns:
      bool array of `shape`; True = keep. Row s depends on slot s only.
    """
    units = math.prod(shape[1:])
    row = _slot_hash(jnp.arange(1, shape[0] + 1, dtype=jnp.uint32), seed)
    return _keep(row[:, None], _unit_hash(units, seed, layer)[None, :], rate).reshape(shape)


def slot_dropout(v: jax.Array, seed: jax.Array, rate: float, layer: int) -> jax.Array:
    """Inverted dropout of slot-level activations.

    Args:
      v: [S, ...] activations.
      seed: [] uint32.
      rate: drop probability in [0, 1); 0 returns `v` itself.
      layer: number of the dropout layer.

    Returns:
      Array like `v`.
    """
    if not rate:
        return v
    keep = slot_keep_mask(v.shape, seed, rate, layer)
    return jnp.where(keep, v / jnp.asarray(1.0 - rate, v.dtype), jnp.zeros((), v.dtype))


def alpha_dropout(v: jax.Array, keep: jax.Array, rate: float) -> jax.Array:
    """Alpha dropout: dropped units are set to alpha', then the affine map restores mean 0 and variance 1.

    Args:
      v: any shape.
      keep: bool, broadcastable to `v`.
      rate: drop probability in [0, 1).

    Returns:
      Array like `v` (MKD specification 4.3: A = ((1-p)(1+p alpha'^2))^(-1/2), B = -A alpha' p).
    """
    scale = ((1.0 - rate) * (1.0 + rate * ALPHA_PRIME**2)) ** -0.5
    shift = -scale * ALPHA_PRIME * rate
    dropped = jnp.where(keep, v, jnp.asarray(ALPHA_PRIME, v.dtype))
    return dropped * jnp.asarray(scale, v.dtype) + jnp.asarray(shift, v.dtype)


def slot_alpha_dropout(v: jax.Array, seed: jax.Array, rate: float, layer: int) -> jax.Array:
    """`alpha_dropout` of slot-level activations with the mask of `slot_keep_mask`.

    Args:
      v: [S, ...] activations.
      seed: [] uint32.
      rate: drop probability in [0, 1); 0 returns `v` itself.
      layer: number of the dropout layer.

    Returns:
      Array like `v`.
    """
    if not rate:
        return v
    return alpha_dropout(v, slot_keep_mask(v.shape, seed, rate, layer), rate)
