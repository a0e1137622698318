"""Stain normalisation of Macenko et al. (ISBI 2009): stains are the extreme directions of tissue in density space."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.ops.image.colour import mix
from histokd_jax.ops.image.density import from_density, optical_density
from histokd_jax.ops.image.quantiles import masked_quantiles
from histokd_jax.ops.image.stains import (
    StainParams,
    checked,
    inverse_stains,
    largest_amounts,
    per_image,
    red_first,
    unit,
)

BACKGROUND = 240.0


def fit(
    pixels: jax.Array,
    mask: jax.Array | None = None,
    *,
    background: float = BACKGROUND,
    least_density: float = 0.15,
    percentile: float = 1.0,
) -> StainParams:
    """Finds the two stains of some pixels.

    Tissue are the pixels with at least `least_density` in every channel. Their densities are projected on the plane of
    the two largest principal components; the stains are the directions at the `percentile` and 100 - `percentile`
    of the angle in it.

    Args:
      pixels: [N, 3] uint8 or float on 0..255, of one tile or sampled over a slide; `jax.vmap` fits many.
      mask: [N] bool, pixels to look at (None: all).
      background: level of unstained glass.
      least_density: in natural-log density.
      percentile: in (0, 50).

    Returns:
      The stains. Without two stains in the pixels (glass, black, a single colour), `valid` is False.
    """
    density = optical_density(pixels.T, background)
    used = (density >= least_density).all(axis=0)
    used = used if mask is None else used & mask
    stains = _extreme_directions(density, used, percentile / 100)
    maximum = largest_amounts(mix(density, inverse_stains(stains), axis=0), used)
    return checked(stains, maximum, background, jnp.sum(used))


def transform(
    images: jax.Array,
    source: StainParams,
    target: StainParams,
    *,
    dtype: jnp.dtype | str = jnp.uint8,
) -> jax.Array:
    """Gives the images the stains of the target: one 3 x 3 matrix in density space.

    Args:
      images: [B, H, W, 3] uint8, or float32 on 0..255.
      source: stains of the images, one for all or with a leading axis B.
      target: stains of the reference.
      dtype: uint8 (rounded to nearest, halves to even, clipped) or float32 (neither).

    Returns:
      [B, H, W, 3]; unchanged where source or target is not valid.

    Raises:
      ValueError: for images of another form.
    """

    def one(planes, source, target):
        density = optical_density(planes, source.background)
        return from_density(mix(density, density_map(source, target), axis=0), target.background)

    return per_image(one, images, source, target, dtype)


def density_map(source: StainParams, target: StainParams) -> jax.Array:
    """[3, 3]: density of the source @ map = density with the target's stains and largest amounts."""
    ratio = target.maximum / source.maximum
    return mix(inverse_stains(source.stains), target.stains * ratio[:, None])


def published_target() -> StainParams:
    """The reference stains and largest amounts of the method's first implementation."""
    stains = jnp.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]], jnp.float32)
    return StainParams(unit(stains), jnp.array([1.9705, 1.0308], jnp.float32), jnp.float32(BACKGROUND), jnp.array(True))


def _extreme_directions(density: jax.Array, used: jax.Array, level: float) -> jax.Array:
    """[2, 3] unit stains, haematoxylin first, of densities [3, N]."""
    weight = used.astype(jnp.float32)[None, :]
    count = jnp.maximum(jnp.sum(weight), 1)
    centred = (density - jnp.sum(density * weight, axis=1, keepdims=True) / count) * weight
    covariance = jnp.matmul(centred, centred.T, precision=jax.lax.Precision.HIGHEST) / jnp.maximum(count - 1, 1)
    main, second = _plane(covariance)
    along, across = mix(density, jnp.stack([main, second], axis=1), axis=0)
    extremes = masked_quantiles(_turn(across, along), used, (level, 1 - level), _angle_of_turn)
    stains = jnp.cos(extremes)[:, None] * main[None, :] + jnp.sin(extremes)[:, None] * second[None, :]
    return red_first(unit(stains))


def _turn(across: jax.Array, along: jax.Array) -> jax.Array:
    """In [-2, 2], of the same order as atan2(across, along): angles without a slow function for every pixel."""
    size = jnp.abs(along) + jnp.abs(across)
    ratio = across / jnp.where(size > 0, size, 1)
    return jnp.where(along >= 0, ratio, jnp.where(across >= 0, 2 - ratio, -2 - ratio))


def _angle_of_turn(turn: jax.Array) -> jax.Array:
    """atan2(across, along) of `_turn(across, along)`."""
    forward = jnp.abs(turn) <= 1
    ratio = jnp.where(forward, turn, jnp.sign(turn) * 2 - turn)
    return jnp.arctan2(ratio, jnp.where(forward, 1, -1) * (1 - jnp.abs(ratio)))


def _plane(covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two largest principal directions; the first points to positive density, so that angles do not wrap."""
    _, vectors = jnp.linalg.eigh(covariance)
    main, second = vectors[:, 2], vectors[:, 1]
    return jnp.where(jnp.sum(main) < 0, -main, main), second
