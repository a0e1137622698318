"""Masks, accumulation precision and safe norms shared by the losses of this package."""

from __future__ import annotations

import jax
import jax.numpy as jnp

EPS = 1e-12
"""Floor of an L2 norm in every row normalisation."""


def accumulate(x: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Casts to at least float32 and replaces masked rows by exact zeros.

    The replacement happens before any arithmetic, so that garbage (even NaN) in a masked row reaches neither the value
    nor the gradient.

    Args:
      x: [b, ...] float.
      where: [b] bool, valid rows; None means all.

    Returns:
      [b, ...] float32, or float64 if `x` is float64.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if where is None:
        return x
    return jnp.where(where.reshape(where.shape + (1,) * (x.ndim - 1)), x, 0.0)


def valid_rows(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """The [b] bool mask of valid rows of `x` (all True if `where` is None)."""
    return jnp.ones(x.shape[0], bool) if where is None else where


def count(mask: jax.Array, dtype: jnp.dtype, at_least: int = 1) -> jax.Array:
    """Number of True entries as a scalar of `dtype`, never below `at_least`, so that it can divide."""
    return jnp.maximum(jnp.sum(mask), at_least).astype(dtype)


def masked_mean(values: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Mean over valid rows; 0 if there are none.

    Args:
      values: [b] float, finite everywhere.
      where: [b] bool, valid rows; None means all.

    Returns:
      [] of the dtype of `values`.
    """
    mask = valid_rows(values, where)
    return jnp.sum(jnp.where(mask, values, 0.0)) / count(mask, values.dtype)


def keep(values: jax.Array, where: jax.Array | None) -> jax.Array:
    """Per-example values [b] with exact zeros, and zero gradient, in masked rows."""
    return values if where is None else jnp.where(where, values, 0.0)


def per_example_mean(x: jax.Array) -> jax.Array:
    """[b] mean over everything behind the first axis of [b, ...]."""
    return jnp.mean(x.reshape(x.shape[0], -1), axis=-1)


def per_example_sum(x: jax.Array) -> jax.Array:
    """[b] sum over everything behind the first axis of [b, ...]."""
    return jnp.sum(x.reshape(x.shape[0], -1), axis=-1)


def absolute(x: jax.Array) -> jax.Array:
    """|x| with sub-gradient 0 at 0, where `jnp.abs` has 1."""
    return x * jax.lax.stop_gradient(jnp.sign(x))


def safe_norm(x: jax.Array, axis: int | tuple[int, ...] = -1, floor: float = EPS) -> jax.Array:
    """L2 norm along `axis` (kept), with zero instead of NaN gradient where the norm is at most `floor`."""
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    regular = square > floor**2
    return jnp.where(regular, jnp.sqrt(jnp.where(regular, square, 1.0)), 0.0)


def unit(x: jax.Array, axis: int = -1, floor: float = EPS) -> jax.Array:
    """`x / max(norm, floor)` along `axis`.

    The gradient is defined as zero where the norm is at most `floor`: the derivative of `x / floor` is finite, but a
    step along it would destroy the network.
    """
    norm = safe_norm(x, axis, floor)
    regular = norm > 0.0
    return jnp.where(regular, x / jnp.where(regular, norm, 1.0), jax.lax.stop_gradient(x / floor))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product at full precision (no TF32 or bf16 passes on accelerators)."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def require_maps(name: str, student: jax.Array, teacher: jax.Array, *, same_channels: bool = False) -> None:
    """Rejects inputs that are not feature maps of the same examples.

    Args:
      name: name of the loss, for the message.
      student: [b, C_s, ...].
      teacher: [b, C_t, ...] with as many axes.
      same_channels: also require C_s = C_t.

    Raises:
      ValueError: if an array has no channel axis, the numbers of axes or examples differ, or the channels do although
        `same_channels`.
    """
    shapes = f"student {student.shape} and teacher {teacher.shape}"
    if min(student.ndim, teacher.ndim) < 2 or student.ndim != teacher.ndim or student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{name} compares [b, channels, positions ...] of the same b examples, got {shapes}")
    if same_channels and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{name} needs equal channels, got {shapes}: put a connector that maps {student.shape[1]} to "
            f"{teacher.shape[1]} channels on the student"
        )


def require_same_shape(name: str, student: jax.Array, teacher: jax.Array) -> None:
    """Rejects a student and a teacher of different shapes.

    Raises:
      ValueError: naming both shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name} needs equal shapes, got student {student.shape} and teacher {teacher.shape}: put a connector on "
            "the student"
        )


def require_batch(name: str, *arrays: jax.Array, same_width: bool = False) -> None:
    """Rejects inputs on which a batch-coupled loss is not defined.

    Args:
      name: name of the loss, for the message.
      *arrays: [b, d] embeddings of the same b examples.
      same_width: also require equal d.

    Raises:
      ValueError: if an array is not a matrix, b differs or is below 2, or d differs although `same_width`.
    """
    shapes = [a.shape for a in arrays]
    if any(len(s) != 2 for s in shapes):
        raise ValueError(f"{name} needs [b, d] matrices, got shapes {shapes}")
    if len({s[0] for s in shapes}) != 1:
        raise ValueError(f"{name} compares the same b examples, got batch sizes {[s[0] for s in shapes]}")
    if shapes[0][0] < 2:
        raise ValueError(f"{name} couples the examples of a batch and needs b >= 2, got b = {shapes[0][0]}")
    if same_width and len({s[1] for s in shapes}) != 1:
        raise ValueError(f"{name} needs embeddings of one width, got {[s[1] for s in shapes]}")
