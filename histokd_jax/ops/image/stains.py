"""What Macenko's and Vahadane's methods share: two stain vectors, the largest usual amounts, and the checks on them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.ops.image.colour import lightness
from histokd_jax.ops.image.density import RUIFROK
from histokd_jax.ops.image.pixels import check_images, to_uint8
from histokd_jax.ops.image.quantiles import masked_quantiles

MIN_PIXELS = 16
MIN_ANGLE_DEGREES = 5.0
LARGEST = 0.99
_MIN_AMOUNT = 1e-3


class StainParams(NamedTuple):
    """Stains of a tile, a slide or a reference image.

    Attributes:
      stains: [2, 3] float32, unit vectors of optical density; haematoxylin (more red density) first.
      maximum: [2] float32, 99th percentile of the amount of each stain in the tissue.
      background: [] float32, level of unstained glass to which densities refer.
      valid: [] bool; False where the pixels did not determine two stains. `stains` are then those of Ruifrok, `maximum`
        is 1, and images are returned unchanged.
    """

    stains: jax.Array
    maximum: jax.Array
    background: jax.Array
    valid: jax.Array


def unit(vector: jax.Array) -> jax.Array:
    """Rows [..., 3] scaled to length 1; zeros stay."""
    return vector * jax.lax.rsqrt(jnp.maximum(jnp.sum(vector**2, axis=-1, keepdims=True), 1e-20))


def fallback_stains() -> np.ndarray:
    """[2, 3] float32: haematoxylin and eosin of Ruifrok and Johnston, unit length."""
    rows = RUIFROK[:2]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def is_tissue(planes: jax.Array, below: float = 80.0) -> jax.Array:
    """Pixels whose CIELAB lightness is below `below` (0..100): [3, ...] on 0..255 -> [...] bool."""
    return lightness(planes, axis=0) < below


def white_level(planes: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Level of unstained glass under the lamp of a slide: 99th percentile of every pixel's brightest channel.

    Stains hardly absorb red, so that tissue without glass gives nearly the same level.

    Args:
      planes: [3, N] on 0..255.
      mask: [N] bool, pixels to look at (None: all).

    Returns:
      [] float32 in [128, 255].
    """
    brightest = jnp.max(planes, axis=0).astype(jnp.float32)
    mask = jnp.ones(brightest.shape, bool) if mask is None else mask
    return jnp.clip(masked_quantiles(brightest, mask, (LARGEST,))[0], 128.0, 255.0)


def red_first(stains: jax.Array) -> jax.Array:
    """[2, 3] with the stain of the larger red density, haematoxylin, first."""
    return jnp.where(stains[0, 0] >= stains[1, 0], stains, stains[::-1])


def checked(stains: jax.Array, maximum: jax.Array, background: jax.Array | float, count: jax.Array) -> StainParams:
    """Parameters, or the fallback where they mean nothing.

    Valid are stains found from at least `MIN_PIXELS` pixels that enclose at least `MIN_ANGLE_DEGREES` and both occur: a
    smaller angle is what noise makes of one stain, and dividing by its sine would blow noise up.

    Args:
      stains: [2, 3] unit vectors.
      maximum: [2].
      background: [].
      count: [] number of pixels they were found from.

    Returns:
      Finite parameters.
    """
    sine_squared = 1 - jnp.sum(stains[0] * stains[1]) ** 2
    apart = sine_squared > np.sin(np.radians(MIN_ANGLE_DEGREES)) ** 2
    valid = (count >= MIN_PIXELS) & apart & (maximum > _MIN_AMOUNT).all() & jnp.isfinite(stains).all()
    background = jnp.asarray(background, jnp.float32)
    return StainParams(jnp.where(valid, stains, fallback_stains()), jnp.where(valid, maximum, 1.0), background, valid)


def largest_amounts(amounts: jax.Array, used: jax.Array) -> jax.Array:
    """[2]: 99th percentile of [2, N] amounts over the pixels [N] that are used."""
    return jax.vmap(lambda row: masked_quantiles(row, used, (LARGEST,))[0])(amounts)


def inverse_stains(stains: jax.Array) -> jax.Array:
    """[3, 2]: density @ inverse = amounts by least squares (normal equations of two unit vectors)."""
    cosine = jnp.sum(stains[0] * stains[1])
    gram = jnp.stack([jnp.stack([jnp.float32(1), -cosine]), jnp.stack([-cosine, jnp.float32(1)])])
    return (stains.T @ gram) / jnp.maximum(1 - cosine**2, 1e-12)


def per_image(function, images: jax.Array, source, target, dtype: jnp.dtype | str) -> jax.Array:
    """function(planes, source, target) for every image, where both parameters are valid; the image itself elsewhere.

    Args:
      function: of [3, H, W] and two sets of parameters without batch axis; gives [3, H, W] float32.
      images: [B, H, W, 3] uint8, or float32 on 0..255.
      source: parameters of the images: one set for all, or with a leading axis B.
      target: parameters without batch axis.
      dtype: uint8 (rounded to nearest, halves to even, clipped) or a float type.

    Returns:
      [B, H, W, 3] of `dtype`.

    Raises:
      ValueError: for images of another form, or if there are neither one nor B sources.
    """
    check_images(images)
    if source.valid.shape not in ((), images.shape[:1]):
        raise ValueError(
            f"source parameters for {source.valid.shape} tiles, images {images.shape}: expected one set for all tiles "
            "or one for each"
        )

    def one(planes, source, target):
        return jnp.where(source.valid & target.valid, function(planes, source, target), planes.astype(jnp.float32))

    planes = jnp.moveaxis(images, -1, 1)
    changed = jax.vmap(one, (0, 0 if source.valid.ndim else None, None))(planes, source, target)
    # Bytes are moved back, not floats.
    changed = to_uint8(changed) if jnp.dtype(dtype) == jnp.uint8 else changed.astype(dtype)
    return jnp.moveaxis(changed, 1, -1)
