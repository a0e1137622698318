"""Feature hints: FitNet and attention transfer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, masked_mean, unit


def fitnet_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """FitNet hint loss (Romero et al., arXiv 1412.6550) with the identity regressor: mean squared difference.

    Args:
      student: [b, ...] float.
      teacher: [b, ...] float of the same shape.
      where: [b] bool, valid rows; the mean runs over all elements of these.

    Returns:
      [] float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ, because the identity regressor is then not defined.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"fitnet_loss uses the identity regressor and needs equal shapes, got {student.shape} and {teacher.shape}"
        )
    square = (accumulate(student, where) - accumulate(teacher, where)) ** 2
    return masked_mean(jnp.mean(square.reshape(square.shape[0], -1), axis=-1), where)


def at_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Attention transfer between feature maps (Zagoruyko and Komodakis, arXiv 1612.03928), p = 2, RepDistiller form.

    The map of a sample is the channel mean of the squared features, flattened and scaled to unit length; the loss is
    the mean over samples and positions of the squared difference.

    Args:
      student: [b, C_s, ...] float with at least two positions after the channel axis.
      teacher: [b, C_t, ...] float with the same positions.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input).

    Raises:
      ValueError: if there are fewer than two positions (the loss of a pooled vector is identically 0), or they differ.
    """
    positions = student.shape[2:]
    if positions != teacher.shape[2:] or math.prod(positions) < 2:
        raise ValueError(
            f"at_loss compares maps over the same >= 2 positions, got shapes {student.shape} and {teacher.shape}; "
            "on a pooled vector it is identically zero"
        )

    def attention(x: jax.Array) -> jax.Array:
        energy = jnp.mean(accumulate(x, where) ** 2, axis=1)
        return unit(energy.reshape(energy.shape[0], -1))

    return masked_mean(jnp.mean((attention(student) - attention(teacher)) ** 2, axis=-1), where)
