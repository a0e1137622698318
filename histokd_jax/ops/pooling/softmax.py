"""The softmax of a slide as sums that can be extended and merged: running maximum, normaliser, numerator."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NEG = -1e30  # never -inf: the difference of two of them is NaN


class Stats(NamedTuple):
    """Online softmax state.

    Attributes:
      m: [S, Q] maximum of the scores so far, `NEG` for an empty slot.
      z: [S, Q] normaliser relative to `m`.
      num: [S, Q, H] weighted sum of the values relative to `m`.
    """

    m: jax.Array
    z: jax.Array
    num: jax.Array


def empty(slots: int, queries: int, width: int, dtype: jnp.dtype) -> Stats:
    """The state before the first patch."""
    return Stats(
        jnp.full((slots, queries), NEG, dtype),
        jnp.zeros((slots, queries), dtype),
        jnp.zeros((slots, queries, width), dtype),
    )


def one_hot(segment_ids: jax.Array, num_slots: int) -> jax.Array:
    """[S, 1, n] bool: which of the patches [n] are of which slot."""
    return (segment_ids[None, :] == jnp.arange(1, num_slots + 1, dtype=segment_ids.dtype)[:, None])[:, None, :]


def extend(stats: Stats, values: jax.Array, scores: jax.Array, own: jax.Array) -> Stats:
    """The state after some more patches.

    Differentiable in values and scores only where `stats` is `empty`: the maximum is held constant.

    Args:
      stats: the state so far.
      values: [H, n].
      scores: [S or 1, Q, n] in the dtype of the state.
      own: [S, 1, n], see `one_hot`.
    """
    m = jnp.maximum(stats.m, lax.stop_gradient(jnp.max(jnp.where(own, scores, NEG), axis=-1)))
    r = jnp.exp(stats.m - m)
    # `where` inside exp: outside, an empty slot would give exp(0) or overflow.
    e = jnp.exp(jnp.where(own, scores - m[..., None], NEG))
    return Stats(m, stats.z * r + e.sum(-1), stats.num * r[..., None] + weighted_sum(e, values))


@jax.custom_vjp
def weighted_sum(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Sum of values per slot and query; operands in the dtype of the values, also in the backward pass.

    Args:
      weights: [S, Q, n], at least float32.
      values: [H, n].

    Returns:
      [S, Q, H] in the dtype of the weights.
    """
    return jnp.einsum("sqn,hn->sqh", weights.astype(values.dtype), values, preferred_element_type=weights.dtype)


def weighted_sum_vjp(g: jax.Array, weights: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pulls a cotangent [S, Q, H] of `weighted_sum` back to (weights [S, Q, n], values [H, n])."""
    low, acc = g.astype(values.dtype), weights.dtype
    d_weights = jnp.einsum("sqh,hn->sqn", low, values, preferred_element_type=acc)
    d_values = jnp.einsum("sqh,sqn->hn", low, weights.astype(values.dtype), preferred_element_type=acc)
    return d_weights, d_values.astype(values.dtype)


weighted_sum.defvjp(
    lambda weights, values: (weighted_sum(weights, values), (weights, values)),
    lambda kept, g: weighted_sum_vjp(g, *kept),
)


def merge(stats: Stats, axes: tuple[str, ...]) -> Stats:
    """The state of the patches of all devices along mesh axes; inside `jax.shard_map`."""
    top = lax.pmax(lax.stop_gradient(stats.m), axes)
    r = jnp.exp(stats.m - top)
    return Stats(top, lax.psum(stats.z * r, axes), lax.psum(stats.num * r[..., None], axes))


def finish(stats: Stats) -> tuple[jax.Array, jax.Array]:
    """(pooled [S, Q, H], lse [S, Q]): exactly 0 and `NEG` for an empty slot, with finite gradients."""
    filled = stats.z > 0
    z = jnp.where(filled, stats.z, 1.0)
    return stats.num / z[..., None], jnp.where(filled, stats.m + jnp.log(z), NEG)
