"""The patches of a slide with the highest and the lowest scores, from packed rows and with memory that does not grow.

Scores stream chunk by chunk, as in the pool; only S x Q x B winners are kept. The winning patches themselves are then
fetched, so that what is computed from them has gradients like any other function of a patch. On a mesh every device
offers its own winners and hands over its own patches: the traffic is S x Q x B rows, whatever the length of the bags.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from histokd_jax.nn.gated_attention import Bags
from histokd_jax.ops.pooling import layout, softmax
from histokd_jax.ops.pooling.chunked import for_chunks
from histokd_jax.ops.pooling.features import FeaturesFn, accumulator, probe

HIGHEST, LOWEST = 1, -1


class Selected(NamedTuple):
    """Chosen patches of every slide and score map; the leading axis E runs over the ends asked for."""

    patches: jax.Array  # [E, S, Q, B, D], 0 where not valid
    positions: jax.Array  # [E, S, Q, B] int32, index within the bag
    valid: jax.Array  # [E, S, Q, B] bool, False where the bag has fewer patches

    def identity(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(patches [n, D], segment ids [n], positions [n]) flat, as a chunk function takes them."""
        slots = jnp.arange(1, self.positions.shape[1] + 1, dtype=jnp.int32)[None, :, None, None]
        ids = jnp.where(self.valid, slots, 0)
        return self.patches.reshape(-1, self.patches.shape[-1]), ids.reshape(-1), self.positions.reshape(-1)


class _Winners(NamedTuple):
    """Scores and places of the winners so far, each [E, S, Q, B]."""

    score: jax.Array  # times the sign of the end, `softmax.NEG` where there is none
    position: jax.Array
    place: jax.Array  # flat index on the device that holds it
    device: jax.Array


def select(
    features_fn: FeaturesFn,
    params: Any,
    aux: Any,
    bags: Bags,
    count: int,
    *,
    ends: tuple[int, ...] = (HIGHEST, LOWEST),
    chunk: int = 512,
) -> Selected:
    """The `count` patches with the highest or lowest scores of every slide.

    Ties go to the lower position within the bag. The choice has no gradient; the chosen patches have.

    Args:
      features_fn: chunk function, of which the scores [Q, n] are used, see `histokd_jax.ops.pooling.features`.
      params: its parameters.
      aux: its other arrays.
      bags: the packed patches.
      count: B, patches per end; a bag may have fewer.
      ends: any of `HIGHEST` and `LOWEST`, in the order of the result's leading axis.
      chunk: patches per chunk.

    Returns:
      The patches, best (of `LOWEST`: lowest) first.

    Raises:
      ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"count = {count} patches cannot be selected; ask for at least 1")
    find = functools.partial(_find, features_fn, bags.num_slots, count, ends, chunk)
    fixed = jax.tree.map(lax.stop_gradient, (params, aux, bags.patches))
    shared, rows = layout.axes(), layout.patch_spec()
    if not shared:
        winners = find(*fixed, bags.segment_ids, bags.positions)
        return Selected(_fetch(bags.patches, winners), winners.position, winners.score > softmax.NEG / 2)
    find = layout.on_shards(functools.partial(_find_shared, find, count, shared), (P(), P(), rows, rows, rows), P())
    winners = find(*fixed, bags.segment_ids, bags.positions)

    def fetch(patches, winners):
        own = winners.device == lax.axis_index(shared)
        return lax.psum(_fetch(patches, winners._replace(score=jnp.where(own, winners.score, softmax.NEG))), shared)

    # Checked replication gives the sum its right transpose.
    patches = layout.on_shards(fetch, (rows, P()), P(), check_vma=True)(bags.patches, winners)
    return Selected(patches, winners.position, winners.score > softmax.NEG / 2)


def _fetch(patches: jax.Array, winners: _Winners) -> jax.Array:
    flat = jnp.asarray(patches).reshape(-1, patches.shape[-1])
    # A place that holds no winner may point at padding, which may hold NaN.
    return jnp.where((winners.score > softmax.NEG / 2)[..., None], flat[winners.place], jnp.zeros((), flat.dtype))


def _find(features_fn, num_slots, count, ends, chunk, params, aux, patches, segment_ids, positions) -> _Winners:
    """The winners among the patches of one device."""
    values, scores = jax.eval_shape(features_fn, params, aux, *probe(patches))
    shape = (len(ends), num_slots, scores.shape[0], count)
    sign = jnp.asarray(ends, accumulator(values)).reshape(-1, 1, 1, 1)
    nothing = jnp.zeros(shape, jnp.int32)
    start = _Winners(jnp.full(shape, softmax.NEG, sign.dtype), nothing, nothing, nothing)

    def body(best, first, part):
        x, seg, pos = part
        scores = features_fn(params, aux, layout.masked(x, seg), seg, pos)[1].astype(sign.dtype)
        own = softmax.one_hot(seg, num_slots)[None]
        offered = jnp.broadcast_to(jnp.where(own, sign * scores[None, None], softmax.NEG), (*shape[:3], seg.shape[0]))
        # Earlier winners come first, and top_k prefers the first of equals.
        score, chosen = lax.top_k(jnp.concatenate([best.score, offered], axis=-1), count)

        def pick(kept, new):
            both = jnp.concatenate([kept, jnp.broadcast_to(new, offered.shape).astype(jnp.int32)], axis=-1)
            return jnp.take_along_axis(both, chosen, axis=-1)

        place = first + jnp.arange(seg.shape[0], dtype=jnp.int32)
        return _Winners(score, pick(best.position, pos), pick(best.place, place), best.device)

    return for_chunks(layout.flatten(patches, segment_ids, positions), chunk, body, start)


def _find_shared(find, count, axes, *args) -> _Winners:
    """The winners among the patches of all devices."""
    here = lax.axis_index(axes)
    own = find(*args)
    own = own._replace(device=jnp.full_like(own.device, here))
    devices = math.prod(layout.shards())

    def everyone(value):
        # A sum over disjoint places in one array: an all-reduce, like every other exchange of a step.
        stacked = jnp.zeros((devices, *value.shape), value.dtype).at[here].set(value)
        return jnp.concatenate(list(lax.psum(stacked, axes)), axis=-1)

    offered = jax.tree.map(everyone, own)
    order = lax.sort((-offered.score, offered.position, offered.place, offered.device), dimension=-1, num_keys=2)
    score, *rest = (t[..., :count] for t in order)
    return _Winners(-score, *rest)
