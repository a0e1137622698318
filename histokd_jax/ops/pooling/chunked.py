"""The pool chunk by chunk, with its own backward pass.

The forward pass streams over chunks with an online softmax. The backward pass runs the chunk function again and pulls
the cotangents back chunk by chunk, so that temporary memory does not grow with the bag. Masking and casting happen
inside the chunk: at the entrance they would copy the whole input.

Activations are feature-major [H, n]: the weight gradient is then a plain row-major product, which is about 1.5 times as
fast on CPU as the transposed one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from histokd_jax.ops.pooling import layout, softmax
from histokd_jax.ops.pooling.features import FeaturesFn, accumulator, probe, slot_scores, slot_scores_vjp

# The first product of a step is kept up to this size (1.3 times the speed of computing it again); beyond it temporary
# memory stays constant.
SAVE_BYTES = 256 * 2**20
# The others are cheap: keeping them pays only in a processor's cache (4 % faster in it, 5 % slower outside).
CACHE_BYTES = 8 * 2**20


class Static(NamedTuple):
    """What fixes the graph.

    Attributes:
      features_fn: see `FeaturesFn`.
      num_slots: S.
      chunk: patches per chunk.
    """

    features_fn: FeaturesFn
    num_slots: int
    chunk: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pool(
    static: Static,
    params: Any,
    patches: jax.Array,
    queries: jax.Array | None,
    aux: Any,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(pooled [S, Q, H], lse [S, Q]); arguments as in `attention_pool`."""
    stats, _ = _forward(static, 0, params, patches, queries, aux, segment_ids, positions)
    return softmax.finish(stats)


def _pool_fwd(static, params, patches, queries, aux, segment_ids, positions):
    # The cotangent of the patches is a whole second input; it is computed only where somebody asks for it.
    wants_patches = patches.perturbed
    params, patches, queries, aux, segment_ids, positions = jax.tree.map(
        lambda primal: primal.value,
        (params, patches, queries, aux, segment_ids, positions),
        is_leaf=lambda t: hasattr(t, "perturbed"),
    )
    keep = _kept(static, params, patches, aux)
    stats, products = _forward(static, keep, params, patches, queries, aux, segment_ids, positions)
    pooled, lse = softmax.finish(stats)
    flag = np.zeros(()) if wants_patches else None
    return (pooled, lse), (params, patches, queries, aux, segment_ids, positions, products, pooled, lse, flag)


def _pool_bwd(static, residuals, cotangents):
    params, patches, queries, aux, segment_ids, positions, products, pooled, lse, flag = residuals
    g_pooled, g_lse = (
        jnp.zeros(like.shape, like.dtype) if isinstance(g, jax.custom_derivatives.SymbolicZero) else g
        for g, like in zip(cotangents, (pooled, lse))
    )
    wants_patches = flag is not None
    # d score = weight * (g . value - g . pooled + g_lse): the last two do not depend on the patch.
    offset = g_lse - jnp.sum(g_pooled * pooled, axis=-1)
    local = functools.partial(_backward_local, static, wants_patches)
    if layout.axes():
        rows = layout.patch_spec()
        local = layout.on_shards(
            functools.partial(_backward_sharded, local),
            in_specs=(P(), rows, P(), P(), rows, rows, layout.stacked_spec(), P(), P(), P()),
            out_specs=(P(), P(), rows if wants_patches else P()),
        )
    d_params, d_queries, d_patches = local(
        params, patches, queries, aux, segment_ids, positions, products, lse, g_pooled, offset
    )
    return (
        d_params,
        (d_patches if wants_patches else _no_cotangent(patches)),
        d_queries,
        *map(functools.partial(jax.tree.map, _no_cotangent), (aux, segment_ids, positions)),
    )


pool.defvjp(_pool_fwd, _pool_bwd, symbolic_zeros=True)


def for_chunks(flat: tuple[jax.Array, ...], chunk: int, body: Callable, carry: Any) -> Any:
    """Applies `body(carry, start, (x, seg, pos))` to each chunk that holds a patch.

    Args:
      flat: (x [N, D], segment_ids [N], positions [N]).
      chunk: patches per chunk; the last one may be shorter.
      body: `start` is the first flat index of the chunk.
      carry: initial carry.

    Returns:
      The last carry.
    """
    total = flat[1].shape[0]

    def guarded(start, size, carry):
        def cut(t):
            return lax.dynamic_slice_in_dim(t, start, size)

        # The slice of the patches sits inside the branch: outside, XLA on CPU would convert a whole bfloat16 input to
        # float32 before the loop.
        return lax.cond(jnp.any(cut(flat[1]) > 0), lambda c: body(c, start, tuple(map(cut, flat))), lambda c: c, carry)

    full = total // chunk
    if full:
        carry = lax.fori_loop(0, full, lambda i, c: guarded(i * chunk, chunk, c), carry)
    if full * chunk < total:
        carry = guarded(full * chunk, total - full * chunk, carry)
    return carry


def _no_cotangent(leaf):
    """A symbolic zero: costs nothing, unlike an array of zeros the size of the cohort."""
    return jax.custom_derivatives.SymbolicZero(jax.core.ShapedArray(leaf.shape, leaf.dtype).to_tangent_aval())


def _kept(static: Static, params, patches, aux) -> int:
    """How many products of the patches of one device are kept for the backward pass; known when tracing."""
    if not hasattr(static.features_fn, "with_products"):
        return 0
    rows, length, _ = patches.shape
    sizes = [
        rows * length // math.prod(layout.shards()) * u.shape[0] * u.dtype.itemsize
        for u in jax.eval_shape(static.features_fn.with_products, params, aux, *probe(patches))[2]
    ]
    if sum(sizes) <= min(CACHE_BYTES, SAVE_BYTES):
        return len(sizes)
    return int(sizes[0] <= SAVE_BYTES)


def _forward(
    static: Static, keep: int, params, patches, queries, aux, segment_ids, positions
) -> tuple[softmax.Stats, Any]:
    """Online softmax state and the first `keep` products [chunks, ., chunk]."""
    local = functools.partial(_forward_local, static, keep)
    shared = layout.axes()
    if not shared:
        return local(params, patches, queries, aux, segment_ids, positions)

    def sharded(*args):
        stats, products = local(*args)
        return softmax.merge(stats, shared), products

    rows = layout.patch_spec()
    sharded = layout.on_shards(sharded, (P(), rows, P(), P(), rows, rows), (P(), layout.stacked_spec()))
    return sharded(params, patches, queries, aux, segment_ids, positions)


def _forward_local(
    static: Static, keep: int, params, patches, queries, aux, segment_ids, positions
) -> tuple[softmax.Stats, Any]:
    flat = layout.flatten(patches, segment_ids, positions)
    h, s = jax.eval_shape(static.features_fn, params, aux, *probe(patches))
    acc = accumulator(h)

    def body(carry, start, part):
        stats, kept = carry
        x, seg, pos = part
        if keep:
            h, s, products = static.features_fn.with_products(params, aux, layout.masked(x, seg), seg, pos)
            at = (start // static.chunk, 0, 0)
            kept = jax.tree.map(lambda t, u: lax.dynamic_update_slice(t, u[None], at), kept, products[:keep])
        else:
            h, s = static.features_fn(params, aux, layout.masked(x, seg), seg, pos)
        own = softmax.one_hot(seg, static.num_slots)
        return softmax.extend(stats, h, slot_scores(s, queries, acc), own), kept

    zero = softmax.empty(static.num_slots, s.shape[0] if queries is None else queries.shape[1], h.shape[0], acc)
    kept = ()
    if keep:
        shapes = jax.eval_shape(static.features_fn.with_products, params, aux, *probe(patches))[2][:keep]
        # Chunk by chunk: columns of one wide array would lie a page apart and cost more to write than to compute.
        chunks = -(-flat[1].shape[0] // static.chunk)
        kept = jax.tree.map(lambda u: jnp.zeros((chunks, u.shape[0], static.chunk), u.dtype), shapes)
    return for_chunks(flat, static.chunk, body, (zero, kept))


def _backward_sharded(local, *args):
    d_params, d_queries, d_patches = local(*args)
    d_params, d_queries = jax.tree.map(lambda g: lax.psum(g, layout.axes()), (d_params, d_queries))
    return d_params, d_queries, d_patches


def _backward_local(
    static, wants_patches, params, patches, queries, aux, segment_ids, positions, products, lse, g_pooled, offset
):
    flat = layout.flatten(patches, segment_ids, positions)

    def body(carry, start, part):
        d_params, d_queries, d_flat = carry
        x, seg, pos = part
        chunk = (layout.masked(x, seg), seg, pos)
        (h, s), pull = _features_vjp(static, wants_patches, params, aux, products, start, chunk)
        own = softmax.one_hot(seg, static.num_slots)
        a = jnp.exp(jnp.where(own, slot_scores(s, queries, lse.dtype) - lse[..., None], softmax.NEG))
        d_a, d_h = softmax.weighted_sum_vjp(g_pooled, a, h)
        d_s, d_q = slot_scores_vjp(a * (d_a + offset[..., None]), s, queries)
        pulled, d_x = pull((d_h, d_s))
        d_params, d_queries = jax.tree.map(
            lambda total, part: total + part.astype(total.dtype), (d_params, d_queries), (pulled, d_q)
        )
        if wants_patches:
            d_x = layout.masked(d_x, seg).astype(d_flat.dtype)
            d_flat = lax.dynamic_update_slice_in_dim(d_flat, d_x, start, axis=0)
        return d_params, d_queries, d_flat

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), (params, queries))
    d_flat = jnp.zeros(flat[0].shape, patches.dtype) if wants_patches else ()
    d_params, d_queries, d_flat = for_chunks(flat, static.chunk, body, (*zero, d_flat))
    d_params, d_queries = jax.tree.map(lambda g, p: g.astype(p.dtype), (d_params, d_queries), (params, queries))
    return d_params, d_queries, (d_flat.reshape(patches.shape) if wants_patches else ())


def _features_vjp(static, wants_patches, params, aux, products, start, part):
    """Values and scores of a chunk, and (cotangents) -> (cotangent of params, cotangent of x or None)."""
    x, seg, pos = part
    if not products:
        fn = static.features_fn
    else:
        at = (start // static.chunk, 0, 0)
        known = jax.tree.map(lambda u: lax.dynamic_slice(u, at, (1, u.shape[1], seg.shape[0]))[0], products)

        def fn(*args):
            return static.features_fn.with_products(*args, known=known)[:2]

    if wants_patches:
        return jax.vjp(lambda params, x: fn(params, aux, x, seg, pos), params, x)
    out, pull = jax.vjp(lambda params: fn(params, aux, x, seg, pos), params)
    return out, lambda g: (*pull(g), None)
