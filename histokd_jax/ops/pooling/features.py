"""What the pool asks of the network: the chunk function, its shapes, and the scores of its keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

FeaturesFn = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(params, aux, x [n, D], segment_ids [n], positions [n]) -> (values [H, n], scores [Q, n]).

With queries [S, Q, K] of the slides it returns keys [K, n] in place of the scores: score = query of the slide . key.

It may be an object that also has `with_products(params, aux, x, segment_ids, positions, known=())`, which returns
(values, scores, products) and takes the first products [., n] of an earlier call as `known` in place of computing them
again, with the same derivatives; the product that costs most to compute comes first. The chunked pool then keeps the
first one for the backward pass while it fits `chunked.SAVE_BYTES`, and all of them while they fit
`chunked.CACHE_BYTES`.
"""


def probe(patches: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A chunk of one patch (x, segment_ids, positions), for `jax.eval_shape` of a chunk function.

    Args:
      patches: [R, L, D], only for its width and dtype.
    """
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.ShapeDtypeStruct((1, patches.shape[-1]), patches.dtype), index, index


def accumulator(values: jax.Array | jax.ShapeDtypeStruct) -> jnp.dtype:
    """Dtype of sums and of the softmax: at least float32."""
    return jnp.promote_types(values.dtype, jnp.float32)


def slot_scores(scores: jax.Array, queries: jax.Array | None, acc: jnp.dtype) -> jax.Array:
    """Scores of the patches for each slot.

    Args:
      scores: [Q, n] scores that are common to all slots, or [K, n] keys.
      queries: None, or [S, Q, K].
      acc: dtype of the result.

    Returns:
      [1, Q, n] without queries, else [S, Q, n]. The operands of the product are in the dtype of the keys.
    """
    if queries is None:
        return scores.astype(acc)[None]
    return _products(queries, scores, acc)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(queries: jax.Array, keys: jax.Array, acc: jnp.dtype) -> jax.Array:
    return jnp.einsum("sqk,kn->sqn", queries.astype(keys.dtype), keys, preferred_element_type=acc)


def _products_vjp(acc, kept, g):
    queries, keys = kept
    d_keys, d_queries = slot_scores_vjp(g, keys, queries)
    return d_queries.astype(queries.dtype), d_keys


_products.defvjp(lambda queries, keys, acc: (_products(queries, keys, acc), (queries, keys)), _products_vjp)


def slot_scores_vjp(
    d_scores: jax.Array, scores: jax.Array, queries: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Pulls cotangents back through `slot_scores`.

    Args:
      d_scores: [S, Q, n], 0 where a patch is not of the slot.
      scores: see `slot_scores`.
      queries: see `slot_scores`.

    Returns:
      (cotangent of `scores`, cotangent [S, Q, K] of the queries in the dtype of `d_scores` or None).
    """
    if queries is None:
        return jnp.sum(d_scores, axis=0).astype(scores.dtype), None
    low, acc = d_scores.astype(scores.dtype), d_scores.dtype
    d_keys = jnp.einsum("sqk,sqn->kn", queries.astype(scores.dtype), low, preferred_element_type=acc)
    return d_keys.astype(scores.dtype), jnp.einsum("sqn,kn->sqk", low, scores, preferred_element_type=acc)
