"""Nystrom attention over packed sequences of any length (baselines specification, section 8).

The reference pads every sequence on the left with zero rows to a multiple of the number of landmarks. Those rows have
zero query, key and value, so they act only through their number: they enter the means of the landmarks as zeros and the
softmax over keys as exp(0). Both are written down here, no padding row exists, and a sequence gives the same result
wherever it lies and whatever lies beside it.

**Tiles.** Sequences are cut into tiles of equal size; a tile holds rows of one slide. Everything that couples a row
with the landmarks of its slide is done tile by tile, so that scores [heads, rows, landmarks] exist for a few tiles at a
time and are computed again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine, symmetric_uniform
from histokd_jax.ops.dropout import hash_dropout
from histokd_jax.ops.grid_convolution import Grid, grid_convolution
from histokd_jax.ops.pooling import NEG

TILES_AT_ONCE = 16
PINV_CONSTANTS = (13.0, 15.0, 7.0)


class Tiles(NamedTuple):
    """Where the rows of the sequences lie: G tiles of B rows, slot after slot."""

    slot: jax.Array  # [G] int32 slot of the tile
    row: jax.Array  # [G, B] int32 index of the row within its sequence
    valid: jax.Array  # [G, B] bool, False behind the end of a sequence
    first: jax.Array  # [S] int32 flat index of row 0 of each sequence
    length: jax.Array  # [S] int32 rows n of each sequence, at least 1

    def per_row(self, values: jax.Array) -> jax.Array:
        """[S] values of the slots to [G, 1], one per tile."""
        return jnp.take(values, self.slot)[:, None]


def make_tiles(length: jax.Array, num_tiles: int, tile: int) -> Tiles:
    """Lays sequences out in tiles.

    Args:
      length: [S] int32, rows of each sequence, at least 1.
      num_tiles: G, at least the sum of ceil(length / tile).
      tile: B.

    Returns:
      The layout; tiles that are not needed hold no valid row.
    """
    used = -(-length // tile)
    ends = jnp.cumsum(used, dtype=jnp.int32)
    index = jnp.arange(num_tiles, dtype=jnp.int32)
    slot = jnp.minimum(jnp.sum(index[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), length.shape[0] - 1)
    row = (index - jnp.take(ends - used, slot))[:, None] * tile + jnp.arange(tile, dtype=jnp.int32)[None, :]
    return Tiles(slot, row, row < jnp.take(length, slot)[:, None], (ends - used) * tile, length)


def iterative_pinv(a: jax.Array, iterations: int = 6) -> jax.Array:
    """Pseudo-inverse of softmax matrices by the iteration of order 4.

    z <- z/4 (13 I - a z (15 I - a z (7 I - a z))), from z0 = a^T / (largest row sum x largest column sum), where the
    maxima run over all heads of a slide.

    Args:
      a: [..., heads, m, m] float, non-negative.
      iterations: number of steps.

    Returns:
      Array like `a`. Products run at full precision: the iteration amplifies rounding.
    """
    rows, columns = (jnp.max(jnp.sum(jnp.abs(a), axis=i), axis=(-2, -1)) for i in (-1, -2))
    eye = jnp.eye(a.shape[-1], dtype=a.dtype).reshape((1,) * (a.ndim - 2) + a.shape[-2:])

    def product(x, y):
        return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)

    z = jnp.swapaxes(a, -1, -2) / (rows * columns)[..., None, None, None]
    outer, middle, inner = PINV_CONSTANTS
    for _ in range(iterations):
        az = product(a, z)
        z = 0.25 * product(z, outer * eye - product(az, middle * eye - product(az, inner * eye - az)))
    return z


class Padding(NamedTuple):
    """The left padding of the reference, as numbers per slot [S] int32."""

    group: jax.Array  # rows per landmark, ceil(n / m)
    rows: jax.Array  # zero rows in front of the sequence


def left_padding(length: jax.Array, landmarks: int) -> Padding:
    """Padding of sequences [S] to multiples of `landmarks`."""
    group = -(-length // landmarks)
    return Padding(group, group * landmarks - length)


def landmark_means(x: jax.Array, tiles: Tiles, padding: Padding, landmarks: int) -> jax.Array:
    """Means of consecutive groups of rows of the padded sequences.

    Args:
      x: [G, B, ...] float, zero on rows that are not valid.
      tiles: the layout.
      padding: see `left_padding`.
      landmarks: m.

    Returns:
      [S, m, ...].
    """
    group = jnp.minimum((tiles.row + tiles.per_row(padding.rows)) // tiles.per_row(padding.group), landmarks - 1)
    index = (tiles.slot[:, None] * landmarks + group).reshape(-1)
    slots = tiles.length.shape[0]
    flat = x.reshape(-1, *x.shape[2:])
    total = jax.ops.segment_sum(flat, index, slots * landmarks, indices_are_sorted=True)
    total = total.reshape(slots, landmarks, *x.shape[2:])
    return total / padding.group.reshape(-1, *(1,) * (total.ndim - 1)).astype(x.dtype)


def _map_tiles(fn: Callable, items: tuple[jax.Array, ...]) -> tuple[jax.Array, ...] | jax.Array:
    """`fn` on every tile, a few at a time; nothing inside is kept for the backward pass."""
    step = jax.checkpoint(lambda item: fn(*item))
    return lax.map(step, items, batch_size=min(TILES_AT_ONCE, items[0].shape[0]))


def landmark_values(queries: jax.Array, k: jax.Array, v: jax.Array, tiles: Tiles, padding: Padding) -> jax.Array:
    """`softmax(queries k^T) v` over all rows of each padded sequence.

    Args:
      queries: [S, m, heads, d] landmarks of the queries.
      k: [G, B, heads, d].
      v: [G, B, heads, d].
      tiles: the layout.
      padding: see `left_padding`.

    Returns:
      [S, m, heads, d].
    """

    def partial(slot, k, v, valid):
        scores = jnp.einsum("mhd,bhd->hmb", jnp.take(queries, slot, axis=0), k)
        top = lax.stop_gradient(jnp.max(jnp.where(valid[None, None, :], scores, NEG), axis=-1))
        e = jnp.exp(jnp.where(valid[None, None, :], scores - top[..., None], NEG))
        return top, e.sum(-1), jnp.einsum("hmb,bhd->hmd", e, v)

    tops, sums, totals = _map_tiles(partial, (tiles.slot, k, v, tiles.valid))
    slots = queries.shape[0]
    top = jax.ops.segment_max(tops, tiles.slot, slots, indices_are_sorted=True)
    zeros = padding.rows.astype(sums.dtype)[:, None, None]
    # The padding rows have score 0: they bound the maximum from below and add exp(0) each.
    top = jnp.where(zeros > 0, jnp.maximum(top, 0.0), top)
    share = jnp.exp(tops - jnp.take(top, tiles.slot, axis=0))
    norm = jax.ops.segment_sum(share * sums, tiles.slot, slots, indices_are_sorted=True)
    norm = norm + zeros * jnp.exp(-jnp.where(zeros > 0, top, 0.0))
    total = jax.ops.segment_sum(share[..., None] * totals, tiles.slot, slots, indices_are_sorted=True)
    return jnp.swapaxes(total / norm[..., None], 1, 2)


def nystrom_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    tiles: Tiles,
    landmarks: int,
    inverse: Callable[[jax.Array], jax.Array] = iterative_pinv,
) -> jax.Array:
    """`softmax(q kL^T) inverse(softmax(qL kL^T)) softmax(qL k^T) v` with landmarks qL, kL of each sequence.

    Args:
      q: [G, B, heads, d] scaled queries, zero on rows that are not valid; so `k` and `v`.
      k: [G, B, heads, d].
      v: [G, B, heads, d].
      tiles: the layout.
      landmarks: m.
      inverse: maps [S, heads, m, m] to its (pseudo-)inverse.

    Returns:
      [G, B, heads, d]; rows that are not valid hold no meaning.
    """
    padding = left_padding(tiles.length, landmarks)
    q_means, k_means = (landmark_means(t, tiles, padding, landmarks) for t in (q, k))
    middle = inverse(jax.nn.softmax(jnp.einsum("smhd,snhd->shmn", q_means, k_means)))
    values = jnp.einsum("shmn,snhd->smhd", middle, landmark_values(q_means, k, v, tiles, padding))

    def attend(slot, q):
        scores = jnp.einsum("bhd,mhd->bhm", q, jnp.take(k_means, slot, axis=0))
        return jnp.einsum("bhm,mhd->bhd", jax.nn.softmax(scores), jnp.take(values, slot, axis=0))

    return _map_tiles(attend, (tiles.slot, q))


def value_convolution(v: jax.Array, kernel: jax.Array, tiles: Tiles) -> jax.Array:
    """Depthwise convolution of the values along each sequence, one filter per head, zero beyond its ends.

    Args:
      v: [G, B, heads, d].
      kernel: [taps, heads], odd number of taps.
      tiles: the layout.

    Returns:
      [G, B, heads, d]; 0 on rows that are not valid.
    """
    length = jnp.where(tiles.valid, tiles.per_row(tiles.length), 0).reshape(-1)
    row = tiles.row.reshape(-1)
    grid = Grid(row, jnp.zeros_like(row), length, jnp.ones_like(row))
    wide = jnp.repeat(kernel, v.shape[-1], axis=1)[:, None, :]
    return grid_convolution(v.reshape(len(row), -1), wide, grid).reshape(v.shape)


class NystromAttention(nn.Module):
    """Projections around `nystrom_attention`, plus the convolution of the values.

    Attributes:
      width: row width; heads x head width.
      heads: number of heads.
      landmarks: m.
      iterations: steps of the pseudo-inverse.
      taps: kernel of the value convolution.
      rate: dropout of the output.
      layer: number of the dropout layer.
      dtype: compute dtype of the projections; what lies between them stays in at least float32.
    """

    width: int
    heads: int = 8
    landmarks: int = 256
    iterations: int = 6
    taps: int = 33
    rate: float = 0.1
    layer: int = 0
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        self.qkv = Affine(self.width, 3 * self.width, TORCH_DEFAULT, self.dtype, use_bias=False)
        self.out = Affine(self.width, self.width, TORCH_DEFAULT, self.dtype)
        self.conv = self.param("conv", symmetric_uniform(1 / math.sqrt(self.taps)), (self.taps, self.heads))

    def __call__(self, x: jax.Array, tiles: Tiles, seed: jax.Array | None = None) -> jax.Array:
        """Attends within each sequence.

        Args:
          x: [G, B, width] float, normalised.
          tiles: the layout.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [G, B, width] float32 (float64 for float64 parameters); rows that are not valid hold no meaning.
        """
        x = jnp.where(tiles.valid[..., None], x, 0.0)
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)
        q = q / math.sqrt(q.shape[-1])

        def inverse(a):
            return iterative_pinv(a, self.iterations)

        mixed = nystrom_attention(q, k, v, tiles, self.landmarks, inverse)
        y = self.out((mixed + value_convolution(v, self.conv, tiles)).reshape(x.shape))
        return y if seed is None else self._drop(y, tiles, seed)

    def _drop(self, y: jax.Array, tiles: Tiles, seed: jax.Array) -> jax.Array:
        slots = jnp.broadcast_to(tiles.slot[:, None] + 1, tiles.row.shape).reshape(-1)
        flat = y.reshape(-1, self.width).T
        return hash_dropout(flat, seed, slots, tiles.row.reshape(-1), self.rate, self.layer).T.reshape(y.shape)
