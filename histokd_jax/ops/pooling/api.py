"""The public functions of the pool: checks, choice of the implementation, attention maps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from histokd_jax.ops.pooling import chunked, layout, segment, softmax
from histokd_jax.ops.pooling.features import FeaturesFn, probe, slot_scores

CHUNKED, SEGMENT = "chunked", "segment"
IMPLS = (CHUNKED, SEGMENT)


def attention_pool(
    features_fn: FeaturesFn,
    params: Any,
    aux: Any,
    patches: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    *,
    num_slots: int,
    queries: jax.Array | None = None,
    chunk: int = 512,
    impl: str = CHUNKED,
) -> tuple[jax.Array, jax.Array]:
    """Softmax-weighted mean of patch values per slide and query.

    pooled[s, q] = sum_n softmax_n(scores[s, q, n] over patches n of slot s) * values[:, n],

    where the scores are what `features_fn` gives, or with queries the products queries[s, q] . keys[:, n].

    Args:
      features_fn: pure function of some patches, see `FeaturesFn`; it must not close over traced arrays.
      params: pytree of float arrays that `features_fn` is differentiated in.
      aux: pytree of arrays that it is not differentiated in (dropout seeds).
      patches: [R, L, D]; rows with segment id 0 may hold anything, NaN included.
      segment_ids: [R, L] int32; 0 = padding, s + 1 = slot s.
      positions: [R, L] int32, index of the patch within its bag.
      num_slots: S.
      queries: [S, Q, K] float queries of every slide (co-attention), already scaled; None for scores that are common to
        all slides.
      chunk: patches per chunk; about 512 keeps a chunk in cache on CPU, accelerators want more. Not read by "segment".
      impl: "chunked" (temporary memory does not grow with the bag) or "segment" (keeps the activations of all patches).

    Returns:
      pooled: [S, Q, H] float32 (float64 for float64 values); exactly 0 for an empty slot.
      lse: [S, Q] log of the softmax normaliser; about -1e30 for an empty slot.

    Raises:
      ValueError: for an unknown `impl`, shapes that do not fit, segment ids beyond the slots (where they are known when
        tracing), or rows that cannot be divided over the mesh in use.
    """
    _check(features_fn, params, aux, patches, segment_ids, positions, num_slots, queries, chunk)
    args = (params, patches, queries, aux, segment_ids, positions)
    if impl == CHUNKED:
        return chunked.pool(chunked.Static(features_fn, num_slots, chunk), *args)
    if impl == SEGMENT:
        return segment.pool(features_fn, num_slots, *args)
    raise ValueError(f"impl={impl!r} is no implementation of the pool; use one of {IMPLS}")


def attention_weights(
    features_fn: FeaturesFn,
    params: Any,
    aux: Any,
    patches: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    *,
    num_slots: int,
    queries: jax.Array | None = None,
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
      queries: as in `attention_pool`.
      chunk: patches per chunk.

    Returns:
      [Q, R, L] float32 (float64 for float64 scores); sums to 1 over the patches of a slide, 0 on padding.

    Raises:
      ValueError: as `attention_pool`.
    """
    _, lse = attention_pool(
        features_fn, params, aux, patches, segment_ids, positions, num_slots=num_slots, queries=queries, chunk=chunk
    )

    def local(params, aux, patches, segment_ids, positions, queries, lse):
        flat = layout.flatten(patches, segment_ids, positions)

        def fill(out, start, part):
            x, seg, pos = part
            _, s = features_fn(params, aux, layout.masked(x, seg), seg, pos)
            own = softmax.one_hot(seg, num_slots)
            s = slot_scores(s, queries, lse.dtype) - lse[..., None]
            a = jnp.sum(jnp.exp(jnp.where(own, s, softmax.NEG)), axis=0)
            return lax.dynamic_update_slice_in_dim(out, a.astype(out.dtype), start, axis=1)

        out = chunked.for_chunks(flat, chunk, fill, jnp.zeros((lse.shape[1], flat[1].shape[0]), lse.dtype))
        return out.reshape(lse.shape[1], *segment_ids.shape)

    if layout.axes():
        rows = layout.patch_spec()
        local = layout.on_shards(local, (P(), P(), rows, rows, rows, P(), P()), layout.patch_spec(None))
    return local(params, aux, patches, segment_ids, positions, queries, lse)


def _check(features_fn, params, aux, patches, segment_ids, positions, num_slots, queries, chunk) -> None:
    if num_slots < 1 or chunk < 1:
        raise ValueError(f"num_slots={num_slots} and chunk={chunk} of the pool must both be at least 1")
    if patches.ndim != 3 or not patches.shape[:2] == segment_ids.shape == positions.shape:
        raise ValueError(
            f"patches {patches.shape}, segment_ids {segment_ids.shape} and positions {positions.shape} do not fit: "
            "expected [R, L, D], [R, L] and [R, L]"
        )
    largest = _largest(segment_ids)
    if largest > num_slots:
        raise ValueError(
            f"segment ids reach {largest}, but the step has {num_slots} slots: the patches of the last slides would be "
            "left out; raise num_slots"
        )
    if queries is not None:
        _check_queries(features_fn, params, aux, patches, num_slots, queries)
    layout.check_divides(*segment_ids.shape)


def _check_queries(features_fn, params, aux, patches, num_slots, queries) -> None:
    _, keys = jax.eval_shape(features_fn, params, aux, *probe(patches))
    if queries.ndim != 3 or queries.shape[0] != num_slots or queries.shape[2] != keys.shape[0]:
        raise ValueError(
            f"queries {queries.shape} do not fit: expected [S, Q, K] with S = {num_slots} slots and K = "
            f"{keys.shape[0]}, the width of the keys"
        )


def _largest(segment_ids) -> int:
    """The largest segment id; 0 while tracing, where values are not known."""
    if isinstance(segment_ids, jax.core.Tracer) or not getattr(segment_ids, "is_fully_addressable", True):
        return 0
    # NumPy: within a trace, operations of jax.numpy on known values would be traced too.
    return int(np.asarray(segment_ids).max(initial=0))
