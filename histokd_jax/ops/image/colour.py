"""Colour spaces of RGB images on the scale 0..255: HSV (hexcone), and CIELAB of sRGB under D65.

`axis` is where the channels are: -1 in images. Inside, every channel is a plane of its own, because loops over three
interleaved numbers do not vectorise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# sRGB primaries to XYZ, 2 degree observer, white point D65 (ITU-R BT.709 to three decimals of 1e-6).
XYZ_OF_RGB = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
WHITE = np.array([0.95047, 1.0, 1.08883])
RGB_OF_XYZ = np.linalg.inv(XYZ_OF_RGB)
_CUBIC_ABOVE, _SLOPE, _OFFSET = 0.008856, 7.787, 16 / 116


def mix(values: jax.Array, matrix: jax.Array | np.ndarray, axis: int = -1) -> jax.Array:
    """Channels times a small matrix, written out, in full float32 precision on every device.

    Args:
      values: array with n channels at `axis`.
      matrix: [n, m].
      axis: of the channels.

    Returns:
      float32 with m channels at `axis`: `values @ matrix` if it is the last.
    """
    planes = jnp.moveaxis(values.astype(jnp.float32), axis, 0)
    matrix = jnp.asarray(matrix, jnp.float32)
    n, m = matrix.shape
    return jnp.stack([sum(matrix[d, c] * planes[d] for d in range(n)) for c in range(m)], axis=axis)


def rgb_to_hsv(rgb: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hue in [0, 1), saturation, and value on the scale of the input; hue and saturation do not depend on that scale.

    Args:
      rgb: [..., 3] float. Saturation exceeds 1 where a channel is negative; it is 0 where the largest is not positive.

    Returns:
      Three arrays [...].
    """
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    span = value - jnp.minimum(jnp.minimum(red, green), blue)
    safe = jnp.where(span > 0, span, 1)
    sector = jnp.where(
        red == value,
        (green - blue) / safe,
        jnp.where(green == value, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = jnp.where(span > 0, (sector / 6) % 1, 0)
    return hue, jnp.where(value > 0, span / jnp.where(value > 0, value, 1), 0), value


def hsv_to_rgb(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> jax.Array:
    """The inverse of `rgb_to_hsv`; hue counts modulo 1.

    Args:
      hue: [...].
      saturation: [...].
      value: [...].

    Returns:
      [..., 3].
    """

    def channel(n):
        k = (n + 6 * hue) % 6
        return value - value * saturation * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

    return jnp.stack([channel(n) for n in (5, 3, 1)], axis=-1)


def linear_of_srgb(rgb: jax.Array) -> jax.Array:
    """sRGB on 0..255 to linear light on 0..1 (IEC 61966-2-1)."""
    v = rgb.astype(jnp.float32) / 255
    return jnp.where(v > 0.04045, _power((jnp.maximum(v, 0.04045) + 0.055) / 1.055, 2.4), v / 12.92)


def srgb_of_linear(light: jax.Array) -> jax.Array:
    """Linear light on 0..1 to sRGB on 0..255; light beyond 0..1 is clipped to the gamut first."""
    v = jnp.clip(light, 0, 1)
    return 255 * jnp.where(v > 0.0031308, 1.055 * _power(jnp.maximum(v, 0.0031308), 1 / 2.4) - 0.055, 12.92 * v)


def rgb_to_lab(rgb: jax.Array, axis: int = -1) -> jax.Array:
    """CIELAB of sRGB pixels.

    Args:
      rgb: uint8 or float on 0..255, three channels at `axis`.
      axis: of the channels.

    Returns:
      float32 of the same shape: L* in 0..100, a*, b*.
    """
    planes = linear_of_srgb(jnp.moveaxis(rgb, axis, 0))
    x, y, z = _cube_root(mix(planes, (XYZ_OF_RGB / WHITE[:, None]).T, axis=0))
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=axis)


def lab_to_rgb(lab: jax.Array, axis: int = -1) -> jax.Array:
    """The inverse of `rgb_to_lab`, clipped to the gamut.

    Args:
      lab: three channels at `axis`.
      axis: of the channels.

    Returns:
      float32 on 0..255 of the same shape.
    """
    planes = jnp.moveaxis(lab, axis, 0)
    y = (planes[0] + 16) / 116
    f = jnp.stack([y + planes[1] / 500, y, y - planes[2] / 200])
    xyz = jnp.where(f > _SLOPE * _CUBIC_ABOVE + _OFFSET, f * f * f, (f - _OFFSET) / _SLOPE)
    return jnp.moveaxis(srgb_of_linear(mix(xyz, (RGB_OF_XYZ * WHITE).T, axis=0)), 0, axis)


def lightness(rgb: jax.Array, axis: int = -1) -> jax.Array:
    """L* of `rgb_to_lab` alone, in 0..100: the shape of `rgb` without `axis`."""
    planes = linear_of_srgb(jnp.moveaxis(rgb, axis, 0))
    return 116 * _cube_root(mix(planes, XYZ_OF_RGB[1][:, None], axis=0)[0]) - 16


def _cube_root(light: jax.Array) -> jax.Array:
    """Cube root, with the straight line of CIELAB near black."""
    return jnp.where(light > _CUBIC_ABOVE, _power(jnp.maximum(light, _CUBIC_ABOVE), 1 / 3), _SLOPE * light + _OFFSET)


def _power(values: jax.Array, exponent: float) -> jax.Array:
    """`values ** exponent` of positive numbers, by functions that vectorise on CPUs (`pow` and `cbrt` do not)."""
    return jnp.exp(exponent * jnp.log(values))
