"""The pool in one piece: all patches at once, plain automatic differentiation, activations kept.

For bags that fit: nothing is computed twice and the step is one fused graph. Temporary memory grows with the bag.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from histokd_jax.ops.pooling import layout, softmax
from histokd_jax.ops.pooling.features import FeaturesFn, accumulator, slot_scores


def pool(
    features_fn: FeaturesFn,
    num_slots: int,
    params: Any,
    patches: jax.Array,
    queries: jax.Array | None,
    aux: Any,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(pooled [S, Q, H], lse [S, Q]); arguments as in `attention_pool`."""
    shared = layout.axes()

    def local(params, patches, queries, aux, segment_ids, positions):
        if shared:
            # Each device differentiates its own copy; the transpose of this sums the gradients over the devices.
            params, queries = jax.tree.map(lambda t: lax.pcast(t, shared, to="varying"), (params, queries))
        x, seg, pos = layout.flatten(patches, segment_ids, positions)
        h, s = features_fn(params, aux, layout.masked(x, seg), seg, pos)
        s = slot_scores(s, queries, accumulator(h))
        zero = softmax.empty(num_slots, s.shape[1], h.shape[0], accumulator(h))
        stats = softmax.extend(zero, h, s, softmax.one_hot(seg, num_slots))
        return softmax.merge(stats, shared) if shared else stats

    if shared:
        rows = layout.patch_spec()
        # Only with checked replication is the transpose of `pcast` that sum.
        local = layout.on_shards(local, (P(), rows, P(), P(), rows, rows), P(), check_vma=True)
    return softmax.finish(local(params, patches, queries, aux, segment_ids, positions))
