"""Moment matching between two sets of embeddings of the same batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, count, matmul, require_batch, safe_norm, valid_rows


def mean_covariance(x: jax.Array, where: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Column mean and unbiased covariance of the valid rows.

    Args:
      x: [b, d] float.
      where: [b] bool, valid rows.

    Returns:
      (mean [d], covariance [d, d]) in float32 (float64 for float64 input); the covariance of one row is 0.
    """
    mask = valid_rows(x, where)
    x = accumulate(x, where)
    mean = jnp.sum(x, axis=0) / count(mask, x.dtype)
    centred = jnp.where(mask[:, None], x - mean[None, :], 0.0)
    return mean, matmul(centred.T, centred) / (count(mask, x.dtype, at_least=2) - 1.0)


def coral_loss(a: jax.Array, b: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Mean-plus-covariance alignment of MKD (section 5.2), the DomainBed variant of Deep CORAL.

    `|mu_a - mu_b|^2 / d + |Cov_a - Cov_b|_F^2 / d^2`. The classic CORAL differs: constant
    1 / (4 d^2) and no mean term.

    Args:
      a: [b, d] float embeddings.
      b: [b, d] float embeddings of the same examples.
      where: [b] bool, valid rows. With fewer than two of them (known only at run time) the covariance term is 0.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch.

    Raises:
      ValueError: if b < 2 or the shapes disagree.
    """
    require_batch("coral_loss", a, b, same_width=True)
    mean_a, cov_a = mean_covariance(a, where)
    mean_b, cov_b = mean_covariance(b, where)
    return jnp.mean((mean_a - mean_b) ** 2) + jnp.mean((cov_a - cov_b) ** 2)


def classic_coral_loss(student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Deep CORAL (arXiv 1607.01719), `|Cov_s - Cov_t|_F^2 / (4 d^2)`; `coral_loss` is another variant.

    Args:
      student: [b, d] float.
      teacher: [b, d] float.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch, invariant to translation of either side.

    Raises:
      ValueError: if b < 2 or the shapes disagree.
    """
    require_batch("classic_coral_loss", student, teacher, same_width=True)
    difference = mean_covariance(student, where)[1] - mean_covariance(teacher, where)[1]
    return jnp.mean(difference**2) / 4.0


def cmd_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    order: int = 5,
    value_range: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Central moment discrepancy (arXiv 1702.08811).

    `|m_s - m_t| / r + sum_{k=2..K} |c_k(s) - c_k(t)| / r^k` with c_k the k-th central moment of every dimension. Made
    for bounded activations.

    Args:
      student: [b, d] float.
      teacher: [b, d] float.
      order: K >= 1.
      value_range: r, the width of the range of values.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch; translation changes the first part only.

    Raises:
      ValueError: if b < 2 or the shapes disagree.
    """
    require_batch("cmd_loss", student, teacher, same_width=True)
    mask = valid_rows(student, where)[:, None]

    def moments(x: jax.Array) -> list[jax.Array]:
        x = accumulate(x, where)
        n = count(mask, x.dtype)
        mean = jnp.sum(x, axis=0) / n
        centred = jnp.where(mask, x - mean[None, :], 0.0)
        return [mean, *(jnp.sum(centred**k, axis=0) / n for k in range(2, order + 1))]

    pairs = zip(moments(student), moments(teacher))
    return sum(safe_norm(s - t)[0] / value_range**k for k, (s, t) in enumerate(pairs, start=1))
