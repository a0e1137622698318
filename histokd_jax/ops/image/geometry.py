"""Moving the pixels of one image, given where they come from; sizes odd or even, height and width may differ.

Every function maps [H, W, C] to an image of the same number of channels; numbers may be traced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BILINEAR, NEAREST = "bilinear", "nearest"


def flip(image: jax.Array, horizontal: jax.Array, vertical: jax.Array) -> jax.Array:
    """Mirrors left-right where `horizontal` and top-bottom where `vertical` ([] bool each); the dtype stays."""
    image = jnp.where(horizontal, image[:, ::-1], image)
    return jnp.where(vertical, image[::-1], image)


def rotate_quarters(image: jax.Array, quarters: jax.Array) -> jax.Array:
    """Turns counter-clockwise by `quarters` (in 0..3) right angles, exactly; the dtype stays.

    Args:
      image: [H, H, C].
      quarters: [] int32.

    Returns:
      [H, H, C], equal to `np.rot90(image, quarters)`.

    Raises:
      ValueError: if the image is not square.
    """
    if image.shape[0] != image.shape[1]:
        raise ValueError(
            f"an image of {image.shape[0]} x {image.shape[1]} pixels cannot be turned by right angles inside its own "
            "frame: crop to squares first"
        )
    turned = jnp.where(quarters % 2 == 1, jnp.swapaxes(image, 0, 1), image)
    return flip(turned, quarters >= 2, (quarters == 1) | (quarters == 2))


def rotate(image: jax.Array, angle: jax.Array, interpolation: str = NEAREST, fill: float = 0.0) -> jax.Array:
    """Turns counter-clockwise about the centre of the frame; the frame stays (More From Less, A4 step 7).

    Args:
      image: [H, W, C].
      angle: [] float32, radians.
      interpolation: "nearest" (coordinates rounded to nearest, halves up; the dtype stays) or "bilinear" (float32;
        pixels beyond the frame count as `fill`).
      fill: value of pixels that come from beyond the frame.

    Returns:
      [H, W, C].
    """
    y, x = rotated_coordinates(image.shape[0], image.shape[1], angle)
    if check_interpolation(interpolation) == NEAREST:
        return _tap(image, jnp.floor(y + 0.5), jnp.floor(x + 0.5), fill)
    image = image.astype(jnp.float32)
    top, left = jnp.floor(y), jnp.floor(x)
    down, right = (y - top)[..., None], (x - left)[..., None]
    upper = _tap(image, top, left, fill) * (1 - right) + _tap(image, top, left + 1, fill) * right
    lower = _tap(image, top + 1, left, fill) * (1 - right) + _tap(image, top + 1, left + 1, fill) * right
    return upper * (1 - down) + lower * down


def rotated_coordinates(height: int, width: int, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(y, x), each [H, W] float32: where the pixels of an image turned by `angle` come from."""
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y = (jnp.arange(height, dtype=jnp.float32) - middle_y)[:, None]
    x = (jnp.arange(width, dtype=jnp.float32) - middle_x)[None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return sin * x + cos * y + middle_y, cos * x - sin * y + middle_x


def crop_resize(
    image: jax.Array,
    top: jax.Array,
    left: jax.Array,
    height: jax.Array,
    width: jax.Array,
    size: tuple[int, int],
    interpolation: str = BILINEAR,
) -> jax.Array:
    """Cuts a window out and stretches it to `size`: half-pixel centres, no antialias (More From Less, A4 step 4).

    Args:
      image: [H, W, C].
      top: [] int32, first row of the window.
      left: [] int32, first column.
      height: [] int32 >= 1, rows of the window; it must lie within the image.
      width: [] int32 >= 1, columns.
      size: (rows, columns) of the result.
      interpolation: "bilinear" (float32; beyond the outermost centres of the window its edge is repeated) or "nearest"
        (the dtype stays).

    Returns:
      [size[0], size[1], C].
    """
    if check_interpolation(interpolation) == NEAREST:
        return image[_nearest(top, height, size[0])][:, _nearest(left, width, size[1])]
    return _blend(_blend(image.astype(jnp.float32), top, height, size[0], 0), left, width, size[1], 1)


def check_interpolation(interpolation: str) -> str:
    """The name itself.

    Raises:
      ValueError: if it is neither "bilinear" nor "nearest".
    """
    if interpolation not in (BILINEAR, NEAREST):
        raise ValueError(f"interpolation is {interpolation!r}; expected {BILINEAR!r} or {NEAREST!r}")
    return interpolation


def _nearest(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
    centre = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (jnp.asarray(length, jnp.float32) / size)
    return start + jnp.minimum(jnp.floor(centre).astype(jnp.int32), length - 1)


def _blend(image: jax.Array, start: jax.Array, length: jax.Array, size: int, axis: int) -> jax.Array:
    """Linear interpolation along one axis: two rows (or columns) per result, so that no weight matrix is needed."""
    length = jnp.asarray(length, jnp.int32)
    centre = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (length.astype(jnp.float32) / size) - 0.5
    centre = jnp.clip(centre, 0, (length - 1).astype(jnp.float32))
    low = jnp.floor(centre).astype(jnp.int32)
    weight = jnp.expand_dims(centre - low, (1 - axis, 2))
    first = jnp.take(image, start + low, axis=axis, mode="clip")
    second = jnp.take(image, start + jnp.minimum(low + 1, length - 1), axis=axis, mode="clip")
    return first + (second - first) * weight


def _tap(image: jax.Array, y: jax.Array, x: jax.Array, fill: float) -> jax.Array:
    """Pixels at whole-numbered float coordinates [...]; `fill` beyond the frame."""
    height, width, channels = image.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = jnp.clip(y, 0, height - 1).astype(jnp.int32) * width + jnp.clip(x, 0, width - 1).astype(jnp.int32)
    values = jnp.take(image.reshape(-1, channels), at, axis=0, mode="clip")
    return jnp.where(inside[..., None], values, jnp.asarray(fill, image.dtype))
