"""Depthwise convolution on grids of packed rows whose sides are data: one program for slides of every size.

A framework's convolution wants one rectangle per array. Here each row knows its place in the grid of its own slide, so
that a tap is a gather of rows. A sequence is a grid of width 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Grid(NamedTuple):
    """The place of every row in the grid of its slide; the rows of a grid lie in row-major order without gaps."""

    y: jax.Array  # [T] int32, 0 .. height - 1
    x: jax.Array  # [T] int32, 0 .. width - 1
    height: jax.Array  # [T] int32; 0 for a row outside any grid: it is not read, and its result is 0
    width: jax.Array  # [T] int32


@jax.custom_vjp
def grid_convolution(values: jax.Array, kernel: jax.Array, grid: Grid) -> jax.Array:
    """Depthwise cross-correlation with zero padding: out[y, x] = sum_ij kernel[i, j] values[y + i - ci, x + j - cj].

    Memory beyond input and result does not grow with the kernel: taps are summed one after another, in both directions.

    Args:
      values: [T, C] float, the rows of all grids.
      kernel: [kh, kw, C], odd sides; (ci, cj) is its centre.
      grid: the place of every row.

    Returns:
      [T, C] in the promoted dtype of both.

    Raises:
      ValueError: for a kernel with an even side or of another width than the values.
    """
    _check(values, kernel)
    return _correlate(values, kernel, grid)


def _check(values: jax.Array, kernel: jax.Array) -> None:
    if kernel.ndim != 3 or not all(n % 2 for n in kernel.shape[:2]) or kernel.shape[2] != values.shape[-1]:
        raise ValueError(
            f"kernel {kernel.shape} does not fit values {values.shape}: expected [kh, kw, C] with odd kh and kw"
        )


def _offsets(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vertical and horizontal distance [kh * kw] of every tap from the centre."""
    height, width = kernel.shape[:2]
    dy, dx = jnp.divmod(jnp.arange(height * width, dtype=jnp.int32), width)
    return dy - height // 2, dx - width // 2


def _neighbours(values: jax.Array, grid: Grid, dy: jax.Array, dx: jax.Array) -> jax.Array:
    """The row at (y + dy, x + dx) of the same grid, 0 beyond its border."""
    y, x = grid.y + dy, grid.x + dx
    inside = (y >= 0) & (y < grid.height) & (x >= 0) & (x < grid.width)
    index = jnp.arange(values.shape[0], dtype=jnp.int32) + dy * grid.width + dx
    return jnp.where(inside[:, None], jnp.take(values, index, axis=0, mode="clip"), jnp.zeros((), values.dtype))


def _correlate(values: jax.Array, kernel: jax.Array, grid: Grid) -> jax.Array:
    dtype = jnp.promote_types(values.dtype, kernel.dtype)
    taps = kernel.reshape(-1, kernel.shape[-1])

    def add(total, tap):
        weight, dy, dx = tap
        return total + weight[None, :] * _neighbours(values, grid, dy, dx), None

    return lax.scan(add, jnp.zeros(values.shape, dtype), (taps, *_offsets(kernel)))[0]


def _forward(values, kernel, grid):
    _check(values, kernel)
    return _correlate(values, kernel, grid), (values, kernel, grid)


def _backward(kept, g):
    values, kernel, grid = kept
    # Row j is read by row i = j - offset with the same weight: the transpose is the correlation with a turned kernel.
    d_values = _correlate(g, kernel[::-1, ::-1], grid).astype(values.dtype)

    def weight_gradient(_, tap):
        return None, jnp.sum(g * _neighbours(values, grid, *tap), axis=0)

    _, d_taps = lax.scan(weight_gradient, None, _offsets(kernel))
    return d_values, d_taps.reshape(kernel.shape).astype(kernel.dtype), None


grid_convolution.defvjp(_forward, _backward)
