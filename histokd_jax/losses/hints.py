"""Feature hints, one example at a time: FitNet, attention transfer, VID, SRRL, cosine, SRD."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import (
    accumulate,
    keep,
    masked_mean,
    per_example_mean,
    require_maps,
    require_same_shape,
    safe_norm,
    unit,
)
from histokd_jax.losses.maps import flat, matched

CODE, PAPER = "code", "paper"
_VARIANCE_FLOOR = 1e-5


def hint_errors(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Mean squared difference of every example: FitNet behind its regressor, and supervision transfer.

    Between the modalities of a pair this is supervision transfer (arXiv 1507.00448), which cross-modal papers also
    call CMD.

    Args:
      student: [b, ...] float.
      teacher: [b, ...] float of the same shape.
      where: [b] bool, valid rows; others return exactly 0 with zero gradient.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ, because the identity regressor is then not defined.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"fitnet_loss uses the identity regressor and needs equal shapes, got {student.shape} and {teacher.shape}: "
            "put a connector on the student"
        )
    return per_example_mean((accumulate(student, where) - accumulate(teacher, where)) ** 2)


def fitnet_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """FitNet hint loss (Romero et al., arXiv 1412.6550) with the identity regressor: mean of `hint_errors`.

    Args:
      student: [b, ...] float.
      teacher: [b, ...] float of the same shape.
      where: [b] bool, valid rows; the mean runs over all elements of these.

    Returns:
      [] float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ.
    """
    return masked_mean(hint_errors(student, teacher, where=where), where)


def attention_errors(
    student: jax.Array,
    teacher: jax.Array,
    *,
    power: int = 2,
    form: str = CODE,
    where: jax.Array | None = None,
) -> jax.Array:
    """Attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928) of one layer, per example.

    The map of an example is the channel mean of `F ** power`, flattened and scaled to unit length. `code`
    (RepDistiller): mean over positions of the squared difference; `paper`: its unsquared L2 norm.

    Args:
      student: [b, C_s, ...] float; the larger map is average-pooled to the smaller.
      teacher: [b, C_t, ...] float with as many position axes.
      power: even.
      form: "code" or "paper".
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input), with `code` and power 2 in [0, 2 / positions].

    Raises:
      ValueError: if the axes disagree, fewer than two positions are left (the loss of a pooled vector is identically
        0), or the form is unknown.
    """
    if form not in (CODE, PAPER):
        raise ValueError(f"form {form!r} of attention transfer is unknown; use {CODE!r} or {PAPER!r}")
    if student.ndim != teacher.ndim or math.prod(map(min, student.shape[2:], teacher.shape[2:])) < 2:
        raise ValueError(
            f"at_loss compares maps over the same >= 2 positions, got shapes {student.shape} and {teacher.shape}; "
            "on a pooled vector it is identically zero"
        )
    s, t = matched(accumulate(student, where), accumulate(teacher, where))

    def attention(x: jax.Array) -> jax.Array:
        energy = jnp.mean(flat(x) ** power, axis=1)
        return unit(energy)

    difference = attention(s) - attention(t)
    if form == PAPER:
        return safe_norm(difference)[:, 0]
    return jnp.mean(difference**2, axis=-1)


def at_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    power: int = 2,
    form: str = CODE,
    where: jax.Array | None = None,
) -> jax.Array:
    """Mean over valid examples of `attention_errors`; Args and Raises as there.

    Returns:
      [] float32 (float64 for float64 input).
    """
    return masked_mean(attention_errors(student, teacher, power=power, form=form, where=where), where)


def vid_rho(variance: float = 5.0) -> float:
    """The parameter of `vid_loss` at which the variance is `variance`: 4.9932... for 5."""
    return math.log(math.expm1(variance - _VARIANCE_FLOOR))


def vid_loss(student: jax.Array, teacher: jax.Array, rho: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Variational information distillation (Ahn et al., arXiv 1904.05835) of one layer, per example.

    Mean over elements of `0.5 ((m - F_t)^2 / v + log v)`, `v = softplus(rho) + 1e-5`. Can be negative; for fixed
    residuals the optimum of v is the mean squared residual of its channel.

    Args:
      student: [b, C, ...] float, behind the regressor m.
      teacher: [b, C, ...] float of the same shape.
      rho: [C] float parameter of the variance of every teacher channel, `vid_rho()` at first; without weight decay.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: if the channels or the axes differ.
    """
    require_maps("vid_loss", student, teacher, same_channels=True)
    s, t = matched(accumulate(student, where), accumulate(teacher, where))
    if rho.shape != s.shape[1:2]:
        raise ValueError(f"vid_loss needs one variance parameter per channel, [{s.shape[1]}], got {rho.shape}")
    variance = (jax.nn.softplus(accumulate(rho)) + _VARIANCE_FLOOR)[None, :, None]
    return keep(per_example_mean(0.5 * ((flat(s) - flat(t)) ** 2 / variance + jnp.log(variance))), where)


def cosine_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """`1 - cos(f_s, f_t)` per example, in [0, 2], invariant to positive scale.

    Args:
      student: [b, d] float.
      teacher: [b, d] float.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ.
    """
    require_same_shape("cosine_loss", student, teacher)
    cosine = jnp.sum(unit(accumulate(student, where)) * unit(accumulate(teacher, where)), axis=-1)
    return keep(1.0 - cosine, where)


def srrl_loss(
    student: jax.Array,
    teacher: jax.Array,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    weight: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Softmax regression representation learning (Yang et al., ICLR 2021), per example.

    `mean (f_s - f_t)^2 + weight mean (head_t(f_s) - t)^2`: the second part pushes the student's features through the
    frozen classifier of the teacher.

    Args:
      student: [b, d] float, pooled, behind the connector.
      teacher: [b, d] float, pooled.
      student_logits: [b, C] float, the teacher's head applied to `student`.
      teacher_logits: [b, C] float.
      weight: of the second part.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ.
    """
    require_same_shape("srrl_loss", student, teacher)
    require_same_shape("srrl_loss", student_logits, teacher_logits)
    features = hint_errors(student, teacher, where=where)
    return features + weight * hint_errors(student_logits, teacher_logits, where=where)


def srd_loss(
    student: jax.Array, teacher: jax.Array, *, power: float = 4.0, where: jax.Array | None = None
) -> jax.Array:
    """Feature part of SRD (Miles and Mikolajczyk, arXiv 2303.11098): `2 log sum |e_s - e_t|^power`.

    The features come from a batch-normalised linear projector; the KL part is `kd_loss`. The sum is kept above 1e-12,
    below which there is no gradient.

    Args:
      student: [b, d] float.
      teacher: [b, d] float.
      power: exponent, > 1.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input); a logarithm of a sum over the batch, so not a mean of per-example terms.

    Raises:
      ValueError: if the shapes differ.
    """
    require_same_shape("srd_loss", student, teacher)
    size = jnp.abs(accumulate(student, where) - accumulate(teacher, where))
    return 2.0 * jnp.log(jnp.maximum(jnp.sum(size**power), 1e-12))
