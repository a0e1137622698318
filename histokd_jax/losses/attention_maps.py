"""HM-KD: what a student reads off a teacher of the same shapes (CoCoFNet specification, section 9).

All losses are per example and not reduced; the teacher's side is a constant. Masked rows return exactly 0 with zero
gradient, whatever they hold.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import EPS, accumulate, unit, valid_rows
from histokd_jax.losses.mutual import tempered_kl


def attention_map_distance(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """AT: squared distance of squared attention maps, each scaled to unit length.

    `|| phi(A_s) - phi(A_t) ||^2` with `phi(A) = vec(A * A) / max(|| vec(A * A) ||, 1e-12)`; in [0, 2], and blind to
    sign and scale of a map. A sum over positions, where `at_loss` of this package has a mean.

    Args:
      student: [b, ...] float.
      teacher: [b, ...] float of the same shape.
      where: [b] bool, valid rows.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: for two shapes.
    """
    _same_shape("attention_map_distance", student, teacher)

    def phi(x: jax.Array) -> jax.Array:
        return unit(jnp.square(accumulate(x, where)).reshape(x.shape[0], -1))

    return _masked(jnp.sum(jnp.square(phi(student) - phi(jax.lax.stop_gradient(teacher))), axis=-1), where)


def cosine_distance(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """COS: `1 - cos` of pooled features, squared norms each enlarged by 1e-12; in [0, 2].

    Args:
      student: [b, d] float.
      teacher: [b, d] float.
      where: [b] bool, valid rows.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: for two shapes.
    """
    _same_shape("cosine_distance", student, teacher)
    s, t = accumulate(student, where), jax.lax.stop_gradient(accumulate(teacher, where))
    norms = (jnp.sum(s * s, axis=-1) + EPS) * (jnp.sum(t * t, axis=-1) + EPS)
    return _masked(1.0 - jnp.sum(s * t, axis=-1) * jax.lax.rsqrt(norms), where)


def logit_kl(
    student: jax.Array, teacher: jax.Array, temperature: float = 5.0, *, where: jax.Array | None = None
) -> jax.Array:
    """KL: `T^2 sum_c p_t (log p_t - log p_s)` with `p = softmax(z / T)`.

    Args:
      student: [b, C] float logits.
      teacher: [b, C] float logits.
      temperature: T > 0.
      where: [b] bool, valid rows.

    Returns:
      [b] float32 (float64 for float64 logits), nats.

    Raises:
      ValueError: for two shapes.
    """
    _same_shape("logit_kl", student, teacher)
    return _masked(tempered_kl(accumulate(student, where), accumulate(teacher, where), temperature), where)


def _masked(each: jax.Array, where: jax.Array | None) -> jax.Array:
    return jnp.where(valid_rows(each, where), each, 0.0)


def _same_shape(name: str, student: jax.Array, teacher: jax.Array) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name} compares equal shapes, got {student.shape} of the student and {teacher.shape} of the teacher: was "
            "the teacher trained with other widths, or on another image size?"
        )
