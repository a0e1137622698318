"""Changing the colours of one image on the scale 0..255, given the drawn numbers. Nothing clips unless it says so."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.ops.image.colour import hsv_to_rgb, rgb_to_hsv
from histokd_jax.ops.image.density import hed_to_rgb, rgb_to_hed


def fill_zeros(image: jax.Array, noise: jax.Array) -> jax.Array:
    """Elements that are exactly 0 take the value of `noise` ([H, W, C], like the image); per channel, not per pixel."""
    image = image.astype(jnp.float32)
    return jnp.where(image == 0, noise, image)


def solarise(image: jax.Array, threshold: jax.Array) -> jax.Array:
    """Values below `threshold` ([]) stay, the others become 255 - value."""
    image = image.astype(jnp.float32)
    return jnp.where(image < threshold, image, 255 - image)


def brightness(image: jax.Array, delta: jax.Array) -> jax.Array:
    """Adds `delta` ([], grey levels)."""
    return image.astype(jnp.float32) + delta


def contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """(v - mean) * factor + mean, with the mean of each channel over the image."""
    image = image.astype(jnp.float32)
    mean = jnp.mean(image, axis=(0, 1), keepdims=True)
    return (image - mean) * factor + mean


def saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
    """HSV saturation times `factor` ([]), clipped to 0..1."""
    hue, saturated, value = rgb_to_hsv(image.astype(jnp.float32))
    return hsv_to_rgb(hue, jnp.clip(saturated * factor, 0, 1), value)


def hue(image: jax.Array, shift: jax.Array) -> jax.Array:
    """HSV hue plus `shift` ([], turns)."""
    found, saturated, value = rgb_to_hsv(image.astype(jnp.float32))
    return hsv_to_rgb(found + shift, saturated, value)


def jitter_stains(image: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """Each of haematoxylin, eosin and DAB becomes amount * scale + offset (Tellez et al. 2018).

    Args:
      image: [H, W, 3].
      scale: [3].
      offset: [3], natural-log density.

    Returns:
      [H, W, 3] float32; black stays darker than level 1 only up to the floor of `optical_density`.
    """
    hed = rgb_to_hed(image)
    return hed_to_rgb(hed * scale[None, None, :] + offset[None, None, :])


def clip(image: jax.Array) -> jax.Array:
    """To [0, 255]."""
    return jnp.clip(image.astype(jnp.float32), 0, 255)
