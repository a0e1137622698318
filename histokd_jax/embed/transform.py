"""From the pixels of tiles to the input of an encoder, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.encoders.presets import BICUBIC, Transform


@dataclasses.dataclass(frozen=True, eq=False)
class Stain:
    """A stain normalisation that is fitted to each slide.

    Attributes:
      facts: what a manifest records, JSON-serialisable.
      fit: uint8 [T, h, w, 3], some tiles of one slide -> its parameters, arrays of fixed shapes. Raises DataError
        if the slide holds no stains.
      apply: pure, (uint8 [B, h, w, 3], parameters) -> float [B, h, w, 3] on a scale of 0 to 255.
      tiles: how many tiles of a slide are fitted.
    """

    facts: Mapping[str, Any]
    fit: Callable[[np.ndarray], Any]
    apply: Callable[[jax.Array, Any], jax.Array]
    tiles: int = 16


def prepare(tiles: jax.Array, transform: Transform, stain: Stain | None = None, parameters: Any = None) -> jax.Array:
    """Resizes, crops and normalises tiles.

    Tiles of the size of the encoder's input are only normalised. Others are resized as Pillow does it: the filter's
    support grows with the reduction, and both passes are rounded to whole levels within 0..255.

    Args:
      tiles: uint8 [B, h, h, 3].
      transform: of the encoder.
      stain: applied to the tiles as they were read.
      parameters: of the stains of the slide.

    Returns:
      float32 [B, size, size, 3].
    """
    x = tiles.astype(jnp.float32) if stain is None else jnp.asarray(stain.apply(tiles, parameters), jnp.float32)
    if tiles.shape[1] != transform.size:
        x = _crop(_resize(x, transform), transform.size)
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (transform.mean, transform.std))
    return (x / transform.scale - mean) / std


def _resize(x: jax.Array, transform: Transform) -> jax.Array:
    edge, method = transform.resize, "cubic" if transform.method == BICUBIC else "linear"
    for axis in (2, 1):  # As Pillow: rows first, and whole levels between the passes.
        if x.shape[axis] != edge:
            shape = (*x.shape[:axis], edge, *x.shape[axis + 1 :])
            x = jnp.clip(jnp.floor(jax.image.resize(x, shape, method, antialias=True) + 0.5), 0, 255)
    return x


def _crop(x: jax.Array, size: int) -> jax.Array:
    start = round((x.shape[1] - size) / 2)
    return x[:, start : start + size, start : start + size]
