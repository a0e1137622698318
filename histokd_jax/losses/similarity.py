"""Similarity-preserving distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import absolute, accumulate, count, matmul, require_batch, unit, valid_rows

L1, L2 = "l1", "l2"


def _unit_gram(x: jax.Array, norm: str) -> jax.Array:
    """Gram matrix [b, b] of the rows of `x` with each row scaled to unit length."""
    gram = matmul(x, x.T)
    if norm == L2:
        return unit(gram)
    total = jnp.sum(absolute(gram), axis=-1, keepdims=True)
    return jnp.where(total > 1e-12, gram / jnp.where(total > 1e-12, total, 1.0), 0.0)


def sp_loss(a: jax.Array, b: jax.Array, *, norm: str = L2, where: jax.Array | None = None) -> jax.Array:
    """Similarity-preserving loss (Tung and Mori, ICCV 2019; MKD section 5.3).

    `|G_a - G_b|_F^2 / b^2` with G the Gram matrix whose rows are divided by their own L2 norm. Symmetric, invariant to
    an orthogonal map or a common scale of either side, at most 4 / b. No stop-gradient inside.

    Args:
      a: [b, d_a] float embeddings.
      b: [b, d_b] float embeddings of the same examples; the widths may differ.
      norm: "l2", or "l1": the rows of torchdistill's version, another loss.
      where: [b] bool, valid rows; b counts these only.

    Returns:
      [] float32 (float64 for float64 input), coupling the whole batch.

    Raises:
      ValueError: if b < 2, the batch sizes differ or the norm is unknown.
    """
    require_batch("sp_loss", a, b)
    if norm not in (L1, L2):
        raise ValueError(f"norm {norm!r} of sp_loss is unknown; use {L2!r} or {L1!r}")
    difference = _unit_gram(accumulate(a, where), norm) - _unit_gram(accumulate(b, where), norm)
    n = count(valid_rows(a, where), difference.dtype)
    return jnp.sum(difference**2) / n**2
