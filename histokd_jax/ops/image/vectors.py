"""Changing one vector of expression values, given the drawn numbers (More From Less, B5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def log_normalise(counts: jax.Array, total: float) -> jax.Array:
    """ln(1 + counts scaled to sum to `total`): [K] float32; a vector of zeros stays one (deviation 22)."""
    counts = counts.astype(jnp.float32)
    found = jnp.sum(counts)
    return jnp.log1p(counts * (total / jnp.where(found > 0, found, 1)))


def mask(values: jax.Array, keep: jax.Array) -> jax.Array:
    """Zeros where `keep` ([K] bool) is False; survivors keep their value, they are not scaled up."""
    return jnp.where(keep, values.astype(jnp.float32), 0)


def permute_chosen(values: jax.Array, order: jax.Array, chosen: jax.Array) -> jax.Array:
    """The first `chosen` genes of `order` exchange their values in a circle; all others stay (deviation 21, corrected).

    Args:
      values: [K].
      order: [K] int32, a permutation of the genes.
      chosen: [] int32 in 0..K.

    Returns:
      [K] float32: gene order[i] has the value of order[i + 1], the last chosen one that of order[0].
    """
    values = values.astype(jnp.float32)
    rank = jnp.arange(values.shape[0])
    giver = jnp.where(rank < chosen, order[(rank + 1) % jnp.maximum(chosen, 1)], order)
    return jnp.zeros_like(values).at[order].set(values[giver])


def add_noise(values: jax.Array, noise: jax.Array) -> jax.Array:
    """values + noise, both [K]."""
    return values.astype(jnp.float32) + noise
