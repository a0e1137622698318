"""Moment matching between two sets of embeddings of the same batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, count, matmul, require_batch, valid_rows


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
