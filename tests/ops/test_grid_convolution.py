"""Depthwise convolution on packed grids against one NumPy convolution per grid, with derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.ops.grid_convolution import Grid, grid_convolution

GRIDS = ((1, 1), (2, 3), (7, 1), (5, 5), (1, 4))
CHANNELS, GAP = 3, 2


def layout():
    """Grids one after another with rows outside of any between them."""
    y, x, height, width = [], [], [], []
    for h, w in GRIDS:
        for i in range(h * w + GAP):
            y.append(i // w)
            x.append(i % w)
            height.append(h if i < h * w else 0)
            width.append(w)
    return Grid(*(jnp.array(t, jnp.int32) for t in (y, x, height, width)))


def reference(values, kernel):
    kh, kw, _ = kernel.shape
    out, start = np.zeros_like(values), 0
    for h, w in GRIDS:
        image = values[start : start + h * w].reshape(h, w, -1)
        wide = np.pad(image, ((kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
        total = sum(kernel[i, j] * wide[i : i + h, j : j + w] for i in range(kh) for j in range(kw))
        out[start : start + h * w] = total.reshape(h * w, -1)
        start += h * w + GAP
    return out


@pytest.mark.parametrize("sides", [(1, 1), (3, 3), (7, 7), (5, 1)])
def test_grid_convolution_and_derivatives(sides):
    rng = np.random.default_rng(0)
    grid = layout()
    values, g = (rng.normal(size=(len(grid.y), CHANNELS)) for _ in range(2))
    kernel = rng.normal(size=(*sides, CHANNELS))
    with jax.enable_x64(True):
        out, pull = jax.vjp(lambda v, k: grid_convolution(v, k, grid), jnp.asarray(values), jnp.asarray(kernel))
        d_values, d_kernel = pull(jnp.asarray(g))
    np.testing.assert_allclose(out, reference(values, kernel), atol=1e-12)
    # The map is bilinear, so its derivatives are inner products with unit vectors.
    for index in ((0, 0), (3, 1), (20, 2), (len(grid.y) - GAP - 1, 0), (len(grid.y) - 1, 1)):
        unit = np.zeros_like(values)
        unit[index] = 1
        np.testing.assert_allclose(d_values[index], np.sum(g * reference(unit, kernel)), atol=1e-12)
    for index in np.ndindex(kernel.shape):
        unit = np.zeros_like(kernel)
        unit[index] = 1
        np.testing.assert_allclose(d_kernel[index], np.sum(g * reference(values, unit)), atol=1e-12)


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="odd kh and kw"):
        grid_convolution(jnp.zeros((len(layout().y), 1)), jnp.zeros((2, 3, 1)), layout())
