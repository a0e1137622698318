"""Attention pooling of ragged bags, chunk by chunk, with its own backward pass.

One function serves every bag network: the caller gives a pure function from a chunk of patches to values and scores,
the pool streams over chunks with an online softmax. The backward pass runs the chunk function again and pulls the
cotangents back chunk by chunk, so that temporary memory does not grow with the bag. Masking and casting happen inside
the chunk: at the entrance they would copy the whole input.

Activations are feature-major [H, n]: the weight gradient is then a plain row-major product, which is about 1.5 times as
fast on CPU as the transposed one.

Under a mesh with a "data" axis (entered with `jax.set_mesh`) rows are pooled where they lie and only slot-level partial
sums [S, Q, H] travel: a slide may span rows and devices with an exact result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

FeaturesFn = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(params, aux, x [n, D], segment_ids [n], positions [n]) -> (values [H, n], scores [Q, n]).

It may be an object that also has `with_products(params, aux, x, segment_ids, positions, known=())`, which returns
(values, scores, products) and takes the first products [., n] of an earlier call as `known` in place of computing them
again, with the same derivatives; the product that costs most to compute comes first. The pool then keeps the first one
for the backward pass while it fits `SAVE_BYTES`, and all of them while they fit `CACHE_BYTES`.
"""

NEG = -1e30  # never -inf: the difference of two of them is NaN
# The first product of a step is kept up to this size (1.3 times the speed of computing it again); beyond it temporary
# memory stays constant.
SAVE_BYTES = 256 * 2**20
# The others are cheap: keeping them pays only in a processor's cache (4 % faster in it, 5 % slower outside).
CACHE_BYTES = 8 * 2**20
DATA_AXIS = "data"


class _Static(NamedTuple):
    features_fn: FeaturesFn
    num_slots: int
    chunk: int
    data_shards: int


class _Stats(NamedTuple):
    """Online softmax state: running maximum, normaliser, numerator."""

    m: jax.Array  # [S, Q]
    z: jax.Array  # [S, Q]
    num: jax.Array  # [S, Q, H]


def attention_pool(
    features_fn: FeaturesFn,
    params: Any,
    aux: Any,
    patches: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    *,
    num_slots: int,
    chunk: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Softmax-weighted mean of patch values per slide and query.

    pooled[s, q] = sum_n softmax_n(scores[q, n] over patches n of slot s) * values[:, n].

    Args:
      features_fn: pure function of one chunk, see `FeaturesFn`; it must not close over traced arrays.
      params: pytree of float arrays that `features_fn` is differentiated in.
      aux: pytree of arrays that it is not differentiated in (dropout seeds).
      patches: [R, L, D]; rows with segment id 0 may hold anything, NaN included.
      segment_ids: [R, L] int32; 0 = padding, s + 1 = slot s.
      positions: [R, L] int32, index of the patch within its bag.
      num_slots: S.
      chunk: patches per chunk; about 512 keeps a chunk in cache on CPU, accelerators want more.

    Returns:
      pooled: [S, Q, H] float32 (float64 for float64 values); exactly 0 for an empty slot.
      lse: [S, Q] log of the softmax normaliser; about -1e30 for an empty slot.

    Raises:
      ValueError: if the rows cannot be divided over the "data" axis of the mesh in use.
    """
    shards = _data_shards()
    if patches.shape[0] % shards:
        raise ValueError(
            f"{patches.shape[0]} packed rows cannot be divided over the {shards} devices of the 'data' axis: "
            f"set data.rows to a multiple of {shards}"
        )
    static = _Static(features_fn, num_slots, chunk, shards)
    return _pool(static, params, patches, aux, segment_ids, positions)


def attention_weights(
    features_fn: FeaturesFn,
    params: Any,
    aux: Any,
    patches: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    *,
    num_slots: int,
    chunk: int = 512,
) -> jax.Array:
    """Softmax weight of every patch within its slide (not differentiable; for attention maps).

    Args:
      features_fn: as in `attention_pool`.
      params: as in `attention_pool`.
      aux: as in `attention_pool`.
      patches: [R, L, D].
      segment_ids: [R, L] int32.
      positions: [R, L] int32.
      num_slots: S.
      chunk: patches per chunk.

    Returns:
      [Q, R, L] float32 (float64 for float64 scores); sums to 1 over the patches of a slide, 0 on padding.
    """
    _, lse = attention_pool(features_fn, params, aux, patches, segment_ids, positions, num_slots=num_slots, chunk=chunk)

    def local(params, aux, patches, segment_ids, positions, lse):
        flat = _flatten(patches, segment_ids, positions)

        def fill(out, start, part):
            x, seg, pos = part
            _, s = features_fn(params, aux, _masked(x, seg), seg, pos)
            a = jnp.exp(jnp.where(seg > 0, s.astype(lse.dtype) - lse.T[:, jnp.maximum(seg - 1, 0)], NEG))
            return lax.dynamic_update_slice_in_dim(out, a.astype(out.dtype), start, axis=1)

        out = _for_chunks(flat, chunk, fill, jnp.zeros((lse.shape[1], flat[1].shape[0]), lse.dtype))
        return out.reshape(lse.shape[1], *segment_ids.shape)

    if _data_shards() > 1:
        rows = P(DATA_AXIS)
        local = jax.shard_map(
            local, in_specs=(P(), P(), rows, rows, rows, P()), out_specs=P(None, DATA_AXIS), check_vma=False
        )
    return local(params, aux, patches, segment_ids, positions, lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(static: _Static, params, patches, aux, segment_ids, positions):
    stats, _ = _forward(static, 0, params, patches, aux, segment_ids, positions)
    return _finish(stats)


def _pool_fwd(static, params, patches, aux, segment_ids, positions):
    # The cotangent of the patches is a whole second input; it is computed only where somebody asks for it.
    wants_patches = patches.perturbed
    params, patches, aux, segment_ids, positions = jax.tree.map(
        lambda primal: primal.value,
        (params, patches, aux, segment_ids, positions),
        is_leaf=lambda t: hasattr(t, "perturbed"),
    )
    keep = _kept(static, params, patches, aux)
    stats, products = _forward(static, keep, params, patches, aux, segment_ids, positions)
    pooled, lse = _finish(stats)
    flag = np.zeros(()) if wants_patches else None
    return (pooled, lse), (params, patches, aux, segment_ids, positions, products, pooled, lse, flag)


def _pool_bwd(static, residuals, cotangents):
    params, patches, aux, segment_ids, positions, products, pooled, lse, flag = residuals
    g_pooled, g_lse = (
        jnp.zeros(like.shape, like.dtype) if isinstance(g, jax.custom_derivatives.SymbolicZero) else g
        for g, like in zip(cotangents, (pooled, lse))
    )
    wants_patches = flag is not None
    # d score = weight * (g . value - g . pooled + g_lse): the last two do not depend on the patch.
    offset = g_lse - jnp.sum(g_pooled * pooled, axis=-1)
    local = functools.partial(_backward_local, static, wants_patches)
    if static.data_shards > 1:
        rows = P(DATA_AXIS)
        local = jax.shard_map(
            functools.partial(_backward_sharded, local),
            in_specs=(P(), rows, P(), rows, rows, rows, P(), P(), P()),
            out_specs=(P(), rows if wants_patches else P()),
            check_vma=False,
        )
    d_params, d_patches = local(params, patches, aux, segment_ids, positions, products, lse, g_pooled, offset)
    return (
        d_params,
        (d_patches if wants_patches else _no_cotangent(patches)),
        *map(functools.partial(jax.tree.map, _no_cotangent), (aux, segment_ids, positions)),
    )


_pool.defvjp(_pool_fwd, _pool_bwd, symbolic_zeros=True)


def _no_cotangent(leaf):
    """A symbolic zero: costs nothing, unlike an array of zeros the size of the cohort."""
    return jax.custom_derivatives.SymbolicZero(jax.core.ShapedArray(leaf.shape, leaf.dtype).to_tangent_aval())


def _data_shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[DATA_AXIS] if DATA_AXIS in mesh.axis_names else 1


def _flatten(patches, segment_ids, positions):
    return patches.reshape(-1, patches.shape[-1]), segment_ids.reshape(-1), positions.reshape(-1)


def _masked(x, seg):
    # Zeroing the input, not the output: 0 * NaN is NaN inside the weight gradient.
    return jnp.where((seg > 0)[:, None], x, jnp.zeros((), x.dtype))


def _for_chunks(flat, chunk, body, carry):
    """Applies `body(carry, start, (x, seg, pos))` to each chunk that holds a patch; `start` is its first flat index."""
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


def _one_hot(seg, num_slots):
    return seg[None, :] == jnp.arange(1, num_slots + 1, dtype=seg.dtype)[:, None]  # [S, n]


def _kept(static: _Static, params, patches, aux) -> int:
    """How many products of the rows of one device are kept for the backward pass; known when tracing."""
    if not hasattr(static.features_fn, "with_products"):
        return 0
    rows, length, _ = patches.shape
    sizes = [
        rows // static.data_shards * length * u.shape[0] * u.dtype.itemsize
        for u in jax.eval_shape(static.features_fn.with_products, params, aux, *_probe(patches))[2]
    ]
    if sum(sizes) <= min(CACHE_BYTES, SAVE_BYTES):
        return len(sizes)
    return int(sizes[0] <= SAVE_BYTES)


def _probe(patches) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A chunk of one patch, for its shapes."""
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.ShapeDtypeStruct((1, patches.shape[-1]), patches.dtype), index, index


def _forward(static: _Static, keep: int, params, patches, aux, segment_ids, positions) -> tuple[_Stats, Any]:
    """Online softmax state and the first `keep` products [chunks, ., chunk]."""
    local = functools.partial(_forward_local, static, keep)
    if static.data_shards == 1:
        return local(params, patches, aux, segment_ids, positions)

    def sharded(*args):
        (m, z, num), products = local(*args)
        top = lax.pmax(m, DATA_AXIS)
        r = jnp.exp(m - top)
        return _Stats(top, lax.psum(z * r, DATA_AXIS), lax.psum(num * r[..., None], DATA_AXIS)), products

    rows = P(DATA_AXIS)
    return jax.shard_map(sharded, in_specs=(P(), rows, P(), rows, rows), out_specs=(P(), rows), check_vma=False)(
        params, patches, aux, segment_ids, positions
    )


def _forward_local(static: _Static, keep: int, params, patches, aux, segment_ids, positions) -> tuple[_Stats, Any]:
    flat = _flatten(patches, segment_ids, positions)
    h, s = jax.eval_shape(static.features_fn, params, aux, *_probe(patches))
    acc = jnp.promote_types(h.dtype, jnp.float32)
    slots, queries = static.num_slots, s.shape[0]

    def body(carry, start, part):
        stats, kept = carry
        x, seg, pos = part
        if keep:
            h, s, products = static.features_fn.with_products(params, aux, _masked(x, seg), seg, pos)
            at = (start // static.chunk, 0, 0)
            kept = jax.tree.map(lambda t, u: lax.dynamic_update_slice(t, u[None], at), kept, products[:keep])
        else:
            h, s = static.features_fn(params, aux, _masked(x, seg), seg, pos)
        one_hot = _one_hot(seg, slots)[:, None, :]
        s = s.astype(acc)[None]
        m = jnp.maximum(stats.m, jnp.max(jnp.where(one_hot, s, NEG), axis=-1))
        r = jnp.exp(stats.m - m)
        # `where` inside exp: outside, an empty slot would give exp(0) or overflow.
        e = jnp.exp(jnp.where(one_hot, s - m[..., None], NEG))
        num = jnp.einsum("sqn,hn->sqh", e.astype(h.dtype), h, preferred_element_type=acc)
        return _Stats(m, stats.z * r + e.sum(-1), stats.num * r[..., None] + num), kept

    zero = _Stats(
        jnp.full((slots, queries), NEG, acc),
        jnp.zeros((slots, queries), acc),
        jnp.zeros((slots, queries, h.shape[0]), acc),
    )
    kept = ()
    if keep:
        shapes = jax.eval_shape(static.features_fn.with_products, params, aux, *_probe(patches))[2][:keep]
        # Chunk by chunk: columns of one wide array would lie a page apart and cost more to write than to compute.
        chunks = -(-flat[1].shape[0] // static.chunk)
        kept = jax.tree.map(lambda u: jnp.zeros((chunks, u.shape[0], static.chunk), u.dtype), shapes)
    return _for_chunks(flat, static.chunk, body, (zero, kept))


def _finish(stats: _Stats) -> tuple[jax.Array, jax.Array]:
    filled = stats.z > 0
    z = jnp.where(filled, stats.z, 1.0)
    return stats.num / z[..., None], jnp.where(filled, stats.m + jnp.log(z), NEG)


def _backward_sharded(local, *args):
    d_params, d_patches = local(*args)
    return jax.tree.map(lambda g: lax.psum(g, DATA_AXIS), d_params), d_patches


def _backward_local(
    static, wants_patches, params, patches, aux, segment_ids, positions, products, lse, g_pooled, offset
):
    flat = _flatten(patches, segment_ids, positions)

    def body(carry, start, part):
        d_params, d_flat = carry
        x, seg, pos = part
        (h, s), pull = _features_vjp(static, wants_patches, params, aux, products, start, (_masked(x, seg), seg, pos))
        one_hot = _one_hot(seg, static.num_slots)[:, None, :]
        a = jnp.exp(jnp.where(one_hot, s.astype(lse.dtype)[None] - lse[..., None], NEG))
        g = g_pooled.astype(h.dtype)
        d_h = jnp.einsum("sqh,sqn->hn", g, a.astype(h.dtype), preferred_element_type=lse.dtype)
        d_a = jnp.einsum("sqh,hn->sqn", g, h, preferred_element_type=lse.dtype) + offset[..., None]
        d_s = jnp.sum(a * d_a, axis=0)
        pulled, d_x = pull((d_h.astype(h.dtype), d_s.astype(s.dtype)))
        d_params = jax.tree.map(lambda total, part: total + part.astype(total.dtype), d_params, pulled)
        if wants_patches:
            d_flat = lax.dynamic_update_slice_in_dim(d_flat, _masked(d_x, seg).astype(d_flat.dtype), start, axis=0)
        return d_params, d_flat

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    d_flat = jnp.zeros(flat[0].shape, patches.dtype) if wants_patches else ()
    d_params, d_flat = _for_chunks(flat, static.chunk, body, (zero, d_flat))
    d_params = jax.tree.map(lambda g, p: g.astype(p.dtype), d_params, params)
    return d_params, (d_flat.reshape(patches.shape) if wants_patches else ())


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
