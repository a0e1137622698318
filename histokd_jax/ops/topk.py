"""The k-th largest value of every slide, exact, for bags packed into rows: the threshold of a top-k selection.

Floats are mapped to unsigned integers of the same order, and the answer is found bit by bit: the largest integer that
at least k patches of the slide reach. Every round counts patches per slide, so memory stays linear in the patches,
slides may span rows, and devices exchange counts only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from histokd_jax.ops.pooling import layout

_CHUNK = 8192


def segment_counts(segment_ids: jax.Array, num_slots: int) -> jax.Array:
    """Patches of every slot.

    Args:
      segment_ids: [R, L] int32; 0 = padding, s + 1 = slot s.
      num_slots: S.

    Returns:
      [S] int32.
    """
    ones = jnp.ones((1, *segment_ids.shape), jnp.int32)

    def local(ones, segment_ids):
        return _total(_count(ones, segment_ids, num_slots))[:, 0]

    return _sharded(local, 1)(ones, segment_ids)


def floor_fraction(counts: jax.Array, ratio: float, most: int) -> jax.Array:
    """`floor(ratio * count)` with the product in double precision, as a host would compute it.

    Single precision is off by one at some multiples (0.29 * 100). The table costs 4 bytes per patch of a step.

    Args:
      counts: [S] int32 in [0, most].
      ratio: in (0, 1].
      most: the largest possible count, known when tracing.

    Returns:
      [S] int32.
    """
    table = np.floor(np.arange(most + 1) * float(ratio)).astype(np.int32)
    return jnp.asarray(table)[counts]


def segment_kth_largest(values: jax.Array, segment_ids: jax.Array, k: jax.Array, num_slots: int) -> jax.Array:
    """The k-th largest of each row of values, within every slot; not differentiable.

    Args:
      values: [Q, R, L] float32 or float64 without NaN; anything but NaN on padding.
      segment_ids: [R, L] int32; 0 = padding, s + 1 = slot s.
      k: [S] int32, common to the rows of a slot.
      num_slots: S.

    Returns:
      [S, Q] in the dtype of the values: an element of the slot, so that `values >= result` keeps k of them, and more if
      some tie with the k-th; +inf where k < 1, -inf where the slot has fewer than k patches.

    Raises:
      ValueError: for shapes or dtypes that do not fit.
    """
    if values.ndim != 3 or values.shape[1:] != segment_ids.shape or k.shape != (num_slots,):
        raise ValueError(
            f"values {values.shape}, segment_ids {segment_ids.shape} and k {k.shape} do not fit: expected [Q, R, L], "
            f"[R, L] and [S] with S = {num_slots}"
        )
    if values.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"values are {values.dtype}; the order of the k-th largest needs float32 or float64")

    def local(values, segment_ids, k):
        return _kth(lax.stop_gradient(values), segment_ids, k, num_slots)

    return _sharded(local, 1, 1)(values, segment_ids, k)


def _sharded(local, leading: int, replicated: int = 0):
    """`local` on the patches of each device, if a mesh divides them."""
    if not layout.axes():
        return local
    in_specs = (layout.patch_spec(*[None] * leading), layout.patch_spec(), *[P()] * replicated)
    return layout.on_shards(local, in_specs, P())


def _total(counts: jax.Array) -> jax.Array:
    return lax.psum(counts, layout.axes()) if layout.axes() else counts


def _kth(values: jax.Array, segment_ids: jax.Array, k: jax.Array, num_slots: int) -> jax.Array:
    bits = 8 * values.dtype.itemsize
    keys = _ordered(values)
    own = jnp.maximum(segment_ids - 1, 0)

    def decide(i, prefix):
        candidate = prefix | jnp.asarray(1, keys.dtype) << jnp.asarray(bits - 1 - i, keys.dtype)
        reach = keys >= jnp.moveaxis(candidate[own], -1, 0)
        enough = _total(_count(reach, segment_ids, num_slots)) >= k[:, None]
        return jnp.where(enough, candidate, prefix)

    prefix = lax.fori_loop(0, bits, decide, jnp.zeros((num_slots, values.shape[0]), keys.dtype))
    found = _values(prefix, values.dtype)
    # Without any reaching bit the prefix stays 0, which is the key of no number.
    found = jnp.where(prefix == 0, -jnp.inf, found)
    return jnp.where(k[:, None] < 1, jnp.inf, found)


def _count(mask: jax.Array, segment_ids: jax.Array, num_slots: int) -> jax.Array:
    """[S, Q] int32: how many patches of a slot are set in [Q, R, L].

    Products with a one-hot chunk instead of a scatter, whose additions to few addresses would queue on accelerators.
    """
    flat, ids = mask.reshape(mask.shape[0], -1), segment_ids.reshape(-1)
    total = ids.shape[0]

    def part(start, size):
        m = lax.dynamic_slice_in_dim(flat, start, size, axis=1).astype(jnp.float32)
        seg = lax.dynamic_slice_in_dim(ids, start, size)
        one_hot = (seg[None, :] == jnp.arange(1, num_slots + 1, dtype=seg.dtype)[:, None]).astype(jnp.float32)
        # Sums of at most _CHUNK ones are exact.
        return jnp.einsum("sn,qn->sq", one_hot, m, precision=lax.Precision.HIGHEST).astype(jnp.int32)

    counts = jnp.zeros((num_slots, mask.shape[0]), jnp.int32)
    full = total // _CHUNK
    if full:
        counts = lax.fori_loop(0, full, lambda i, c: c + part(i * _CHUNK, _CHUNK), counts)
    return counts + part(full * _CHUNK, total - full * _CHUNK) if full * _CHUNK < total else counts


def _unsigned(dtype: jnp.dtype) -> tuple[jnp.dtype, jax.Array]:
    unsigned = jnp.uint32 if dtype == jnp.float32 else jnp.uint64
    return unsigned, jnp.asarray(1, unsigned) << jnp.asarray(8 * dtype.itemsize - 1, unsigned)


def _ordered(values: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the floats: negative ones reversed, below the others."""
    unsigned, sign = _unsigned(values.dtype)
    raw = lax.bitcast_convert_type(values, unsigned)
    return jnp.where((raw & sign) > 0, ~raw, raw | sign)


def _values(keys: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `_ordered`."""
    _, sign = _unsigned(dtype)
    return lax.bitcast_convert_type(jnp.where((keys & sign) > 0, keys ^ sign, ~keys), dtype)
