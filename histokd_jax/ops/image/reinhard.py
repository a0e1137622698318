"""Colour transfer of Reinhard et al. (2001) in CIELAB: mean and spread of the tissue become those of the target."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from histokd_jax.ops.image.colour import lab_to_rgb, rgb_to_lab
from histokd_jax.ops.image.stains import MIN_PIXELS, is_tissue, per_image

_MIN_SPREAD = 0.1


class ReinhardParams(NamedTuple):
    """Colours of a tile, a slide or a reference image.

    Attributes:
      mean: [3] float32, CIELAB of the tissue.
      std: [3] float32, population standard deviation.
      valid: [] bool; False where there were too few tissue pixels or their lightness does not vary (a single colour).
        `mean` and `std` are then 0 and 1, and images are returned unchanged.
    """

    mean: jax.Array
    std: jax.Array
    valid: jax.Array


def fit(pixels: jax.Array, mask: jax.Array | None = None, *, lightness: float = 80.0) -> ReinhardParams:
    """Mean and standard deviation of the tissue.

    Args:
      pixels: [N, 3] uint8 or float on 0..255, of one tile or sampled over a slide; `jax.vmap` fits many.
      mask: [N] bool, pixels to look at (None: all).
      lightness: tissue is darker than this L*.

    Returns:
      The parameters.
    """
    planes = pixels.T
    used = is_tissue(planes, lightness)
    used = used if mask is None else used & mask
    lab, weight = rgb_to_lab(planes, axis=0), used.astype(jnp.float32)[None, :]
    count = jnp.sum(weight)
    mean = jnp.sum(lab * weight, axis=1) / jnp.maximum(count, 1)
    variance = jnp.sum(((lab - mean[:, None]) * weight) ** 2, axis=1) / jnp.maximum(count, 1)
    std = jnp.sqrt(variance)
    valid = (count >= MIN_PIXELS) & (std[0] > _MIN_SPREAD)
    return ReinhardParams(jnp.where(valid, mean, 0.0), jnp.where(valid, std, 1.0), valid)


def transform(
    images: jax.Array,
    source: ReinhardParams,
    target: ReinhardParams,
    *,
    lightness: float = 80.0,
    dtype: jnp.dtype | str = jnp.uint8,
) -> jax.Array:
    """(lab - source mean) * target std / source std + target mean, clipped to the gamut.

    A channel whose source spread is below 0.1 is shifted but not scaled. Pixels lighter than `lightness` are moved the
    less, the lighter they are (linearly, not at all at L* = 100): the statistics are those of tissue and would tint
    glass.

    Args:
      images: [B, H, W, 3] uint8, or float32 on 0..255.
      source: parameters of the images, one for all or with a leading axis B.
      target: parameters of the reference.
      lightness: as for `fit`, below 100; 100 moves every pixel fully.
      dtype: uint8 (rounded to nearest, halves to even) or float32.

    Returns:
      [B, H, W, 3]; unchanged where source or target is not valid.

    Raises:
      ValueError: for images of another form.
    """

    def one(planes, source, target):
        flat = source.std < _MIN_SPREAD
        scale = jnp.where(flat, 1.0, target.std / jnp.where(flat, 1.0, source.std))
        shift = target.mean - source.mean * scale
        lab = rgb_to_lab(planes, axis=0)
        share = jnp.clip((100 - lab[:1]) / max(100 - lightness, 1e-6), 0, 1)
        moved = lab * (scale[:, None, None] - 1) + shift[:, None, None]
        return lab_to_rgb(lab + share * moved, axis=0)

    return per_image(one, images, source, target, dtype)
