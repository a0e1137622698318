"""Quantiles of the marked values of an array, exact and without sorting.

Floats are mapped to unsigned integers of the same order and the wanted order statistic is found bit by bit, in 32
counts over the array: linear in the number of values, without memory of their size, batched by `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SIGN = np.uint32(1 << 31)


def masked_quantiles(
    values: jax.Array,
    mask: jax.Array,
    levels: Sequence[float],
    monotone: Callable[[jax.Array], jax.Array] = lambda values: values,
) -> jax.Array:
    """Quantiles with linear interpolation between order statistics, as `numpy.quantile(values[mask], levels)`.

    Args:
      values: [N] float32, finite.
      mask: [N] bool, which values count.
      levels: numbers in [0, 1].
      monotone: a non-decreasing function; the quantiles are those of `monotone(values)`, which is computed for the
        order statistics alone.

    Returns:
      [len(levels)] float32; zeros where no value counts.
    """
    keys = _ordered(values)
    count = jnp.sum(mask, dtype=jnp.int32)
    place = jnp.asarray(levels, jnp.float32) * jnp.maximum(count - 1, 0).astype(jnp.float32)
    lower = jnp.floor(place).astype(jnp.int32)
    low = _order_statistic(keys, mask, lower)
    high = _next(keys, mask, low, lower + 1)
    first, second = monotone(_values(low)), monotone(_values(high))
    found = first + (second - first) * (place - lower)
    return jnp.where(count > 0, found, 0)


def _order_statistic(keys: jax.Array, mask: jax.Array, rank: jax.Array) -> jax.Array:
    """[Q] uint32: the value that `rank` ([Q] int32, 0-based) marked values precede in order."""

    def decide(i, prefix):
        candidate = prefix | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        below = jnp.sum(mask[None, :] & (keys[None, :] < candidate[:, None]), axis=1, dtype=jnp.int32)
        return jnp.where(below <= rank, candidate, prefix)

    return lax.fori_loop(0, 32, decide, jnp.zeros(rank.shape, jnp.uint32))


def _next(keys: jax.Array, mask: jax.Array, found: jax.Array, rank: jax.Array) -> jax.Array:
    """The order statistic `rank`, given that of rank - 1; the latter itself where there is no further one."""
    above = mask[None, :] & (keys[None, :] > found[:, None])
    smallest = jnp.min(jnp.where(above, keys[None, :], jnp.uint32(0xFFFFFFFF)), axis=1)
    upto = jnp.sum(mask[None, :] & (keys[None, :] <= found[:, None]), axis=1, dtype=jnp.int32)
    return jnp.where((upto > rank) | ~above.any(axis=1), found, smallest)


def _ordered(values: jax.Array) -> jax.Array:
    raw = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    return jnp.where((raw & _SIGN) > 0, ~raw, raw | _SIGN)


def _values(keys: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(jnp.where((keys & _SIGN) > 0, keys ^ _SIGN, ~keys), jnp.float32)
