"""What happens to a pair on the device before the networks see it: flips and standardisation (section 2.3).

The flips of the release are drawn here, as data, so that outputs of a teacher can be cached for every pair of flips.
Any preset of `histokd_jax.ops.image.presets` may stand in their place.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from histokd_jax.ops.image.augment import augment
from histokd_jax.ops.image.presets import Recipe

INDEPENDENT, PAIRED, NO_FLIPS = "independent", "paired", "none"
FLIP_MODES = (INDEPENDENT, PAIRED, NO_FLIPS)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Flips(NamedTuple):
    """Which examples are turned over, of each stain.

    Attributes:
      image: [B, 2] bool, horizontal and vertical.
      partner: [B, 2] bool.
    """

    image: jax.Array
    partner: jax.Array


def draw_flips(key: jax.Array, example: jax.Array, mode: str) -> Flips:
    """Flips of a step, each with probability 1/2; a function of the key and the number of the example alone.

    Args:
      key: of the step.
      example: [B] int32.
      mode: "independent" (the release, D3), "paired" (both stains alike) or "none".

    Returns:
      The flips.

    Raises:
      ValueError: unknown mode.
    """
    if mode not in FLIP_MODES:
        raise ValueError(f"data.flip_mode = {mode!r} is unknown; use one of {FLIP_MODES}")
    if mode == NO_FLIPS:
        return no_flips(example.shape[0])
    bits = jax.vmap(lambda e: jax.random.bernoulli(jax.random.fold_in(key, e), 0.5, (2, 2)))(example)
    return Flips(bits[:, 0], bits[:, 0 if mode == PAIRED else 1])


def no_flips(batch: int) -> Flips:
    """Everything as stored."""
    return Flips(jnp.zeros((batch, 2), bool), jnp.zeros((batch, 2), bool))


def variants(mode: str) -> tuple[tuple[tuple[bool, bool], tuple[bool, bool]], ...]:
    """Every pair of flips that a mode can draw, as ((horizontal, vertical) of the image, the same of the partner)."""
    both = tuple(itertools.product((False, True), repeat=2))
    if mode == NO_FLIPS:
        return ((both[0], both[0]),)
    return tuple((f, f) for f in both) if mode == PAIRED else tuple(itertools.product(both, repeat=2))


def variant_index(flips: Flips, mode: str) -> jax.Array:
    """[B] int32 place of drawn flips in `variants(mode)`."""

    def number(bits: jax.Array) -> jax.Array:
        return 2 * bits[:, 0].astype(jnp.int32) + bits[:, 1]

    if mode == NO_FLIPS:
        return jnp.zeros(flips.image.shape[0], jnp.int32)
    return number(flips.image) if mode == PAIRED else 4 * number(flips.image) + number(flips.partner)


def apply_flips(images: jax.Array, flips: jax.Array) -> jax.Array:
    """Mirrors columns and rows of some images.

    Args:
      images: [B, H, W, C].
      flips: [B, 2] bool, horizontal (columns) and vertical (rows).

    Returns:
      Images of the same shape.
    """
    check_images(images)
    horizontal, vertical = (flips[:, i][:, None, None, None] for i in range(2))
    images = jnp.where(horizontal, images[:, :, ::-1], images)
    return jnp.where(vertical, images[:, ::-1], images)


def follow_recipe(key: jax.Array, example: jax.Array, images: jax.Array, recipe: Recipe, partner: bool) -> jax.Array:
    """Augments one stain of a step by a preset.

    Args:
      key: of the step.
      example: [B] int32.
      images: [B, H, W, 3] uint8.
      recipe: steps of both stains.
      partner: whether these are the partner images.

    Returns:
      [B, H, W, 3] on 0..255, uint8 or float32.
    """
    check_images(images)
    steps, branch = (recipe.partner, 1) if partner else (recipe.image, 0)
    return augment(key, example, images, steps, branch=branch, shared_geometry=recipe.shared_geometry)


def check_images(images: jax.Array) -> None:
    """Refuses what is no batch of 8-bit RGB images.

    Raises:
      ValueError: showing shape and type.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [B, H, W, 3] uint8, got {images.shape} {images.dtype}")


def standardise(images: jax.Array) -> jax.Array:
    """[B, H, W, 3] on 0..255 to float32 with the fixed mean and standard deviation of each colour."""
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (MEAN, STD))
    return (images.astype(jnp.float32) / 255.0 - mean) / std
