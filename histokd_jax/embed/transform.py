"""From the pixels of tiles to the input of an encoder, on the device."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from histokd_jax.encoders.presets import BICUBIC, Transform

StainFunction = Callable[[jax.Array], jax.Array]
"""Pure: uint8 [B, h, w, 3] -> float [B, h, w, 3] on a scale of 0 to 255."""


def prepare(tiles: jax.Array, transform: Transform, stain: StainFunction | None = None) -> jax.Array:
    """Resizes, crops and normalises tiles.

    Tiles of the size of the encoder's input are only normalised. Others are resized as Pillow does it: the filter's
    support grows with the reduction, and the result is rounded to whole levels within 0..255.

    Args:
      tiles: uint8 [B, h, h, 3].
      transform: of the encoder.
      stain: applied to the tiles as they were read.

    Returns:
      float32 [B, size, size, 3].
    """
    x = tiles.astype(jnp.float32) if stain is None else jnp.asarray(stain(tiles), jnp.float32)
    if tiles.shape[1] != transform.size:
        x = _crop(_resize(x, transform), transform.size)
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (transform.mean, transform.std))
    return (x / transform.scale - mean) / std


def _resize(x: jax.Array, transform: Transform) -> jax.Array:
    edge = transform.resize
    if x.shape[1] == edge:
        return x
    method = "cubic" if transform.method == BICUBIC else "linear"
    resized = jax.image.resize(x, (len(x), edge, edge, 3), method, antialias=True)
    return jnp.clip(jnp.round(resized), 0, 255)


def _crop(x: jax.Array, size: int) -> jax.Array:
    start = round((x.shape[1] - size) / 2)
    return x[:, start : start + size, start : start + size]
