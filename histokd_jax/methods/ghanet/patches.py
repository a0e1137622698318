"""Chunk functions of the two branches, the map over patches, and the selection of its largest entries.

Both branches read the packed patches through `attention_pool`, so memory does not grow with the bag, padding may hold
anything, and a slide may span rows and devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from histokd_jax.methods.ghanet.layers import normalise
from histokd_jax.nn.affine import ColumnParams, affine_columns, affine_to_columns, known_product, operand
from histokd_jax.nn.gated_attention import Bags, gated_scores
from histokd_jax.ops.dropout import hash_dropout
from histokd_jax.ops.pooling import NEG, SEGMENT, chunked, layout, softmax
from histokd_jax.ops.pooling.features import probe, slot_scores
from histokd_jax.ops.topk import floor_fraction, segment_counts, segment_kth_largest

Aux = Mapping[str, jax.Array]


def _product(proj: ColumnParams, x: jax.Array, known: tuple[jax.Array, ...], dtype: jnp.dtype | None) -> jax.Array:
    return known_product(proj, x, known[0], 1, dtype) if known else affine_to_columns(proj, x, dtype)


def own_scores(queries: jax.Array, context: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Products of every patch with the queries of its slide.

    Args:
      queries: [S, Q, H], or [1, Q, H] for queries that all slides share.
      context: [H, n].
      segment_ids: [n] int32.

    Returns:
      [Q, n], at least float32; 0 on padding unless the queries are shared.
    """
    scores = slot_scores(context, queries, jnp.promote_types(context.dtype, jnp.float32))
    if queries.shape[0] == 1:
        return scores[0]
    return jnp.sum(jnp.where(softmax.one_hot(segment_ids, queries.shape[0]), scores, 0.0), axis=0)


@dataclasses.dataclass(frozen=True)
class ContextPatches:
    """The patches as CAB sees them (steps 1 and 3) and their attention scores; hashable by value.

    Attributes:
      rate: dropout of the projection and of the attention probabilities.
      layer: number of the dropout layer of the projection.
      prob_layer: that of the probabilities.
      dtype: compute dtype of the products.
    """

    rate: float = 0.0
    layer: int = 0
    prob_layer: int = 1
    dtype: jnp.dtype | None = None

    def __call__(
        self, params: Mapping, aux: Aux, x: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Context C and the scores of the queries.

        Args:
          params: {"proj": ColumnParams, "norm": NormParams, "queries": [S or 1, Q, H]}.
          aux: {"seed"} to draw dropout, {} for none.
          x: [n, D] patches.
          segment_ids: [n] int32.
          positions: [n] int32.

        Returns:
          (C [H, n], scores). Scores are [Q, n]; with a seed [2 Q, n]: those that dropout keeps (the others are `NEG`),
          then all of them. Dropping a probability p then is a change of the sum and of the normaliser.
        """
        return self.with_products(params, aux, x, segment_ids, positions)[:2]

    def with_products(
        self,
        params: Mapping,
        aux: Aux,
        x: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        known: tuple[jax.Array, ...] = (),
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array]]:
        """`__call__`, and the product of the projection [H, n], which is not computed again if it is `known`."""
        c, u = self._context(params, aux, x, segment_ids, positions, known)
        scores = own_scores(params["queries"], c, segment_ids)
        if aux:
            ones = jnp.ones_like(scores)
            keep = hash_dropout(ones, aux["seed"], segment_ids, positions, self.rate, self.prob_layer) > 0
            scores = jnp.concatenate([jnp.where(keep, scores, NEG), scores])
        return c, scores, (u,)

    def scores(
        self, params: Mapping, aux: Aux, x: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> jax.Array:
        """[Q, n] scores without dropout of the probabilities (the projection is dropped as in the passes)."""
        c, _ = self._context(params, aux, x, segment_ids, positions, ())
        return own_scores(params["queries"], c, segment_ids)

    def _context(self, params, aux, x, segment_ids, positions, known) -> tuple[jax.Array, jax.Array]:
        u = _product(params["proj"], x, known, self.dtype)
        e = jax.nn.relu(u)
        if aux:
            e = hash_dropout(e, aux["seed"], segment_ids, positions, self.rate, self.layer)
        return operand(normalise(params["norm"], e, 0), self.dtype), u


@dataclasses.dataclass(frozen=True)
class HeadProbabilities:
    """The map from mean attention probabilities in place of mean raw scores (deviation D9).

    It is the logarithm of the mean over heads, so that the softmax over kept patches renormalises the probabilities,
    and repeating every patch changes nothing.

    Attributes:
      context: the chunk function of the pass.
      heads: number of heads.
    """

    context: ContextPatches
    heads: int

    def scores(
        self, params: Mapping, aux: Aux, x: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> jax.Array:
        """[T, n]; params of the pass and "lse" [S, heads * T], the normaliser of every slide."""
        scores = self.context.scores(params, aux, x, segment_ids, positions)
        lse = params["lse"][jnp.maximum(segment_ids - 1, 0)].T
        log_prob = (scores - lse).reshape(self.heads, -1, scores.shape[1])
        return jax.nn.logsumexp(log_prob, axis=0) - math.log(self.heads)


@dataclasses.dataclass(frozen=True)
class SurvivalPatches:
    """The patches as HSB sees them (steps 1 and 2) and the scores of its weights; hashable by value.

    The pool hands over `positions` as it got them. Here they are flat indices of the patches, with which per-patch
    arrays are read from `aux`: the positions proper, and the map of CAB.

    Attributes:
      rows: any of "morphology" (P), "genotype" (Q) and "uniform", in the order of the scores.
      rate: dropout of the projection.
      layer: number of the dropout layer.
      dtype: compute dtype of the products.
    """

    rows: tuple[str, ...]
    rate: float = 0.0
    layer: int = 0
    dtype: jnp.dtype | None = None

    def __call__(
        self, params: Mapping, aux: Aux, x: jax.Array, segment_ids: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Values B and scores.

        Args:
          params: {"proj", "norm", "gate"}; and "map" if its gradient is wanted.
          aux: {"positions": [R * L]}, "map" [T, R * L] (`NEG` where a patch is not kept) if not in `params`, "seed".
          x: [n, D] patches.
          segment_ids: [n] int32.
          index: [n] int32, flat index of each patch.

        Returns:
          (B [H, n], scores [1, T or 1 + T, n]).
        """
        return self.with_products(params, aux, x, segment_ids, index)[:2]

    def with_products(
        self,
        params: Mapping,
        aux: Aux,
        x: jax.Array,
        segment_ids: jax.Array,
        index: jax.Array,
        known: tuple[jax.Array, ...] = (),
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array]]:
        """`__call__`, and the product of the projection [H, n], which is not computed again if it is `known`."""
        u = _product(params["proj"], x, known, self.dtype)
        b = jax.nn.relu(normalise(params["norm"], u, 0))
        if "seed" in aux:
            b = hash_dropout(b, aux["seed"], segment_ids, aux["positions"][index], self.rate, self.layer)
        b = operand(b, self.dtype)
        scores = []
        for row in self.rows:
            if row == "morphology":
                scores.append(gated_scores(params["gate"], affine_columns(params["gate"]["gate"], b, self.dtype)))
            elif row == "genotype":
                scores.append((params if "map" in params else aux)["map"][:, index])
            else:
                scores.append(jnp.zeros((1, x.shape[0]), u.dtype))
        return b, jnp.concatenate([s.astype(u.dtype) for s in scores]), (u,)


def patch_map(
    scores_fn: Callable[..., jax.Array], params: Mapping, aux: Aux, bags: Bags, chunk: int, impl: str
) -> jax.Array:
    """What a pure function says about every patch.

    Args:
      scores_fn: (params, aux, x [n, D], segment_ids [n], positions [n]) -> [T, n].
      params: pytree of arrays.
      aux: pytree of arrays.
      bags: the packed patches.
      chunk: patches per chunk.
      impl: "chunked", or "segment" for all patches at once.

    Returns:
      [T, R, L]; 0 on padding.
    """
    shape = jax.eval_shape(scores_fn, params, aux, *probe(bags.patches))

    def local(params, aux, patches, segment_ids, positions):
        flat = layout.flatten(patches, segment_ids, positions)

        def fill(out, start, part):
            x, seg, pos = part
            s = scores_fn(params, aux, layout.masked(x, seg), seg, pos)
            s = jnp.where((seg > 0)[None], s, 0.0)
            return lax.dynamic_update_slice_in_dim(out, s.astype(out.dtype), start, axis=1)

        out = jnp.zeros((shape.shape[0], flat[1].shape[0]), shape.dtype)
        out = fill(out, 0, flat) if impl == SEGMENT else chunked.for_chunks(flat, chunk, fill, out)
        return out.reshape(-1, *segment_ids.shape)

    if layout.axes():
        rows = layout.patch_spec()
        local = layout.on_shards(local, (P(), P(), rows, rows, rows), layout.patch_spec(None))
    return local(params, aux, bags.patches, bags.segment_ids, bags.positions)


def select_largest(values: jax.Array, segment_ids: jax.Array, num_slots: int, ratio: float, min_k: int) -> jax.Array:
    """Step 4 of HSB: the map where a patch is among the largest `floor(ratio N)` of its slide and row, ties included.

    Args:
      values: [T, R, L] map.
      segment_ids: [R, L] int32.
      num_slots: S.
      ratio: fraction kept, of the valid patches of the slide.
      min_k: least number kept; 0 refuses slides that are too small (D12).

    Returns:
      [T, R, L]: the value where kept, `NEG` elsewhere; NaN in slides that are too small, if their sizes are not known
      when tracing, so that nothing is learned or predicted silently.

    Raises:
      ValueError: for a slide that is too small, where its size is known.
    """
    _refuse_small(segment_ids, num_slots, ratio, min_k)
    counts = segment_counts(segment_ids, num_slots)
    k = floor_fraction(counts, ratio, segment_ids.size)
    k = jnp.minimum(jnp.maximum(k, min_k), counts)
    threshold = segment_kth_largest(values, segment_ids, k, num_slots)
    threshold = jnp.where(((k == 0) & (counts > 0))[:, None], jnp.nan, threshold)
    limit = jnp.moveaxis(threshold[jnp.maximum(segment_ids - 1, 0)], -1, 0)
    kept = jnp.where(values >= limit, values, NEG)
    return jnp.where(jnp.isnan(limit), jnp.nan, kept)


def _refuse_small(segment_ids: jax.Array, num_slots: int, ratio: float, min_k: int) -> None:
    if min_k or isinstance(segment_ids, jax.core.Tracer) or not getattr(segment_ids, "is_fully_addressable", True):
        return
    counts = np.bincount(np.asarray(segment_ids).reshape(-1), minlength=num_slots + 1)[1:]
    small = [(slot, int(n)) for slot, n in enumerate(counts) if n and np.floor(n * ratio) < 1]
    if small:
        slot, n = small[0]
        raise ValueError(
            f"the slide in slot {slot} has {n} patches, of which hsb.ratio = {ratio} keeps none (the product rounded "
            "down is 0): set hsb.min_k = 1, raise hsb.ratio, or leave slides this small out"
        )
