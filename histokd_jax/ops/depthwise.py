"""Depth-wise convolution as a sum of shifted products: grouped convolutions of XLA are slow on CPU.

A tap is a shifted view of the zero-padded input times one row of weights. Kernels of side 3 are written out; of
larger ones a loop runs over the rows of the kernel, so that programs stay small. The backward pass has the same form.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

SHIFTS, GROUPED = "shifts", "grouped"
FORMS = (SHIFTS, GROUPED)
_WRITTEN_OUT = 3


def depthwise(x: jax.Array, kernel: jax.Array, form: str = SHIFTS) -> jax.Array:
    """Depth-wise cross-correlation, stride 1, zero padding side // 2: the grid keeps its size.

    Args:
      x: [B, H, W, C] float.
      kernel: [k, k, 1, C] float of the same dtype, k odd.
      form: "shifts", or "grouped": the framework's grouped convolution.

    Returns:
      [B, H, W, C], dtype of `x`.

    Raises:
      ValueError: for a kernel that is not square with an odd side, of another width than `x`, or an unknown form.
    """
    side = kernel.shape[0]
    if kernel.shape != (side, side, 1, x.shape[-1]) or side % 2 == 0:
        raise ValueError(f"kernel {kernel.shape} does not fit input {x.shape}: expected [k, k, 1, C] with odd k")
    if form == GROUPED:
        return _grouped(x, kernel)
    if form != SHIFTS:
        raise ValueError(f"form = {form!r} is unknown; use one of {FORMS}")
    return _shifted(x, kernel[:, :, 0])


def _grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    pad = [(kernel.shape[0] // 2,) * 2] * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), pad, None, None, numbers, feature_group_count=x.shape[-1])


@jax.custom_vjp
def _shifted(x: jax.Array, taps: jax.Array) -> jax.Array:
    """The correlation with taps [k, k, C]."""
    padded = _pad(x, taps.shape[0])

    def row(i: jax.Array, weights: jax.Array) -> jax.Array:
        band = _band(padded, i, x.shape[1])
        return functools.reduce(jnp.add, (_view(band, j, x.shape[2]) * w for j, w in enumerate(_split(weights))))

    if taps.shape[0] <= _WRITTEN_OUT:
        return functools.reduce(jnp.add, (row(i, weights) for i, weights in enumerate(taps)))
    rows = jnp.arange(taps.shape[0])
    return lax.scan(lambda total, tap: (total + row(*tap), None), jnp.zeros_like(x), (rows, taps))[0]


def _pad(x: jax.Array, side: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)])


def _band(padded: jax.Array, i: jax.Array | int, height: int) -> jax.Array:
    """The rows of the padded input that meet row `i` of the kernel."""
    return lax.dynamic_slice_in_dim(padded, i, height, axis=1)


def _view(band: jax.Array, j: int, width: int) -> jax.Array:
    return lax.slice_in_dim(band, j, j + width, axis=2)


def _split(weights: jax.Array) -> list[jax.Array]:
    """Taps of one kernel row, each [1, 1, 1, C]."""
    return [weights[j].reshape(1, 1, 1, -1) for j in range(weights.shape[0])]


def _forward(x, taps):
    return _shifted(x, taps), (x, taps)


def _backward(kept, g):
    x, taps = kept
    # A tap moves input j to output j - offset, so its transpose is the correlation with the turned kernel.
    d_x = _shifted(g, taps[::-1, ::-1])
    padded, side = _pad(x, taps.shape[0]), taps.shape[0]
    # Sums over the batch and the grid are long: at least float32.
    wide = jnp.promote_types(taps.dtype, jnp.float32)

    def row(i):
        band = _band(padded, i, x.shape[1])
        return jnp.stack([jnp.sum((g * _view(band, j, x.shape[2])).astype(wide), axis=(0, 1, 2)) for j in range(side)])

    if side <= _WRITTEN_OUT:
        d_taps = jnp.stack([row(i) for i in range(side)])
    else:
        d_taps = lax.scan(lambda _, i: (None, row(i)), None, jnp.arange(side))[1]
    return d_x, d_taps.astype(taps.dtype)


_shifted.defvjp(_forward, _backward)
