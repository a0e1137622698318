"""Gated token attention with convolutions over the attention plane (CoCoFNet specification, section 4.3).

The plane of scores is an image with one channel per expanded map: rows are query tokens, columns key tokens. It is
never kept when it is large: blocks of query rows, with the two neighbours that the 3x3 filters reach on either side,
are computed one after another and again in the backward pass. The batch axis is not touched, so that a batch divided
over devices stays divided.

The batch norm between the filters needs the mean and variance of the whole filtered plane before any block can be
finished. A filtered score is the product of a filtered query and a filtered key, so both follow from covariances of
these, without the plane (`plane_moments`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

GATED, SOFTMAX = "score_times_softmax", "softmax"
GATES = (GATED, SOFTMAX)
_REACH = 2  # rows on either side that two 3x3 filters see


class Plane(NamedTuple):
    """What happens to the scores.

    Attributes:
      mix: [3, 3, E, E] first filter.
      mean: [E] subtracted after it.
      multiplier: [E] then multiplied.
      shift: [E] then added.
      collapse: [3, 3, E, 1] second filter, behind the gate.
    """

    mix: jax.Array
    mean: jax.Array
    multiplier: jax.Array
    shift: jax.Array
    collapse: jax.Array


def block_rows(batch: int, tokens: int, maps: int, elements: int) -> int:
    """Query rows per block such that one block of the plane has at most `elements` numbers; at least one row.

    Args:
      batch: B.
      tokens: N.
      maps: E.
      elements: size of a block.

    Returns:
      Rows, `tokens` if the whole plane fits.
    """
    return max(1, min(tokens, elements // (batch * tokens * maps)))


def mixed_scores(queries: jax.Array, keys: jax.Array, mix: jax.Array) -> jax.Array:
    """The whole plane behind the first filter.

    Args:
      queries: [B, N, E, c], or [B, N, 1, c] shared by all maps.
      keys: [B, N, E, c].
      mix: [3, 3, E, E].

    Returns:
      [B, N, N, E], at least float32.
    """
    return _filter(_scores(queries, keys), mix, row_padding=1)


def moments(plane: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and (biased) variance [E] of a plane [B, n, m, E]."""
    mean = jnp.mean(plane, axis=(0, 1, 2))
    return mean, jnp.mean(jnp.square(plane - _wide(mean)), axis=(0, 1, 2))


def plane_moments(queries: jax.Array, keys: jax.Array, mix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`moments(mixed_scores(...))` without the plane.

    With q' the query and its two neighbours, and k' the keys seen through the filter, a filtered score is <q', k'>.
    Its variance is that of the row means <q', mean k'> plus the mean over rows of q' cov(k') q': two sums without
    cancellation.

    Args:
      queries: [B, N, E, c] or [B, N, 1, c].
      keys: [B, N, E, c].
      mix: [3, 3, E, E].

    Returns:
      (mean [E], variance [E]).
    """
    q, k = _filtered_factors(queries, keys, mix)
    centre = jnp.mean(k, axis=1)
    rows = jnp.einsum("bnd,bdo->bno", q, centre)
    apart = k - centre[:, None]
    tokens = k.shape[1]
    spread = jnp.einsum("bmdo,bmeo->bode", apart, apart) / tokens
    within = jnp.einsum("bnd,bne,bode->o", q, q, spread, optimize=[(0, 1), (0, 1)]) / (q.shape[0] * tokens)
    mean = jnp.mean(rows, axis=(0, 1))
    return mean, within + jnp.mean(jnp.square(rows - mean[None, None]), axis=(0, 1))


def _filtered_factors(queries: jax.Array, keys: jax.Array, mix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q' [B, N, D] and k' [B, N, D, E] whose products are the filtered plane; D = 3 c, times E unless queries are
    shared."""
    wide = jnp.promote_types(jnp.promote_types(queries.dtype, keys.dtype), jnp.float32)
    batch, tokens, maps, width = keys.shape
    scale = width**-0.5
    q = jnp.stack(_neighbours(queries.astype(wide)), axis=2)  # [B, N, 3, E or 1, c]
    k = jnp.stack(_neighbours(keys.astype(wide)), axis=2) * scale
    shared = "r" if queries.shape[2] == 1 else "re"
    filtered = jnp.einsum(f"bmsec,rseo->bm{shared}co", k, mix.astype(wide))
    return q.reshape(batch, tokens, -1), filtered.reshape(batch, tokens, -1, maps)


def _neighbours(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The previous token, the token and the next one, 0 beyond the ends."""
    padded = jnp.pad(x, [(0, 0), (1, 1)] + [(0, 0)] * (x.ndim - 2))
    return tuple(lax.slice_in_dim(padded, i, i + x.shape[1], axis=1) for i in range(3))


def attend(mixed: jax.Array, values: jax.Array, plane: Plane, gate: str = GATED) -> tuple[jax.Array, jax.Array]:
    """The rest of the attention from the whole mixed plane.

    Args:
      mixed: [B, N, N, E], see `mixed_scores`.
      values: [B, N, c].
      plane: filters and norm; `mix` is not used.
      gate: "score_times_softmax", or "softmax" alone.

    Returns:
      (gathered values [B, N, c] in the dtype of `values`, map [B, N, N], at least float32).
    """
    found = _filter(_gated(mixed, plane, gate), plane.collapse, row_padding=1)[..., 0]
    return _gather(found, values), found


def attend_in_blocks(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    plane: Plane,
    rows: int,
    gate: str = GATED,
    want_map: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """`attend(mixed_scores(...))` with one block of query rows in memory at a time, in both directions.

    Args:
      queries: [B, N, E, c] or [B, N, 1, c].
      keys: [B, N, E, c].
      values: [B, N, c].
      plane: filters and norm.
      rows: query rows per block.
      gate: see `attend`.
      want_map: whether the map is returned; it is the largest array.

    Returns:
      (gathered values [B, N, c], map [B, N, N] or None).
    """
    batch, tokens = queries.shape[:2]
    blocks = math.ceil(tokens / rows)

    def body(_, block):
        number, near = block
        # Two rows more on either side; zero queries outside the plane give the zero scores of its padding.
        mixed = _filter(_scores(near, keys), plane.mix, row_padding=0)
        index = number * rows - 1 + jnp.arange(rows + 2)
        inside = (index >= 0) & (index < tokens)
        gated = jnp.where(inside[None, :, None, None], _gated(mixed, plane, gate), 0.0)
        found = _filter(gated, plane.collapse, row_padding=0)[..., 0]
        return None, (_gather(found, values), found if want_map else None)

    windows = _windows(queries, rows, blocks)
    _, (out, found) = lax.scan(jax.checkpoint(body, prevent_cse=False), None, (jnp.arange(blocks), windows))
    return _joined(out, tokens), _joined(found, tokens) if want_map else None


def _windows(queries: jax.Array, rows: int, blocks: int) -> jax.Array:
    """[blocks, B, rows + 4, E, c]: every block of queries with its neighbours, zeros outside."""
    after = _REACH + blocks * rows - queries.shape[1]
    padded = jnp.pad(queries, [(0, 0), (_REACH, after), (0, 0), (0, 0)])
    size = rows + 2 * _REACH
    return jnp.stack([lax.slice_in_dim(padded, i * rows, i * rows + size, axis=1) for i in range(blocks)])


def _joined(blocks: jax.Array, tokens: int) -> jax.Array:
    """[blocks, B, rows, .] to [B, N, .]."""
    moved = jnp.moveaxis(blocks, 0, 1)
    return moved.reshape(moved.shape[0], -1, moved.shape[-1])[:, :tokens]


def _scores(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Scaled products [B, n, m, E], at least float32 whatever the operands are."""
    wide = jnp.promote_types(jnp.promote_types(queries.dtype, keys.dtype), jnp.float32)
    if queries.shape[2] == 1:
        queries = jnp.broadcast_to(queries, (*queries.shape[:2], *keys.shape[2:]))
    product = jnp.einsum("bnec,bmec->bnme", queries, keys, preferred_element_type=wide)
    return product * keys.shape[-1] ** -0.5


def _filter(plane: jax.Array, kernel: jax.Array, row_padding: int) -> jax.Array:
    """3x3 filter over an image [B, n, m, E]; columns are zero padded by one."""
    padding = [(row_padding, row_padding), (1, 1)]
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(plane, kernel.astype(plane.dtype), (1, 1), padding, None, None, numbers)


def _gated(mixed: jax.Array, plane: Plane, gate: str) -> jax.Array:
    score = (mixed - _wide(plane.mean)) * _wide(plane.multiplier) + _wide(plane.shift)
    weight = jax.nn.softmax(score, axis=2)
    return weight if gate == SOFTMAX else score * weight


def _gather(found: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum("bnm,bmc->bnc", found.astype(values.dtype), values)


def _wide(per_map: jax.Array) -> jax.Array:
    return per_map.reshape(1, 1, 1, -1)
