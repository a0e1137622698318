"""Optical density (Beer-Lambert) and the haematoxylin-eosin-DAB basis of Ruifrok and Johnston (2001)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.ops.image.colour import mix

# Rows: haematoxylin, eosin, DAB; columns: density in red, green, blue. Ruifrok and Johnston 2001, as printed.
RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_OF_DENSITY = np.linalg.inv(RUIFROK)


def optical_density(rgb: jax.Array, background: jax.Array | float = 255.0, floor: float = 1.0) -> jax.Array:
    """-ln(I / background); pixels darker than `floor` count as `floor`, so that black is finite.

    Args:
      rgb: [..., 3] uint8 or float on 0..255.
      background: level of unstained glass; brighter pixels get a negative density.
      floor: smallest level told apart, > 0.

    Returns:
      [..., 3] float32.
    """
    return -jnp.log(jnp.maximum(rgb.astype(jnp.float32), floor) / background)


def from_density(density: jax.Array, background: jax.Array | float = 255.0) -> jax.Array:
    """background * exp(-density): [...] float32, neither rounded nor clipped."""
    return background * jnp.exp(-density)


def rgb_to_hed(rgb: jax.Array, floor: float = 1.0) -> jax.Array:
    """Amounts of haematoxylin, eosin and DAB whose densities add up to the pixel.

    Args:
      rgb: [..., 3] uint8 or float on 0..255.
      floor: see `optical_density`.

    Returns:
      [..., 3] float32 in natural-log density; negative where a colour lies outside the basis (not clipped, so that
      `hed_to_rgb` inverts it).
    """
    return mix(optical_density(rgb, floor=floor), HED_OF_DENSITY)


def hed_to_rgb(hed: jax.Array) -> jax.Array:
    """The inverse of `rgb_to_hed` for pixels of at least `floor`: [..., 3] float32, neither rounded nor clipped."""
    return from_density(mix(hed, RUIFROK))
