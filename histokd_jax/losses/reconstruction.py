"""Reconstruction of standardised gene groups: scaled cosine and squared error (G-HANet specification, section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, unit


def scaled_cosine_error(
    prediction: jax.Array, target: jax.Array, *, power: float = 3.0, where: jax.Array | None = None
) -> jax.Array:
    """`(1 - cos(prediction, target)) ** power`, per example, not reduced (GraphMAE's loss).

    Args:
      prediction: [b, g] float.
      target: [b, g] float.
      power: exponent.
      where: [b] bool, valid rows; others return exactly 0 with zero gradient.

    Returns:
      [b] float32 (float64 for float64 input), from 0 (parallel) over 1 to 2 ** power (opposite); norms are floored at
      1e-12.
    """
    z, r = accumulate(target, where), accumulate(prediction, where)
    error = 1.0 - jnp.sum(unit(r) * unit(z), axis=-1)
    # Rounding may leave a tiny negative distance, whose fractional power would be NaN.
    error = jnp.maximum(error, 0.0) ** (int(power) if float(power).is_integer() else power)
    return error if where is None else jnp.where(where, error, 0.0)


def mean_squared_error(prediction: jax.Array, target: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Mean over features of the squared difference, per example, not reduced.

    Args:
      prediction: [b, g] float, g >= 1.
      target: [b, g] float.
      where: [b] bool, valid rows; others return exactly 0 with zero gradient.

    Returns:
      [b] float32 (float64 for float64 input).
    """
    difference = accumulate(prediction, where) - accumulate(target, where)
    return jnp.mean(difference * difference, axis=-1)


def group_errors(
    prediction: jax.Array,
    target: jax.Array,
    sizes: Sequence[int],
    *,
    power: float = 3.0,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Both errors of every group of consecutive features.

    Args:
      prediction: [b, K] float.
      target: [b, K] float.
      sizes: T group sizes, summing to K; a group of size 0 has errors 0 (deviation D6, `skip_group`).
      power: see `scaled_cosine_error`.
      where: [b] bool, valid rows.

    Returns:
      (scaled cosine error [b, T], mean squared error [b, T]).

    Raises:
      ValueError: if the sizes do not sum to K.
    """
    if prediction.shape != target.shape or sum(sizes) != prediction.shape[-1]:
        raise ValueError(
            f"predictions {prediction.shape} and targets {target.shape} must be [b, K] with K = {sum(sizes)}, the sum "
            f"of the group sizes {tuple(sizes)}"
        )
    cosine, square, start = [], [], 0
    nothing = jnp.zeros(prediction.shape[0], jnp.promote_types(prediction.dtype, jnp.float32))
    for size in sizes:
        r, z = prediction[:, start : start + size], target[:, start : start + size]
        cosine.append(scaled_cosine_error(r, z, power=power, where=where) if size else nothing)
        square.append(mean_squared_error(r, z, where=where) if size else nothing)
        start += size
    return jnp.stack(cosine, axis=-1), jnp.stack(square, axis=-1)
