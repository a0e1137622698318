"""Feature maps [b, C, positions ...]: pooling to a common size, and views that the map losses share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def bins(size: int, target: int) -> list[tuple[int, int]]:
    """Start and end (exclusive) of every adaptive bin: `floor(i H / h)` to `ceil((i + 1) H / h)`."""
    return [(i * size // target, -(-(i + 1) * size // target)) for i in range(target)]


def _averaging(size: int, target: int) -> np.ndarray:
    matrix = np.zeros((target, size))
    for row, (start, end) in zip(matrix, bins(size, target)):
        row[start:end] = 1.0 / (end - start)
    return matrix


def adaptive_average_pool(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Average over adaptive bins, which also exist where sizes do not divide.

    Args:
      x: [b, C, H, ...] float.
      sizes: target size of every axis behind the channels.

    Returns:
      [b, C, *sizes].

    Raises:
      ValueError: if the number of axes differs.
    """
    if len(sizes) != x.ndim - 2:
        raise ValueError(f"sizes {sizes} do not belong to the axes behind the channels of {x.shape}")
    for axis, target in enumerate(sizes, start=2):
        if x.shape[axis] != target:
            matrix = jnp.asarray(_averaging(x.shape[axis], target), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1), precision=jax.lax.Precision.HIGHEST), -1, axis)
    return x


def adaptive_max_pool(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Maximum over adaptive bins; Args and Returns as in `adaptive_average_pool`."""
    for axis, target in enumerate(sizes, start=2):
        if x.shape[axis] != target:
            parts = [
                jnp.max(jax.lax.slice_in_dim(x, start, end, axis=axis), axis=axis)
                for start, end in bins(x.shape[axis], target)
            ]
            x = jnp.stack(parts, axis=axis)
    return x


def matched(a: jax.Array, b: jax.Array, pool=adaptive_average_pool) -> tuple[jax.Array, jax.Array]:
    """Both maps at the smaller size of every position axis (section 1, spatial mismatch)."""
    sizes = tuple(map(min, a.shape[2:], b.shape[2:]))
    return pool(a, sizes), pool(b, sizes)


def flat(x: jax.Array) -> jax.Array:
    """[b, C, P] with all positions on one axis."""
    return x.reshape(*x.shape[:2], -1)
