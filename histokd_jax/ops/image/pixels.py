"""Between stored pixels and network inputs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_uint8(images: jax.Array) -> jax.Array:
    """Rounds to the nearest level, halves to the even one, and clips to 0..255.

    Args:
      images: any shape, finite, scale 0..255.

    Returns:
      uint8 of the same shape; uint8 is returned as it is.
    """
    if images.dtype == jnp.uint8:
        return images
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)


def standardise(
    images: jax.Array,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: jnp.dtype | str = jnp.float32,
) -> jax.Array:
    """(x / 255 - mean) / std per channel (CoCoFNet specification 2.3; More From Less, deviation 9).

    Args:
      images: [..., C] uint8 or float, scale 0..255.
      mean: C numbers on the scale 0..1.
      std: C positive numbers on the scale 0..1.
      dtype: of the result; the arithmetic is float32.

    Returns:
      Array of the same shape.

    Raises:
      ValueError: if mean or std do not have one number per channel, or a std is not positive.
    """
    scale, shift = _affine(images.shape, mean, std)
    return (images.astype(jnp.float32) * scale + shift).astype(dtype)


def unstandardise(
    values: jax.Array, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> jax.Array:
    """The inverse of `standardise`: float32 on the scale 0..255 (see `to_uint8` for pictures)."""
    scale, shift = _affine(values.shape, mean, std)
    return (values.astype(jnp.float32) - shift) / scale


def check_images(images: jax.Array, what: str = "images") -> None:
    """Refuses anything that is not a batch of RGB images.

    Args:
      images: should be [B, H, W, 3] uint8 or float32 with H, W >= 1.
      what: name for the message.

    Raises:
      ValueError: with the shape and dtype found.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"{what} have the shape {images.shape}; expected [batch, height, width, 3]")
    if images.dtype not in (jnp.uint8, jnp.float32):
        raise ValueError(f"{what} are {images.dtype}; expected uint8, or float32 on the scale 0..255")


def _affine(shape: tuple[int, ...], mean: Sequence[float], std: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """x * scale + shift, in the rank of the images; divided in double precision, on the host."""
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if mean.shape != shape[-1:] or std.shape != shape[-1:] or not (std > 0).all():
        raise ValueError(
            f"mean {mean.tolist()} and std {std.tolist()} do not fit images of shape {shape}: expected one number per "
            "channel, each std positive"
        )
    scale, shift = 1 / (255 * std), -mean / std
    rank = (1,) * (len(shape) - 1) + shape[-1:]
    return scale.astype(np.float32).reshape(rank), shift.astype(np.float32).reshape(rank)
