"""Distillation of class probabilities from a teacher that is constant inside every loss of this module."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import (
    accumulate,
    keep,
    masked_mean,
    require_same_shape,
    safe_norm,
    valid_rows,
)
from histokd_jax.losses.classification import cross_entropy
from histokd_jax.losses.mutual import tempered_kl

_PEARSON_EPS = 1e-8
_STD_EPS = 1e-7


def kd_loss(
    student: jax.Array, teacher: jax.Array, *, temperature: float = 4.0, where: jax.Array | None = None
) -> jax.Array:
    """Classic distillation, `T^2 KL(softmax(t / T) || softmax(s / T))` (Hinton et al., arXiv 1503.02531), per example.

    Args:
      student: [b, C] float logits.
      teacher: [b, C] float logits; no gradient flows into them.
      temperature: T > 0.
      where: [b] bool, valid rows; others return exactly 0 with zero gradient.

    Returns:
      [b] float32 (float64 for float64 logits), nats; the gradient of their mean is `T (p_s - p_t) / b`.

    Raises:
      ValueError: if the shapes differ.
    """
    require_same_shape("kd_loss", student, teacher)
    return keep(tempered_kl(accumulate(student, where), accumulate(teacher, where), temperature), where)


def standardise_logits(logits: jax.Array) -> jax.Array:
    """`(z - mean) / (1e-7 + std)` of every row, unbiased std (Sun et al., arXiv 2403.01427).

    Args:
      logits: [b, C] float, C >= 2.

    Returns:
      [b, C] float32 (float64 for float64 input), unchanged by `a z + c` with a > 0.
    """
    z = accumulate(logits)
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    return z / (_STD_EPS + safe_norm(z) / (z.shape[-1] - 1) ** 0.5)


def standardised_kd_loss(
    student: jax.Array, teacher: jax.Array, *, temperature: float = 2.0, where: jax.Array | None = None
) -> jax.Array:
    """`kd_loss` of standardised logits, `T^2` included. Args and Returns as there."""
    s, t = standardise_logits(accumulate(student, where)), standardise_logits(accumulate(teacher, where))
    return kd_loss(s, t, temperature=temperature, where=where)


def _target_split(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log p_y [b], log (1 - p_y) [b], log softmax over the other classes [b, C]), in log space throughout."""
    others = jnp.where(target, jnp.finfo(logits.dtype).min, logits)
    log_all = jax.nn.logsumexp(logits, axis=-1)
    log_y = jnp.sum(jnp.where(target, logits, 0.0), axis=-1) - log_all
    return log_y, jax.nn.logsumexp(others, axis=-1) - log_all, jax.nn.log_softmax(others, axis=-1)


def dkd_terms(
    student: jax.Array,
    teacher: jax.Array,
    label: jax.Array,
    *,
    temperature: float = 4.0,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Target-class and non-target-class terms of decoupled distillation, per example, `T^2` included.

    Args:
      student: [b, C] float logits, C >= 2.
      teacher: [b, C] float logits; no gradient flows into them.
      label: [b] int32; anything in masked rows.
      temperature: T > 0.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      (TCKD [b], NCKD [b]) with `KD = TCKD + (1 - p_t,y) NCKD`; NCKD is 0 for two classes.

    Raises:
      ValueError: if the shapes differ or there is only one class.
    """
    require_same_shape("dkd_loss", student, teacher)
    if student.shape[-1] < 2:
        raise ValueError(f"dkd_loss splits the classes and needs C >= 2, got logits of shape {student.shape}")
    s = accumulate(student, where) / temperature
    t = jax.lax.stop_gradient(accumulate(teacher, where)) / temperature
    label = label if where is None else jnp.where(where, label, 0)
    target = jax.nn.one_hot(label, s.shape[-1], dtype=bool)
    (s_y, s_rest, s_others), (t_y, t_rest, t_others) = _target_split(s, target), _target_split(t, target)
    binary = jnp.exp(t_y) * (t_y - s_y) + jnp.exp(t_rest) * (t_rest - s_rest)
    entries = jnp.where(target, 0.0, jnp.exp(t_others) * (t_others - s_others))
    scale = temperature**2
    return keep(scale * binary, where), keep(scale * jnp.sum(entries, axis=-1), where)


def dkd_loss(
    student: jax.Array,
    teacher: jax.Array,
    label: jax.Array,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Decoupled distillation `alpha TCKD + beta NCKD` (Zhao et al., arXiv 2203.08679), per example.

    The published ramp over 20 epochs is a weight schedule of the caller. Args and Raises as in `dkd_terms`.

    Returns:
      [b] float32 (float64 for float64 logits), nats.
    """
    binary, others = dkd_terms(student, teacher, label, temperature=temperature, where=where)
    return alpha * binary + beta * others


def _pearson(a: jax.Array, b: jax.Array, mask: jax.Array, axis: int) -> jax.Array:
    """Correlation of a and b along `axis` over `mask` ([b, C] bool); 0, without gradient, if one is constant."""
    n = jnp.maximum(jnp.sum(mask, axis=axis, keepdims=True), 1).astype(a.dtype)

    def centred(x: jax.Array) -> jax.Array:
        return jnp.where(mask, x - jnp.sum(jnp.where(mask, x, 0.0), axis=axis, keepdims=True) / n, 0.0)

    a, b = centred(a), centred(b)
    norms = safe_norm(a, axis) * safe_norm(b, axis)
    # Below the epsilon the quotient is rounding noise, with a gradient of 1e8.
    regular = norms > _PEARSON_EPS
    inner = jnp.sum(a * b, axis=axis, keepdims=True)
    return jnp.where(regular, inner / (jnp.where(regular, norms, 1.0) + _PEARSON_EPS), 0.0).squeeze(axis)


def dist_terms(
    student: jax.Array, teacher: jax.Array, *, temperature: float = 1.0, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Inter-class and intra-class terms of DIST, without the factor `tau^2`.

    Args:
      student: [b, C] float logits (dense predictions: flatten to pixels x classes).
      teacher: [b, C] float logits; no gradient flows into them.
      temperature: tau > 0.
      where: [b] bool, valid rows.

    Returns:
      (1 - correlation over classes, per example [b], 0 in masked rows; 1 - mean over classes of the correlation over
      examples [], which couples the batch).

    Raises:
      ValueError: if the shapes differ or b < 2.
    """
    require_same_shape("dist_loss", student, teacher)
    if student.shape[0] < 2:
        raise ValueError(f"dist_loss correlates over the batch and needs b >= 2, got b = {student.shape[0]}")
    p = jax.nn.softmax(accumulate(student, where) / temperature, axis=-1)
    q = jax.nn.softmax(jax.lax.stop_gradient(accumulate(teacher, where)) / temperature, axis=-1)
    mask = jnp.broadcast_to(valid_rows(student, where)[:, None], p.shape)
    inter = keep(1.0 - _pearson(p, q, mask, axis=1), where)
    return inter, 1.0 - jnp.mean(_pearson(p, q, mask, axis=0))


def dist_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """DIST, `tau^2 (beta inter + gamma intra)` (Huang et al., arXiv 2205.10536). Args and Raises as in `dist_terms`.

    Returns:
      [] float32 (float64 for float64 logits) in [0, 2 (beta + gamma) tau^2], coupling the whole batch.
    """
    inter, intra = dist_terms(student, teacher, temperature=temperature, where=where)
    return temperature**2 * (beta * masked_mean(inter, where) + gamma * intra)


def generalised_distillation_loss(
    student: jax.Array,
    teacher: jax.Array,
    label: jax.Array,
    *,
    imitation: float = 0.5,
    temperature: float = 2.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """`(1 - lambda) CE(y, s) + lambda CE(softmax(t / T), s)` per example (Lopez-Paz et al., arXiv 1511.03643).

    For a teacher trained on privileged inputs. The student is not tempered and there is no `T^2`.

    Args:
      student: [b, C] float logits.
      teacher: [b, C] float logits; no gradient flows into them.
      label: [b] int32; anything in masked rows.
      imitation: lambda in [0, 1]; 0 is plain training.
      temperature: T > 0 of the teacher.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 logits), nats.

    Raises:
      ValueError: if the shapes differ.
    """
    require_same_shape("generalised_distillation_loss", student, teacher)
    log_q = jax.nn.log_softmax(accumulate(student, where), axis=-1)
    target = jax.nn.softmax(jax.lax.stop_gradient(accumulate(teacher, where)) / temperature, axis=-1)
    soft = keep(-jnp.sum(target * log_q, axis=-1), where)
    return (1.0 - imitation) * cross_entropy(student, label, where=where) + imitation * soft
