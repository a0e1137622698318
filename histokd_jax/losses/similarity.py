"""Similarity-preserving distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, count, matmul, require_batch, unit, valid_rows


def _unit_gram(x: jax.Array) -> jax.Array:
    """Gram matrix [b, b] of the rows of `x` with each row scaled to unit length."""
    return unit(matmul(x, x.T))


def sp_loss(a: jax.Array, b: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Similarity-preserving loss (Tung and Mori, ICCV 2019; MKD section 5.3).

    `|G_a - G_b|_F^2 / b^2` with G the Gram matrix whose rows are divided by their own L2 norm. Symmetric, invariant to
    an orthogonal map or a common scale of either side, at most 4 / b. No stop-gradient inside.

    Args:
      a: [b, d_a] float embeddings.
      b: [b, d_b] float embeddings of the same examples; the widths may differ.
      where: [b] bool, valid rows; b counts these only.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch.

    Raises:
      ValueError: if b < 2 or the batch sizes differ.
    """
    require_batch("sp_loss", a, b)
    difference = _unit_gram(accumulate(a, where)) - _unit_gram(accumulate(b, where))
    n = count(valid_rows(a, where), difference.dtype)
    return jnp.sum(difference**2) / n**2
