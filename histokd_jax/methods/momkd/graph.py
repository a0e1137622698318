"""Graph attention (GATv2) on the neighbour graph of all slides of a step (specification 3.1).

Lists of neighbours become columns of edges, and sums over edges run column by column, so that no array of edges times
channels exists. Every node attends to itself; edges lead to patches of the same slide only, whatever padding holds.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine
from histokd_jax.ops.dropout import hash_dropout

CENTRE_TO_NEIGHBOUR, NEIGHBOUR_TO_CENTRE, SYMMETRIC = "centre_to_neighbour", "neighbour_to_centre", "symmetric"
DIRECTIONS = (CENTRE_TO_NEIGHBOUR, NEIGHBOUR_TO_CENTRE, SYMMETRIC)
_SLOPE = 0.2


class Edges(NamedTuple):
    """Directed edges between the N patches of a step, in columns of N.

    Attributes:
      source: [K, N] int32, where a message comes from.
      target: [K, N] int32, where it goes.
      valid: [K, N] bool; other entries are no edges.
      slot: [N] int32, segment id of every patch; 0 = padding.
      number: [K + 1, N] int32, number of an edge within its slide, of self-loops in the last row: seeds dropout.
    """

    source: jax.Array
    target: jax.Array
    valid: jax.Array
    slot: jax.Array
    number: jax.Array


def make_edges(neighbours: jax.Array, segment_ids: jax.Array, positions: jax.Array, direction: str) -> Edges:
    """Edges of the batch fields.

    Args:
      neighbours: [R, L, k] int32 places from each patch to its neighbours, see `histokd_jax.types.Batch`; 0 = none,
        anything on padding.
      segment_ids: [R, L] int32.
      positions: [R, L] int32.
      direction: "centre_to_neighbour": a patch receives messages from those that list it (the published code);
        "neighbour_to_centre": from those that it lists; "symmetric": from both, each once.

    Returns:
      The edges, without self-loops.

    Raises:
      ValueError: unknown direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"graph.direction = {direction!r} is unknown; use one of {DIRECTIONS}")
    neighbours, segment_ids, positions = map(jnp.asarray, (neighbours, segment_ids, positions))
    slot, k = segment_ids.reshape(-1), neighbours.shape[-1]
    n = slot.shape[0]
    offset = neighbours.reshape(n, k).T
    centre = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None, :], (k, n))
    place = centre + offset
    inside = (offset != 0) & (place >= 0) & (place < n)
    place = jnp.where(inside, place, centre)
    valid = inside & (slot > 0)[None, :] & (slot[place] == slot[None, :])
    columns = 2 * k + 1
    number = positions.reshape(1, n) * columns + jnp.arange(columns, dtype=jnp.int32)[:, None]
    if direction == CENTRE_TO_NEIGHBOUR:
        return Edges(centre, place, valid, slot, number[k:])
    if direction == NEIGHBOUR_TO_CENTRE:
        return Edges(place, centre, valid, slot, number[k:])
    return Edges(
        jnp.concatenate([centre, place]),
        jnp.concatenate([place, centre]),
        # Of two patches that list each other, the edges of both lists are the same.
        jnp.concatenate([valid, valid & ~_mutual(place, valid)]),
        slot,
        number,
    )


def _mutual(place: jax.Array, valid: jax.Array) -> jax.Array:
    """[k, n] whether the neighbour of an edge lists the centre as well."""
    theirs = jnp.where(valid, place, -1)[:, place]  # [k, k, n]: what each neighbour lists
    return jnp.any(theirs == jnp.arange(place.shape[1])[None, None, :], axis=0)


class GraphAttention(nn.Module):
    """GATv2 with several heads, self-loops and a bias (Brody et al., ICLR 2022).

    Attributes:
      in_features: input width.
      width: output width D, divided by the heads.
      heads: number of heads.
      rate: dropout of the attention weights.
      layer: number of the dropout layer.
      dtype: compute dtype of the linear maps.
    """

    in_features: int
    width: int
    heads: int
    rate: float
    layer: int
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the parameters."""
        self.source = Affine(self.in_features, self.width, TORCH_DEFAULT, self.dtype)
        self.target = Affine(self.in_features, self.width, TORCH_DEFAULT, self.dtype)
        self.att = self.param("att", nn.initializers.glorot_uniform(), (self.heads, self.width // self.heads))
        self.bias = self.param("bias", nn.initializers.zeros, (self.width,))

    def __call__(self, x: jax.Array, edges: Edges, seed: jax.Array | None = None) -> jax.Array:
        """[N, in_features] finite to [N, width]; `seed` draws dropout."""
        heads = (x.shape[0], self.heads, -1)
        source, target = self.source(x).reshape(heads), self.target(x).reshape(heads)
        weights = edge_softmax(*edge_scores(self.att, source, target, edges), edges)
        if seed is not None:
            weights = self._dropped(weights, edges, seed)
        return edge_sum(weights, source, edges).reshape(x.shape[0], -1) + self.bias[None, :]

    def _dropped(self, weights: jax.Array, edges: Edges, seed: jax.Array) -> jax.Array:
        rows, n, heads = weights.shape
        slots = jnp.broadcast_to(edges.slot[None, :], (rows, n)).reshape(-1)
        flat = weights.reshape(rows * n, heads).T
        return hash_dropout(flat, seed, slots, edges.number.reshape(-1), self.rate, self.layer).T.reshape(weights.shape)


def edge_scores(att: jax.Array, source: jax.Array, target: jax.Array, edges: Edges) -> tuple[jax.Array, jax.Array]:
    """Scores `a . LeakyReLU(W_src x_j + W_dst x_i)` before the softmax.

    Args:
      att: [heads, width] a of each head.
      source: [N, heads, width] W_src x.
      target: [N, heads, width] W_dst x.
      edges: see `Edges`.

    Returns:
      (of the edges [K, N, heads], of the self-loops [N, heads]).
    """

    @jax.checkpoint
    def score(s: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.sum(jax.nn.leaky_relu(source[s] + target[t], _SLOPE) * att[None], axis=-1)

    own = jnp.arange(source.shape[0], dtype=jnp.int32)
    return jax.lax.map(lambda column: score(*column), (edges.source, edges.target)), score(own, own)


def edge_softmax(scores: jax.Array, own: jax.Array, edges: Edges) -> jax.Array:
    """Softmax over the edges that come into a patch and its self-loop.

    Args:
      scores: [K, N, heads].
      own: [N, heads] of the self-loops.
      edges: see `Edges`.

    Returns:
      [K + 1, N, heads] weights, 0 where there is no edge; those of the self-loops in the last row.
    """
    valid, low = edges.valid[..., None], jnp.finfo(scores.dtype).min
    # A constant shift of the exponents, which has no gradient.
    shift, floor = jax.lax.stop_gradient((own, jnp.where(valid, scores, low)))
    largest = shift.at[edges.target].max(floor)
    self_weight = jnp.exp(own - largest)
    weights = jnp.where(valid, jnp.exp(jnp.where(valid, scores - largest[edges.target], 0.0)), 0.0)
    total = self_weight.at[edges.target].add(weights)
    return jnp.concatenate([weights / total[edges.target], (self_weight / total)[None]])


def edge_sum(weights: jax.Array, source: jax.Array, edges: Edges) -> jax.Array:
    """Sum of the incoming messages, `sum_j weight_ji W_src x_j`.

    Args:
      weights: [K + 1, N, heads] as from `edge_softmax`.
      source: [N, heads, width] W_src x.
      edges: see `Edges`.

    Returns:
      [N, heads, width].
    """

    @jax.checkpoint
    def messages(weight: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.zeros_like(source).at[t].add(weight[..., None] * source[s])

    def add(total: jax.Array, column: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + messages(*column), None

    first = weights[-1][..., None] * source
    return jax.lax.scan(add, first, (weights[:-1], edges.source, edges.target))[0]
