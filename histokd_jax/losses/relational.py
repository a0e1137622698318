"""Relational distillation on pooled embeddings: RKD and PKT."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, count, matmul, require_batch, safe_norm, unit, valid_rows

_PKT_EPS = 1e-7


def _huber(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size < 1.0, 0.5 * x * x, size - 0.5)


def _relative_distances(x: jax.Array, pairs: jax.Array) -> jax.Array:
    """Pairwise distances [b, b] divided by the mean of the positive ones; zero on the diagonal and off `pairs`."""
    square = jnp.sum(x * x, axis=-1)
    square = square[:, None] + square[None, :] - 2.0 * matmul(x, x.T)
    pairs = pairs & ~jnp.eye(x.shape[0], dtype=bool)
    distance = jnp.where(pairs, jnp.sqrt(jnp.maximum(square, 1e-12)), 0.0)
    total = jnp.sum(distance)
    # A single valid row has no pair, and 0 / 0 would be NaN.
    return distance * (count(pairs, x.dtype) / jnp.where(total > 0.0, total, 1.0))


def _angles(x: jax.Array) -> jax.Array:
    """Cosines [b, b, b]: entry ijk is the angle at example i between j and k; degenerate entries are 0."""
    direction = unit(x[None, :, :] - x[:, None, :])
    return matmul(direction, jnp.swapaxes(direction, 1, 2))


def rkd_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Relational knowledge distillation, distances and angles (Park et al., arXiv 1904.05068).

    Huber loss (knee at 1) between relative distances, mean over all b^2 entries, plus the same between angles, mean
    over all b^3 entries. Invariant to translation, rotation and scale of either side. Weights as in RepDistiller. No
    stop-gradient inside.

    Args:
      student: [b, d_s] float.
      teacher: [b, d_t] float.
      distance_weight: weight of the distance part.
      angle_weight: weight of the angle part, whose cost grows as b^3.
      where: [b] bool, valid rows; b counts these only.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch.

    Raises:
      ValueError: if b < 2 or the batch sizes differ.
    """
    require_batch("rkd_loss", student, teacher)
    valid = valid_rows(student, where)
    student, teacher = accumulate(student, where), accumulate(teacher, where)
    pairs = valid[:, None] & valid[None, :]
    triples = pairs[:, :, None] & valid[None, None, :]
    n = count(valid, student.dtype)
    distance = _huber(_relative_distances(student, pairs) - _relative_distances(teacher, pairs))
    angle = _huber(jnp.where(triples, _angles(student) - _angles(teacher), 0.0))
    return distance_weight * jnp.sum(distance) / n**2 + angle_weight * jnp.sum(angle) / n**3


def _affinities(x: jax.Array, pairs: jax.Array) -> jax.Array:
    """Row-stochastic cosine affinities [b, b] over valid pairs."""
    x = x / (safe_norm(x) + _PKT_EPS)
    similarity = jnp.where(pairs, (matmul(x, x.T) + 1.0) / 2.0, 0.0)
    total = jnp.sum(similarity, axis=-1, keepdims=True)
    return similarity / jnp.where(total > 0.0, total, 1.0)


def pkt_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Probabilistic knowledge transfer (Passalis and Tefas, arXiv 1803.10837).

    Mean over all b^2 entries (not rows) of `P_t log((P_t + 1e-7) / (P_s + 1e-7))`, with P the row-normalised
    `(cosine + 1) / 2`; hence the customary weight 30000. May be slightly negative. No stop-gradient inside.

    Args:
      student: [b, d_s] float.
      teacher: [b, d_t] float.
      where: [b] bool, valid rows; b counts these only.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch.

    Raises:
      ValueError: if b < 2 or the batch sizes differ.
    """
    require_batch("pkt_loss", student, teacher)
    valid = valid_rows(student, where)
    pairs = valid[:, None] & valid[None, :]
    p_s = _affinities(accumulate(student, where), pairs)
    p_t = _affinities(accumulate(teacher, where), pairs)
    entries = p_t * jnp.log((p_t + _PKT_EPS) / (p_s + _PKT_EPS))
    return jnp.sum(jnp.where(pairs, entries, 0.0)) / count(valid, p_s.dtype) ** 2
